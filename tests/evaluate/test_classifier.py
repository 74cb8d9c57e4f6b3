"""The classifier learns, and is the same on every run."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate.classifier import (
    _BATCH,
    FEATURES,
    Classifier,
    Recipe,
    _batches,
    predicted,
    reduced,
    rotated,
    train_classifier,
)
from tests.evaluate.pictures import labelled


@given(st.integers(1, 700), st.integers(1, 12), st.integers(0, 5))
def test_each_image_comes_once_an_epoch(count: int, steps: int, seed: int) -> None:
    batches = list(_batches(count, Recipe(steps=steps, seed=seed)))
    assert [len(batch) for batch in batches] == [_BATCH] * steps
    rows = np.concatenate(batches)
    for start in range(0, len(rows) - count + 1, count):
        assert np.array_equal(np.sort(rows[start : start + count]), np.arange(count))


def test_it_learns_and_is_the_same_again() -> None:
    pixels, labels = labelled(2000, seed=0)
    heard: list[int] = []
    one, again = (train_classifier(pixels, labels, 4, Recipe(steps=60), heard.append) for _ in "12")
    assert heard == [*range(1, 61)] * 2
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    other = train_classifier(pixels, labels, 4, Recipe(steps=1, seed=1))
    assert not torch.equal(one.last.weight, other.last.weight)
    unseen, wanted = labelled(1000, seed=1)
    assert (predicted(one, unseen) == wanted).mean() > 0.9


_TRAIN = """
import numpy as np
from pipeline.evaluate.classifier import Recipe, train_classifier
for channels in (1, 3):
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, channels), dtype=np.uint8)
    train_classifier(pixels, np.arange(1000) % 10, 10, Recipe(steps=10))
"""


def test_it_is_trained_on_a_cpu_without_avx512() -> None:
    """Where a kernel of oneDNN overwrote what was not its own."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert subprocess.run([sys.executable, "-c", _TRAIN], env=environment, check=False).returncode == 0


def test_training_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train_classifier(*labelled(20, seed=0), 4, Recipe(steps=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (64, 3), (96, 1)])
def test_features_have_one_size(side: int, channels: int) -> None:
    network = Classifier(channels, 2).eval()
    pixels = torch.randint(0, 256, (3, side, side, channels), dtype=torch.uint8)
    with torch.no_grad():
        assert network.features(pixels).shape == (3, FEATURES)
        assert network(pixels).shape == (3, 2)


def test_flips_make_it_blind_to_sides() -> None:
    """Two classes that are each other's mirror image: without flips it tells them apart, with flips it cannot."""
    pixels, _ = labelled(1000, seed=0)
    left = pixels.copy()
    left[:, :, 16:] = 0
    both, labels = np.concatenate([left, left[:, :, ::-1]]), np.repeat([0, 1], 1000)
    sure, blind = (train_classifier(both, labels, 2, Recipe(steps=80, flip=flip)) for flip in (False, True))
    assert (predicted(sure, both) == labels).mean() > 0.95
    assert (predicted(blind, both) == labels).mean() < 0.7


def test_large_images_are_averaged_down() -> None:
    pixels = np.arange(2 * 128 * 128 * 3).reshape(2, 128, 128, 3).astype(np.uint8)
    found = reduced(pixels)
    assert found.shape == (2, 64, 64, 3)
    assert np.array_equal(found, pixels.reshape(2, 64, 2, 64, 2, 3).mean(axis=(2, 4)).round().astype(np.uint8))
    assert reduced(found) is found


def test_turned_images_say_by_how_much() -> None:
    pixels, _ = labelled(40, seed=0)
    turned, turns = rotated(pixels)
    assert set(turns) == {0, 1, 2, 3}
    for image, count, found in zip(pixels, turns, turned, strict=True):
        assert np.array_equal(np.rot90(image, count), found)


@pytest.mark.parametrize("steps", [1, 2, 9, 11])
def test_a_few_steps_are_enough_to_end(steps: int) -> None:
    train_classifier(*labelled(20, seed=0), 4, Recipe(steps=steps))
