"""Each defect moves the metrics the way it should, and a metric's error is that of groups left out."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.evaluate import defects
from pipeline.evaluate.classifier import Classifier, Recipe, train_classifier
from pipeline.evaluate.metrics import Described, compare, inception_score, of_classes, of_groups
from pipeline.images import Pixels
from tests.evaluate.pictures import labelled

COUNT = 800


@pytest.fixture(scope="module")
def network() -> Classifier:
    return train_classifier(*labelled(2000, seed=0), 4, Recipe(steps=60))


def describe(network: Classifier, pixels: Pixels, labels: NDArray[np.int64]) -> Described:
    with torch.no_grad():
        features = network.features(torch.from_numpy(pixels))
        return Described(features=features.numpy(), logits=network.last(features).numpy(), labels=labels)


def test_each_defect_moves_the_metrics_as_it_should(network: Classifier) -> None:
    reference = describe(network, *labelled(COUNT, seed=1))
    pixels, labels = labelled(COUNT, seed=2)
    clean = describe(network, pixels, labels)
    found = {
        "clean": compare(reference, clean),
        "blurred": compare(reference, describe(network, defects.blurred(pixels, np.arange(len(pixels))), labels)),
        "noisy": compare(reference, describe(network, defects.noisy(pixels, np.arange(COUNT)), labels)),
        "class missing": compare(reference, clean.of(defects.without_class(labels, 2))),
        "repeated": compare(reference, clean.of(defects.repeated(COUNT))),
    }
    value = {(name, metric): one.value for name, of in found.items() for metric, one in of.items()}
    for name, of in found.items():
        print(f"{name:15}", *(f"{metric} {one.value:.4f} ± {one.error:.4f}" for metric, one in of.items()))
    for defect in ("blurred", "noisy", "class missing", "repeated"):
        assert value[defect, "fid"] > 3 * value["clean", "fid"]
        assert value[defect, "kid"] > value["clean", "kid"] + 3 * found["clean"]["kid"].error
    for metric in ("recall", "coverage"):
        assert value["class missing", metric] < value["clean", metric] - 0.1
        assert value["repeated", metric] < 0.2 * value["clean", metric]
    assert value["noisy", "precision"] < value["clean", "precision"]
    assert value["class missing", "inception_score"] < value["clean", "inception_score"] - 0.5
    assert found["clean"]["precision"].error < 0.05


def test_classes_are_compared_each_with_its_own(network: Classifier) -> None:
    reference = describe(network, *labelled(COUNT, seed=1))
    pixels, labels = labelled(COUNT, seed=2)
    noise = np.where((labels == 3)[:, None, None, None], defects.noisy(pixels, np.arange(COUNT)), pixels)
    few = np.flatnonzero((labels != 0) | (np.arange(COUNT) < 40))  # ten of class 0
    pairs = of_classes([reference, describe(network, noise, labels).of(few)], 4)
    found = {label: compare(*pair) for label, pair in pairs.items()}
    assert list(found) == [1, 2, 3]
    assert found[3]["fid"].value > 3 * max(found[label]["fid"].value for label in (1, 2))


def test_inception_score_lies_between_one_and_the_number_of_classes() -> None:
    assert inception_score(np.zeros((8, 4))) == pytest.approx(1.0)
    assert inception_score(np.tile([50.0, 0, 0, 0], (8, 1))) == pytest.approx(1.0)
    assert inception_score(np.eye(4).repeat(2, axis=0) * 1000) == pytest.approx(4.0)
    half = np.log([[0.5, 0.5], [1.0, 1e-300]])
    wanted = np.exp((0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25) + np.log(1 / 0.75)) / 2)
    assert inception_score(half) == pytest.approx(wanted)


def test_the_error_of_a_mean_is_the_known_one() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    found = of_groups(np.array_split(values, 50), lambda some: float(some.mean()))
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std() / np.sqrt(5000), rel=0.3)


def test_defects_keep_shape_and_type() -> None:
    pixels, labels = labelled(12, seed=0)
    for changed in (defects.blurred(pixels, np.arange(len(pixels))), defects.noisy(pixels, np.arange(12))):
        assert changed.shape == pixels.shape
        assert changed.dtype == np.uint8
        assert not np.array_equal(changed, pixels)
    flat = np.full((1, 8, 8, 3), 77, np.uint8)
    assert np.array_equal(defects.blurred(flat, np.arange(1)), flat)
    assert np.array_equal(defects.noisy(pixels, np.arange(12))[5:6], defects.noisy(pixels[5:6], np.arange(5, 6)))
    kept = labels[defects.without_class(labels, 1)]
    assert len(kept) == 12
    assert set(kept) == {0, 2, 3}
