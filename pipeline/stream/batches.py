"""A rank's batches, from the chunks it is dealt: checked against the plan, decoded ahead, in order. No Ray."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import RetryableError
from pipeline.stream.chunk import Chunk, ChunkReader
from pipeline.stream.order import OrderPlan, rank_lanes

STEPS_AHEAD = 3
"""Batches that are ready or being decoded while the trainer works on one: what bounds the feed's memory."""
_JOB_BYTES = 1024**2
_POLL_SEC = 0.5
T = TypeVar("T")


class FeedError(RetryableError):
    """The blocks did not come as the plan says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's rows of the global batch of one data step."""

    step: int
    """Data step t."""
    image: NDArray[np.uint8]
    """[n, R, R, C], 0 … 255."""
    label: NDArray[np.int64]
    """[n]; 0 without classes."""
    sample: NDArray[np.int64]
    """[n], number in the index of the sample shown."""
    position: NDArray[np.int64]
    """[n], place in the global sequence: t·B + row of the global batch."""
    replaced: tuple[str, ...]
    """One reason for each row whose own sample could not be read."""


def rank_batches(
    blocks: Iterator[pa.Table], reader: ChunkReader, first_step: int, rank: int, world_size: int, threads: int
) -> Generator[Batch, None, None]:
    """A rank's rows of data steps first_step, first_step + 1, …, from its blocks in the order they are dealt.

    The blocks begin with the group of `first_step`. Up to STEPS_AHEAD batches are made ahead, by a thread that waits
    for blocks and by `threads` that decode. Raises FeedError if a block is not the one the plan deals.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        started = _started(blocks, reader, first_step, rank, world_size, pool)
        with contextlib.closing(_ahead(started, STEPS_AHEAD)) as ready:
            for unfinished in ready:
                yield unfinished.result()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lane:
    """What one lane gives to a batch: rows of a chunk, and a slice of the batch."""

    chunk: Chunk
    number: int
    rows: range


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unfinished:
    """A batch whose rows are being decoded."""

    step: int
    plan: OrderPlan
    lanes: Sequence[_Lane]
    image: NDArray[np.uint8]
    jobs: Sequence[Future[tuple[NDArray[np.int64], list[str]]]]
    """Of a lane after another: places shown and reasons; none where tasks decoded."""

    def result(self) -> Batch:
        """Wait for the rows. Raises what a decoding thread raised."""
        if self.jobs:
            done = [job.result() for job in self.jobs]
            reasons = [reason for _, said in done for reason in said if reason]
            shown = np.split(np.concatenate([places for places, _ in done]), len(self.lanes))
        else:
            reasons = [reason for lane in self.lanes for reason in lane.chunk.reasons(lane.rows)]
            shown = [np.array(lane.rows) for lane in self.lanes]
        own = np.arange(self.plan.lane_size)
        return Batch(
            step=self.step,
            image=self.image,
            label=np.concatenate([lane.chunk.label[at] for lane, at in zip(self.lanes, shown, strict=True)]),
            sample=np.concatenate([lane.chunk.sample[at] for lane, at in zip(self.lanes, shown, strict=True)]),
            position=np.concatenate([own + lane.number * len(own) for lane in self.lanes])
            + self.step * self.plan.batch_size,
            replaced=tuple(reasons),
        )


def _started(
    blocks: Iterator[pa.Table],
    reader: ChunkReader,
    first_step: int,
    rank: int,
    world_size: int,
    pool: ThreadPoolExecutor,
) -> Iterator[_Unfinished]:
    """Batches whose decoding has begun, in order."""
    plan = reader.plan
    first_chunk = plan.first_chunk(first_step)
    group, part = divmod(first_step, plan.steps_per_group)
    while True:
        numbers = rank_lanes(plan, group, first_chunk, rank, world_size)
        chunks = [_checked(blocks, plan, group * plan.num_lanes + number) for number in numbers]
        for served in range(part, plan.steps_per_group):
            rows = range(served * plan.lane_size, (served + 1) * plan.lane_size)
            lanes = [_Lane(chunk=c, number=n, rows=rows) for c, n in zip(chunks, numbers, strict=True)]
            yield _start(lanes, reader, group * plan.steps_per_group + served, pool)
        group, part = group + 1, 0


def _checked(blocks: Iterator[pa.Table], plan: OrderPlan, number: int) -> Chunk:
    table = next(blocks, None)
    if table is None:
        raise FeedError(f"the data ended before chunk {number}; run the same command again")
    chunk = Chunk(table)
    if not np.array_equal(chunk.position, np.arange(number * plan.chunk_size, (number + 1) * plan.chunk_size)):
        found = int(chunk.position[0]) // plan.chunk_size
        raise FeedError(f"chunk {found} came where the plan has chunk {number}; run the same command again")
    return chunk


def _start(lanes: Sequence[_Lane], reader: ChunkReader, step: int, pool: ThreadPoolExecutor) -> _Unfinished:
    """Slice the batch from decoded chunks, or hand the decoding of its rows to the pool, about 1 MB of pixels a job."""
    shape, size, jobs = reader.decoder.shape, reader.plan.lane_size, []
    if reader.in_tasks:
        image = np.concatenate([lane.chunk.pixels(shape)[lane.rows.start : lane.rows.stop] for lane in lanes])
    else:
        image = np.empty((len(lanes) * size, *shape), np.uint8)
        job_rows = max(1, _JOB_BYTES // image[0].nbytes)
        for at, lane in enumerate(lanes):
            for start in range(0, size, job_rows):
                rows = lane.rows[start : start + job_rows]
                out = image[at * size + start : at * size + start + len(rows)]
                jobs.append(pool.submit(reader.decoder.decode, lane.chunk, rows, out))
    return _Unfinished(step=step, plan=reader.plan, lanes=lanes, image=image, jobs=jobs)


def _ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, up to `depth` of them drawn ahead by a thread; what it raises is raised here, in its place."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=_POLL_SEC)

    def draw() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
            put(error)

    threading.Thread(target=draw, name="feed", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
