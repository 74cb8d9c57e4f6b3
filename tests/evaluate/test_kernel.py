"""KID is the unbiased estimate over every pair, and its error that of groups really left out."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.evaluate.jackknife import error_of
from pipeline.evaluate.kernel import kid_of_groups


def mmd(real: NDArray[np.float64], gen: NDArray[np.float64]) -> float:
    """One pair at a time."""

    def mean(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        pairs = [(x, y) for i, x in enumerate(one) for j, y in enumerate(other) if one is not other or i != j]
        return float(np.mean([(x @ y / len(x) + 1) ** 3 for x, y in pairs]))

    return mean(real, real) + mean(gen, gen) - 2 * mean(real, gen)


def test_it_is_the_mean_over_every_pair_and_its_error_from_groups_left_out() -> None:
    chance = np.random.default_rng(0)
    real = [chance.normal(size=(size, 3)) for size in (5, 7, 4)]
    gen = [chance.normal(size=(size, 3)) + 0.5 for size in (6, 3)]
    found = kid_of_groups(real, gen)
    assert found.value == pytest.approx(mmd(np.concatenate(real), np.concatenate(gen)), rel=1e-9)
    of_real = [mmd(np.concatenate(real[:i] + real[i + 1 :]), np.concatenate(gen)) for i in range(3)]
    of_gen = [mmd(np.concatenate(real), gen[1 - i]) for i in range(2)]
    assert found.error == pytest.approx(np.hypot(error_of(of_real), error_of(of_gen)), rel=1e-9)


def test_two_draws_of_one_kind_differ_by_nothing_on_average() -> None:
    """Unbiased: values of both signs, whose mean lies within three of its errors."""
    chance = np.random.default_rng(1)
    values = [kid_of_groups(*(np.split(chance.normal(size=(60, 4)), 6) for _ in "12")).value for _ in range(100)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 3 * np.std(values) / 10
