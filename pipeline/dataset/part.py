"""A part of the index: a Parquet file of which a reader fetches only the pieces it needs, each checked by its digest.

dataset.json holds the digest of a part's footer, and the footer those of its row groups: whatever is damaged or
exchanged is found before it is parsed, without reading the whole file. A row group is one shard's rows, or a piece of
them. Any Parquet reader reads a part.
"""

import base64
import dataclasses
import hashlib
import io
import itertools
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.dataset.record import DatasetError, Part

MAX_PART_ROWS = 1_000_000
MAX_PART_GROUPS = 128
"""A reader without the footer in its cache reads 360 bytes a row group of it beside the 40 KB of a row group of 1000
rows: with 128 the footer costs as much as the rows, and 1e6 shards make a dataset.json of 3 MB."""
MAX_GROUP_ROWS = 16_384

_GROUPS_KEY = "ganymede.row_groups"
_GROUP = np.dtype([("rows", "<i8"), ("end", "<i8"), ("sha256", "u1", 32)])
_TAIL_BYTES = 8  # length of the footer and magic
_FOOTER_CACHE_BYTES, _ROWS_CACHE_BYTES = 16 * 1024**2, 32 * 1024**2
_PARSED_SIZE = 8  # a parsed footer in memory takes about so many times its stored size

V = TypeVar("V")


def fill_parts(shards: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Shards' rows, in order, as the row groups of each part: at most MAX_GROUP_ROWS rows in one, and at most
    MAX_PART_GROUPS of them and MAX_PART_ROWS rows in a part.
    """
    part: list[pa.Table] = []
    for shard in shards:
        for start in range(0, len(shard), MAX_GROUP_ROWS):
            group = shard.slice(start, MAX_GROUP_ROWS)
            if len(part) == MAX_PART_GROUPS or sum(map(len, part)) + len(group) > MAX_PART_ROWS:
                yield part
                part = []
            part.append(group)
    if part:
        yield part


def encode_part(shards: Sequence[pa.Table], notes: Mapping[str, str] = types.MappingProxyType({})) -> bytes:
    """The bytes of a part: each table makes a row group, or several; equal rows and notes give equal bytes.

    `notes` are kept in the footer, see `note`.
    """
    body = io.BytesIO()
    with _writer(body, shards[0].schema) as writer:
        for rows in filter(len, shards):
            writer.write_table(rows, row_group_size=MAX_GROUP_ROWS)
    data = body.getvalue()
    metadata = pq.read_metadata(io.BytesIO(data))
    # The footer comes last and lists digests of what precedes it, so it is written anew once that is known.
    pieces = data[: len(data) - _footer_bytes(data)]
    footer = io.BytesIO()
    with _writer(footer, shards[0].schema) as writer:
        digests = base64.b64encode(_digests(metadata, pieces).tobytes()).decode()
        writer.add_key_value_metadata({_GROUPS_KEY: digests, **notes})
    listed = pq.read_metadata(io.BytesIO(footer.getvalue()))
    listed.append_row_groups(metadata)
    footer = io.BytesIO()
    listed.write_metadata_file(footer)
    return pieces + footer.getvalue()[4:]


def _writer(sink: io.BytesIO, schema: pa.Schema) -> pq.ParquetWriter:
    """Without statistics, which would make the footer half as large again; only shard names repeat."""
    repeated = [field.name for field in schema if field.name == "shard"]
    return pq.ParquetWriter(sink, schema, compression="zstd", write_statistics=False, use_dictionary=repeated)


def _digests(metadata: pq.FileMetaData, pieces: bytes) -> NDArray[np.void]:
    """Rows, end and digest of each row group; together they cover every byte before the footer."""
    table = np.zeros(metadata.num_row_groups, _GROUP)
    starts = [_first_page(metadata.row_group(i).column(0)) for i in range(1, metadata.num_row_groups)]
    table["end"] = [*starts, len(pieces)][: len(table)]
    for i, (start, end) in enumerate(itertools.pairwise([0, *table["end"].tolist()])):
        table["rows"][i] = metadata.row_group(i).num_rows
        table["sha256"][i] = np.frombuffer(hashlib.sha256(pieces[start:end]).digest(), np.uint8)
    return table


def _first_page(column: pq.ColumnChunkMetaData) -> int:
    return int(column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset)


def _footer_bytes(data: bytes) -> int:
    return int.from_bytes(data[-8:-4], "little") + _TAIL_BYTES


def describe_part(name: str, data: bytes) -> Part:
    """What dataset.json says of a part, from its stored bytes; `name` is its path below the split."""
    footer_bytes = _footer_bytes(data)
    return Part(
        name=name,
        rows=pq.read_metadata(io.BytesIO(data)).num_rows,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        footer_bytes=footer_bytes,
        footer_sha256=hashlib.sha256(data[-footer_bytes:]).hexdigest(),
    )


def note(data: bytes, name: str) -> str:
    """A note of a part, from its bytes."""
    return str(pq.read_metadata(io.BytesIO(data)).metadata[name.encode()].decode())


# ------------------------------------------------------------------------------------------------------ reading


def read_rows(url: str, part: Part, start: int, stop: int) -> pa.Table:
    """Rows start … stop − 1 of a part, from the row groups that hold them, through the caches of this process.

    Raises DatasetError where the part, its footer or one of these row groups is not what dataset.json lists.
    """
    layout = _layouts.get((url, part.sha256), lambda: _read_layout(url, part))
    if layout.ends[-1:].tolist() != [part.rows]:
        raise DatasetError(f"{url}: does not have the {part.rows} rows that dataset.json says; prepare it again")
    first, last = np.searchsorted(layout.ends, [start, stop - 1], side="right").tolist()
    groups = [_group(url, part, layout, number) for number in range(first, last + 1)]
    before = int(layout.ends[first - 1]) if first else 0
    return pa.concat_tables(groups).slice(start - before, stop - start)


class _Cache(Generic[V]):
    """What was used last, bounded in bytes; one a process, shared by its threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._held_bytes = max_bytes, 0
        self._entries: OrderedDict[object, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object, load: Callable[[], tuple[V, int]]) -> V:
        """The value of a key; `load` gives it and its size in bytes where it is not held."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]
        value, size_bytes = load()
        with self._lock:
            self._held_bytes += size_bytes - self._entries.pop(key, (None, 0))[1]
            self._entries[key] = value, size_bytes
            while self._held_bytes > self._max_bytes and len(self._entries) > 1:
                self._held_bytes -= self._entries.popitem(last=False)[1][1]
        return value


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A checked footer."""

    metadata: pq.FileMetaData
    ends: NDArray[np.int64]
    """Rows up to the end of each row group."""
    groups: NDArray[np.void]
    """Digests (_GROUP); empty where the whole part was checked at once."""
    data: bytes | None
    """The part, where it was read whole."""


_layouts: _Cache[_Layout] = _Cache(_FOOTER_CACHE_BYTES)
_tables: _Cache[pa.Table] = _Cache(_ROWS_CACHE_BYTES)


def _read_layout(url: str, part: Part) -> tuple[_Layout, int]:
    if not part.footer_sha256:
        return _read_whole(url, part)
    footer = _fetch(url, part.size_bytes - part.footer_bytes, part.footer_bytes)
    _check(footer, part.footer_sha256, url)
    metadata = pq.read_metadata(io.BytesIO(footer))
    groups = np.frombuffer(base64.b64decode(metadata.metadata[_GROUPS_KEY.encode()]), _GROUP)
    layout = _Layout(metadata, np.cumsum(groups["rows"]), groups, None)
    return layout, len(footer) * _PARSED_SIZE


def _read_whole(url: str, part: Part) -> tuple[_Layout, int]:
    """Of a part whose footer dataset.json does not describe (a generated shard's, small), everything is checked."""
    data = storage.read(url)
    _check(data, part.sha256, url)
    metadata = pq.read_metadata(io.BytesIO(data))
    ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], dtype=np.int64)
    return _Layout(metadata, ends, np.zeros(0, _GROUP), data), len(data)


def _group(url: str, part: Part, layout: _Layout, number: int) -> pa.Table:
    def load() -> tuple[pa.Table, int]:
        source = io.BytesIO(layout.data) if layout.data is not None else _read_group(url, layout.groups, number)
        rows = pq.ParquetFile(source, metadata=layout.metadata).read_row_group(number)
        return rows, rows.nbytes

    return _tables.get((url, part.sha256, number), load)


def _read_group(url: str, groups: NDArray[np.void], number: int) -> "_Piece":
    start = int(groups["end"][number - 1]) if number else 0
    data = _fetch(url, start, int(groups["end"][number]) - start)
    _check(data, groups["sha256"][number].tobytes().hex(), url)
    return _Piece(data, start)


class _Piece(io.RawIOBase):
    """A piece of a file at its place in it: what lies elsewhere is not there to be read."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._start, self._offset = memoryview(data), start, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + (0, self._offset, self._start + len(self._data))[whence]
        return self._offset

    def readinto(self, buffer: Any) -> int:
        found = self._data[self._offset - self._start :][: len(buffer)]
        buffer[: len(found)] = found
        self._offset += len(found)
        return len(found)


def _fetch(url: str, offset: int, size_bytes: int) -> bytes:
    try:
        return storage.read_range(url, offset, size_bytes)
    except storage.StorageUnavailableError:
        raise
    except storage.StorageError as error:
        raise DatasetError(f"the part {error}") from error


def _check(data: bytes, sha256: str, url: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DatasetError(f"{url}: not the part that dataset.json lists; restore it, or prepare the dataset again")
