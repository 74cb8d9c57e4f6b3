"""What a source of images holds, as a listing, and how a worker reads one item of it.

Four kinds, told apart by what lies at the URL: a folder of images (a subfolder a class), a zip of one, IDX files (the
MNIST family), WebDataset shards. Folders named train, test, val or validation at the top are splits.
"""

import collections
import dataclasses
import functools
import gzip
import hashlib
import json
import math
import re
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import images, storage
from pipeline.dataset import tar
from pipeline.errors import InputError

Kind = Literal["folder", "zip", "idx", "webdataset"]

SPLITS: Mapping[str, str] = {"train": "train", "test": "test", "val": "val", "validation": "val"}
IMAGE_EXTENSIONS = frozenset(
    ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
)
MAX_ITEM_BYTES = 64 * 1024**2
MAX_IDX_BYTES = 8 * 1024**3
ITEMS = pa.schema(
    [
        ("split", pa.string()),
        ("name", pa.string()),  # stable; what logs show
        ("label", pa.int32()),  # null: no label
        ("object", pa.string()),  # file, zip member, IDX file or tar, below the URL
        ("offset", pa.int64()),  # first byte; of an IDX file: the image's number
        ("size", pa.int64()),  # bytes
    ]
)
_IDX_NAME = re.compile(r"(.*-)?(train|t10k|test)-(images|labels)[-.]idx([13])-ubyte(\.gz)?")
_IDX_SPLITS = {"train": "train", "t10k": "test", "test": "test"}
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class SourceError(InputError):
    """A source that is missing, empty, without images, or not laid out as one of the four kinds."""


class ItemError(InputError):
    """One item that cannot be read, while the others can."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A listed source."""

    kind: Kind
    url: str
    items: pa.Table
    """Schema ITEMS, in the order of (split, name)."""
    classes: tuple[str, ...]
    """Class names by label; empty: no labels."""
    digest: str
    """Identity: names, sizes and labels, or the content where it had to be read; never times or places."""
    ignored: int
    """Files that are no images."""

    def counts(self) -> dict[str, int]:
        """Items of each split."""
        return dict(sorted(collections.Counter(self.items["split"].to_pylist()).items()))


@dataclasses.dataclass(frozen=True, slots=True)
class _Item:
    """One image of a listing, before its class has a number."""

    split: str
    name: str
    label: int | str | None
    object: str
    offset: int
    size_bytes: int


def scan(url: str, *, label_field: str = "cls", class_names: Sequence[str] = ()) -> Source:
    """List a source.

    `label_field` is where WebDataset shards hold the class: cls, json:KEY or folder. `class_names` name the labels of
    a source that holds numbers, and order those of one that holds names. Raises SourceError, StorageError, TarError.
    """
    if url.lower().endswith(".zip"):
        return _scan_zip(url, class_names)
    entries = list(storage.list_entries(url))
    if not entries:
        what = "is a file, not a folder or a .zip" if storage.stat(url) else "is missing or empty"
        raise SourceError(f"source {url} {what}; name a folder of images, a .zip, IDX files or WebDataset shards")
    names = [entry.name for entry in entries]
    if any(_IDX_NAME.fullmatch(name) for name in names):
        return _scan_idx(url, names, class_names)
    tars = [name for name in names if name.endswith(".tar") and not _is_hidden(name)]
    if tars:
        return _scan_tars(url, tars, label_field, class_names)
    sizes = {entry.name: entry.size_bytes for entry in entries}
    return _scan_tree("folder", url, sizes, class_names)


def read_item(kind: Kind, url: str, item: Mapping[str, object]) -> bytes | NDArray[np.uint8]:
    """One item (a row of ITEMS): an image file's bytes, or pixels [H, W, 1] of an IDX file.

    Raises ItemError when this item cannot be read, SourceError when the source is not what was listed.
    """
    name, offset, size = str(item["object"]), int(str(item["offset"])), int(str(item["size"]))
    if kind == "idx":
        return _idx_images(storage.join(url, name))[offset][:, :, None]
    if size > MAX_ITEM_BYTES:
        raise ItemError(f"{size} bytes are more than the {MAX_ITEM_BYTES} allowed")
    if kind == "zip":
        return _read_zip_member(url, name)
    if kind == "webdataset":
        return storage.read_range(storage.join(url, name), offset, size)
    data = storage.read(storage.join(url, name))
    if len(data) != size:
        raise SourceError(f"{storage.join(url, name)}: {len(data)} bytes, {size} when listed; leave the source alone")
    return data


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


# ------------------------------------------------------------------------------------------- folder and zip


def _scan_tree(kind: Kind, url: str, sizes: Mapping[str, int], class_names: Sequence[str]) -> Source:
    """A tree of image files: split folders, then class folders, or neither."""
    visible = [name for name in sizes if not _is_hidden(name)]
    pictures = [name for name in visible if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    if not pictures:
        raise SourceError(f"source {url} holds no images; known extensions: {', '.join(sorted(IMAGE_EXTENSIONS))}")
    places = _places(url, pictures)
    items = [_Item(split, name, label, name, 0, sizes[name]) for name, (split, label) in places.items()]
    return _finish(kind, url, items, class_names, ignored=len(visible) - len(pictures))


def _places(url: str, names: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Name → (split, class); raises SourceError where some files have one and some have none."""
    wrap = _wrapping_folders(names)
    places: dict[str, tuple[str, str | None]] = {}
    with_split = []
    for name in names:
        folders = name.split("/")[wrap:-1]
        split = SPLITS.get(folders[0].lower()) if folders else None
        with_split.append(split is not None)
        rest = folders[1:] if split else folders
        places[name] = (split or "train", rest[0] if rest else None)
    _refuse_mixture(url, names, with_split, "below a split folder (train, test, val)")
    _refuse_mixture(url, names, [label is not None for _, label in places.values()], "in a class folder")
    return places


def _wrapping_folders(names: Sequence[str]) -> int:
    """Leading folders that all names share above their split or class folder, as in cats-1.0/train/tabby/1.png."""
    paths = [name.split("/") for name in names]
    wrap = 0
    while all(len(path) > wrap + 2 for path in paths) and len({path[wrap] for path in paths}) == 1:
        if paths[0][wrap].lower() in SPLITS:
            break
        wrap += 1
    return wrap


def _refuse_mixture(url: str, names: Sequence[str], flags: Sequence[bool], what: str) -> None:
    if any(flags) and not all(flags):
        yes, no = names[flags.index(True)], names[flags.index(False)]
        raise SourceError(f"source {url} is mixed: {yes} lies {what} and {no} does not; sort all files the same way")


def _scan_zip(url: str, class_names: Sequence[str]) -> Source:
    infos = [info for info in _zip(url).infolist() if not info.is_dir()]
    for info in infos:
        if {"", ".", ".."} & set(info.filename.split("/")) or "\\" in info.filename:
            raise SourceError(f"source {url} holds a member named {info.filename[:80]!r}, which leaves the archive")
    infos = [info for info in infos if not _is_hidden(info.filename)]
    sizes = {info.filename: info.file_size for info in infos}
    if len(sizes) != len(infos):
        raise SourceError(f"source {url} holds two members of one name; pack it again")
    for info in infos:
        if info.flag_bits & 1:
            raise SourceError(f"source {url} is encrypted ({info.filename}); unpack it and name the folder")
        if info.compress_type not in _ZIP_METHODS:
            raise SourceError(f"source {url} uses compression {info.compress_type} ({info.filename}); pack it again")
    if not sizes:
        raise SourceError(f"source {url} is an empty archive")
    return _scan_tree("zip", url, sizes, class_names)


@functools.lru_cache(maxsize=2)
def _zip(url: str) -> zipfile.ZipFile:
    """The open archive, one a process; its file is closed when it leaves the cache."""
    file = storage.open_seekable(url)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        file.close()
        raise SourceError(f"source {url} is no readable zip ({error}); copy it again") from error
    weakref.finalize(archive, file.close)
    return archive


def _read_zip_member(url: str, name: str) -> bytes:
    try:
        return _zip(url).read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ItemError(f"cannot unpack: {error}") from error
    except KeyError as error:
        raise SourceError(f"source {url} lost its member {name}; leave the source alone") from error


# ------------------------------------------------------------------------------------------------------ IDX


def _scan_idx(url: str, names: Sequence[str], class_names: Sequence[str]) -> Source:
    files = {match[0]: match for match in map(_IDX_NAME.fullmatch, names) if match}
    found: dict[tuple[str, str], str] = {}
    for name, match in sorted(files.items(), reverse=True):  # of x and x.gz the plain one wins
        found[_IDX_SPLITS[match[2]], match[3]] = name
    items: list[_Item] = []
    content = hashlib.sha256()
    for split in sorted({split for split, _ in found}):
        for part in ("images", "labels"):
            if (split, part) not in found:
                raise SourceError(f"source {url} has no {part} file for split {split}; IDX files come in pairs")
        pixels = _idx_images(storage.join(url, found[split, "images"]))
        labels = _idx_labels(storage.join(url, found[split, "labels"]))
        if len(pixels) != len(labels):
            raise SourceError(f"source {url} has {len(pixels)} images and {len(labels)} labels in split {split}")
        content.update(repr((split, pixels.shape)).encode() + pixels.tobytes() + labels.tobytes())
        name, size = found[split, "images"], math.prod(pixels.shape[1:])
        stem = name.removesuffix(".gz")
        items += [_Item(split, f"{stem}#{i:06d}", int(label), name, i, size) for i, label in enumerate(labels)]
    return _finish("idx", url, items, class_names, ignored=len(names) - len(files), content=content.hexdigest())


@functools.lru_cache(maxsize=4)
def _idx_images(url: str) -> NDArray[np.uint8]:
    """[n, H, W] of an idx3-ubyte file, decompressed once a process."""
    return _read_idx(url, 3)


def _idx_labels(url: str) -> NDArray[np.uint8]:
    """[n] of an idx1-ubyte file."""
    return _read_idx(url, 1)


def _read_idx(url: str, dimensions: int) -> NDArray[np.uint8]:
    """A uint8 IDX file of so many dimensions; its header says how much is decompressed, never its body."""
    with storage.open_seekable(url) as raw:
        file = gzip.GzipFile(fileobj=raw) if url.endswith(".gz") else raw
        try:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]) or len(header) < 4 + 4 * dimensions:
                raise SourceError(f"{url}: not an IDX file of bytes in {dimensions} dimensions; copy it again")
            shape = np.frombuffer(header, ">u4", offset=4).astype(np.int64)
            size = math.prod(shape.tolist())
            if size > MAX_IDX_BYTES or math.prod(shape[1:].tolist()) > images.MAX_PIXELS:
                raise SourceError(f"{url}: its header promises {size} bytes, more than are allowed")
            body = file.read(size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(f"{url}: cannot decompress ({error}); copy the file again") from error
    if len(body) != size:
        raise SourceError(f"{url}: truncated or padded: {size} bytes wanted, {len(body)} found; copy the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)


# ----------------------------------------------------------------------------------------------- WebDataset


def _scan_tars(url: str, tars: Sequence[str], label_field: str, class_names: Sequence[str]) -> Source:
    splits = [SPLITS.get(name.split("/")[0].lower()) if "/" in name else None for name in tars]
    _refuse_mixture(url, tars, [split is not None for split in splits], "below a split folder (train, test, val)")
    items: list[_Item] = []
    ignored = 0
    for name, split in zip(tars, splits, strict=True):
        where = storage.join(url, name)
        data = storage.read(where)
        for sample in tar.group(tar.scan(data, where), where):
            image = next((m for ext, m in sample.members.items() if ext in IMAGE_EXTENSIONS), None)
            if image is None:
                ignored += 1
                continue
            label = _sample_label(sample, data, label_field, where)
            items.append(_Item(split or "train", f"{name}#{sample.key}", label, name, image.offset, image.size_bytes))
    if not items:
        raise SourceError(f"source {url} holds no images in its {len(tars)} tars")
    _refuse_mixture(url, [i.name for i in items], [i.label is not None for i in items], f"with a label ({label_field})")
    if label_field != "cls" and items[0].label is None:
        raise SourceError(f"source {url} has no label at {label_field}; see --label-field")
    return _finish("webdataset", url, items, class_names, ignored)


def _sample_label(sample: tar.Sample, data: bytes, label_field: str, where: str) -> int | str | None:
    """A sample's class: a number, a name, or None where it says nothing."""
    if label_field == "folder":
        return sample.key.rpartition("/")[0].rpartition("/")[2] or None
    kind, _, key = label_field.partition(":")
    member = sample.members.get(kind)
    if member is None:
        return None
    text = data[member.offset : member.offset + member.size_bytes]
    try:
        value = json.loads(text).get(key) if kind == "json" else text.decode().strip()
    except (ValueError, AttributeError) as error:
        raise SourceError(f"{where}: the .{kind} of {sample.key} cannot be read ({error})") from error
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        return int(value)
    if value is None or (isinstance(value, int | str) and not isinstance(value, bool)):
        return value
    raise SourceError(f"{where}: the label of {sample.key} is {value!r}, neither a number nor a name")


# --------------------------------------------------------------------------------------------------- labels


def _finish(
    kind: Kind, url: str, items: list[_Item], class_names: Sequence[str], ignored: int, content: str = ""
) -> Source:
    """Number the classes, order the items and digest them."""
    items.sort(key=lambda item: (item.split, item.name))
    number, classes = _classes(url, [item.label for item in items], class_names)
    labels = [None if item.label is None else number(item.label) for item in items]
    digest = hashlib.sha256(f"{kind}\n{content}\n{classes!r}\n".encode())
    for item, label in zip(items, labels, strict=True):
        digest.update(f"{item.split}\0{item.name}\0{label}\0{item.size_bytes}\n".encode(errors="surrogateescape"))
    columns: dict[str, Iterable[object]] = {
        "split": [item.split for item in items],
        "name": [_printable(item.name) for item in items],
        "label": labels,
        "object": [_stored(url, item.object) for item in items],
        "offset": [item.offset for item in items],
        "size": [item.size_bytes for item in items],
    }
    return Source(kind, url, pa.table(columns, schema=ITEMS), classes, digest.hexdigest(), ignored)


def _printable(name: str) -> str:
    return name.encode(errors="replace").decode()


def _stored(url: str, name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"source {url} holds a name that is not UTF-8 ({_printable(name)}); rename it") from error
    return name


def _classes(
    url: str, labels: Sequence[int | str | None], class_names: Sequence[str]
) -> tuple[Callable[[int | str], int], tuple[str, ...]]:
    """How a label becomes a number, and the classes' names."""
    distinct = sorted({label for label in labels if label is not None}, key=lambda label: (str(type(label)), label))
    if not distinct:
        return int, ()
    numbers = [label for label in distinct if isinstance(label, int)]
    if len(numbers) == len(distinct):
        if min(numbers) < 0 or max(numbers) >= (len(class_names) or 100_000):
            raise SourceError(
                f"source {url} has labels {min(numbers)} … {max(numbers)}, and {len(class_names) or 100_000} class "
                "names are allowed for; see --class-names"
            )
        return int, tuple(class_names) or tuple(map(str, range(max(numbers) + 1)))
    names = list(map(str, distinct))
    if class_names and set(class_names) != set(names):
        raise SourceError(f"source {url} has classes {', '.join(names[:20])}; --class-names must hold the same names")
    ordered = tuple(class_names) or tuple(names)
    position = {name: number for number, name in enumerate(ordered)}
    return (lambda label: position[str(label)]), ordered
