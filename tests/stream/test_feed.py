"""The plan, executed by real Ray: order, whole blocks, and what they rest on."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.stream.batches import rank_batches
from pipeline.stream.chunk import Chunk
from tests.stream.ranks import on_ranks, processes_running
from tests.stream.readers import reader_of


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("world_size", "in_tasks", "num_chunks"), [(1, True, 1000), (2, False, 390), (3, False, 1000), (3, False, 50)]
)
def test_segments_follow_each_other_in_order_in_whole_blocks(
    tmp_path: Path, world_size: int, in_tasks: bool, num_chunks: int
) -> None:
    """The first has 256 chunks, or with three ranks 264; or as many as are wanted, and then a whole deal at a time."""
    reader = reader_of(str(tmp_path), in_tasks=in_tasks)
    first, each = reader.plan.first_chunk(5), min(num_chunks + 30, 400) // world_size

    def dealt(blocks: Iterator[pa.Table]) -> list[pa.Table]:
        return list(itertools.islice(blocks, each))

    for rank, tables in enumerate(on_ranks(reader, first, num_chunks, world_size, dealt)):
        blocks = [Chunk(table) for table in tables]
        numbers = [first + rank + world_size * i for i in range(each)]
        assert [len(block) for block in blocks] == [6] * each
        positions = np.concatenate([np.arange(n * 6, (n + 1) * 6) for n in numbers])
        assert np.array_equal(np.concatenate([block.position for block in blocks]), positions)
        samples = np.concatenate([reader.plan.chunk(n) for n in numbers])
        assert np.array_equal(np.concatenate([block.sample for block in blocks]), samples)


@pytest.mark.usefixtures("ray_session")
def test_a_killed_read_worker_costs_no_sample_and_no_order(tmp_path: Path) -> None:
    """Three are killed while the rank takes batches of two segments."""
    reader = reader_of(str(tmp_path), in_tasks=False)

    def killing(blocks: Iterator[pa.Table]) -> tuple[list[np.ndarray], int]:
        batches, samples, killed = rank_batches(blocks, reader, 0, 0, 1, 1), [], 0
        for step in range(460):
            samples.append(next(batches).sample)
            if step in (10, 60, 260) and (pids := processes_running("ReadChunk->MapBatches(ChunkReader)")):
                os.kill(pids[0], signal.SIGKILL)
                killed += 1
        return samples, killed

    ((samples, killed),) = on_ranks(reader, 0, 1000, 1, killing)
    assert np.array_equal(samples, [reader.plan.batch(step) for step in range(460)])
    assert killed > 1


def test_settings_that_order_and_block_size_rest_on(tmp_path: Path) -> None:
    """In a process of its own: the callable runs in Ray Train's controller, where nothing is set before."""
    code = (
        "import sys, json, ray; from pipeline.stream.feed import plan_dataset\n"
        "from pipeline.train.ray_train import Shares\n"
        "from ray.data import DataContext\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level='ERROR')\n"
        "from tests.stream.readers import reader_of\n"
        "plan_dataset(reader_of(sys.argv[1]), 0, 1)\n"
        "c = DataContext.get_current()\n"
        "o = Shares()._resolve_execution_options('train')\n"
        "print(json.dumps([c.target_max_block_size, c.execution_no_progress_timeout_s, c.enable_progress_bars,"
        " c.raise_original_map_exception, o.preserve_order]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [None, -1, False, True, True]
