"""The feed: Ray Data executes the order plan.

One task = one chunk = one ranged read a shard = one block of exactly C rows. The stock splitter of Ray Train then
deals the blocks round-robin, so chunk n reaches rank (n − n0) mod w. DESIGN.md, "The feed".
"""

import time
from typing import Any

import numpy as np
import ray.data
from ray.data import DataContext, ExecutionOptions
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.train import DataConfig

from pipeline.stream.chunk import ChunkReader

_REST_SEC, _SPIN_SEC = 0.05, 0.005
_DIRECT_CHUNKS, _NUMBERS_A_BLOCK = 2000, 10_000
_NUMBERS_WAITING = 256


def plan_dataset(reader: ChunkReader, first_chunk: int, num_chunks: int) -> ray.data.Dataset:
    """Chunks first_chunk, first_chunk + 1, … as blocks, in order.

    Called in Ray Train's controller, where the driver's DataContext does not reach: it sets its own. A block over
    192 MiB would be cut in two with a target size, and a paused trainer is no stuck pipeline.
    """
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # so that a bad dataset is told in its own words
    context.custom_execution_callback_classes = [_Pace]
    policies = [*ENABLED_BACKPRESSURE_POLICIES, *([_FewNumbersWait] if num_chunks > _DIRECT_CHUNKS else [])]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)
    return _chunk_numbers(num_chunks).map_batches(
        reader, batch_size=None, batch_format="pyarrow", fn_kwargs={"first_chunk": first_chunk}
    )


def _chunk_numbers(num_chunks: int) -> ray.data.Dataset:
    """One chunk number a block.

    A block for each from the start costs 1.4 ms apiece before the first read. For a long plan one task cuts blocks of
    10,000 into single numbers as they are needed (see `_FewNumbersWait`), so that the first batch of 488,000 chunks
    comes as soon as that of a few.
    """
    if num_chunks <= _DIRECT_CHUNKS:
        return ray.data.range(num_chunks, override_num_blocks=num_chunks)
    numbers = [np.arange(n, min(n + _NUMBERS_A_BLOCK, num_chunks)) for n in range(0, num_chunks, _NUMBERS_A_BLOCK)]
    single = ray.data.from_numpy(numbers).repartition(target_num_rows_per_block=1)
    # It waits most of the time, and with the one free CPU of a small machine nothing would be left to read with.
    # `repartition` has no argument for it.
    single._logical_plan.dag.ray_remote_args["num_cpus"] = 0
    return single


class _FewNumbersWait(BackpressurePolicy):
    """Lets one task count, and only so many chunk numbers wait for a read task.

    By bytes, the measure of Ray's own policies, all of a plan would wait: half a million blocks on the driver, each a
    cost before it is needed.
    """

    def can_add_input(self, op: Any) -> bool:
        return not _counts(op) or op.num_active_tasks() == 0

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        waiting = sum(self._topology[below].total_enqueued_input_blocks() for below in op.output_dependencies)
        return 0 if _counts(op) and waiting >= _NUMBERS_WAITING else None


def _counts(op: Any) -> bool:
    """Whether it is the operator that cuts blocks of numbers: the one right behind the input."""
    return bool(op.input_dependencies) and not any(above.input_dependencies for above in op.input_dependencies)


class _Pace(ExecutionCallback):
    """Rests where Ray Data's scheduling loop spins: at a step that came at once and moved no block.

    While finished chunks wait for a slower consumer, Ray 2.60's loop finds them ready at every look and never sleeps:
    it took 0.87 of a core, and a trainer on two cores went from 1500 to 350 images a second. A step that waited, or
    moved a block, is left alone: the next read task starts as soon as one ends.
    """

    _moved = -1
    _ended_sec = 0.0

    def on_execution_step(self, executor: Any) -> None:
        moved = sum(op.metrics.num_task_outputs_generated + op.metrics.num_outputs_taken for op in executor._topology)
        if moved == self._moved and time.monotonic() - self._ended_sec < _SPIN_SEC:
            time.sleep(_REST_SEC)
        self._moved, self._ended_sec = moved, time.monotonic()


def data_config() -> DataConfig:
    """Ray Train's splitter with the order kept; its default would overwrite the context's execution options."""
    return DataConfig(execution_options=ExecutionOptions(preserve_order=True))
