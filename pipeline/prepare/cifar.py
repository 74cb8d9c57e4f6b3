"""CIFAR-10 and CIFAR-100 in their "python version": batches of 32 × 32 RGB images, in a folder or the official .tar.gz.

The batches are pickles of Python 2; `array_pickle` reads them, so nothing in them is executed.
"""

import functools
import gzip
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline import images, storage
from pipeline.dataset.names import is_hidden
from pipeline.prepare import array_pickle
from pipeline.prepare.listing import Item, Source, SourceError, finish

MAX_BATCH_BYTES = 256 * 1024**2
MAX_ARCHIVE_BYTES = 512 * 1024**2
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
_SIDE = 32
_ROW_BYTES = 3 * _SIDE * _SIDE


class _Variant(NamedTuple):
    """How one of the two is laid out."""

    meta: str
    splits: Mapping[str, tuple[str, ...]]
    labels: str
    names: str


_CIFAR10 = _Variant(
    meta="batches.meta",
    splits={"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)},
    labels="labels",
    names="label_names",
)
_CIFAR100 = _Variant(
    meta="meta",
    splits={"train": ("train",), "test": ("test",)},
    labels="fine_labels",
    names="fine_label_names",
)
_CIFAR10_NAME = re.compile(r"(.*/)?(data_batch_\d+|test_batch|batches\.meta)")


class _Batch(NamedTuple):
    """One file's images, uint8 [n, 3072] in planes of R, G, B, and their classes."""

    split: str
    pixels: images.Pixels
    labels: list[int]


def is_archive(url: str) -> bool:
    """Whether the URL is named as the official archives are."""
    return url.lower().endswith((".tar.gz", ".tgz"))


def is_cifar(names: Sequence[str]) -> bool:
    """Whether these are the files of a folder that holds CIFAR-10, or two of CIFAR-100's train, test and meta."""
    bases = {name.rpartition("/")[2] for name in names}
    return any(map(_CIFAR10_NAME.fullmatch, names)) or len(bases & {"train", "test", "meta"}) > 1


def scan_cifar(url: str, class_names: Sequence[str]) -> Source:
    """List the batches in a folder or archive. Raises SourceError, LabelError, StorageError."""
    loaded = _load(url)
    items: list[Item] = []
    content = hashlib.sha256()
    for file, (split, pixels, labels) in loaded.batches.items():
        content.update(repr((split, file, pixels.shape, labels)).encode() + pixels.tobytes())
        items += [Item(split, f"{file}#{i:06d}", label, file, i, _ROW_BYTES) for i, label in enumerate(labels)]
    return finish("cifar", url, items, class_names or loaded.names, loaded.ignored, content=content.hexdigest())


def read_image(url: str, file: str, number: int) -> images.Pixels:
    """Image `number` of a batch: uint8 [32, 32, 3]. The batches, 184 MB, are read once a process and kept."""
    planes = _load(url).batches[file].pixels[number].reshape(3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


class _Loaded(NamedTuple):
    """All that a source holds."""

    names: tuple[str, ...]
    batches: Mapping[str, _Batch]
    ignored: int


@functools.lru_cache(maxsize=2)
def _load(url: str) -> _Loaded:
    """Class names and batches; a split that is not there at all is left out."""
    files = _unpacked(url) if is_archive(url) else _stored(url)
    folder, variant = _layout(url, files.names)
    names = _class_names(f"{url}: {variant.meta}", files.read(folder + variant.meta), variant)
    batches: dict[str, _Batch] = {}
    for split, wanted in variant.splits.items():
        present = [file for file in wanted if folder + file in files.names]
        if present and len(present) < len(wanted):
            missing = ", ".join(file for file in wanted if file not in present)
            raise SourceError(f"source {url} has {', '.join(present)} and lacks {missing}; copy all batches")
        for file in present:
            where = f"{url}: {file}"
            batches[file] = _batch(where, split, files.read(folder + file), variant)
            _check_labels(where, batches[file].labels, len(names))
    if not batches:
        raise SourceError(f"source {url} has {variant.meta} and no batches; copy them beside it")
    return _Loaded(names, batches, ignored=len(files.names) - len(batches) - 1)


def _layout(url: str, names: frozenset[str]) -> tuple[str, _Variant]:
    """The folder that holds the batches, as a prefix of names, and which of the two they are."""
    variant = _CIFAR10 if any(map(_CIFAR10_NAME.fullmatch, names)) else _CIFAR100
    wanted = {variant.meta, *(file for files in variant.splits.values() for file in files)}
    folders = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in wanted}
    if not folders:
        raise SourceError(f"source {url} holds no CIFAR batches; of another archive name the unpacked folder")
    if len(folders) > 1:
        raise SourceError(f"source {url} holds CIFAR files in {len(folders)} folders; name one of them")
    (folder,) = folders
    prefix = f"{folder}/" if folder else ""
    if prefix + variant.meta not in names:
        raise SourceError(f"source {url} has no {variant.meta}, which names the classes; copy it beside the batches")
    return prefix, variant


# ---------------------------------------------------------------------------------------- what a file holds


def _batch(where: str, split: str, data: bytes, variant: _Variant) -> _Batch:
    """The images and classes of a batch, their shapes and types made sure of."""
    value = _dict(where, data)
    pixels, labels = value.get("data"), value.get(variant.labels)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _ROW_BYTES or not len(pixels):
        found = getattr(pixels, "shape", type(pixels).__name__)
        raise SourceError(f"{where}: data is {found}, and CIFAR's is uint8 [n, {_ROW_BYTES}]; get the file anew")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise SourceError(f"{where}: {variant.labels} is no list of numbers; get the file anew")
    if len(labels) != len(pixels):
        raise SourceError(f"{where}: {len(pixels)} images and {len(labels)} labels; get the file anew")
    return _Batch(split, pixels, labels)


def _class_names(where: str, data: bytes, variant: _Variant) -> tuple[str, ...]:
    names = _dict(where, data).get(variant.names)
    known = tuple(map(_text, names)) if isinstance(names, list) else ()
    if not all(known) or not known or len(set(known)) < len(known):
        raise SourceError(f"{where}: {variant.names} is no list of different names; get the file anew")
    return known


def _check_labels(where: str, labels: Sequence[int], count: int) -> None:
    if min(labels) < 0 or max(labels) >= count:
        raise SourceError(
            f"{where}: labels {min(labels)} … {max(labels)}, and there are {count} class names; get the file anew"
        )


def _dict(where: str, data: bytes) -> Mapping[str, object]:
    """The dict that a file holds, its keys as text."""
    value = array_pickle.loads(data, where)
    if not isinstance(value, dict):
        raise SourceError(f"{where}: holds a {type(value).__name__} where CIFAR has a dict; get the file anew")
    return {_text(key): item for key, item in value.items()}


def _text(value: object) -> str:
    """Python 2's text is Python 3's bytes; empty for what is neither."""
    return value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else ""


# ------------------------------------------------------------------------------------- a folder, an archive


class _Files(NamedTuple):
    """The files of a folder or an archive."""

    names: frozenset[str]
    read: Callable[[str], bytes]


def _stored(url: str) -> _Files:
    sizes = {entry.name: entry.size_bytes for entry in storage.list_entries(url)}

    def read(name: str) -> bytes:
        if sizes[name] > MAX_BATCH_BYTES:
            raise SourceError(f"{url}: {name}: {sizes[name]} bytes are more than the {MAX_BATCH_BYTES} of a batch")
        return storage.read(storage.join(url, name))

    return _Files(frozenset(name for name in sizes if not is_hidden(name)), read)


def _unpacked(url: str) -> _Files:
    """The plain files of an archive, unpacked into memory: never to disk."""
    with storage.open_seekable(url) as raw:
        try:
            data = gzip.GzipFile(fileobj=raw).read(MAX_ARCHIVE_BYTES + 1)
            if len(data) > MAX_ARCHIVE_BYTES:
                raise SourceError(
                    f"source {url} unpacks to more than {MAX_ARCHIVE_BYTES} bytes; it is no CIFAR archive"
                )
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                members = [member for member in archive if member.type in _PLAIN and not member.sparse]
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
            raise SourceError(f"source {url} is no readable .tar.gz ({error}); copy it again") from error
    spans = {member.name: (member.offset_data, member.size) for member in members if not is_hidden(member.name)}

    def read(name: str) -> bytes:
        offset, size = spans[name]
        return data[offset : offset + size]

    return _Files(frozenset(spans), read)
