"""The numbers of the shards to make, as a dataset of Ray Data.

Apart from the workers, because Ray Data's own processes import what defines a callback: with torch in it, that took 3 s
of a core just when the workers start.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

_BLOCKS, _REST_SEC = 1000, 0.02


def numbers_dataset(shards: Sequence[int]) -> ray.data.Dataset:
    """Blocks of the column `shard`, int64; what a worker returns for each row is a block of its own.

    The driver puts them: a task that reads them would take a process, which imports Ray Data for 2 s of a core.
    """
    numbers = ray.data.from_blocks([pa.table({"shard": block}) for block in blocks_of(shards)])
    numbers.context.target_max_block_size = 1  # byte
    numbers.context.custom_execution_callback_classes = [_Rest]
    return numbers


def blocks_of(shards: Sequence[int]) -> Iterator[Sequence[int]]:
    """Shards in blocks that become smaller, down to one: a put takes 1 ms, and no worker should be left with many."""
    start = 0
    while start < len(shards):
        stop = start + max(1, (len(shards) - start) // _BLOCKS)
        yield shards[start:stop]
        start = stop


class _Rest(ExecutionCallback):
    """Lets Ray Data's scheduling loop look at most fifty times a second: each look takes milliseconds of a core, and a
    worker has its next shard before it has ended one.
    """

    def on_execution_step(self, executor: Any) -> None:  # noqa: ARG002 - Ray's signature
        time.sleep(_REST_SEC)
