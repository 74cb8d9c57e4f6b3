"""What images are worth: how well a classifier that was trained on them does on real ones."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.classifier import Recipe, predicted, train_classifier
from pipeline.images import Pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images with their classes."""

    pixels: Pixels
    """uint8 [N, R, R, C]."""
    labels: NDArray[np.int64]
    """[N]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """What a classifier is trained on."""

    real: bool = False
    """The real images."""
    gen: bool = False
    """The generated ones."""
    flip: bool = False
    """Each image mirrored or not, by chance."""


ARMS: Mapping[str, Arm] = {
    "real": Arm(real=True),
    "real + flips": Arm(real=True, flip=True),
    "synthetic": Arm(gen=True),
    "both": Arm(real=True, gen=True),
}
"""Every arm takes as many steps, from the same first weights a seed, and is tested on the same real images, which none
of them was trained on."""


LEAST = 0.02
"""Of accuracy above guessing that a classifier must reach on real images before others are measured by it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of one arm on the real test images, over its seeds."""

    of_seeds: tuple[float, ...]
    """Share that was right, a number a seed."""
    of_classes: tuple[float | None, ...]
    """The same of each class, the mean over seeds; None of one that no test image shows."""

    @property
    def balanced(self) -> float:
        """The mean over classes: a class counts as much as every other."""
        return float(np.mean([one for one in self.of_classes if one is not None]))

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.of_seeds))

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return float(np.std(self.of_seeds, ddof=1)) if len(self.of_seeds) > 1 else 0.0


def told_right(
    arm: Arm, real: Labelled, gen: Labelled, test: Labelled, num_classes: int, steps: int, seed: int
) -> NDArray[np.bool_]:
    """Train on an arm of real and generated images: whether each test image was told right, [M]."""
    taken = [images for images, is_taken in ((real, arm.real), (gen, arm.gen)) if is_taken]
    pixels, labels = (_together([getattr(one, name) for one in taken]) for name in ("pixels", "labels"))
    network = train_classifier(pixels, labels, num_classes, Recipe(steps=steps, seed=seed, flip=arm.flip))
    return np.asarray(predicted(network, test.pixels) == test.labels)


def _together(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def accuracy(right: Sequence[NDArray[np.bool_]], labels: NDArray[np.int64], num_classes: int) -> Accuracy:
    """From what each seed told right of test images with these labels."""
    hits = np.mean(right, axis=0)
    shown = [labels == label for label in range(num_classes)]
    return Accuracy(
        of_seeds=tuple(float(one.mean()) for one in right),
        of_classes=tuple(float(hits[rows].mean()) if rows.any() else None for rows in shown),
    )


def worth(arms: Mapping[str, Accuracy], num_classes: int) -> float:
    """What generated images teach of what real ones teach: accuracy over classes, counted from that of guessing. 0
    where real ones teach nothing either, less than LEAST: then nothing is known of the others.
    """
    chance = 1 / num_classes
    real = arms["real"].balanced - chance
    return (arms["synthetic"].balanced - chance) / real if real >= LEAST else 0.0
