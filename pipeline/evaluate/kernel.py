"""KID: the maximum mean discrepancy of two sets of features, by a cubic kernel."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.jackknife import Estimate, error_of

Features = NDArray[np.floating]
Sums = NDArray[np.float64]


def kid_of_groups(real: Sequence[Features], gen: Sequence[Features]) -> Estimate:
    """The unbiased estimate from all features (Bińkowski et al. 2018, equation 4), and its standard error.

    Groups are [N, F]; each of either side is left out once, from sums between groups that are taken only once. Every
    pair of samples counts, where implementations that draw subsets leave most of them out.
    """
    sizes = [np.array([len(group) for group in side], np.float64) for side in (real, gen)]
    sums = _sums(real, real, itself=True), _sums(gen, gen, itself=True), _sums(real, gen)
    every = [np.ones(len(side), bool) for side in (real, gen)]

    def left_out(side: int, group: int) -> float:
        kept = [mask.copy() for mask in every]
        kept[side][group] = False
        return _mmd(sums, sizes, kept)

    errors = [error_of([left_out(side, group) for group in range(len(sizes[side]))]) for side in (0, 1)]
    return Estimate(value=_mmd(sums, sizes, every), error=math.hypot(*errors))


def _sums(one: Sequence[Features], other: Sequence[Features], *, itself: bool = False) -> Sums:
    """Of the kernel (x·y / F + 1)³ over all pairs between groups; with `itself` not of a feature with itself."""
    sums = np.zeros((len(one), len(other)))
    for row, x in enumerate(one):
        for column, y in enumerate(other):
            if itself and column < row:
                sums[row, column] = sums[column, row]
                continue
            inner = x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1
            values = inner * inner * inner  # numpy's power of three takes ten times as long
            sums[row, column] = values.sum() - (np.trace(values) if itself and row == column else 0.0)
    return sums


def _mmd(
    sums: tuple[Sums, Sums, Sums], sizes: Sequence[NDArray[np.float64]], kept: Sequence[NDArray[np.bool_]]
) -> float:
    m, n = (float(size[mask].sum()) for size, mask in zip(sizes, kept, strict=True))
    (real, gen, between), (in_real, in_gen) = sums, kept
    within = real[in_real][:, in_real].sum() / (m * (m - 1)) + gen[in_gen][:, in_gen].sum() / (n * (n - 1))
    return float(within - 2 * between[in_real][:, in_gen].sum() / (m * n))
