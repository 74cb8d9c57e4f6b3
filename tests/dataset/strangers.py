"""WebDataset shards as other tools write them: Python's own tar writer, JPEG of several sizes, labels of each kind."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence

from PIL import Image

from pipeline import storage

CLASSES = ("cat", "dog", "eel")


def jpeg(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A JPEG file whose grey says which one it is."""
    sink = io.BytesIO()
    Image.new("RGB", size, (seed * 7 % 256,) * 3).save(sink, "JPEG", quality=95)
    return sink.getvalue()


def grey(seed: int) -> int:
    """What `jpeg` shows."""
    return seed * 7 % 256


def tar_of(files: Sequence[tuple[str, bytes]], fmt: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, bytes) in this order."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=fmt) as out:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            out.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def sample(number: int, label: int) -> Mapping[str, bytes]:
    """Its members by extension: the class as a number, and as a name in JSON."""
    about = {"kind": CLASSES[label], "id": label, "caption": f"number {number}"}
    return {
        "cls": b"%d" % label,
        "jpg": jpeg(number, (16 + number % 9, 20)),
        "json": json.dumps(about).encode(),
        "txt": b"a caption",
    }


def shard(start: int, count: int, *, folder: bool = False, sort: bool = False, total: int = 60) -> bytes:
    """Samples start … start + count − 1 of `total`, of three classes in turn, or one class after the other."""
    files = []
    for number in range(start, start + count):
        label = number * len(CLASSES) // total if sort else number % len(CLASSES)
        key = f"{CLASSES[label]}/{number:06d}" if folder else f"{number:06d}"
        files += [(f"{key}.{extension}", data) for extension, data in sample(number, label).items()]
    return tar_of(files)


def write(url: str, shards: Mapping[str, bytes]) -> str:
    """Store shards by name."""
    for name, data in shards.items():
        storage.put(storage.join(url, name), data)
    return url


def write_shards(url: str, *, num_shards: int = 6, each: int = 10, sort: bool = False, folder: bool = False) -> str:
    """Shards of one split at the top of a URL."""
    total = num_shards * each
    return write(
        url,
        {
            f"pets-{number:04d}.tar": shard(number * each, each, sort=sort, folder=folder, total=total)
            for number in range(num_shards)
        },
    )
