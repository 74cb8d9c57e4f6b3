"""What a source of images holds, as a listing, and how a worker reads its items.

Six kinds, told apart by what lies at the URL: a folder of images (a subfolder a class), a zip of one, IDX files (the
MNIST family), CIFAR batches, WebDataset shards, Parquet with a column of images. Folders named train, test, val or
validation are splits.
"""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from pipeline import images, storage
from pipeline.prepare import cifar, idx, parquet, tree, webdataset
from pipeline.prepare.listing import ITEMS, ItemError, Kind, Source, SourceError

__all__ = ["ITEMS", "ItemError", "Kind", "Source", "SourceError", "read_item", "read_items", "scan"]

MAX_ITEM_BYTES = 64 * 1024**2

Found = bytes | images.Pixels


def scan(url: str, *, label_field: str = "cls", class_names: Sequence[str] = (), image_column: str = "") -> Source:
    """List a source.

    `label_field` is where WebDataset shards hold the class (cls, json:KEY or folder) or which column of Parquet files
    does (column:NAME); `image_column` is which column of those holds the images, empty: found. `class_names` name the
    labels of a source that holds numbers, and order those of one that holds names.

    Raises SourceError, LabelError, StorageError, TarError.
    """
    if url.lower().endswith(".zip"):
        return tree.scan_zip(url, class_names)
    if cifar.is_archive(url):
        return cifar.scan_cifar(url, class_names)
    sizes = {entry.name: entry.size_bytes for entry in storage.list_entries(url)}
    if not sizes:
        what = "is a file, not a folder or an archive" if storage.stat(url) else "is missing or empty"
        known = "a folder of images, a .zip of one, or a folder of IDX, CIFAR, WebDataset or Parquet files"
        raise SourceError(f"source {url} {what}; name {known}")
    names = list(sizes)
    if any(map(idx.is_idx, names)):
        return idx.scan_idx(url, names, class_names)
    if cifar.is_cifar(names):
        return cifar.scan_cifar(url, class_names)
    if tars := webdataset.shards(names):
        return webdataset.scan_shards(url, tars, label_field, class_names)
    if parquet.is_parquet(url, names):
        return parquet.scan_parquet(url, sizes, label_field, class_names, image_column)
    return tree.scan_tree("folder", url, sizes, class_names)


def read_item(source: Source, item: Mapping[str, object]) -> Found:
    """One item (a row of ITEMS): an image file's bytes, or pixels uint8 [H, W, 1 or 3] of an IDX or CIFAR file.

    Raises ItemError when this item cannot be read, SourceError when the source is not what was listed.
    """
    name, offset = str(item["object"]), int(str(item["offset"]))
    if source.kind == "idx":
        return idx.read_image(source.url, name, offset)
    if source.kind == "cifar":
        return cifar.read_image(source.url, name, offset)
    if source.kind == "parquet":
        block = parquet.Block(storage.join(source.url, name), source.image_column, int(str(item["block"])))
        data = parquet.read_image(block, offset)
        _check_size(len(data))
        return data
    size = int(str(item["size"]))
    _check_size(size)
    if source.kind == "zip":
        return tree.read_member(source.url, name)
    if source.kind == "webdataset":
        return storage.read_range(storage.join(source.url, name), offset, size)
    data = storage.read(storage.join(source.url, name))
    if len(data) != size:
        where = storage.join(source.url, name)
        raise SourceError(f"{where}: {len(data)} bytes, {size} when listed; leave the source alone")
    return data


def read_items(source: Source, items: pa.Table) -> Iterator[tuple[int, Found | ItemError]]:
    """Each of the items with its row in `items`, in the order that is cheapest to read: each block is read once.

    An item that cannot be read comes as its error. Raises SourceError as `read_item` does.
    """
    rows = items.to_pylist()
    for row in _in_cheapest_order(items):
        try:
            yield row, read_item(source, rows[row])
        except ItemError as error:
            yield row, error


def _in_cheapest_order(items: pa.Table) -> Iterator[int]:
    """Row numbers, those of a block together; without blocks as they come."""
    if items["block"].null_count == len(items):
        return iter(range(len(items)))
    columns = {name: items[name] for name in ("object", "block", "offset")}
    table = pa.table(columns | {"row": pa.array(range(len(items)))})
    return iter(
        table.sort_by([("object", "ascending"), ("block", "ascending"), ("offset", "ascending")])["row"].to_pylist()
    )


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_ITEM_BYTES:
        raise ItemError(f"{size_bytes} bytes are more than the {MAX_ITEM_BYTES} allowed")
