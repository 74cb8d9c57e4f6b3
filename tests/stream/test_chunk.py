"""A chunk is its planned samples, whoever decodes it, and says what it had to replace."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import images, storage
from pipeline.config import ConfigError
from pipeline.stream.chunk import (
    BadDataError,
    Chunk,
    Decoder,
    FeedConfig,
    default_runs_per_chunk,
    default_steps_per_group,
)
from tests.stream.readers import block, damage, planned, reader_of


@pytest.mark.parametrize("in_tasks", [True, False])
def test_a_chunk_is_its_samples(tmp_path: Path, in_tasks: bool) -> None:
    reader = reader_of(str(tmp_path), in_tasks=in_tasks)
    for n in (0, 7, 16, 17, 40):  # some wrap at N
        got, samples = Chunk(block(reader, n)), reader.plan.chunk(n)
        pixels = np.empty((6, 16, 16, 1), np.uint8)
        if in_tasks:
            pixels = got.pixels((16, 16, 1))
        else:
            reader.decoder.decode(got, range(6), pixels)
        assert np.array_equal(pixels, planned(samples))
        assert np.array_equal(got.label, samples % 2)
        assert np.array_equal(got.sample, samples)
        assert np.array_equal(got.position, np.arange(n * 6, n * 6 + 6))
        assert got.reasons(range(6)) == []


def test_neighbours_are_one_read_and_runs_far_apart_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read_into = storage.read_into

    def counted(url: str, offset: int, out: memoryview) -> None:
        asked.append(len(out))
        read_into(url, offset, out)

    reader = reader_of(str(tmp_path), batch_size=16, num_lanes=1, steps_per_group=1, runs_per_chunk=2, in_tasks=False)
    monkeypatch.setattr(storage, "read_into", counted)
    one_shard = next(n for n in range(99) if len(set(reader.plan.chunk(n) // 30)) == 1)
    block(reader, one_shard)  # the index is read now
    asked.clear()
    block(reader, one_shard)
    assert len(asked) == 1
    monkeypatch.setattr("pipeline.stream.chunk._MERGED_GAP_BYTES", 2047)  # to the next sample, not to the one after
    runs = 1 + int((np.diff(np.sort(reader.plan.chunk(one_shard))) > 1).sum())
    asked.clear()
    block(reader, one_shard)
    assert len(asked) == runs


@pytest.mark.parametrize("in_tasks", [True, False])
def test_a_corrupt_sample_is_replaced_and_said(tmp_path: Path, in_tasks: bool) -> None:
    reader = reader_of(str(tmp_path), in_tasks=in_tasks)
    samples = reader.plan.chunk(5)
    damage(tmp_path, int(samples[2]), int(samples[3]), int(samples[5]))
    wanted = samples[[0, 1, 4, 4, 4, 0]]
    table = reader.read(5)
    pixels = np.empty((6, 16, 16, 1), np.uint8)
    replaced = reader.decoder.decode(Chunk(table), range(6), pixels)
    assert np.array_equal(pixels, planned(wanted))
    assert {row: place for row, (place, _) in replaced.items()} == {2: 4, 3: 4, 5: 0}
    assert all(f"{samples[row]:09d}: cannot decode" in reason for row, (_, reason) in replaced.items())
    if in_tasks:
        got = Chunk(block(reader, 5))
        assert np.array_equal(got.pixels((16, 16, 1)), planned(wanted))
        assert np.array_equal(got.label, wanted % 2)
        assert np.array_equal(got.sample, wanted)
        assert got.reasons(range(6)) == [reason for _, reason in replaced.values()]


@pytest.mark.parametrize(
    ("bad", "shown", "tries"),
    # Each place by itself, then the neighbours of the first bad one, then the good one for each of the other four.
    [((0, 1, 2, 3, 4), [5] * 5, 6 + 5 + 4), ((0, 5), [1, 1], 6 + 1 + 1)],
)
def test_a_bad_sample_is_tried_as_a_replacement_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: tuple[int, ...], shown: list[int], tries: int
) -> None:
    reader = reader_of(str(tmp_path), in_tasks=False)
    damage(tmp_path, *map(int, reader.plan.chunk(5)[list(bad)]))
    tried = []
    decode_into = images.decode_into
    monkeypatch.setattr(images, "decode_plain", lambda files, _: range(len(files)))
    monkeypatch.setattr(images, "decode_into", lambda data, out: (tried.append(1), decode_into(data, out)))
    replaced = reader.decoder.decode(Chunk(reader.read(5)), range(6), np.empty((6, 16, 16, 1), np.uint8))
    assert [place for place, _ in replaced.values()] == shown
    assert len(tried) == tries


def test_a_chunk_is_found_within_a_larger_table(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path), in_tasks=True)
    both = pa.concat_tables([block(reader, 4), block(reader, 5)])
    for table in (both, both.combine_chunks()):
        chunk = Chunk(table.slice(6, 6))
        assert np.array_equal(chunk.pixels((16, 16, 1)), planned(reader.plan.chunk(5)))


def test_a_chunk_without_a_good_sample_is_an_error(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path))
    damage(tmp_path, *map(int, reader.plan.chunk(5)))
    with pytest.raises(BadDataError, match=r"no sample of 6 near shard-.*can be read"):
        block(reader, 5)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path))
    shard = tmp_path / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(storage.StorageError, match=r"shard-000001\.tar"):
        [block(reader, n) for n in range(16)]


@given(st.integers(0, 10**9), st.integers(1, 12), st.integers(0, 3), st.booleans())
def test_flip_and_crop_depend_on_the_position_alone(start: int, count: int, crop_px: int, flip: bool) -> None:
    decoder = Decoder(resolution=8, channels=3, seed=1, flip=flip, crop_px=crop_px)
    position = np.arange(start, start + count)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    together, alone = pixels.copy(), pixels.copy()
    decoder._augment(together, position)
    for i in range(count):
        decoder._augment(alone[i : i + 1], position[i : i + 1])
    assert np.array_equal(together, alone)
    if not crop_px:
        mirrored = pixels[:, :, ::-1]
        same = [np.array_equal(now, then) for now, then in zip(together, pixels, strict=True)]
        other = [np.array_equal(now, then) for now, then in zip(together, mirrored, strict=True)]
        assert all(a or (b and flip) for a, b in zip(same, other, strict=True))


def test_half_are_flipped_and_every_shift_occurs() -> None:
    position = np.arange(2000)
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, None, :, None] + 10, (2000, 8, 8, 1)).copy()
    Decoder(resolution=8, channels=1, seed=1, flip=True)._augment(ramp, position)
    assert 900 < (ramp[:, 0, 0, 0] > ramp[:, 0, 7, 0]).sum() < 1100
    grid = (np.arange(8)[:, None] * 8 + np.arange(8)).astype(np.uint8)[None, :, :, None].repeat(2000, 0)
    Decoder(resolution=8, channels=1, seed=1, crop_px=2)._augment(grid, position)
    centre, counts = np.unique(grid[:, 4, 4, 0], return_counts=True)
    assert set(centre) == {(4 + y) * 8 + 4 + x for y in range(-2, 3) for x in range(-2, 3)}
    assert counts.min() > 40  # of 80 expected


def test_default_group_sizes() -> None:
    assert default_steps_per_group(60_000, 64, 8, 32 * 32) == 128  # chunks of 1024 samples
    assert default_steps_per_group(10**6, 64, 8, 512 * 512 * 3) == 2  # 128 MB a group
    assert default_steps_per_group(50, 64, 8, 1024) == 6  # a chunk of 48, no longer than the dataset
    assert default_steps_per_group(3, 64, 8, 1024) == 1


def test_a_shift_is_not_negative() -> None:
    with pytest.raises(ConfigError, match="crop_px"):
        FeedConfig(crop_px=-1)


def test_an_index_less_well_mixed_is_read_in_more_runs() -> None:
    assert default_runs_per_chunk(1024, 1.1) == 1
    assert default_runs_per_chunk(1024, 5.0) == 4
    assert default_runs_per_chunk(6, 5.0) == 3
    assert default_runs_per_chunk(7, 5.0) == 1
