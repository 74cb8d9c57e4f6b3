"""The plan, executed by real Ray: order, whole blocks, and what they rest on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.stream import feed
from pipeline.stream.batches import rank_batches
from pipeline.stream.chunk import Chunk
from pipeline.stream.feed import data_config, plan_dataset
from tests.stream.readers import reader_of


def executed(reader: object, first: int, count: int) -> "feed.ray.data.Dataset":
    """The plan as Ray Train would execute it."""
    data = plan_dataset(reader, first, count)  # type: ignore[arg-type]
    data.context.execution_options = data_config()._resolve_execution_options("train")
    return data


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("in_tasks", "direct_chunks"), [(True, 2000), (False, 2000), (False, 0)])
def test_ray_keeps_the_order_and_the_blocks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_tasks: bool, direct_chunks: int
) -> None:
    """Both forms of a plan: single numbers from the start, and cut from blocks of many as they are needed."""
    monkeypatch.setattr(feed, "_DIRECT_CHUNKS", direct_chunks)
    monkeypatch.setattr(feed, "_NUMBERS_A_BLOCK", 300)  # several
    reader = reader_of(str(tmp_path), in_tasks=in_tasks)
    first = reader.plan.first_chunk(5)
    data = executed(reader, first, 1040)
    blocks = [Chunk(block) for block in data.iter_batches(batch_size=None, batch_format="pyarrow")]
    assert [len(block) for block in blocks] == [6] * 1040
    assert np.array_equal(np.concatenate([b.position for b in blocks]), np.arange(first * 6, (first + 1040) * 6))
    wanted = np.concatenate([reader.plan.chunk(n) for n in range(first, first + 1040)])
    assert np.array_equal(np.concatenate([b.sample for b in blocks]), wanted)


@pytest.mark.usefixtures("ray_session")
def test_a_killed_read_worker_costs_no_sample_and_no_order(tmp_path: Path) -> None:
    """Two are killed while the rank takes batches."""
    reader = reader_of(str(tmp_path), in_tasks=False)
    (shard,) = executed(reader, 0, 1900).streaming_split(1, equal=True)
    blocks = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow"))
    batches, killed = rank_batches(blocks, reader, 0, 0, 1, 1), list[int]()
    for step in range(460):
        batch = next(batches)
        assert np.array_equal(batch.sample, reader.plan.batch(step))
        if step in (60, 200) and (pids := processes_running("MapBatches(ChunkReader)")):
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])
    batches.close()  # type: ignore[attr-defined]
    assert killed


def processes_running(task: str) -> list[int]:
    """Process ids of this machine's Ray workers that run such a task."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        commands = [(path.parent.name, path.read_bytes()) for path in Path("/proc").glob("[0-9]*/cmdline")]
        found = [int(pid) for pid, command in commands if command.startswith(b"ray::") and task.encode() in command]
        if found:
            return found
    return []


def test_settings_that_order_and_block_size_rest_on() -> None:
    """In a process of its own: the callable runs in Ray Train's controller, where nothing is set before."""
    code = (
        "import sys, json, ray; from pipeline.stream.feed import plan_dataset, data_config\n"
        "from ray.data import DataContext\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n"
        "plan_dataset(print, 0, 1)\n"
        "c = DataContext.get_current()\n"
        "o = data_config()._resolve_execution_options('train')\n"
        "print(json.dumps([c.target_max_block_size, c.execution_no_progress_timeout_s, c.enable_progress_bars,"
        " c.raise_original_map_exception, o.preserve_order]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [None, -1, False, True, True]
