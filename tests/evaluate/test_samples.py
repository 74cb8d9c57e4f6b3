"""Which samples are looked at depends on seed and count alone, and their pixels are those that are stored."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import images, storage
from pipeline.dataset.index import IndexReader
from pipeline.evaluate import samples
from pipeline.evaluate.samples import EvaluateError, Shape, chosen, read_all, read_samples
from tests.small import make_dataset, shape_image

SHAPE = Shape(resolution=16, channels=1)


@given(st.integers(1, 5000), st.integers(1, 6000), st.integers(0, 3))
def test_chosen_are_sorted_and_differ(num_samples: int, count: int, seed: int) -> None:
    found = chosen(num_samples, count, seed)
    assert len(found) == min(count, num_samples)
    assert (np.diff(found) > 0).all()
    assert 0 <= found[0] <= found[-1] < num_samples
    assert np.array_equal(found, chosen(num_samples, count, seed))


@pytest.mark.parametrize(("num_samples", "count"), [(1000, 500), (1000, 100)])
def test_each_is_as_likely_as_every_other(num_samples: int, count: int) -> None:
    """Over 400 seeds: within five standard deviations of the mean, all of a thousand."""
    times = np.zeros(num_samples)
    for seed in range(400):
        times[chosen(num_samples, count, seed)] += 1
    share = count / num_samples
    assert (abs(times - 400 * share) < 5 * np.sqrt(400 * share * (1 - share))).all()


def test_a_billion_samples_cost_what_is_chosen_of_them() -> None:
    assert len(chosen(10**9, 1000, 0)) == 1000


@pytest.fixture
def reader(tmp_path: Path) -> IndexReader:
    made = make_dataset(str(tmp_path), num_samples=100)
    return IndexReader(str(tmp_path / "train"), made.splits["train"])


def test_pixels_labels_and_keys(reader: IndexReader) -> None:
    """Over several shards and parts, with gaps."""
    numbers = np.array([3, 4, 28, 31, 65, 99])
    found = read_samples(reader, numbers, SHAPE)
    for place, number in enumerate(numbers.tolist()):
        assert np.array_equal(found.pixels[place], shape_image(number, number % 2, 16))
    assert found.labels.tolist() == (numbers % 2).tolist()
    assert found.keys == tuple(f"{number:09d}" for number in numbers)


def test_far_apart_samples_are_read_piece_by_piece(reader: IndexReader, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.array([3, 4, 28, 31, 65, 99])
    whole = read_samples(reader, numbers, SHAPE)
    monkeypatch.setattr(samples, "_WINDOW", 2)
    monkeypatch.setattr(samples, "_MERGED_GAP_BYTES", 100)
    assert np.array_equal(read_samples(reader, numbers, SHAPE).pixels, whole.pixels)
    many = read_all(reader, numbers, SHAPE, lambda pixels: pixels[:, ::2])
    assert np.array_equal(many.pixels, whole.pixels[:, ::2])
    assert many.keys == whole.keys
    assert many.labels.tolist() == whole.labels.tolist()


def test_windows_fit_into_memory() -> None:
    assert [len(part) for part in samples.windows(np.arange(2500), SHAPE)] == [1000, 1000, 500]
    assert {len(part) for part in samples.windows(np.arange(84), Shape(resolution=256, channels=3))} == {42}


def test_a_size_that_is_not_the_datasets(reader: IndexReader) -> None:
    with pytest.raises(EvaluateError, match=r"shard-000001\.tar, key 000000040: 16 x 16 pixels, not 32 x 32"):
        read_samples(reader, np.array([40]), Shape(resolution=32, channels=1))


@pytest.mark.parametrize(("resolution", "channels", "fit"), [(32, 1, "pad"), (8, 1, "crop"), (16, 3, "crop")])
def test_other_sizes_are_resized_where_that_is_asked_for(
    reader: IndexReader, resolution: int, channels: int, fit: images.Fit
) -> None:
    found = read_samples(reader, np.array([40, 41]), Shape(resolution=resolution, channels=channels, fit=fit))
    stored = np.broadcast_to(shape_image(41, 1, 16), (16, 16, channels))
    assert np.array_equal(found.pixels[1], images.resize(stored, resolution, fit))


def test_some_of_them_in_another_order(reader: IndexReader) -> None:
    found = read_samples(reader, np.array([3, 4, 28]), SHAPE).of(np.array([2, 0, 0]))
    assert found.keys == ("000000028", "000000003", "000000003")
    assert found.labels.tolist() == [0, 1, 1]
    assert np.array_equal(found.pixels[1], shape_image(3, 1, 16))


def test_an_image_that_cannot_be_decoded(reader: IndexReader) -> None:
    row = reader.rows(40, 41).to_pylist()[0]
    url = reader.shard_url(row["shard"])
    data = bytearray(storage.read(url))
    data[row["offset"] + 40] ^= 255
    storage.put(url, bytes(data))
    with pytest.raises(EvaluateError, match=r"shard-000001\.tar, key 000000040: .*; verify the dataset"):
        read_samples(reader, np.array([39, 40]), SHAPE)
