"""The index: where each sample lies. Parquet parts, one row a sample, one row group a shard.

A row is derived from the stored bytes of its shard. A reader holds what dataset.json says of the parts and fetches the
row groups it needs (see `part`).
"""

import bisect
import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import images, storage
from pipeline.dataset import part, tar
from pipeline.dataset.part import encode_part as encode_part
from pipeline.dataset.record import DatasetError, DatasetRecord, Part

_DECODED_TOGETHER = 64
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
FOREIGN_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),  # as the shard says it: the number follows from the classes of all shards
        ("shard", pa.string()),  # name below shards_url
        ("shard_size", pa.int64()),  # bytes when it was indexed
        ("offset", pa.int64()),
        ("size", pa.int32()),
        ("sha256", pa.binary(32)),  # null: nothing was decoded
    ]
)
"""Of shards that others wrote: a part is derived from its shards alone. `IndexReader` gives rows of SCHEMA."""


def shard_name(number: int) -> str:
    """The name of a shard below its split."""
    return f"shard-{number:06d}.tar"


def part_name(number: int) -> str:
    """The name of an index part below its split."""
    return f"index/part-{number:05d}.parquet"


def rows_of_shard(shard: str, data: bytes, channels: int) -> pa.Table:
    """The index rows of a shard, from its bytes alone; every image is decoded. Raises TarError or ImageError."""
    samples = list(tar.group(tar.scan(data, shard), shard))
    members = [image_member(sample, shard) for sample in samples]
    labels = [sample.members.get("cls") for sample in samples]
    columns: dict[str, list[Any]] = {
        "key": [sample.key for sample in samples],
        "label": [None if one is None else int(data[one.offset : one.offset + one.size_bytes]) for one in labels],
        "shard": [shard] * len(samples),
        "offset": [member.offset for member in members],
        "size": [member.size_bytes for member in members],
        "sha256": _pixel_digests([data[one.offset : one.offset + one.size_bytes] for one in members], channels),
    }
    return pa.table(columns, schema=SCHEMA)


def _pixel_digests(files: Sequence[bytes], channels: int) -> list[bytes]:
    """sha256 of the pixels of each image; some at a time, since together they decode faster."""
    digests: list[bytes] = []
    for start in range(0, len(files), _DECODED_TOGETHER):
        decoded = images.decode_all(files[start : start + _DECODED_TOGETHER], channels)
        digests += [hashlib.sha256(np.ascontiguousarray(pixels).data).digest() for pixels in decoded]
    return digests


def image_member(sample: tar.Sample, where: str) -> tar.Member:
    """The image of a sample; raises TarError if it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    raise tar.TarError(f"{where}: key {sample.key!r} has no image ({', '.join(IMAGE_EXTENSIONS)})")


class IndexReader:
    """Rows of a split by sample number. Picklable; holds names, row counts and digests of the parts, and no rows."""

    def __init__(
        self, split_url: str, parts: Sequence[Part], shards_url: str = "", classes: Sequence[str] = ()
    ) -> None:
        self._split_url = split_url
        self._shards_url = shards_url or split_url
        self._parts = list(parts)
        self._classes = tuple(classes)
        self._ends = list(itertools.accumulate(part.rows for part in parts))

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return self._ends[-1] if self._ends else 0

    def shard_url(self, shard: str) -> str:
        """The URL of a shard named in a row."""
        return storage.join(self._shards_url, shard)

    def rows(self, start: int, stop: int) -> pa.Table:
        """The rows of samples start … stop − 1, which must lie in [0, N]; columns as in SCHEMA, or more.

        Raises DatasetError for a part that is damaged or not the one listed, and for an indexed foreign shard whose
        size has changed.
        """
        assert 0 <= start <= stop <= self.num_samples
        tables = []
        while start < stop:
            number = bisect.bisect_right(self._ends, start)
            first = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            url = storage.join(self._split_url, self._parts[number].name)
            tables.append(self._own(part.read_rows(url, self._parts[number], start - first, end - first)))
            start = end
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()

    def _own(self, rows: pa.Table) -> pa.Table:
        """Rows of foreign shards as ours: sizes compared, class names numbered."""
        if rows.schema != FOREIGN_SCHEMA:
            return rows
        for row in rows.group_by(["shard", "shard_size"], use_threads=False).aggregate([]).to_pylist():
            _check_size(self.shard_url(row["shard"]), row["shard_size"])
        label = pc.index_in(rows["label"], value_set=pa.array(self._classes, pa.string()))
        return rows.set_column(1, "label", label).select(SCHEMA.names)


@functools.lru_cache(maxsize=4096)
def _check_size(shard_url: str, size_bytes: int) -> None:
    """Once a shard and process."""
    found = storage.stat(shard_url)
    if found is None or found.size_bytes != size_bytes:
        has = "is gone" if found is None else f"has {found.size_bytes} bytes"
        raise DatasetError(
            f"{shard_url} {has}, {size_bytes} when it was indexed; restore it, or index the shards again at another URL"
        )


def open_split(url: str, record: DatasetRecord, split: str) -> IndexReader:
    """The index of a split of the dataset whose dataset.json is at `url`; raises DatasetError if it has no such."""
    record.num_samples(split)
    return IndexReader(storage.join(url, split), record.splits[split], record.shards_url, record.classes)
