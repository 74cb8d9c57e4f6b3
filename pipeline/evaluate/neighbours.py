"""What lies near what: precision, recall, density and coverage, from distances taken block by block."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

_BLOCK_BYTES = 2**27
"""Of distances at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """What each sample says; the metrics are the means, over all or over a class."""

    precise: NDArray[np.bool_]
    """Whether a generated sample lies within the k-th neighbour of some real one; mean: precision."""
    density: NDArray[np.float64]
    """Within how many real ones' it lies, over k; mean: density."""
    recalled: NDArray[np.bool_]
    """Whether a real sample lies within the k-th neighbour of some generated one; mean: recall."""
    covered: NDArray[np.bool_]
    """Whether some generated sample lies within a real one's k-th neighbour; mean: coverage."""


def neighbourhood(real: NDArray[np.floating], gen: NDArray[np.floating], k: int = 5) -> Neighbourhood:
    """Of features [N, F] and [M, F], in their own precision, N and M above k.

    Precision and recall by Kynkäänniemi et al. 2019, density and coverage by Naeem et al. 2020. Memory is that of the
    features and of one block of distances; each distance between the sets is taken once.
    """
    assert min(len(real), len(gen)) > k
    centre = real.mean(axis=0)  # squares of large numbers would drown small differences
    real_t, gen_t = (torch.from_numpy(np.ascontiguousarray(side - centre)) for side in (real, gen))
    real_radius, gen_radius = (_squared_radius(side, k) for side in (real_t, gen_t))
    within = torch.zeros(len(gen_t), dtype=torch.int64)
    recalled = torch.zeros(len(real_t), dtype=torch.bool)
    nearest = torch.full((len(real_t),), torch.inf, dtype=real_t.dtype)
    for rows, squared in blocks(gen_t, real_t):
        recalled |= (squared < gen_radius[rows, None]).any(dim=0)
        nearest = torch.minimum(nearest, squared.amin(dim=0))
        within[rows] = squared.lt_(real_radius).sum(dim=1).long()  # in place: four times as fast as a sum of booleans
    return Neighbourhood(
        precise=(within > 0).numpy(),
        density=within.numpy() / k,
        recalled=recalled.numpy(),
        covered=(nearest < real_radius).numpy(),
    )


def _squared_radius(features: torch.Tensor, k: int) -> torch.Tensor:
    """The squared distance of each feature to its k-th nearest other, [N]."""
    radius = torch.empty(len(features), dtype=features.dtype)
    for rows, squared in blocks(features, features):
        nearest = squared.topk(k + 1, dim=1, largest=False, sorted=False).values  # itself among them
        radius[rows] = nearest.amax(dim=1)  # kthvalue would take five times as long
    return radius


def nearest(one: torch.Tensor, other: torch.Tensor, *, itself: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each feature of `one`, [N, F]: the squared distance to the nearest of `other`, [M, F], and which that is. With
    `itself` both are one set, and none is its own neighbour.
    """
    distance, place = torch.empty(len(one), dtype=one.dtype), torch.empty(len(one), dtype=torch.int64)
    for rows, squared in blocks(one, other):
        if itself:
            squared[torch.arange(len(squared)), torch.arange(rows.start, rows.stop)] = torch.inf
        place[rows] = squared.argmin(dim=1)
        # Anew, for those of copies would be what rounding leaves of the difference of large squares.
        distance[rows] = ((one[rows] - other[place[rows]]) ** 2).sum(dim=1)
    return distance, place


def blocks(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Squared distances of some rows of `one` to all of `other`: rows, [n, M]. The memory is used again."""
    lengths = (other**2).sum(dim=1)
    step = max(1, _BLOCK_BYTES // (len(other) * other.element_size()))
    memory = torch.empty((min(step, len(one)), len(other)), dtype=other.dtype)
    for start in range(0, len(one), step):
        part = one[start : start + step]
        squared = memory[: len(part)]
        torch.addmm(lengths, part, other.T, alpha=-2, out=squared)
        squared += (part**2).sum(dim=1, keepdim=True)
        yield slice(start, start + len(part)), squared.clamp_(min=0)
