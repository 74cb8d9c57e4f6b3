"""Ranks that take what the feed deals them, each in a Ray worker."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import ray.data

from pipeline.stream.chunk import ChunkReader
from pipeline.stream.feed import plan_dataset, rank_blocks
from pipeline.train.ray_train import Shares

T = TypeVar("T")


def on_ranks(
    reader: ChunkReader, first_chunk: int, num_chunks: int, world_size: int, work: Callable[[Iterator[pa.Table]], T]
) -> list[T]:
    """What `work` makes of each rank's blocks, dealt as Ray Train deals them; `work` is pickled by value if nested."""
    dealt = Shares().configure({"train": plan_dataset(reader, first_chunk, num_chunks)}, world_size, None, None)

    @ray.remote(num_cpus=0)
    def one_rank(share: ray.data.DataIterator) -> T:
        return work(rank_blocks(share))

    return ray.get([one_rank.remote(of_rank["train"]) for of_rank in dealt], timeout=100)


def processes_running(task: str) -> list[int]:
    """Process ids of this machine's Ray workers that run such a task."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        commands = [(path.parent.name, path.read_bytes()) for path in Path("/proc").glob("[0-9]*/cmdline")]
        found = [int(pid) for pid, command in commands if command.startswith(b"ray::") and task.encode() in command]
        if found:
            return found
    return []
