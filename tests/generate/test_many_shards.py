"""A run of very many shards: what a driver must look up before it can go on, and before it can commit."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipeline import snapshot
from pipeline.dataset import index
from pipeline.generate import ray_generate
from pipeline.generate.ray_shards import numbers_dataset
from tests.generate.test_generate import make_snapshot, plan_of

NUM_SHARDS, MOST_SEC, FIRST_MOST_SEC = 100_000, 60.0, 40.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hundred_thousand_shards_are_looked_up_in_a_minute(tmp_path: Path) -> None:
    plan = plan_of(snapshot.load(make_snapshot(str(tmp_path / "run"))), num_images=NUM_SHARDS, shard_size=1)
    out = tmp_path / "out"
    folder = out / "train" / "index"
    folder.mkdir(parents=True)
    one = folder / index.part_name(0).rpartition("/")[2]
    one.write_bytes(os.urandom(6_000))  # as large as a part of a small shard
    lost = {7, 99_998}
    for shard in range(1, NUM_SHARDS):
        if shard % 30_000 == 0:  # a file has at most 65,000 names
            one = folder / index.part_name(shard).rpartition("/")[2]
            one.write_bytes(os.urandom(6_000))
        elif shard not in lost:
            os.link(one, folder / index.part_name(shard).rpartition("/")[2])
    started = time.monotonic()
    assert set(ray_generate.missing_shards(str(out), plan)) == lost
    for shard in lost:
        os.link(one, folder / index.part_name(shard).rpartition("/")[2])
    assert ray_generate.missing_shards(str(out), plan) == []
    parts = ray_generate.stored_parts(str(out), plan)
    elapsed_sec = time.monotonic() - started
    print(f"looked up in {elapsed_sec:.1f} s")
    assert len(parts) == NUM_SHARDS
    assert len({part.sha256 for part in parts}) == 4
    assert parts[-1].name == index.part_name(NUM_SHARDS - 1)
    assert elapsed_sec <= MOST_SEC


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_hundred_thousand_shards_begin_at_once(ray_session: None) -> None:  # noqa: ARG001 - needs Ray
    """A read task for each thousand of them started a process each: 96, and the first shard came after 80 s."""

    class Taken:  # here, so that it travels by value: actors cannot import a test
        def __call__(self, batch: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
            return {"shard": batch["shard"]}

    started = time.monotonic()
    pool = ActorPoolStrategy(size=1)
    taken = numbers_dataset(range(NUM_SHARDS)).map_batches(Taken, batch_size=1, compute=pool, num_cpus=1)
    bundle = next(iter(taken.iter_internal_ref_bundles()))
    elapsed_sec = time.monotonic() - started
    print(f"the first one after {elapsed_sec:.1f} s")
    assert ray.get(bundle.blocks[0].ref)["shard"].to_pylist() == [0]
    assert elapsed_sec <= FIRST_MOST_SEC
