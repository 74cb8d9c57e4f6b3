"""The index: where each sample lies. Parquet parts, one row a sample, one row group a shard.

A row is derived from the stored bytes of its shard. A reader holds row counts only and fetches the row groups it
needs through a small cache of its process.
"""

import bisect
import functools
import hashlib
import io
import itertools
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import images, storage
from pipeline.dataset import tar
from pipeline.dataset.record import DatasetError, Part

MAX_PART_ROWS = 1_000_000
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),  # null: no label
        ("shard", pa.string()),  # name below the split
        ("offset", pa.int64()),  # of the image's bytes in the shard
        ("size", pa.int32()),  # bytes
        ("sha256", pa.binary(32)),  # of the decoded pixels, uint8 HWC
    ]
)


def shard_name(number: int) -> str:
    """The name of a shard below its split."""
    return f"shard-{number:06d}.tar"


def part_name(number: int) -> str:
    """The name of an index part below its split."""
    return f"index/part-{number:05d}.parquet"


def rows_of_shard(shard: str, data: bytes, channels: int) -> pa.Table:
    """The index rows of a shard, from its bytes alone; every image is decoded. Raises TarError or ImageError."""
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    for sample in tar.group(tar.scan(data, shard), shard):
        image = image_member(sample, shard)
        label = sample.members.get("cls")
        pixels = images.decode(data[image.offset : image.offset + image.size_bytes], channels=channels).pixels
        columns["key"].append(sample.key)
        columns["label"].append(None if label is None else int(data[label.offset : label.offset + label.size_bytes]))
        columns["shard"].append(shard)
        columns["offset"].append(image.offset)
        columns["size"].append(image.size_bytes)
        columns["sha256"].append(hashlib.sha256(pixels.tobytes()).digest())
    return pa.table(columns, schema=SCHEMA)


def image_member(sample: tar.Sample, where: str) -> tar.Member:
    """The image of a sample; raises TarError if it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise tar.TarError(f"{where}: key {sample.key!r} has no image ({', '.join(IMAGE_EXTENSIONS)})")


def encode_part(shards: Sequence[pa.Table]) -> bytes:
    """The Parquet bytes of a part, one row group for each shard's rows; equal rows give equal bytes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, shards[0].schema, compression="zstd") as writer:
        for rows in shards:
            writer.write_table(rows, row_group_size=max(1, len(rows)))
    return sink.getvalue()


class IndexReader:
    """Rows of a split by sample number. Picklable; holds cumulative row counts and nothing else."""

    def __init__(self, split_url: str, parts: Sequence[Part]) -> None:
        self._split_url = split_url
        self._parts = list(parts)
        self._ends = list(itertools.accumulate(part.rows for part in parts))

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return self._ends[-1] if self._ends else 0

    def shard_url(self, shard: str) -> str:
        """The URL of a shard named in a row."""
        return storage.join(self._split_url, shard)

    def rows(self, start: int, stop: int) -> pa.Table:
        """The rows of samples start … stop − 1, which must lie in [0, N]."""
        assert 0 <= start <= stop <= self.num_samples
        tables = []
        while start < stop:
            number = bisect.bisect_right(self._ends, start)
            first = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            part = self._parts[number]
            url = storage.join(self._split_url, part.name)
            tables.append(_part_rows(url, part.sha256, start - first, end - first))
            start = end
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def _part_rows(url: str, sha256: str, start: int, stop: int) -> pa.Table:
    """Rows of one part, through the process's cache of row groups."""
    ends = _row_group_ends(url, sha256)
    tables = []
    while start < stop:
        number = bisect.bisect_right(ends, start)
        if number == len(ends):
            raise DatasetError(f"{url}: has fewer rows than dataset.json says; prepare the dataset again")
        first = ends[number - 1] if number else 0
        end = min(stop, ends[number])
        tables.append(_row_group(url, sha256, number).slice(start - first, end - start))
        start = end
    return pa.concat_tables(tables)


def _row_group_ends(url: str, sha256: str) -> list[int]:
    metadata = _metadata(url, sha256)
    return list(itertools.accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))


@functools.lru_cache(maxsize=64)
def _row_group(url: str, sha256: str, number: int) -> pa.Table:
    with storage.open_seekable(url) as file:
        return pq.ParquetFile(file, metadata=_metadata(url, sha256)).read_row_group(number)


@functools.lru_cache(maxsize=64)
def _metadata(url: str, sha256: str) -> pq.FileMetaData:
    """The footer of a part whose digest is the one that dataset.json lists; asked once a process."""
    if storage.digest(url) != sha256:
        raise DatasetError(f"{url}: not the part that dataset.json lists; restore it, or prepare the dataset again")
    with storage.open_seekable(url) as file:
        return pq.ParquetFile(file).metadata
