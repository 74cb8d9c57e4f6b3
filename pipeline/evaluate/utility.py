"""What images are worth: how well a classifier that was trained on them does on real ones."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

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


def utility(
    real: Labelled,
    gen: Labelled,
    test: Labelled,
    num_classes: int,
    *,
    steps: int,
    seeds: Sequence[int],
    on_progress: Callable[[str, int], None] = lambda *_: None,
) -> Mapping[str, Accuracy]:
    """Accuracy by arm: trained on "real" images, "real + flips", "synthetic" ones, and on "both".

    Every arm takes as many steps, from the same first weights a seed, and is tested on the same real images, which none
    of them was trained on. `on_progress` hears the arm and the steps done in it.
    """
    both = Labelled(pixels=np.concatenate([real.pixels, gen.pixels]), labels=np.concatenate([real.labels, gen.labels]))
    arms = {"real": (real, False), "real + flips": (real, True), "synthetic": (gen, False), "both": (both, False)}
    result = {}
    for name, (images, flip) in arms.items():
        right = []
        for number, seed in enumerate(seeds):
            recipe = Recipe(steps=steps, seed=seed, flip=flip)

            def told(step: int, name: str = name, before: int = number * steps) -> None:
                on_progress(name, before + step)

            network = train_classifier(images.pixels, images.labels, num_classes, recipe, told)
            right.append(predicted(network, test.pixels) == test.labels)
        hits = np.mean(right, axis=0)
        shown = [test.labels == label for label in range(num_classes)]
        of_classes = tuple(float(hits[rows].mean()) if rows.any() else None for rows in shown)
        result[name] = Accuracy(of_seeds=tuple(float(hit.mean()) for hit in right), of_classes=of_classes)
    return result
