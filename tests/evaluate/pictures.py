"""Pictures for the tests of evaluation: soft blobs, alike and yet all different."""

import numpy as np
from numpy.typing import NDArray

from pipeline.images import Pixels


def pictures(count: int, seed: int, side: int = 32) -> Pixels:
    """uint8 [count, side, side, 1]: three blobs of any place, size and brightness, with a little grain."""
    chance = np.random.default_rng(seed)
    image = sum(_blob(chance, count, side, (0.2, 0.8), (0.2, 0.8)) for _ in range(3))
    return _stored(chance, image)


def labelled(count: int, seed: int, num_classes: int = 4, side: int = 32) -> tuple[Pixels, NDArray[np.int64]]:
    """Pictures uint8 [count, side, side, 1] of one blob, whose height in the picture says its class, and labels."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(num_classes, size=count)
    low = (labels + 0.3) / num_classes
    image = _blob(chance, count, side, (low, low + 0.4 / num_classes), (0.2, 0.8))
    stripes = np.where(np.arange(side) % 2, 1.0, 0.4)  # so that there is something to blur
    return _stored(chance, image * stripes), labels


def _blob(chance: np.random.Generator, count: int, side: int, down: object, right: object) -> NDArray[np.float64]:
    y, x = np.mgrid[0:side, 0:side] / side
    place_y, place_x, size, bright = (
        chance.uniform(*bound, count)[:, None, None]  # type: ignore[misc]
        for bound in (down, right, (0.08, 0.3), (60, 160))
    )
    return bright * np.exp(-((y - place_y) ** 2 + (x - place_x) ** 2) / (2 * size**2))


def _stored(chance: np.random.Generator, image: NDArray[np.float64]) -> Pixels:
    return (image + chance.normal(scale=4, size=image.shape)).clip(0, 255).astype(np.uint8)[..., None]
