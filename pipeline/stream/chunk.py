"""One chunk of the order plan: which bytes it needs, and what they show. No Ray.

A chunk travels as an Arrow table of C rows in the order they are served. The bytes that were read, or where read tasks
decode the pixels, lie in the first row's `data`, and every row says where in them it is: so they are copied nowhere.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import images, philox, storage
from pipeline.config import ConfigError
from pipeline.dataset.index import IndexReader
from pipeline.errors import InputError
from pipeline.stream.memory import Recycled
from pipeline.stream.order import OrderPlan

SCHEMA = pa.schema(
    [
        ("data", pa.large_binary()),  # all bytes of the chunk in the first row, none in the others
        ("start", pa.int64()),  # where in them this row's image file begins, or the R·R·C bytes of its pixels
        ("size", pa.int64()),  # their number
        ("label", pa.int64()),  # 0 without classes
        ("sample", pa.int64()),  # number in the index
        ("position", pa.int64()),  # place in the sequence of all chunks: n·C + i
        ("name", pa.string()),  # shard and key
        ("reason", pa.string()),  # why it shows another sample than the planned one; empty: it does not
    ]
)
_CHUNK_BYTES = 64 * 1024**2
_GROUP_BYTES = 128 * 1024**2
_CHUNK_SAMPLES = 1024
_MERGED_GAP_BYTES = 1024**2
_memory = Recycled()
"""Of a read task, which is the only one in its process."""
_MIXED_RATIO, _RUNS_PER_CHUNK = 2.0, 4


class BadDataError(InputError):
    """A chunk in which no sample can be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """How samples reach the networks."""

    decode: Literal["trainer", "tasks"] = "trainer"
    """Where images are decoded: by threads beside the trainer, so that image files cross the object store, or by the
    read tasks. On two cores the first was faster by 2.3 for 256² JPEG, whose pixels are ten times its bytes, and by 1.4
    for 32² PNG; tasks spare a trainer whose own cores are busy while others idle."""
    flip: bool = False
    """Mirror each sample left to right with probability 1/2, by (seed, position)."""
    crop_px: int = 0
    """Shift each sample by up to so many pixels each way, by (seed, position): the edge is mirrored, then cropped."""

    def __post_init__(self) -> None:
        if self.crop_px < 0:
            raise ConfigError(f"crop_px must be at least 0, not {self.crop_px}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Image files → the pixels that a network is shown."""

    resolution: int
    channels: int
    seed: int = 0
    flip: bool = False
    crop_px: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """[R, R, C] of a sample."""
        return self.resolution, self.resolution, self.channels

    def decode(self, chunk: "Chunk", places: range, out: NDArray[np.uint8]) -> dict[int, tuple[int, str]]:
        """Decode the samples at some places of a chunk into `out`, uint8 [len(places), R, R, C].

        A sample that cannot be decoded is replaced by the next good one of its chunk: returns, of each row where that
        was needed, the place shown and the reason. Raises BadDataError where the chunk has no good one.
        """
        files, replaced = [chunk.file(place) for place in places], {}
        for row in images.decode_plain(files, out):
            try:
                images.decode_into(bytes(files[row]), out[row])
            except images.ImageError as error:
                replaced[row] = _next_good(chunk, places[row], out[row], str(error))
        self._augment(out, chunk.position[places.start : places.stop])
        return replaced

    def _augment(self, out: NDArray[np.uint8], position: NDArray[np.int64]) -> None:
        """Flip and shift in place; what happens to a row depends on its position alone."""
        if self.flip:
            coin = philox.integers(philox.stream_key(self.seed, "flip"), position, 2) == 1
            out[coin] = out[coin, :, ::-1]
        if self.crop_px:
            raw = philox.words(philox.stream_key(self.seed, "crop"), position, 2)
            shift = (raw * np.uint64(2 * self.crop_px + 1) >> np.uint64(32)).astype(int)
            pad, size = self.crop_px, self.resolution
            for row, (top, left) in zip(out, shift, strict=True):
                wide = np.pad(row, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
                row[:] = wide[top : top + size, left : left + size]


class Chunk:
    """A chunk's table, opened without a copy."""

    def __init__(self, table: pa.Table) -> None:
        data = table["data"].combine_chunks() if table["data"].num_chunks > 1 else table["data"].chunk(0)
        start, stop = np.frombuffer(data.buffers()[1], np.int64)[data.offset : data.offset + 2].tolist()
        self._name, self._reason = table["name"], table["reason"]
        self.label: NDArray[np.int64] = table["label"].to_numpy()
        self.sample: NDArray[np.int64] = table["sample"].to_numpy()
        self.position: NDArray[np.int64] = table["position"].to_numpy()
        self._start: list[int] = table["start"].to_pylist()
        self._size: list[int] = table["size"].to_pylist()
        self.bad: set[int] = set()
        """Places found not to decode, so that many are not tried again for each of many."""
        self._body = memoryview(data.buffers()[2]).cast("B")[start:stop]  # a scalar would be a copy

    def __len__(self) -> int:
        return len(self.position)

    def file(self, place: int) -> memoryview:
        """The image file at a place."""
        return self._body[self._start[place] : self._start[place] + self._size[place]]

    def pixels(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """uint8 [C, *shape], a view, of a chunk that a task decoded."""
        return np.frombuffer(self._body, np.uint8).reshape(len(self), *shape)

    def name(self, place: int) -> str:
        """Shard and key."""
        return str(self._name[place])

    def reasons(self, places: range) -> list[str]:
        """Why some places show other samples than the planned ones, where they do."""
        return list(filter(None, self._reason[places.start : places.stop].to_pylist()))


def _next_good(chunk: Chunk, bad: int, out: NDArray[np.uint8], error: str) -> tuple[int, str]:
    """The place whose sample `out` shows now in place of a bad one's, and why."""
    reason = f"{chunk.name(bad)}: {error}"
    chunk.bad.add(bad)
    for at in (place % len(chunk) for place in range(bad + 1, bad + len(chunk))):
        if at not in chunk.bad:
            try:
                images.decode_into(bytes(chunk.file(at)), out)
            except images.ImageError:
                chunk.bad.add(at)
            else:
                return at, reason
    raise BadDataError(f"no sample of {len(chunk)} near {reason} can be read; prepare the dataset again")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkReader:
    """What a read task does: chunk number → rows. Picklable and small."""

    index: IndexReader
    plan: OrderPlan
    decoder: Decoder
    in_tasks: bool
    """Decode here; else beside the trainer."""
    storage_timeout_sec: float = 0.0
    """A store that cannot be reached is tried again for so long."""

    def __call__(self, numbers: pa.Table) -> pa.Table:
        """A block of one chunk number → the block of that chunk."""
        (number,) = numbers.column(0).to_pylist()
        table = storage.patiently(functools.partial(self.read, number), self.storage_timeout_sec)
        return self.decoded(table) if self.in_tasks else table

    def read(self, number: int) -> pa.Table:
        """A chunk's image files. Raises StorageError, DatasetError."""
        samples = self.plan.chunk(number)
        unique, place = np.unique(samples, return_inverse=True)
        rows = self._rows(unique)
        body, starts = self._read(rows)
        first = number * self.plan.chunk_size
        columns = {
            "data": _in_first_row(body, len(samples)),
            "start": starts[place],
            "size": rows["size"].cast(pa.int64()).take(place),
            "label": rows["label"].fill_null(0).cast(pa.int64()).take(place),
            "sample": samples,
            "position": np.arange(first, first + len(samples)),
            "name": pc.binary_join_element_wise(rows["shard"], rows["key"], ": ").take(place),
            "reason": pa.repeat("", len(samples)),
        }
        return pa.table(columns, schema=SCHEMA)

    def decoded(self, table: pa.Table) -> pa.Table:
        """The same chunk with pixels in place of image files."""
        pixels = np.empty((len(table), *self.decoder.shape), np.uint8)
        replaced = self.decoder.decode(Chunk(table), range(len(table)), pixels)
        shown, reasons = np.arange(len(table)), [""] * len(table)
        for row, (place, reason) in replaced.items():
            shown[row], reasons[row] = place, reason
        each = pixels[0].size
        columns = {
            "data": _in_first_row(pixels, len(table)),
            "start": np.arange(len(table)) * each,
            "size": pa.repeat(each, len(table)),
            "label": table["label"].take(shown),
            "sample": table["sample"].take(shown),
            "position": table["position"],
            "name": table["name"],
            "reason": reasons,
        }
        return pa.table(columns, schema=SCHEMA)

    def _rows(self, samples: NDArray[np.int64]) -> pa.Table:
        """Index rows of ascending sample numbers, one request for each run of consecutive ones."""
        cuts = np.flatnonzero(np.diff(samples) != 1) + 1
        runs = np.split(samples, cuts)
        return pa.concat_tables([self.index.rows(int(run[0]), int(run[-1]) + 1) for run in runs])

    def _read(self, rows: pa.Table) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The bytes of index rows and where in them each file begins: a ranged read a run of neighbours in a shard."""
        shards = rows["shard"].to_numpy()
        offset, size = (rows[name].to_numpy().astype(np.int64) for name in ("offset", "size"))
        gap = offset[1:] - (offset[:-1] + size[:-1])
        apart = (gap > _MERGED_GAP_BYTES) | (shards[1:] != shards[:-1])
        first = np.concatenate([[0], np.flatnonzero(apart) + 1])
        last = np.concatenate([first[1:], [len(rows)]]) - 1
        lengths = offset[last] + size[last] - offset[first]
        begins = np.cumsum(lengths) - lengths
        body = _memory.take(int(lengths.sum()))
        for row, begin, length in zip(first.tolist(), begins.tolist(), lengths.tolist(), strict=True):
            storage.read_into(self.index.shard_url(shards[row]), int(offset[row]), body[begin : begin + length].data)
        return body, offset + np.repeat(begins - offset[first], last + 1 - first)


def _in_first_row(body: NDArray[np.uint8], rows: int) -> pa.Array:
    """A large_binary column, without a copy."""
    ends = np.full(rows + 1, body.nbytes)
    ends[0] = 0
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), rows, [None, pa.py_buffer(ends), pa.py_buffer(body)])


def default_steps_per_group(num_samples: int, batch_size: int, num_lanes: int, sample_bytes: float) -> int:
    """k: a chunk ≤ 64 MB, ≤ 1024 samples and ≤ the dataset, a group ≤ 128 MB, at least one step.

    Two groups are held, one served and one arriving. `sample_bytes` is a sample's size in the form they hold.
    """
    lane_size = batch_size // num_lanes
    chunk_samples = min(_CHUNK_SAMPLES, num_samples, int(_CHUNK_BYTES / sample_bytes))
    return max(1, min(chunk_samples // lane_size, int(_GROUP_BYTES / sample_bytes) // batch_size))


def default_runs_per_chunk(chunk_size: int, label_run_ratio: float) -> int:
    """m: one run a chunk where the index is mixed, else the largest divisor of C up to 4."""
    if label_run_ratio <= _MIXED_RATIO:
        return 1
    return max(m for m in range(1, _RUNS_PER_CHUNK + 1) if chunk_size % m == 0)
