"""The feed: Ray Data executes the order plan.

One task = one chunk = one ranged read a shard = one block of exactly C rows. The stock splitter of Ray Train then
deals the blocks round-robin, so chunk n reaches rank (n − n0) mod w. DESIGN.md, "The feed".
"""

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import DataContext, Datasource
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from pipeline.stream.chunk import ChunkReader

_SHORTEST_REST_SEC, _LONGEST_REST_SEC, _SPIN_SEC = 0.002, 0.064, 0.005
_FIRST_SEGMENT_CHUNKS, _SEGMENT_CHUNKS = 256, 1024
NUM_RANKS = "ganymede_num_ranks"
"""Key of the dataset's context under which segments find w."""


def plan_dataset(reader: ChunkReader, first_chunk: int, num_chunks: int) -> ray.data.Dataset:
    """Chunks first_chunk, first_chunk + 1, … as blocks, in order: a segment of them at each iteration over it.

    A run needs `num_chunks`: no more are read ahead, but whoever goes on iterating gets more.

    Called in Ray Train's controller, where the driver's DataContext does not reach: it sets its own. A block over
    192 MiB would be cut in two with a target size, and a paused trainer is no stuck pipeline.
    """
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # a thread started and joined in every read task
    context.raise_original_map_exception = True  # so that a bad dataset is told in its own words
    context.custom_execution_callback_classes = [_Pace]
    ray.remote(num_cpus=0)(_import_only).remote()
    numbers = ray.data.read_datasource(_Segments(first_chunk, num_chunks, reader.plan.num_lanes), override_num_blocks=1)
    return numbers.map_batches(reader, batch_size=None, batch_format="pyarrow")


def rank_blocks(share: ray.data.DataIterator) -> Iterator[pa.Table]:
    """The blocks dealt to a rank, one whole block at a time, segment after segment without end."""
    while True:
        yield from share.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow")


def _import_only() -> None:
    """For a worker to have loaded this module, and Ray Data, when the first read task comes."""


class _Segments(Datasource):
    """Chunk numbers, one a read task; each execution goes on where the last one ended.

    Ray Data makes all read tasks of an execution before the first one runs, 1 ms each, and keeps them to its end: so
    the plan, however long, is executed in segments, as a dataset is by those who iterate over it once an epoch. A new
    execution costs about a second in which nothing is read, so only the first segment is short.
    """

    def __init__(self, first_chunk: int, num_chunks: int, num_lanes: int) -> None:
        self._next, self._end, self._num_lanes = first_chunk, first_chunk + num_chunks, num_lanes
        self._most = _FIRST_SEGMENT_CHUNKS

    def get_name(self) -> str:
        return "Chunk"

    def estimate_inmemory_data_size(self) -> None:
        """Unknown."""

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - Ray's signature
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """The tasks of the next segment. The planner asks too, without a context: it is shown one and moves nothing."""
        if data_context is None:
            return [_number_task(self._next)]
        # Whole groups, and as many chunks for one rank as for another: what a splitter deals equally.
        whole = math.lcm(self._num_lanes, data_context.get_config(NUM_RANKS, 1))
        wanted = max(1, min(self._most, self._end - self._next))
        start, self._next = self._next, self._next + -(-wanted // whole) * whole
        self._most = _SEGMENT_CHUNKS
        return [_number_task(number) for number in range(start, self._next)]


def _number_task(number: int) -> ReadTask:
    metadata = BlockMetadata(num_rows=1, size_bytes=8, input_files=None, exec_stats=None)
    return ReadTask(functools.partial(_one_number, number), metadata)


def _one_number(number: int) -> list[pa.Table]:
    return [pa.table({"number": [number]})]


class _Pace(ExecutionCallback):
    """Rests where Ray Data's scheduling loop spins: at a step that came at once and moved no block.

    While finished chunks wait for a slower consumer, Ray 2.60's loop finds them ready at every look and never sleeps:
    it took 0.87 of a core, and a trainer on two cores went from 1500 to 350 images a second. The longer nothing moves,
    the longer the rest. A step that waited, or moved a block, is left alone: the next read task starts as one ends.
    """

    _moved = -1
    _ended_sec = 0.0
    _rest_sec = _SHORTEST_REST_SEC

    def on_execution_step(self, executor: Any) -> None:
        moved = sum(op.metrics.num_task_outputs_generated + op.metrics.num_outputs_taken for op in executor._topology)
        if moved != self._moved:
            self._rest_sec = _SHORTEST_REST_SEC
        elif time.monotonic() - self._ended_sec < _SPIN_SEC:
            time.sleep(self._rest_sec)
            self._rest_sec = min(2 * self._rest_sec, _LONGEST_REST_SEC)
        self._moved, self._ended_sec = moved, time.monotonic()
