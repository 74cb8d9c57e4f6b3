"""What a listed source is: its items in order, their classes, its identity; and what is common to all kinds."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import pyarrow as pa

from pipeline.dataset.label import number_classes
from pipeline.errors import InputError

Kind = Literal["folder", "zip", "idx", "cifar", "webdataset", "parquet"]

ITEMS = pa.schema(
    [
        ("split", pa.string()),
        ("name", pa.string()),  # stable; what logs show
        ("label", pa.int32()),  # null: no label
        ("object", pa.string()),  # file, zip member, IDX or CIFAR file, tar or Parquet file, below the URL
        ("block", pa.int32()),  # row group of a Parquet file: it is read whole; null: the item is read alone
        ("offset", pa.int64()),  # first byte; of IDX and CIFAR files the image's number, of a block its row
        ("size", pa.int64()),  # bytes; null: known only when it is read
    ]
)


class SourceError(InputError):
    """A source that is missing, empty, without images, or not laid out as one of the known kinds."""


class ItemError(InputError):
    """One item that cannot be read, while the others can."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A listed source."""

    kind: Kind
    url: str
    items: pa.Table
    """Schema ITEMS, in the order of (split, name); the items of a block follow each other."""
    classes: tuple[str, ...]
    """Class names by label; empty: no labels."""
    digest: str
    """Identity: names, sizes and labels, or the content where it had to be read; never times or places."""
    ignored: int
    """Files that are no images."""
    image_column: str = ""
    """Of a Parquet source: the column of the image files."""

    def counts(self) -> dict[str, int]:
        """Items of each split."""
        return dict(sorted(collections.Counter(self.items["split"].to_pylist()).items()))

    def without_items(self) -> "Source":
        """All that reading needs beside the items themselves: small enough for every task."""
        return dataclasses.replace(self, items=ITEMS.empty_table())


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image of a listing, before its class has a number; see ITEMS."""

    split: str
    name: str
    label: int | str | None
    object: str
    offset: int
    size_bytes: int | None
    block: int | None = None


def finish(
    kind: Kind,
    url: str,
    items: list[Item],
    class_names: Sequence[str],
    ignored: int,
    content: str = "",
    image_column: str = "",
) -> Source:
    """Number the classes, order the items and digest them with `content`, what the kind knows of the images.

    Raises LabelError, and SourceError for a name that is not UTF-8.
    """
    items.sort(key=lambda item: (item.split, item.name))
    number, classes = number_classes([item.label for item in items], class_names, f"source {url}")
    labels = [None if item.label is None else number(item.label) for item in items]
    digest = hashlib.sha256(f"{kind}\n{content}\n{classes!r}\n".encode())
    for item, label in zip(items, labels, strict=True):
        digest.update(f"{item.split}\0{item.name}\0{label}\0{item.size_bytes}\n".encode(errors="surrogateescape"))
    columns: dict[str, Iterable[object]] = {
        "split": [item.split for item in items],
        "name": [_printable(item.name) for item in items],
        "label": labels,
        "object": [_stored(url, item.object) for item in items],
        "block": [item.block for item in items],
        "offset": [item.offset for item in items],
        "size": [item.size_bytes for item in items],
    }
    table = pa.table(columns, schema=ITEMS)
    return Source(kind, url, table, classes, digest.hexdigest(), ignored, image_column)


def refuse_mixture(url: str, names: Sequence[str], flags: Sequence[bool], what: str) -> None:
    """Raises SourceError where some names have their flag and some have not; `what` says what it stands for."""
    if any(flags) and not all(flags):
        yes, no = names[flags.index(True)], names[flags.index(False)]
        raise SourceError(f"source {url} is mixed: {yes} lies {what} and {no} does not; sort all files the same way")


def _printable(name: str) -> str:
    return name.encode(errors="replace").decode()


def _stored(url: str, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"source {url} holds a name that is not UTF-8 ({_printable(name)}); rename it") from error
    return name
