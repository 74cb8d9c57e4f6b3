"""IDX files, the format of the MNIST family: for each split one of images and one of labels, gzipped or not."""

import functools
import gzip
import hashlib
import math
import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline import images, storage
from pipeline.prepare.listing import Item, Source, SourceError, finish

MAX_FILE_BYTES = 8 * 1024**3
_NAME = re.compile(r"(.*-)?(train|t10k|test)-(images|labels)[-.]idx([13])-ubyte(\.gz)?")
_SPLITS = {"train": "train", "t10k": "test", "test": "test"}


def is_idx(name: str) -> bool:
    """Whether a file has the name of an IDX file."""
    return _NAME.fullmatch(name) is not None


def scan_idx(url: str, names: Sequence[str], class_names: Sequence[str]) -> Source:
    """List the IDX files among the names. Raises SourceError, LabelError, StorageError."""
    files = {match[0]: match for match in map(_NAME.fullmatch, names) if match}
    found: dict[tuple[str, str], str] = {}
    for name, match in sorted(files.items(), reverse=True):  # of x and x.gz the plain one wins
        found[_SPLITS[match[2]], match[3]] = name
    items: list[Item] = []
    content = hashlib.sha256()
    for split in sorted({split for split, _ in found}):
        for part in ("images", "labels"):
            if (split, part) not in found:
                raise SourceError(f"source {url} has no {part} file for split {split}; IDX files come in pairs")
        pixels = _images(storage.join(url, found[split, "images"]))
        labels = _labels(storage.join(url, found[split, "labels"]))
        if len(pixels) != len(labels):
            raise SourceError(f"source {url} has {len(pixels)} images and {len(labels)} labels in split {split}")
        content.update(repr((split, pixels.shape)).encode() + pixels.tobytes() + labels.tobytes())
        name, size = found[split, "images"], math.prod(pixels.shape[1:])
        stem = name.removesuffix(".gz")
        items += [Item(split, f"{stem}#{i:06d}", int(label), name, i, size) for i, label in enumerate(labels)]
    return finish("idx", url, items, class_names, ignored=len(names) - len(files), content=content.hexdigest())


def read_image(url: str, name: str, number: int) -> images.Pixels:
    """Image `number` of a file: uint8 [H, W, 1]."""
    return _images(storage.join(url, name))[number][:, :, None]


@functools.lru_cache(maxsize=4)
def _images(url: str) -> NDArray[np.uint8]:
    """[n, H, W] of an idx3-ubyte file, decompressed once a process."""
    return _read_idx(url, 3)


def _labels(url: str) -> NDArray[np.uint8]:
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
            if size > MAX_FILE_BYTES or math.prod(shape[1:].tolist()) > images.MAX_PIXELS:
                raise SourceError(f"{url}: its header promises {size} bytes, more than are allowed")
            body = file.read(size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise SourceError(f"{url}: cannot decompress ({error}); copy the file again") from error
    if len(body) != size:
        raise SourceError(f"{url}: truncated or padded: {size} bytes wanted, {len(body)} found; copy the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)
