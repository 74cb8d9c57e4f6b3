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
from pipeline.images import Pixels

_WINDOW, _WINDOW_BYTES, _THREADS = 1000, 2**23, 8
_MERGED_GAP_BYTES = 2**20


class EvaluateError(InputError):
    """Sets that cannot be compared, or a sample that cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Some samples of a split, in the order of its index."""

    pixels: Pixels
    """uint8 [N, R, R, C]."""
    labels: NDArray[np.int64]
    """[N]; 0 without classes."""
    keys: tuple[str, ...]
    """N."""


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
    resolution: int,
    channels: int,
    then: Callable[[Pixels], Pixels] = lambda pixels: pixels,
) -> Samples:
    """The same of many, by threads; `then` is done to the pixels of some at a time, to make them smaller."""

    def some(window: NDArray[np.int64]) -> Samples:
        found = read_samples(reader, window, resolution, channels)
        return dataclasses.replace(found, pixels=then(found.pixels))

    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(some, windows(numbers, resolution, channels)))
    return Samples(
        pixels=np.concatenate([part.pixels for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
    )


def windows(numbers: NDArray[np.int64], resolution: int, channels: int) -> list[NDArray[np.int64]]:
    """Sorted numbers in parts whose pixels fit easily into memory several times."""
    size = min(_WINDOW, max(1, _WINDOW_BYTES // (resolution * resolution * channels)))
    return np.split(numbers, range(size, len(numbers), size))


def read_samples(reader: IndexReader, numbers: NDArray[np.int64], resolution: int, channels: int) -> Samples:
    """Samples with these sorted numbers; what lies near each other is read at once. Raises EvaluateError, with shard
    and key, for an image that cannot be decoded or has another size.
    """
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > _WINDOW) + 1)
    tables = [reader.rows(int(run[0]), int(run[-1]) + 1).take(pa.array(run - run[0])) for run in runs]
    rows = pa.concat_tables(tables)
    files: list[bytes] = []
    for shard in pc.unique(rows["shard"]).to_pylist():
        own = rows.filter(pc.equal(rows["shard"], shard))
        files += _files(reader.shard_url(shard), own["offset"].to_numpy(), own["size"].to_numpy())
    pixels = np.empty((len(rows), resolution, resolution, channels), np.uint8)
    names = list(zip(rows["shard"].to_pylist(), rows["key"].to_pylist(), strict=True))
    for place in images.decode_plain(files, pixels):
        shard, key = names[place]
        pixels[place] = _decoded(files[place], pixels.shape[1:], f"{reader.shard_url(shard)}, key {key}")
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


def _decoded(file: bytes, shape: tuple[int, ...], where: str) -> Pixels:
    try:
        found = images.decode(file, channels=shape[2]).pixels
    except images.ImageError as error:
        raise EvaluateError(f"{where}: {error}; verify the dataset") from error
    if found.shape != shape:
        raise EvaluateError(
            f"{where}: {found.shape[1]} x {found.shape[0]} pixels, not {shape[0]} x {shape[0]}; prepare it anew"
        )
    return found
