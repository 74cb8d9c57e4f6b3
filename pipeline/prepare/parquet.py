"""Parquet files with a column of image files, as the Hugging Face hub lays them out.

A row group is the least that can be read, and the hub's hold 100 or 1000 images: one image costs as much as all of
them. So a listing reads no image, only footers and the label column; and a shard is made of few row groups
(`plan.order_of_blocks`), each of which its task reads once (`sources.read_items`).
"""

import functools
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.dataset.label import parse_label
from pipeline.dataset.names import IMAGE_EXTENSIONS, SPLITS, is_hidden
from pipeline.prepare.listing import Item, ItemError, Source, SourceError, finish, refuse_mixture

MAX_BLOCK_BYTES = 1024**3
_EXTENSION = ".parquet"
_COLUMN = "column:"
_IMAGE_NAMES = ("image", "img", "jpg", "png")
_LABEL_NAMES = ("label", "labels", "fine_label", "class")
_HUB_FILE = re.compile(r"(.+?)-\d+-of-\d+.*")
_NUMBER = re.compile(r"[-_.]?\d+$")
_CACHED_FOOTERS = 256
_BROKEN = (pa.ArrowException, OSError, ValueError, IndexError)  # ValueError: names that are not UTF-8


class Block(NamedTuple):
    """The images of a row group."""

    url: str
    image_column: str
    number: int


class _Footer(NamedTuple):
    """What a file says of itself."""

    metadata: pq.FileMetaData
    schema: pa.Schema


class _Columns(NamedTuple):
    """Which column holds what."""

    image: str
    """Of image files: a binary column, or the bytes of a struct."""
    label: str
    """Empty: none."""
    is_class_label: bool
    """Whether the hub's metadata calls it one: there −1 is no label."""
    names: tuple[str, ...]
    """Of the classes; empty: not told."""


def is_parquet(url: str, names: Sequence[str]) -> bool:
    """Whether these are the files of a Parquet source, and not a folder of images with a table beside them."""
    files = _files(names)
    pictures = any(name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for name in names if not is_hidden(name))
    if not files or not pictures:
        return bool(files)
    return bool(_find_image(_footer(storage.join(url, files[0])).schema))


def scan_parquet(
    url: str, sizes: Mapping[str, int], label_field: str, class_names: Sequence[str], image_column: str
) -> Source:
    """List the rows of the Parquet files among `sizes` (bytes by name): footers and labels are read, no image is.

    Identity is labels and footers; those tell where the images lie and how large they are, not what they show.
    Raises SourceError, LabelError, StorageError.
    """
    if label_field != "cls" and not label_field.startswith(_COLUMN):
        raise SourceError(f"source {url} is Parquet; its labels are in a column: --label-field {_COLUMN}NAME")
    wanted_label = label_field.removeprefix(_COLUMN) if label_field.startswith(_COLUMN) else ""
    files = _files(list(sizes))
    splits = _splits(url, files)
    first = _columns(storage.join(url, files[0]), wanted_label, image_column)
    items: list[Item] = []
    content = hashlib.sha256(repr(first).encode())
    for name in files:
        where = storage.join(url, name)
        if _columns(where, wanted_label, image_column) != first:
            raise SourceError(f"source {url}: {files[0]} and {name} differ in their columns; name a folder of one kind")
        content.update(f"{name}\0{_footer_digest(where, sizes[name])}\n".encode(errors="surrogateescape"))
        items += _items(where, name, splits[name], first, sizes[name])
    if not items:
        raise SourceError(f"source {url} holds no images: its {len(files)} Parquet files have no rows")
    for split in sorted(set(splits.values())):  # the hub's test splits may have no labels where train has
        same = [item for item in items if item.split == split]
        refuse_mixture(url, [item.name for item in same], [item.label is not None for item in same], "with a label")
    ignored = sum(not is_hidden(name) for name in sizes) - len(files)
    return finish("parquet", url, items, class_names or first.names, ignored, content.hexdigest(), first.image)


def read_image(block: Block, row: int) -> bytes:
    """The image file in a row of a block; the block read last is kept. Raises ItemError, SourceError, StorageError."""
    if block.number >= _footer(block.url).metadata.num_row_groups:
        raise SourceError(f"{block.url}: has lost row group {block.number}; leave the source alone")
    column = _images(block)
    if row >= len(column):
        raise SourceError(f"{block.url}: row group {block.number} has lost rows; leave the source alone")
    value = column[row].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        raise ItemError("null: the file holds no bytes for this image")
    return bytes(data)


@functools.lru_cache(maxsize=1)
def _images(block: Block) -> pa.ChunkedArray:
    try:
        with _ranges(block.url) as file:
            metadata = _footer(block.url).metadata
            parquet = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)
            return parquet.read_row_group(block.number, columns=[block.image_column]).column(0)
    except _BROKEN as error:
        raise ItemError(f"cannot read row group {block.number}: {_line(error)}") from error


# --------------------------------------------------------------------------------------------------- files


def _files(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(_EXTENSION) and not is_hidden(name)]


def _splits(url: str, files: Sequence[str]) -> dict[str, str]:
    """File → split; raises SourceError for splits of other names, and for the same split in two configurations."""
    found = {name: _split(name) for name in files}
    other = sorted({split for split in found.values() if split not in SPLITS.values()})
    if len(other) > 1 or (other and len(set(found.values())) > 1):
        example = next(name for name, split in found.items() if split == other[-1])
        raise SourceError(f"source {url} has files of train, test or val(idation) and others, as {example}; move those")
    places: dict[str, str] = {}
    for name, split in found.items():
        top = name.split("/")[0] if "/" in name and _word(name.split("/")[0]) not in SPLITS else ""
        if places.setdefault(split, top) != top:
            raise SourceError(
                f"source {url} has the same split in {places[split] or '.'} and in {top}; name one folder"
            )
    return {name: "train" if split in other else split for name, split in found.items()}


def _split(name: str) -> str:
    """The split that a file's name or the nearest folder tells; else what stands in its place, or nothing."""
    *folders, last = name[: -len(_EXTENSION)].split("/")
    for part in (last, *reversed(folders)):
        if _word(part) in SPLITS:
            return SPLITS[_word(part)]
    if last.isdigit() and folders:  # default/extra/0000.parquet
        return f"? {folders[-1]}"
    return f"? {_word(last)}" if _HUB_FILE.fullmatch(last) else "?"


def _word(part: str) -> str:
    """What remains of a name without the hub's numbering: train-00000-of-00003-<hash>, partial-train, train_1."""
    hub = _HUB_FILE.fullmatch(part)
    return _NUMBER.sub("", hub[1] if hub else part).lower().removeprefix("partial-")


@functools.lru_cache(maxsize=_CACHED_FOOTERS)
def _footer(url: str) -> _Footer:
    with _whole(url), _ranges(url) as file:
        parquet = pq.ParquetFile(file)
        return _Footer(parquet.metadata, parquet.schema_arrow)


def _footer_digest(url: str, size_bytes: int) -> str:
    length = int.from_bytes(storage.read_range(url, size_bytes - 8, 4), "little")
    return hashlib.sha256(storage.read_range(url, size_bytes - 8 - length, length)).hexdigest()


@contextmanager
def _ranges(url: str) -> Iterator[io.RawIOBase]:
    """The file without its buffer, which would fetch a megabyte for the labels of each row group."""
    with storage.open_seekable(url) as file:
        yield cast(io.RawIOBase, file.raw)


@contextmanager
def _whole(where: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise SourceError(f"{where}: not a whole Parquet file ({_line(error)}); copy it again") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------------------------------------------- rows


def _items(where: str, name: str, split: str, columns: _Columns, size_bytes: int) -> Iterator[Item]:
    counts = _row_counts(where, size_bytes)
    labels = _labels(where, columns) if columns.label else [None] * sum(counts)
    if len(labels) != sum(counts):
        raise SourceError(f"{where}: {sum(counts)} rows and {len(labels)} labels; copy it again")
    numbered = enumerate(labels)
    for block, count in enumerate(counts):
        for row in range(count):
            number, label = next(numbered)
            yield Item(split, f"{name}#{number:09d}", label, name, row, None, block)


def _row_counts(where: str, size_bytes: int) -> list[int]:
    """Rows of each row group, none of them more than can be read."""
    metadata = _footer(where).metadata
    # Of a row group only what it says itself is asked: its `column()` ends the process where a footer is damaged.
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    counts = [int(group.num_rows) for group in groups]
    if min(counts, default=0) < 0 or sum(counts) > size_bytes:
        raise SourceError(f"{where}: its footer promises {sum(counts)} images in {size_bytes} bytes; copy it again")
    largest = max((int(group.total_byte_size) for group in groups), default=0)
    if largest > MAX_BLOCK_BYTES:
        raise SourceError(
            f"{where}: a row group holds {largest} bytes, and {MAX_BLOCK_BYTES} are allowed, since it can only be read "
            "whole; write the file again with row_group_size=100"
        )
    return counts


def _labels(where: str, columns: _Columns) -> list[int | str | None]:
    """The label of each row. Names are never repeated in memory, however often the file does."""
    footer = _footer(where)
    is_text = not pa.types.is_integer(footer.schema.field(columns.label).type)
    with _whole(where), _ranges(where) as file:
        parquet = pq.ParquetFile(
            file,
            metadata=footer.metadata,
            read_dictionary=[columns.label] if is_text else [],
            page_checksum_verification=True,
        )
        column = parquet.read(columns=[columns.label]).column(0)
    labels: list[int | str | None] = []
    for chunk in column.chunks:
        coded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        values = [parse_label(value, f"{where}: a label") for value in coded.dictionary.to_pylist()]
        known = [None if columns.is_class_label and value == -1 else value for value in values]
        labels += [None if code is None else known[code] for code in coded.indices.to_pylist()]
    return labels


# ------------------------------------------------------------------------------------------------- columns


def _columns(where: str, wanted_label: str, wanted_image: str) -> _Columns:
    """Which columns of a file hold images and labels, those that are wanted or those that are found."""
    schema = _footer(where).schema
    image = wanted_image or _find_image(schema)
    label = wanted_label or _find_label(schema)
    if not image or not _image_leaf(schema, image):
        what = f"column {image} of images" if image else "column of images"
        raise SourceError(f"{where}: has no {what}; it has {_described(schema)}; see --image-column")
    if label and not _is_label(schema, label):
        raise SourceError(
            f"{where}: has no column {label} of numbers or names; it has {_described(schema)}; see --label-field"
        )
    feature = _features(schema).get(label)
    names = feature.get("names") if feature else None
    given = tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
    is_class_label = bool(feature and feature.get("_type") == "ClassLabel")
    return _Columns(_image_leaf(schema, image), label, is_class_label, given if is_class_label else ())


def _find_image(schema: pa.Schema) -> str:
    """The first column that the hub's metadata calls an image, else that looks like one; empty: none."""
    called = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]
    structs = [field.name for field in schema if pa.types.is_struct(field.type)]
    return next((name for name in (*called, *structs, *_IMAGE_NAMES) if _image_leaf(schema, name)), "")


def _find_label(schema: pa.Schema) -> str:
    features = _features(schema)
    called = [name for name in features if features[name].get("_type") == "ClassLabel"]
    called.sort(key=lambda name: _LABEL_NAMES.index(name) if name in _LABEL_NAMES else len(_LABEL_NAMES))
    return next((name for name in (*called, *_LABEL_NAMES) if _is_label(schema, name)), "")


def _image_leaf(schema: pa.Schema, name: str) -> str:
    """The binary column of a name: itself, or the bytes of a struct; empty where there is none."""
    if schema.names.count(name) != 1:
        return ""
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{name}.bytes" if _is_binary(kind.field("bytes").type) else ""
    return name if _is_binary(kind) else ""


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_label(schema: pa.Schema, name: str) -> bool:
    if schema.names.count(name) != 1:
        return False
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What the `datasets` library says of each column, in the file's metadata; nothing where it says nothing."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (ValueError, RecursionError):
        return {}
    for key in ("info", "dataset_info"):
        said_of = said.get(key) if isinstance(said, dict) else None
        features = said_of.get("features") if isinstance(said_of, dict) else None
        if isinstance(features, dict):
            return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    return {}


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({str(field.type)[:60]})" for field in list(schema)[:20]) or "none"
