"""Small sources of real images, in each of the kinds that `prepare` reads."""

import gzip
import io
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.dataset import tar

CLASSES = ("cat", "dog")


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A smooth colour picture that no other seed gives."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def image_bytes(seed: int, image_format: str = "PNG", **options: object) -> bytes:
    """The file of `picture`."""
    sink = io.BytesIO()
    picture(seed).save(sink, image_format, **options)
    return sink.getvalue()


def folder_files(count: int, splits: tuple[str, ...] = ("",), classes: tuple[str, ...] = CLASSES) -> dict[str, bytes]:
    """`count` images for each split, dealt to the classes in turn; no classes: flat."""
    files = {}
    for at, split in enumerate(splits):
        for i in range(count):
            parts = [split, classes[i % len(classes)] if classes else "", f"{i:04d}.png"]
            files["/".join(part for part in parts if part)] = image_bytes(1000 * at + i)
    return files


def write_folder(root: Path, files: dict[str, bytes]) -> str:
    """The files under a folder."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(root)


def write_zip(path: Path, files: dict[str, bytes]) -> str:
    """The files in a zip, with a folder above them all, as most zips have."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"pets-1.0/{name}", data)
    return str(path)


def write_idx(root: Path, train: int, test: int, packed: bool = True) -> str:
    """A small MNIST: pixel values tell the number of the image, labels its last digit."""
    root.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        pixels = np.zeros((count, 28, 28), dtype=np.uint8)
        pixels[:, 4:24, 4:24] = (np.arange(count, dtype=np.uint8) + 1)[:, None, None]
        labels = np.arange(count, dtype=np.uint8) % 10
        files = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes(),
            f"{prefix}-labels-idx1-ubyte": struct.pack(">II", 0x801, count) + labels.tobytes(),
        }
        for name, data in files.items():
            (root / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data, mtime=0) if packed else data)
    return str(root)


def write_tars(root: Path, per_tar: int, names: tuple[str, ...], label: str = "cls") -> str:
    """WebDataset shards of foreign make; `label` is cls, json or folder."""
    for at, name in enumerate(names):
        samples = []
        for i in range(per_tar):
            members = {"jpg": image_bytes(1000 * at + i, "JPEG", quality=95)}
            if label == "cls":
                members["cls"] = b"%d\n" % (i % 2)
            elif label == "json":
                members["json"] = json.dumps({"kind": CLASSES[i % 2]}).encode()
            prefix = f"{CLASSES[i % 2]}/" if label == "folder" else ""
            samples.append((f"{prefix}s{at}_{i:04d}", members))
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar.build(samples))
    return str(root)
