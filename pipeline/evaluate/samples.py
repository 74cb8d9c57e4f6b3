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

_WINDOW, _THREADS = 1000, 8


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
        parts = list(pool.map(some, windows(numbers)))
    return Samples(
        pixels=np.concatenate([part.pixels for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
    )


def windows(numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Sorted numbers in parts that lie near each other in the index."""
    return np.split(numbers, np.flatnonzero(np.diff(numbers // _WINDOW)) + 1)


def read_samples(reader: IndexReader, numbers: NDArray[np.int64], resolution: int, channels: int) -> Samples:
    """Those samples, by one ranged read a shard. Raises EvaluateError, with shard and key, for an image that cannot be
    decoded or has another size.
    """
    first, last = int(numbers[0]), int(numbers[-1])
    rows = reader.rows(first, last + 1).take(pa.array(numbers - first))
    files: list[bytes] = []
    for shard in pc.unique(rows["shard"]).to_pylist():
        own = rows.filter(pc.equal(rows["shard"], shard))
        starts, sizes = own["offset"].to_numpy(), own["size"].to_numpy()
        begin, end = int(starts.min()), int((starts + sizes).max())
        data = storage.read_range(reader.shard_url(shard), begin, end - begin)
        files += [data[start - begin : start - begin + size] for start, size in zip(starts, sizes, strict=True)]
    pixels = np.empty((len(rows), resolution, resolution, channels), np.uint8)
    names = list(zip(rows["shard"].to_pylist(), rows["key"].to_pylist(), strict=True))
    for place in images.decode_plain(files, pixels):
        pixels[place] = _decoded(files[place], pixels.shape[1:], *names[place])
    labels = rows["label"].fill_null(0).to_numpy().astype(np.int64)
    return Samples(pixels=pixels, labels=labels, keys=tuple(key for _, key in names))


def _decoded(file: bytes, shape: tuple[int, ...], shard: str, key: str) -> Pixels:
    try:
        found = images.decode(file, channels=shape[2]).pixels
    except images.ImageError as error:
        raise EvaluateError(f"{shard}, key {key}: {error}; verify the dataset") from error
    if found.shape != shape:
        raise EvaluateError(
            f"{shard}, key {key}: {found.shape[1]} x {found.shape[0]} pixels, not {shape[0]} x {shape[0]}"
        )
    return found
