"""Utility says what synthetic images are worth: like real ones, worth nothing, or all but one class."""

import numpy as np
import pytest

from pipeline.evaluate.ray_utility import utility as by_tasks
from pipeline.evaluate.utility import ARMS, Accuracy, Labelled, accuracy, told_right, worth
from tests.evaluate.pictures import labelled

STEPS = 40


def some(count: int, seed: int) -> Labelled:
    pixels, labels = labelled(count, seed)
    return Labelled(pixels=pixels, labels=labels)


def without_class(images: Labelled, label: int) -> Labelled:
    kept = images.labels != label
    return Labelled(pixels=images.pixels[kept], labels=images.labels[kept])


def shuffled(images: Labelled) -> Labelled:
    return Labelled(pixels=images.pixels, labels=np.random.default_rng(0).permutation(images.labels))


def utility(real: Labelled, gen: Labelled, test: Labelled) -> dict[str, Accuracy]:
    """With one seed, in this process."""
    right = {name: told_right(arm, real, gen, test, 4, STEPS, seed=0) for name, arm in ARMS.items()}
    return {name: accuracy([hits], test.labels, 4) for name, hits in right.items()}


@pytest.mark.usefixtures("ray_session")
def test_what_good_images_are_worth() -> None:
    real, test, told = some(1500, 0), some(800, 1), list[int]()
    good = by_tasks(real, some(1500, 2), test, 4, steps=STEPS, seeds=[0, 1], on_progress=told.append)
    assert list(good) == ["real", "real + flips", "synthetic", "both"]
    assert told == [STEPS] * 8
    for arm in good.values():
        assert arm.mean > 0.9
        assert len(arm.of_seeds) == 2
        assert len(arm.of_classes) == 4
    assert worth(good, 4) == pytest.approx(1.0, abs=0.1)
    assert good["real"].of_seeds[0] != good["real"].of_seeds[1]


def test_what_bad_images_are_worth() -> None:
    real, test = some(1500, 0), some(800, 1)
    bad = utility(real, shuffled(some(1500, 2)), test)
    assert bad["real"].mean > 0.9
    assert bad["synthetic"].mean < 0.5
    assert worth(bad, 4) < 0.4
    partial = utility(real, without_class(some(1500, 2), 2), test)["synthetic"]
    assert partial.of_classes[2] == 0
    assert min(one for one in partial.of_classes[:2] if one is not None) > 0.8


def test_each_arm_learns_from_what_it_names() -> None:
    """Real images of the first two classes, generated ones of the others."""
    images, test = some(1500, 0), some(800, 1)
    low = images.labels < 2
    real, gen = (Labelled(pixels=images.pixels[rows], labels=images.labels[rows]) for rows in (low, ~low))
    found = utility(real, gen, test)
    shares = {name: [round(one or 0.0) for one in arm.of_classes] for name, arm in found.items()}
    assert shares == {"real": [1, 1, 0, 0], "real + flips": [1, 1, 0, 0], "synthetic": [0, 0, 1, 1], "both": [1] * 4}


def test_a_class_that_no_test_image_shows_has_no_accuracy() -> None:
    images = without_class(some(100, 0), 1)
    found = accuracy([images.labels == 0, images.labels >= 0], images.labels, 4)
    assert found.of_classes == (1.0, None, 0.5, 0.5)
    assert found.balanced == pytest.approx(2 / 3)


def test_where_real_images_teach_nothing_nothing_is_known_of_others() -> None:
    def of(right: float) -> Accuracy:
        return Accuracy(of_seeds=(right,), of_classes=(right,) * 4)

    assert worth({"real": of(0.251), "synthetic": of(0.9)}, 4) == 0.0
    assert worth({"real": of(0.1), "synthetic": of(0.9)}, 4) == 0.0
    assert worth({"real": of(0.75), "synthetic": of(0.5)}, 4) == pytest.approx(0.5)


def test_mean_and_spread_are_over_seeds() -> None:
    one = Accuracy(of_seeds=(0.8, 0.9), of_classes=(0.85,))
    assert one.mean == pytest.approx(0.85)
    assert one.spread == pytest.approx(0.0707, abs=1e-4)
    assert Accuracy(of_seeds=(0.8,), of_classes=(0.8,)).spread == 0.0
