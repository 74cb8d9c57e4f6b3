"""One chunk of the order plan: which bytes it needs, and what they show. No Ray.

A chunk travels as an Arrow table of C rows in the order they are served. `data` holds each sample's image file or,
where read tasks decode, its pixels.
"""

import dataclasses
import itertools
from collections.abc import Iterator
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
        ("data", pa.large_binary()),  # an image file, or the R·R·C bytes of its pixels
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

    decode: Literal["auto", "tasks", "trainer"] = "auto"
    """Where images are decoded: by the read tasks, or by threads beside the trainer, so that image files cross the
    object store instead of pixels; auto: beside the trainer where the files are at most half as large as the pixels."""
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

    def decode(self, chunk: "Chunk", places: range, out: NDArray[np.uint8]) -> tuple[NDArray[np.int64], list[str]]:
        """Decode the samples at some places of a chunk into `out`, uint8 [len(places), R, R, C].

        A sample that cannot be decoded is replaced by the next good one of its chunk. Returns the places shown, int64
        [len(places)], and the reasons, "" where none was needed. Raises BadDataError where the chunk has no good one.
        """
        done = [_decode_place(chunk, place, row) for place, row in zip(places, out, strict=True)]
        self._augment(out, chunk.position[places.start : places.stop])
        return np.array([shown for shown, _ in done], np.int64), [reason for _, reason in done]

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
        self._data = _one_array(table["data"])
        self._name, self._reason = table["name"], table["reason"]
        self.label: NDArray[np.int64] = table["label"].to_numpy()
        self.sample: NDArray[np.int64] = table["sample"].to_numpy()
        self.position: NDArray[np.int64] = table["position"].to_numpy()
        start = self._data.offset
        ends = np.frombuffer(self._data.buffers()[1], np.int64)
        self._ends: list[int] = ends[start : start + len(self._data) + 1].tolist()
        self._body = memoryview(self._data.buffers()[2])

    def __len__(self) -> int:
        return len(self._data)

    def data(self, place: int) -> bytes:
        """The image file at a place."""
        return bytes(self._body[self._ends[place] : self._ends[place + 1]])

    def pixels(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """uint8 [C, *shape], a view, of a chunk that a task decoded."""
        body = np.frombuffer(self._body[self._ends[0] : self._ends[-1]], np.uint8)
        return body.reshape(len(self), *shape)

    def name(self, place: int) -> str:
        """Shard and key."""
        return str(self._name[place])

    def reasons(self, places: range) -> list[str]:
        """Why some places show other samples than the planned ones, where they do."""
        return list(filter(None, self._reason[places.start : places.stop].to_pylist()))


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _decode_place(chunk: Chunk, place: int, out: NDArray[np.uint8]) -> tuple[int, str]:
    """The place whose sample `out` shows now, and why it is not the wanted one."""
    reason = ""
    for step in range(len(chunk)):
        at = (place + step) % len(chunk)
        try:
            images.decode_into(chunk.data(at), out)
            return at, reason
        except images.ImageError as error:
            reason = reason or f"{chunk.name(at)}: {error}"
    raise BadDataError(f"no sample of {len(chunk)} near {reason} can be read; prepare the dataset again")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkReader:
    """What a read task does: chunk number → rows. Picklable and small."""

    index: IndexReader
    plan: OrderPlan
    decoder: Decoder
    in_tasks: bool
    """Decode here; else beside the trainer."""

    def __call__(self, numbers: pa.Table, first_chunk: int = 0) -> pa.Table:
        """A block of one number, of a chunk counted from `first_chunk` → the block of that chunk."""
        (number,) = numbers.column(0).to_pylist()
        table = self.read(first_chunk + number)
        return self.decoded(table) if self.in_tasks else table

    def read(self, number: int) -> pa.Table:
        """A chunk's image files. Raises StorageError, DatasetError."""
        samples = self.plan.chunk(number)
        unique, place = np.unique(samples, return_inverse=True)
        rows = self._rows(unique)
        start = number * self.plan.chunk_size
        columns = {
            "data": _gather(list(self._files(rows)), place),
            "label": rows["label"].fill_null(0).cast(pa.int64()).take(place),
            "sample": samples,
            "position": np.arange(start, start + len(samples)),
            "name": pc.binary_join_element_wise(rows["shard"], rows["key"], ": ").take(place),
            "reason": pa.repeat("", len(samples)),
        }
        return pa.table(columns, schema=SCHEMA)

    def decoded(self, table: pa.Table) -> pa.Table:
        """The same chunk with pixels in place of image files."""
        pixels = np.empty((len(table), *self.decoder.shape), np.uint8)
        shown, reasons = self.decoder.decode(Chunk(table), range(len(table)), pixels)
        ends = np.arange(len(table) + 1) * pixels[0].size
        data = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(table), [None, pa.py_buffer(ends), pa.py_buffer(pixels)]
        )
        columns = {
            "data": data,
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

    def _files(self, rows: pa.Table) -> Iterator[memoryview]:
        """The image files of index rows, one ranged read for each run of neighbours in one shard."""
        shards = rows["shard"].to_pylist()
        offset, size = rows["offset"].to_numpy(), rows["size"].to_numpy().astype(np.int64)
        gap = offset[1:] - (offset[:-1] + size[:-1])
        apart = (gap < 0) | (gap > _MERGED_GAP_BYTES) | (np.array(shards[1:]) != np.array(shards[:-1]))
        bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(rows)]
        for start, stop in itertools.pairwise(bounds):
            first = int(offset[start])
            length = int(offset[stop - 1] + size[stop - 1]) - first
            data = _memory.take(length).data
            storage.read_into(self.index.shard_url(shards[start]), first, data)
            for row in range(start, stop):
                yield data[offset[row] - first : offset[row] - first + size[row]]


def _gather(files: list[memoryview], place: NDArray[np.int64]) -> pa.Array:
    """files[place] as one large_binary array, by one copy."""
    ends = np.cumsum([0, *(len(files[at]) for at in place)])
    body = _memory.take(int(ends[-1])).data
    for at, start in zip(place.tolist(), ends.tolist(), strict=False):
        body[start : start + len(files[at])] = files[at]
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(place), [None, pa.py_buffer(ends), pa.py_buffer(body)]
    )


def decodes_in_tasks(config: FeedConfig, file_bytes: float, pixel_bytes: int) -> bool:
    """Whether read tasks decode. Pixels cross the object store then: at 256², ten times what JPEG files are.

    Small PNG files are about as large as their pixels, and decoding them holds Python's lock: processes do it better.
    """
    return config.decode == "tasks" or (config.decode == "auto" and 2 * file_bytes > pixel_bytes)


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
