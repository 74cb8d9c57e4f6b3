"""The numbers of the shards to make, as a dataset of Ray Data.

Apart from the workers, because Ray Data's own processes import what defines a source and a callback: with torch among
it, that took 3 s of a core just when the workers start.
"""

import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Datasource
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import ReadTask

_SHARDS_OF_READ_TASK, _REST_SEC = 1000, 0.02


def numbers_dataset(shards: Sequence[int]) -> ray.data.Dataset:
    """A block a shard, with the column `shard`, int64; in order."""
    # No CPU: the workers may have taken them all.
    numbers = ray.data.read_datasource(_Numbers(shards), num_cpus=0)
    numbers.context.target_max_block_size = 1  # byte: a block a shard
    numbers.context.custom_execution_callback_classes = [_Rest]
    return numbers


class _Numbers(Datasource):
    """Numbers of shards. Not a read task a shard: Ray Data makes all tasks before the first one runs, 1 ms each."""

    def __init__(self, shards: Sequence[int]) -> None:
        self._shards = shards

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int:
        return 8 * len(self._shards)

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - Ray's signature
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        starts = range(0, len(self._shards), _SHARDS_OF_READ_TASK)
        return [_read_task(self._shards[start : start + _SHARDS_OF_READ_TASK]) for start in starts]


def _read_task(shards: Sequence[int]) -> ReadTask:
    metadata = BlockMetadata(num_rows=len(shards), size_bytes=8 * len(shards), input_files=None, exec_stats=None)
    return ReadTask(lambda: [pa.table({"shard": shards})], metadata)


class _Rest(ExecutionCallback):
    """Lets Ray Data's scheduling loop look at most fifty times a second: each look takes milliseconds of a core, and a
    worker has its next shard before it has ended one.
    """

    def on_execution_step(self, executor: Any) -> None:  # noqa: ARG002 - Ray's signature
        time.sleep(_REST_SEC)
