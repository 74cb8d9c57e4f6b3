"""Utility says what synthetic images are worth: like real ones, worth nothing, or all but one class."""

import numpy as np
import pytest

from pipeline.evaluate.utility import Accuracy, Labelled, utility
from tests.evaluate.pictures import labelled


def some(count: int, seed: int) -> Labelled:
    pixels, labels = labelled(count, seed)
    return Labelled(pixels=pixels, labels=labels)


def without_class(images: Labelled, label: int) -> Labelled:
    kept = images.labels != label
    return Labelled(pixels=images.pixels[kept], labels=images.labels[kept])


def shuffled(images: Labelled) -> Labelled:
    return Labelled(pixels=images.pixels, labels=np.random.default_rng(0).permutation(images.labels))


def test_what_images_are_worth() -> None:
    real, test, steps, told = some(1500, 0), some(800, 1), 40, []
    good = utility(real, some(1500, 2), test, 4, steps=steps, seeds=[0, 1], on_progress=lambda *what: told.append(what))
    assert list(good) == ["real", "real + flips", "synthetic", "both"]
    assert [step for arm, step in told if arm == "both"] == [*range(1, 2 * steps + 1)]
    for arm in good.values():
        assert arm.mean > 0.9
        assert len(arm.of_seeds) == 2
        assert len(arm.of_classes) == 4
    bad = utility(real, shuffled(some(1500, 2)), test, 4, steps=steps, seeds=[0])
    assert bad["synthetic"].mean < 0.5
    assert bad["real"].of_seeds == good["real"].of_seeds[:1]
    partial = utility(real, without_class(some(1500, 2), 2), test, 4, steps=steps, seeds=[0])["synthetic"]
    assert partial.of_classes[2] == 0
    assert min(one for one in partial.of_classes[:2] if one is not None) > 0.8


def test_a_class_that_no_test_image_shows_has_no_accuracy() -> None:
    images = some(100, 0)
    found = utility(images, images, without_class(images, 1), 4, steps=1, seeds=[0])["real"]
    assert [one is None for one in found.of_classes] == [False, True, False, False]
    assert found.balanced == pytest.approx(np.mean([one for one in found.of_classes if one is not None]))


def test_mean_and_spread_are_over_seeds() -> None:
    one = Accuracy(of_seeds=(0.8, 0.9), of_classes=(0.85,))
    assert one.mean == pytest.approx(0.85)
    assert one.spread == pytest.approx(0.0707, abs=1e-4)
    assert Accuracy(of_seeds=(0.8,), of_classes=(0.8,)).spread == 0.0
