"""Small sources of real images, in each of the kinds that `prepare` reads."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


def python2_pickle(value: object) -> bytes:
    """What Python 2's cPickle and numpy 1 write in protocol 2, as in the CIFAR files: text and array data are raw
    byte strings, and everything is put into the memo.
    """
    return b"\x80\x02" + _python2(value, [0]) + b"."


def _python2(value: object, memo: list[int]) -> bytes:
    def put(data: bytes) -> bytes:
        memo[0] += 1
        return data + (b"q%c" % memo[0] if memo[0] < 256 else b"r" + struct.pack("<I", memo[0]))

    if isinstance(value, int):
        return b"K%c" % value if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return put(b"U%c" % len(value) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value)
    if isinstance(value, list):
        return put(b"]") + b"(" + b"".join(_python2(item, memo) for item in value) + b"e"
    if isinstance(value, dict):
        pairs = (_python2(key, memo) + _python2(item, memo) for key, item in value.items())
        return put(b"}") + b"(" + b"".join(pairs) + b"u"
    assert isinstance(value, np.ndarray)
    empty = (
        put(b"cnumpy.core.multiarray\n_reconstruct\n") + put(b"cnumpy\nndarray\n") + b"K\0\x85U\x01b\x87" + put(b"R")
    )
    shape = b"".join(_python2(length, memo) for length in value.shape) + b"\x85\x86\x87"[value.ndim - 1 : value.ndim]
    code = value.dtype.str[1:].encode()
    dtype = put(b"cnumpy\ndtype\n") + b"U%c" % len(code) + code + b"K\0K\x01\x87" + put(b"R")
    dtype += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + _python2(value.tobytes(), memo) + b"tb"


def cifar_batch(start: int, count: int, num_classes: int, labels_key: bytes = b"labels") -> dict[bytes, object]:
    """A batch whose image i has red i, green a ramp of rows, blue a ramp of columns, and class i modulo the classes."""
    rows, columns = np.mgrid[0:32, 0:32].astype(np.uint8)
    numbers = range(start, start + count)
    pixels = np.stack([np.stack([np.full((32, 32), i, np.uint8), rows, columns]).reshape(-1) for i in numbers])
    return {
        b"batch_label": b"a batch",
        labels_key: [i % num_classes for i in numbers],
        b"data": pixels,
        b"filenames": [b"image_%05d.png" % i for i in numbers],
    }


def write_cifar10(root: Path, per_batch: int = 4) -> str:
    """A small cifar-10-batches-py."""
    names = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    files: dict[str, dict[bytes, object]] = {"batches.meta": {b"num_cases_per_batch": per_batch, b"label_names": names}}
    for number in range(5):
        files[f"data_batch_{number + 1}"] = cifar_batch(number * per_batch, per_batch, 10)
    files["test_batch"] = cifar_batch(5 * per_batch, per_batch, 10)
    pickled = {name: python2_pickle(value) for name, value in files.items()}
    return write_folder(root, pickled | {"readme.html": b"<html>"})


def write_cifar100(root: Path, count: int = 12) -> str:
    """A small cifar-100-python, of three fine and two coarse classes."""
    meta: dict[bytes, object] = {b"fine_label_names": [b"apple", b"bear", b"crab"], b"coarse_label_names": [b"a", b"b"]}
    files = {"meta": meta} | {name: cifar_batch(0, count, 3, b"fine_labels") for name in ("train", "test")}
    for name in ("train", "test"):
        files[name][b"coarse_labels"] = [i % 2 for i in range(count)]
    return write_folder(root, {name: python2_pickle(value) for name, value in files.items()})


def hub_metadata(features: Mapping[str, object]) -> dict[str, str]:
    """What the `datasets` library writes into a Parquet file's schema."""
    return {"huggingface": json.dumps({"info": {"features": features}, "fingerprint": "0123456789abcdef"})}


def hub_table(images: Sequence[bytes | None], labels: Sequence[int], names: Sequence[str] = CLASSES) -> pa.Table:
    """Rows as the hub stores them: struct<bytes, path> and a ClassLabel."""
    structs = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    column = pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    return table.replace_schema_metadata(hub_metadata(features))


def write_parquet(path: Path, table: pa.Table, rows_per_group: int = 4) -> Path:
    """A Parquet file of small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def write_hub(root: Path, counts: Mapping[str, int], files: int = 2, rows_per_group: int = 4) -> str:
    """A data set as `push_to_hub` lays it out: data/train-00000-of-00002.parquet …; image i has class i modulo 2."""
    for at, (split, count) in enumerate(counts.items()):
        for number in range(files):
            rows = range(number * count // files, (number + 1) * count // files)
            table = hub_table([image_bytes(1000 * at + i) for i in rows], [i % 2 for i in rows])
            write_parquet(root / f"data/{split}-{number:05d}-of-{files:05d}.parquet", table, rows_per_group)
    (root / "README.md").write_text("# a data set")
    return str(root)
