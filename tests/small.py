"""A small real dataset, made without Ray: circles and squares of random sizes, two classes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline import images, storage
from pipeline.dataset import index, mixing, part, record, tar
from pipeline.dataset.record import DatasetRecord

CLASSES = ("circle", "square")


def shape_image(seed: int, label: int, resolution: int) -> NDArray[np.uint8]:
    """uint8 [R, R, 1]: one white shape on black."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", (resolution, resolution))
    size = int(rng.integers(resolution // 3, resolution - 4))
    left, top = (int(rng.integers(1, resolution - size)) for _ in range(2))
    box = (left, top, left + size, top + size)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if label == 0 else draw.rectangle)(box, fill=int(rng.integers(128, 256)))
    return np.asarray(image)[:, :, None]


def shard_bytes(start: int, count: int, resolution: int, label_run: int = 1) -> bytes:
    """A shard of samples start … start + count − 1, `label_run` of one class, then of the other."""
    samples = []
    for i in range(start, start + count):
        label = i // label_run % 2
        image = images.encode(shape_image(i, label, resolution), "png", 100)
        samples.append((f"{i:09d}", {"png": image, "cls": b"%d" % label}))
    return tar.build(samples)


def make_dataset(
    url: str,
    num_samples: int = 100,
    shard_size: int = 30,
    resolution: int = 16,
    label_run: int = 1,
    classes: tuple[str, ...] = CLASSES,
) -> DatasetRecord:
    """Write it to `url`, split `train`; returns its record."""
    tables: list[pa.Table] = []
    for number, start in enumerate(range(0, num_samples, shard_size)):
        data = shard_bytes(start, min(shard_size, num_samples - start), resolution, label_run)
        storage.put_if_absent(storage.join(url, "train", index.shard_name(number)), data)
        tables.append(index.rows_of_shard(index.shard_name(number), data, 1))
    parts = []
    for number in range(0, len(tables), 2):  # two shards a part, so that readers cross parts
        data = part.encode_part(tables[number : number + 2])
        name = index.part_name(number // 2)
        storage.put_if_absent(storage.join(url, "train", name), data)
        parts.append(part.describe_part(name, data))
    tally = mixing.tally_pieces(table["label"] for table in tables)
    runs = tally.label_runs()
    result = DatasetRecord(
        channels=1,
        resolution=resolution,
        image_format="png",
        classes=classes,
        splits={"train": tuple(parts)},
        label_runs={"train": runs} if runs else {},
        class_counts={"train": tally.class_counts(range(len(classes)))} if classes else {},
    )
    record.commit(url, result)
    return result


_READ = """
import json, sys, webdataset
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode("rgb8"):
    image = next(sample[extension] for extension in ("png", "jpg", "webp") if extension in sample)
    print(json.dumps([sample["__key__"], sample.get("cls"), image.shape]))
"""


def read_by_webdataset(shards: Sequence[Path]) -> list[tuple[str, int | None, tuple[int, ...]]]:
    """Key, label and decoded shape of every sample, by the webdataset library in a process that knows nothing of us."""
    command = [sys.executable, "-c", _READ, *map(str, shards)]
    environment = {**os.environ, "WDS_SECURE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd="/")
    return [(key, label, tuple(shape)) for key, label, shape in map(json.loads, done.stdout.splitlines())]
