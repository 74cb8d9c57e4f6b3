"""What can be wrong with a set of images, done to real ones on purpose: the anchors that a number is read by."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pipeline import philox
from pipeline.images import Pixels

REPEATED = 10
_NOISE = 20.0


def blurred(pixels: Pixels, numbers: NDArray[np.int64]) -> Pixels:  # noqa: ARG001 - as all changes are called
    """uint8 [N, R, R, C], each pixel the mean of 3 x 3, the edge repeated."""
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32)
    mean = functional.avg_pool2d(functional.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return np.ascontiguousarray(mean.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def noisy(pixels: Pixels, numbers: NDArray[np.int64]) -> Pixels:
    """uint8 [N, R, R, C] with normal noise of 20 levels, by the samples' numbers."""
    noise = philox.normals(philox.stream_key(0, "evaluate/noise"), numbers, int(np.prod(pixels.shape[1:])))
    levels = pixels + _NOISE * noise.reshape(pixels.shape)
    return levels.round().clip(0, 255).astype(np.uint8)


CHANGES = {"blurred": blurred, "noisy": noisy}
"""Of pixels, by name, for samples with these numbers."""


def without_class(labels: NDArray[np.int64], missing: int) -> NDArray[np.int64]:
    """Rows in which no sample of one class is left: those of the others, of which there are some, are taken again in
    its place.
    """
    kept = np.flatnonzero(labels != missing)
    assert len(kept)
    return np.resize(kept, len(labels))


def repeated(count: int) -> NDArray[np.int64]:
    """Rows in which the first ten samples stand again and again."""
    return np.arange(count, dtype=np.int64) % REPEATED
