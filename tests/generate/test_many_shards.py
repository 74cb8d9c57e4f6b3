"""A run of very many shards: what a driver must look up before it can go on, and before it can commit."""

import os
import time
from pathlib import Path

import pytest

from pipeline import snapshot
from pipeline.dataset import index
from pipeline.generate import ray_generate
from tests.generate.test_generate import make_snapshot, plan_of

NUM_SHARDS, MOST_SEC = 100_000, 60.0


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
