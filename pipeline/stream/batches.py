"""A rank's batches, from the chunks it is dealt: checked against the plan, decoded ahead, in order. No Ray."""

import contextlib
import dataclasses
import itertools
import math
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import RetryableError
from pipeline.stream.chunk import Chunk, ChunkReader, Decoder
from pipeline.stream.memory import Recycled
from pipeline.stream.order import OrderPlan, rank_lanes

STEPS_AHEAD = 1
"""Batches that are ready or being decoded while the trainer works on one: what bounds the feed's memory. With three, 64
images of 256² no longer stayed in 32 MB of cache, and decoding took 7 % longer."""
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
        started = _started(blocks, reader, first_step, rank, world_size, pool, threads)
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
    """A batch whose rows are being filled in."""

    batch: Batch
    jobs: Sequence[Future[list[str]]]
    """Of one share of the rows after another: why rows show other samples than their own; none where tasks decoded."""

    def result(self) -> Batch:
        """Wait for the rows. Raises what a decoding thread raised."""
        reasons = [reason for job in self.jobs for reason in job.result()]
        return dataclasses.replace(self.batch, replaced=tuple(reasons)) if reasons else self.batch


def _started(
    blocks: Iterator[pa.Table],
    reader: ChunkReader,
    first_step: int,
    rank: int,
    world_size: int,
    pool: ThreadPoolExecutor,
    threads: int,
) -> Generator[_Unfinished, None, None]:
    """Batches whose decoding has begun, in order."""
    plan, memory = reader.plan, Recycled()
    group, part = divmod(first_step, plan.steps_per_group)
    # A group at a time is too late: the next one, of L chunks, is fetched while this one is served.
    with contextlib.closing(_ahead(_groups(blocks, plan, first_step, rank, world_size), 1)) as groups:
        for numbers, chunks in groups:
            for served in range(part, plan.steps_per_group):
                rows = range(served * plan.lane_size, (served + 1) * plan.lane_size)
                lanes = [_Lane(chunk=c, number=n, rows=rows) for c, n in zip(chunks, numbers, strict=True)]
                yield _start(lanes, reader, group * plan.steps_per_group + served, pool, threads, memory)
            group, part = group + 1, 0


def _groups(
    blocks: Iterator[pa.Table], plan: OrderPlan, first_step: int, rank: int, world_size: int
) -> Generator[tuple[list[int], list[Chunk]], None, None]:
    """A rank's lanes of one group after another, and their chunks."""
    for group in itertools.count(first_step // plan.steps_per_group):
        lanes = rank_lanes(plan, group, plan.first_chunk(first_step), rank, world_size)
        yield lanes, [_checked(blocks, plan, group * plan.num_lanes + lane) for lane in lanes]


def _checked(blocks: Iterator[pa.Table], plan: OrderPlan, number: int) -> Chunk:
    table = next(blocks, None)
    if table is None:
        raise FeedError(f"the data ended before chunk {number}; run the same command again")
    chunk = Chunk(table)
    if not np.array_equal(chunk.position, np.arange(number * plan.chunk_size, (number + 1) * plan.chunk_size)):
        found = int(chunk.position[0]) // plan.chunk_size
        raise FeedError(f"chunk {found} came where the plan has chunk {number}; run the same command again")
    return chunk


def _start(
    lanes: Sequence[_Lane], reader: ChunkReader, step: int, pool: ThreadPoolExecutor, threads: int, memory: Recycled
) -> _Unfinished:
    """Slice the batch from decoded chunks, or hand the decoding of its rows to the pool."""
    plan, shape = reader.plan, reader.decoder.shape
    num_rows = len(lanes) * plan.lane_size
    image = memory.take(num_rows * math.prod(shape)).reshape(num_rows, *shape)
    rows = slice(lanes[0].rows.start, lanes[0].rows.stop)  # of every lane
    numbers = np.array([lane.number for lane in lanes])
    batch = Batch(
        step=step,
        image=image,
        label=np.concatenate([lane.chunk.label[rows] for lane in lanes]),
        sample=np.concatenate([lane.chunk.sample[rows] for lane in lanes]),
        position=np.add.outer(numbers * plan.lane_size, np.arange(plan.lane_size)).ravel() + step * plan.batch_size,
        replaced=(),
    )
    if reader.in_tasks:
        np.concatenate([lane.chunk.pixels(shape)[rows] for lane in lanes], out=image)
        reasons = [reason for lane in lanes for reason in lane.chunk.reasons(lane.rows)]
        return _Unfinished(batch=dataclasses.replace(batch, replaced=tuple(reasons)), jobs=())
    share = max(1, -(-num_rows // threads))
    starts = range(0, num_rows, share)
    jobs = [pool.submit(_decode, reader.decoder, lanes, batch, start, min(start + share, num_rows)) for start in starts]
    return _Unfinished(batch=batch, jobs=jobs)


def _decode(decoder: Decoder, lanes: Sequence[_Lane], batch: Batch, start: int, stop: int) -> list[str]:
    """Decode rows start … stop - 1 of a batch; reasons, of those that show other samples than their own.

    One job a thread and batch: each end of a job wakes the consumer, and a thread that wakes while all cores decode
    holds Python's lock until it gets one.
    """
    said = []
    size = len(lanes[0].rows)
    for at, lane in enumerate(lanes):
        first, last = max(start, at * size), min(stop, (at + 1) * size)
        if first < last:
            places = lane.rows[first - at * size : last - at * size]
            for row, (shown, reason) in decoder.decode(lane.chunk, places, batch.image[first:last]).items():
                batch.label[first + row], batch.sample[first + row] = lane.chunk.label[shown], lane.chunk.sample[shown]
                said.append(reason)
    return said


def _ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The same items, up to `depth` of them drawn ahead by a thread; what it raises is raised here, in its place."""
    ready: queue.Queue[T | BaseException | None] = queue.Queue()
    room, stop = threading.Semaphore(depth), threading.Event()

    def draw() -> None:
        try:
            while room.acquire() and not stop.is_set():
                ready.put(next(items, None))
            items.close()
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
            ready.put(error)

    threading.Thread(target=draw, name="feed", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item
    finally:
        stop.set()
        room.release()
