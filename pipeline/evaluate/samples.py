"""Which samples of a split are looked at, and their pixels, from the shards where they lie."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import images, philox, storage
from pipeline.dataset.index import IndexReader
from pipeline.errors import InputError
from pipeline.images import Fit, Pixels

_WINDOW, _WINDOW_BYTES, _THREADS = 1000, 2**23, 8
_MERGED_GAP_BYTES = 2**20


class EvaluateError(InputError):
    """Sets that cannot be compared, or a sample that cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What all images of an evaluation are brought to."""

    resolution: int
    """Pixels a side."""
    channels: int
    """1 or 3."""
    fit: Fit | None = None
    """How images of another size are brought to it; None: they are refused."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Some samples of a split, in the order of its index."""

    pixels: Pixels
    """uint8 [N, R, R, C]."""
    labels: NDArray[np.int64]
    """[N]; 0 without classes."""
    keys: tuple[str, ...]
    """N."""

    def of(self, rows: NDArray[np.int64]) -> "Samples":
        """Some of them."""
        keys = tuple(self.keys[row] for row in rows)
        return Samples(pixels=self.pixels[rows], labels=self.labels[rows], keys=keys)


def chosen(num_samples: int, count: int, seed: int) -> NDArray[np.int64]:
    """Sorted numbers of `count` samples of a split, or of all if it has no more; a function of the three alone."""
    if count >= num_samples:
        return np.arange(num_samples, dtype=np.int64)
    key = philox.stream_key(seed, "evaluate/chosen")
    if num_samples <= 4 * count:
        return np.sort(philox.permutation(key, num_samples)[:count])
    draws = 2 * count
    while True:
        drawn = philox.integers(key, np.arange(draws, dtype=np.int64), num_samples)
        _, first = np.unique(drawn, return_index=True)
        if len(first) >= count:
            return np.sort(drawn[np.sort(first)[:count]])  # those drawn earliest
        draws *= 2


def read_all(
    reader: IndexReader,
    numbers: NDArray[np.int64],
    shape: Shape,
    then: Callable[[Pixels], Pixels] = lambda pixels: pixels,
) -> Samples:
    """The same of many, by threads; `then` is done to the pixels of some at a time, to make them smaller."""

    def some(window: NDArray[np.int64]) -> Samples:
        found = read_samples(reader, window, shape)
        return dataclasses.replace(found, pixels=then(found.pixels))

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(some, windows(numbers, shape)))
    return Samples(
        pixels=np.concatenate([part.pixels for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
    )


def windows(numbers: NDArray[np.int64], shape: Shape) -> list[NDArray[np.int64]]:
    """Sorted numbers in parts whose pixels fit easily into memory several times."""
    size = min(_WINDOW, max(1, _WINDOW_BYTES // (shape.resolution**2 * shape.channels)))
    return np.split(numbers, range(size, len(numbers), size))


def read_samples(reader: IndexReader, numbers: NDArray[np.int64], shape: Shape) -> Samples:
    """Samples with these sorted numbers; what lies near each other is read at once. Raises EvaluateError, with shard
    and key, for an image that cannot be decoded or, unless it is to be resized, has another size.
    """
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > _WINDOW) + 1)
    tables = [reader.rows(int(run[0]), int(run[-1]) + 1).take(pa.array(run - run[0])) for run in runs]
    rows = pa.concat_tables(tables)
    files: list[bytes] = []
    for shard in pc.unique(rows["shard"]).to_pylist():
        own = rows.filter(pc.equal(rows["shard"], shard))
        files += _files(reader.shard_url(shard), own["offset"].to_numpy(), own["size"].to_numpy())
    pixels = np.empty((len(rows), shape.resolution, shape.resolution, shape.channels), np.uint8)
    names = list(zip(rows["shard"].to_pylist(), rows["key"].to_pylist(), strict=True))
    for place in images.decode_plain(files, pixels):
        shard, key = names[place]
        pixels[place] = _decoded(files[place], shape, f"{reader.shard_url(shard)}, key {key}")
    labels = rows["label"].fill_null(0).to_numpy().astype(np.int64)
    return Samples(pixels=pixels, labels=labels, keys=tuple(key for _, key in names))


def _files(url: str, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[bytes]:
    """Pieces of a shard, in the order given."""
    ends = starts + sizes
    cuts = np.flatnonzero(starts[1:] - ends[:-1] > _MERGED_GAP_BYTES) + 1
    files = []
    for places in np.split(np.arange(len(starts)), cuts):
        begin, end = int(starts[places].min()), int(ends[places].max())
        data = storage.read_range(url, begin, end - begin)
        files += [data[starts[place] - begin : ends[place] - begin] for place in places]
    return files


def _decoded(file: bytes, shape: Shape, where: str) -> Pixels:
    try:
        found = images.decode(file, channels=shape.channels).pixels
    except images.ImageError as error:
        raise EvaluateError(f"{where}: {error}; verify the dataset") from error
    if shape.fit is not None:
        return images.resize(found, shape.resolution, shape.fit)
    if found.shape[:2] != (shape.resolution, shape.resolution):
        raise EvaluateError(
            f"{where}: {found.shape[1]} x {found.shape[0]} pixels, not {shape.resolution} x {shape.resolution}; "
            "prepare the dataset anew, or have its images resized by --resize crop or pad"
        )
    return found
