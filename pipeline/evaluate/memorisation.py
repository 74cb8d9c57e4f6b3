"""Whether generated images are copies: of the training images, or of each other."""

import dataclasses
import itertools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pipeline import philox
from pipeline.evaluate.neighbours import blocks, nearest
from pipeline.images import Pixels

TAIL = 1e-3
"""Share of held-out images that count as near to training."""
Small = NDArray[np.float32]

CANDIDATES = 32
"""Training images that shifted images are compared with."""

_SIDE, _AT_ONCE = 16, 1000
_SHIFTS = (*itertools.product((-1, 0, 1), repeat=2), (0, 2), (0, -2), (2, 0), (-2, 0))
"""In half pixels of the small images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Of each of N images, the nearest other."""

    distance: NDArray[np.float32]
    """Root mean square over pixels of [0, 255], [N]."""
    place: NDArray[np.int64]
    """Which it is, [N]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyTest:
    """Whether more generated images lie near to training images than images that were held out do."""

    limit: float
    """The distance under which a share of TAIL of the held-out images lies."""
    near: int
    """Generated images under it, and by chance at it."""
    near_held_out: int
    """Held-out images that it was taken from."""
    p_value: float
    """Of so many or more, if distances of generated images were like those of held-out ones."""


def shrunk(pixels: Pixels) -> Small:
    """uint8 [N, R, R, C] → float32 [N, 16, 16, C], or [N, R, R, C] if that is less: means of areas, which JPEG's losses
    and a pixel's shift change little. All that the functions below need of an image.
    """
    side = min(_SIDE, pixels.shape[1])
    small = np.empty((len(pixels), side, side, pixels.shape[3]), np.float32)
    for start in range(0, len(pixels), _AT_ONCE):
        image = torch.tensor(pixels[start : start + _AT_ONCE]).permute(0, 3, 1, 2).to(torch.float32)
        small[start : start + _AT_ONCE] = functional.adaptive_avg_pool2d(image, side).permute(0, 2, 3, 1).numpy()
    return small


def to_training(small: Small, training: Small) -> Neighbours:
    """The nearest of the training images, [M, S, S, C], to each of [N, S, S, C] as it is, mirrored, or shifted by
    up to one of S: what augmentation, or a copy that is to go unnoticed, would do.

    Shifts are tried against the CANDIDATES that look most alike at half the size, which a shift changes little.
    """
    known, images = torch.tensor(training), torch.tensor(small)
    best, place = torch.full((len(small),), torch.inf), torch.zeros(len(small), dtype=torch.int64)
    halves = _halved(known).flatten(1)
    for mirrored in (images, images.flip(2)):
        for rows, squared in blocks(_halved(mirrored).flatten(1), halves):
            alike = squared.topk(min(CANDIDATES, len(known)), dim=1, largest=False, sorted=False).indices
            distance, which = _nearest_shifted(mirrored[rows], known[alike])
            nearer = distance < best[rows]
            best[rows] = torch.where(nearer, distance, best[rows])
            place[rows] = torch.where(nearer, alike.gather(1, which[:, None])[:, 0], place[rows])
    return Neighbours(distance=_root(best, known), place=place.numpy())


def _nearest_shifted(images: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of images [n, S, S, C], over all shifts: the squared distance to the nearest of [n, K, S, S, C], and which."""
    shifted = torch.stack([_shifted(images, shift) for shift in _SHIFTS], dim=1).flatten(2)
    known = candidates.flatten(2)
    squared = torch.baddbmm((shifted**2).sum(dim=2)[:, :, None], shifted, known.mT, alpha=-2)
    squared += (known**2).sum(dim=2)[:, None]
    best, rows = squared.flatten(1).argmin(dim=1), torch.arange(len(images))
    shift, which = best // known.shape[1], best % known.shape[1]
    # Anew, for those of copies would be what rounding leaves of the difference of large squares.
    return ((shifted[rows, shift] - known[rows, which]) ** 2).sum(dim=1), which


def within(small: Small) -> Neighbours:
    """The nearest other image of the same set, [N, S, S, C], N ≥ 2."""
    vectors = torch.tensor(small).flatten(1)
    distance, place = nearest(vectors, vectors, itself=True)
    return Neighbours(distance=_root(distance, small), place=place.numpy())


def copy_test(gen: NDArray[np.float32], held_out: NDArray[np.float32]) -> CopyTest:
    """From the distances of equally many generated and held-out images to the same training images.

    The limit is the r-th smallest distance of n held-out images, r = n · TAIL or more. If both kinds were drawn alike,
    how many generated ones lie under it is negative hypergeometric: as many as are drawn before the r-th of the others,
    without putting back. A plain binomial would take the limit for known, and alarm too often. Equal distances, as of
    held-out images that are training images as well, are put in an order by chance, always the same.
    """
    assert len(gen) == len(held_out)
    n = len(held_out)
    r = _rank(n)
    chance = philox.uniforms(philox.stream_key(0, "evaluate/ties"), np.arange(2 * n), 1)[:, 0]
    distance = np.concatenate([held_out, gen])
    order = np.lexsort((chance, distance))
    last = np.flatnonzero(order < n)[r - 1]
    near = int(last) + 1 - r
    return CopyTest(limit=float(distance[order[last]]), near=near, near_held_out=r, p_value=_at_least(near, r, n))


def findable_share(n: int, p_value: float) -> float:
    """The smallest share of copies among n generated images that brings the test to this p-value, if the others lie as
    held-out ones do; 1 where that cannot be reached.
    """
    r = _rank(n)
    return next(((near - r) / n for near in range(r, n + 1) if _at_least(near, r, n) <= p_value), 1.0)


def _rank(n: int) -> int:
    """Which of n held-out distances, in ascending order, is the limit."""
    return max(1, math.ceil(n * TAIL))


def _at_least(near: int, r: int, n: int) -> float:
    """P(K ≥ near): K of n generated images come before the r-th of n held-out ones."""

    def log_choose(total: int, taken: int) -> float:
        return math.lgamma(total + 1) - math.lgamma(taken + 1) - math.lgamma(total - taken + 1)

    whole = log_choose(2 * n, n)
    below = sum(math.exp(log_choose(k + r - 1, k) + log_choose(2 * n - k - r, n - k) - whole) for k in range(near))
    return max(0.0, 1.0 - below)


def _shifted(images: torch.Tensor, halves: tuple[int, ...]) -> torch.Tensor:
    """[N, S, S, C] moved down and to the right by so many half pixels, the edge repeated."""
    for dim, moved in enumerate(halves, start=1):
        images = (_rolled(images, dim, moved // 2) + _rolled(images, dim, -(-moved // 2))) / 2
    return images


def _rolled(images: torch.Tensor, dim: int, moved: int) -> torch.Tensor:
    size = images.shape[dim]
    return images.index_select(dim, (torch.arange(size) - moved).clamp(0, size - 1))


def _halved(images: torch.Tensor) -> torch.Tensor:
    """[N, S, S, C] at half the size, by means."""
    return functional.avg_pool2d(images.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


def _root(squared: torch.Tensor, images: torch.Tensor | Small) -> NDArray[np.float32]:
    """Squared distances as root mean squares over an image's pixels."""
    return (squared / math.prod(images.shape[1:])).sqrt().numpy()
