"""The feed: what each rank gets is what the plan says, through real Ray."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.dataset.index import IndexReader
from pipeline.stream import feed
from pipeline.stream.feed import (
    BadDataError,
    Batch,
    ChunkReader,
    FeedError,
    data_config,
    default_steps_per_group,
    plan_dataset,
    rank_batches,
)
from pipeline.stream.order import OrderPlan
from tests.small import make_dataset, shape_image


def reader_of(url: str, num_samples: int = 100, **plan: int) -> ChunkReader:
    made = make_dataset(url, num_samples=num_samples, shard_size=30)
    settings = {"seed": 3, "batch_size": 8, "num_lanes": 4, "steps_per_group": 3} | plan
    return ChunkReader(
        index=IndexReader(storage.join(url, "train"), made.splits["train"]),
        plan=OrderPlan(num_samples=num_samples, **settings),
        resolution=16,
        channels=1,
    )


def block(reader: ChunkReader, n: int) -> Mapping[str, Any]:
    return reader({"id": np.array([n])}, 0)


def ranks(reader: ChunkReader, first_step: int, world_size: int, steps: int) -> list[list[Batch]]:
    """The batches of all ranks, dealt round-robin as the splitter does."""
    plan, out = reader.plan, []
    first_chunk = plan.first_chunk(first_step)
    for rank in range(world_size):
        blocks: Iterator[Any] = (block(reader, n) for n in range(first_chunk + rank, 10**6, world_size))
        batches = rank_batches(blocks, plan, first_step, rank, world_size)
        out.append([next(batches) for _ in range(steps)])
    return out


def test_a_chunk_is_its_samples(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path))
    for n in (0, 7, 16, 17, 40):  # some wrap at N
        got, samples = block(reader, n), reader.plan.chunk(n)
        assert np.array_equal(got["image"], np.stack([shape_image(int(i), int(i) % 2, 16) for i in samples]))
        assert np.array_equal(got["label"], samples % 2)
        assert np.array_equal(got["position"], np.arange(n * 6, n * 6 + 6))
        assert set(got["reason"]) == {""}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("first_step", [0, 5])
def test_all_ranks_together_get_the_planned_batch(tmp_path: Path, world_size: int, first_step: int) -> None:
    reader = reader_of(str(tmp_path))
    for served, step in enumerate(range(first_step, first_step + 7)):
        parts = [batches[served] for batches in ranks(reader, first_step, world_size, 7)]
        assert {part.step for part in parts} == {step}
        position = np.concatenate([part.position for part in parts])
        order = np.argsort(position)
        assert np.array_equal(position[order], np.arange(step * 8, step * 8 + 8))
        wanted = reader.plan.batch(step)
        image = np.concatenate([part.image for part in parts])[order]
        assert np.array_equal(image, np.stack([shape_image(int(i), int(i) % 2, 16) for i in wanted]))
        assert np.array_equal(np.concatenate([part.label for part in parts])[order], wanted % 2)


def test_a_dataset_smaller_than_a_group(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path), num_samples=4)
    batch = ranks(reader, 0, 1, 1)[0][0]
    assert np.array_equal(batch.label, reader.plan.batch(0) % 2)


def test_a_block_out_of_order_is_refused(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path))
    blocks = iter([block(reader, n) for n in (0, 1, 3, 2)])
    with pytest.raises(FeedError, match="chunk 3 came where the plan has chunk 2"):
        next(rank_batches(blocks, reader.plan, 0, 0, 1))
    with pytest.raises(FeedError, match="ended before chunk 0"):
        next(rank_batches(iter([]), reader.plan, 0, 0, 1))


def damage(url: Path, *samples: int) -> None:
    """Overwrite the image bytes of samples with noise, in place."""
    reader = reader_of_existing(url)
    for row in (reader.rows(i, i + 1).to_pylist()[0] for i in samples):
        with (url / "train" / row["shard"]).open("r+b") as file:
            file.seek(row["offset"])
            file.write(bytes(row["size"]))


def reader_of_existing(url: Path) -> IndexReader:
    from pipeline.dataset import record

    return IndexReader(str(url / "train"), record.read(str(url))[0].splits["train"])


def test_a_corrupt_sample_is_replaced_and_said(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path))
    samples = reader.plan.chunk(5)
    damage(tmp_path, int(samples[2]), int(samples[3]))
    got = block(reader, 5)
    wanted = samples.copy()
    wanted[2] = wanted[3] = samples[4]
    assert np.array_equal(got["image"], np.stack([shape_image(int(i), int(i) % 2, 16) for i in wanted]))
    assert np.array_equal(got["label"], wanted % 2)
    assert [bool(reason) for reason in got["reason"]] == [False, False, True, True, False, False]
    assert f"{samples[2]:09d}" in got["reason"][2]


def test_a_chunk_without_a_good_sample_is_an_error(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path))
    damage(tmp_path, *map(int, reader.plan.chunk(5)))
    with pytest.raises(BadDataError, match="no sample of 6"):
        block(reader, 5)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    reader = reader_of(str(tmp_path))
    shard = tmp_path / "train" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(storage.StorageError, match=r"shard-000001\.tar"):
        [block(reader, n) for n in range(16)]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("direct_chunks", [0, 5000])
def test_ray_keeps_the_order_and_the_blocks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_chunks: int
) -> None:
    """Both forms of a plan: cut from blocks of many, and single from the start."""
    monkeypatch.setattr(feed, "_DIRECT_CHUNKS", direct_chunks)
    reader = reader_of(str(tmp_path))
    first = reader.plan.first_chunk(5)
    data = plan_dataset(reader, first, 1040, 8)
    data.context.execution_options = data_config()._resolve_execution_options("train")
    blocks = list(data.iter_batches(batch_size=None, batch_format="numpy"))
    assert [len(one["position"]) for one in blocks] == [6] * 1040
    assert np.array_equal(np.concatenate([one["position"] for one in blocks]), np.arange(first * 6, (first + 1040) * 6))
    assert blocks[0]["image"].shape == (6, 16, 16, 1)
    assert blocks[0]["image"].dtype == np.uint8


def test_settings_that_order_and_block_size_rest_on() -> None:
    """In a process of its own: the callable runs in Ray Train's controller, where nothing is set before."""
    code = (
        "import sys, json, ray; from pipeline.stream.feed import plan_dataset, data_config\n"
        "from ray.data import DataContext\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n"
        "plan_dataset(print, 0, 1, 1)\n"
        "c = DataContext.get_current()\n"
        "o = data_config()._resolve_execution_options('train')\n"
        "print(json.dumps([c.target_max_block_size, c.execution_no_progress_timeout_s, c.enable_progress_bars,"
        " c.raise_original_map_exception, o.preserve_order]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [None, -1, False, True, True]


def test_default_group_sizes() -> None:
    assert default_steps_per_group(60_000, 64, 8, 32 * 32) == 128  # chunks of 1024 samples
    assert default_steps_per_group(10**6, 64, 8, 512 * 512 * 3) == 5  # 256 MB a group
    assert default_steps_per_group(50, 64, 8, 1024) == 6  # a chunk of 48, no longer than the dataset
    assert default_steps_per_group(3, 64, 8, 1024) == 1
