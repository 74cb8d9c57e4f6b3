"""The feed: Ray Data executes the order plan, and a rank assembles its batches from the blocks it is dealt.

One task = one chunk = one ranged read a shard = one block of exactly C rows. The stock splitter of Ray Train then
deals the blocks round-robin, so chunk n reaches rank (n − n0) mod w. DESIGN.md, "The feed".
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import DataContext, ExecutionOptions
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.train import DataConfig

from pipeline import images, storage
from pipeline.dataset.index import IndexReader
from pipeline.errors import InputError, RetryableError
from pipeline.stream.order import OrderPlan, rank_lanes

_CHUNK_BYTES = 64 * 1024**2
_GROUP_BYTES = 256 * 1024**2
_CHUNK_SAMPLES = 1024
_STEP_SEC = 0.02
_WIDE_CPUS, _DIRECT_CHUNKS = 4, 5000


class FeedError(RetryableError):
    """The blocks did not come as the plan says."""


class BadDataError(InputError):
    """A chunk in which no sample can be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's rows of the global batch of one data step."""

    step: int
    """Data step t."""
    image: NDArray[np.uint8]
    """[n, R, R, C], 0 … 255."""
    label: NDArray[np.int64]
    """[n]; 0 without classes."""
    position: NDArray[np.int64]
    """[n], place in the global sequence: t·B + row of the global batch."""
    replaced: tuple[str, ...]
    """One reason for each row whose own sample could not be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkReader:
    """What a read task does: chunk number → rows. Picklable and small."""

    index: IndexReader
    plan: OrderPlan
    resolution: int
    channels: int

    def __call__(self, row: Mapping[str, NDArray[np.int64]], first_chunk: int) -> dict[str, NDArray[np.generic]]:
        """The block of chunk `first_chunk + row["id"]`: image, label, position and reason, C rows each."""
        number = first_chunk + int(row["id"][0])
        samples = self.plan.chunk(number)
        unique, inverse = np.unique(samples, return_inverse=True)
        rows = self._rows(unique)
        pixels, chosen, reasons = self._pixels(rows, inverse)
        label = rows["label"].fill_null(0).to_numpy().astype(np.int64)
        start = number * self.plan.chunk_size
        return {
            "image": pixels,
            "label": label[chosen],
            "position": np.arange(start, start + len(samples), dtype=np.int64),
            "reason": np.array(reasons),
        }

    def _rows(self, samples: NDArray[np.int64]) -> pa.Table:
        """Index rows of ascending sample numbers: at most two runs, since chunks wrap at N."""
        cuts = np.flatnonzero(np.diff(samples) != 1) + 1
        runs = np.split(samples, cuts)
        return pa.concat_tables([self.index.rows(int(run[0]), int(run[-1]) + 1) for run in runs])

    def _pixels(
        self, rows: pa.Table, inverse: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
        """Decoded rows in chunk order, which index row each shows, and why where it is not its own."""
        decoded = [self._decode(data) for data in self._encoded(rows)]
        good = [not isinstance(item, str) for item in decoded]
        if not any(good):
            raise BadDataError(
                f"no sample of {len(rows)} in {self.index.shard_url(rows['shard'][0].as_py())} can be read "
                f"({decoded[0]}); prepare the dataset again"
            )
        chosen = np.array([_next_good(good, inverse, place) for place in range(len(inverse))])
        reasons = [
            "" if good[own] else f"{rows['shard'][int(own)].as_py()}: {rows['key'][int(own)].as_py()}: {decoded[own]}"
            for own in inverse
        ]
        return np.stack([decoded[row] for row in chosen]), chosen, reasons

    def _encoded(self, rows: pa.Table) -> Iterator[bytes]:
        """The image bytes of index rows, one ranged read for each run of rows in one shard."""
        shards = rows["shard"].to_pylist()
        offset, size = rows["offset"].to_numpy(), rows["size"].to_numpy()
        start = 0
        for stop in range(1, len(shards) + 1):
            if stop < len(shards) and shards[stop] == shards[start] and offset[stop] > offset[stop - 1]:
                continue
            first = int(offset[start])
            length = int(offset[stop - 1] + size[stop - 1]) - first
            data = storage.read_range(self.index.shard_url(shards[start]), first, length)
            for row in range(start, stop):
                yield data[offset[row] - first : offset[row] - first + size[row]]
            start = stop

    def _decode(self, data: bytes) -> NDArray[np.uint8] | str:
        """Pixels of the wanted size, or why there are none."""
        try:
            return images.resize(images.decode(data, channels=self.channels).pixels, self.resolution, "crop")
        except images.ImageError as error:
            return str(error)


def _next_good(good: list[bool], inverse: NDArray[np.int64], place: int) -> int:
    """The index row shown at a place of the chunk: its own, else that of the next good place, around the end."""
    for step in range(len(inverse)):
        row = int(inverse[(place + step) % len(inverse)])
        if good[row]:
            return row
    raise AssertionError("the caller checked that a good row exists")


def default_steps_per_group(num_samples: int, batch_size: int, num_lanes: int, sample_bytes: int) -> int:
    """k: a chunk ≤ 64 MB, ≤ 1024 samples and ≤ the dataset, a group ≤ 256 MB, at least one step."""
    lane_size = batch_size // num_lanes
    chunk_samples = min(_CHUNK_SAMPLES, num_samples, _CHUNK_BYTES // sample_bytes)
    return max(1, min(chunk_samples // lane_size, _GROUP_BYTES // sample_bytes // batch_size))


class _Pace(ExecutionCallback):
    """Rests at each step of Ray Data's scheduling loop that moved no block.

    While finished chunks wait for a slower consumer, Ray 2.60's loop finds them ready at every look and never sleeps:
    it took 0.87 of a core, and a trainer on two cores went from 1500 to 350 images a second. Resting at every step
    instead would hold up the start of a long plan, whose thousands of blocks pass one by one.
    """

    _moved = -1

    def on_execution_step(self, executor: Any) -> None:
        moved = sum(op.metrics.num_task_outputs_generated + op.metrics.num_outputs_taken for op in executor._topology)
        if moved == self._moved:
            time.sleep(_STEP_SEC)
        self._moved = moved


def plan_dataset(reader: ChunkReader, first_chunk: int, num_chunks: int, free_cpus: float) -> ray.data.Dataset:
    """Chunks first_chunk, first_chunk + 1, … as blocks, in order; `free_cpus` are those that training leaves.

    Called in Ray Train's controller, where the driver's DataContext does not reach: it sets its own. A block over
    192 MiB would be cut in two with a target size, and a paused trainer is no stuck pipeline.
    """
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.execution_no_progress_timeout_s = -1
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # so that a bad dataset is told in its own words
    context.custom_execution_callback_classes = [_Pace]
    return _chunk_numbers(num_chunks, free_cpus).map_batches(
        reader, batch_size=None, fn_kwargs={"first_chunk": first_chunk}
    )


def _chunk_numbers(num_chunks: int, free_cpus: float) -> ray.data.Dataset:
    """One row a block. A long plan takes blocks of 1000 and cuts them: one block a chunk from the start costs 1.4 ms
    each (27 s at 20,000). But cutting is two operators more, which hold a CPU each before a read gets one: with
    one free CPU nothing was read for minutes. There, and for a short plan, blocks are single from the start.
    """
    if free_cpus < _WIDE_CPUS or num_chunks <= _DIRECT_CHUNKS:
        return ray.data.range(num_chunks, override_num_blocks=num_chunks)
    return ray.data.range(num_chunks, override_num_blocks=num_chunks // 1000).repartition(target_num_rows_per_block=1)


def data_config() -> DataConfig:
    """Ray Train's splitter with the order kept; its default would overwrite the context's execution options."""
    return DataConfig(execution_options=ExecutionOptions(preserve_order=True))


def rank_batches(
    blocks: Iterator[Mapping[str, NDArray[np.generic]]], plan: OrderPlan, first_step: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """A rank's rows of data steps first_step, first_step + 1, …, from its blocks in the order they are dealt.

    The blocks begin with the group of `first_step`. Raises FeedError if a block is not the one the plan deals.
    """
    first_chunk = plan.first_chunk(first_step)
    group, part = divmod(first_step, plan.steps_per_group)
    while True:
        lanes = rank_lanes(plan, group, first_chunk, rank, world_size)
        held = [_checked(blocks, plan, group * plan.num_lanes + lane) for lane in lanes]
        for served in range(part, plan.steps_per_group):
            yield _slice(held, lanes, plan, group * plan.steps_per_group + served)
        group, part = group + 1, 0


def _checked(
    blocks: Iterator[Mapping[str, NDArray[np.generic]]], plan: OrderPlan, chunk: int
) -> Mapping[str, NDArray[np.generic]]:
    block = next(blocks, None)
    if block is None:
        raise FeedError(f"the data ended before chunk {chunk}; run the same command again")
    wanted = np.arange(chunk * plan.chunk_size, (chunk + 1) * plan.chunk_size)
    if not np.array_equal(block["position"], wanted):
        found = int(block["position"][0]) // plan.chunk_size
        raise FeedError(f"chunk {found} came where the plan has chunk {chunk}; run the same command again")
    return block


def _slice(held: list[Mapping[str, NDArray[np.generic]]], lanes: list[int], plan: OrderPlan, step: int) -> Batch:
    start = (step % plan.steps_per_group) * plan.lane_size
    rows = slice(start, start + plan.lane_size)
    places = [np.arange(plan.lane_size) + lane * plan.lane_size for lane in lanes]
    return Batch(
        step=step,
        image=np.concatenate([block["image"][rows] for block in held]),
        label=np.concatenate([block["label"][rows] for block in held]),
        position=np.concatenate(places) + step * plan.batch_size,
        replaced=tuple(str(reason) for block in held for reason in block["reason"][rows] if reason),
    )
