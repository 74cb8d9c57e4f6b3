"""The images: 1/f noise in correlated colour channels, which a JPEG coder finds as hard as a photograph.

A few base fields are blended in pairs, each rolled and mirrored at random, so that no two images are alike. The label
of an image is the sum of its decoded bytes modulo 256: whoever delivers a batch can be asked for proof.
"""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import images, storage
from pipeline.dataset import index, mixing, part, record, tar
from pipeline.dataset.record import DatasetRecord
from tests.benchmarks.ingest.cases import Case

JPEG_QUALITY = 92
CLASSES = tuple(f"sum-{label:03d}" for label in range(256))
_NUM_FIELDS, _FIELD_SIZE = 64, 256
# Of the amplitude against frequency: luminance, and the two colour differences, which are smoother in photographs.
_SLOPES = (1.6, 1.9, 1.9)
_TO_RGB = np.array([[1.0, 0.35, 0.1], [1.0, 0.0, -0.25], [1.0, -0.35, 0.15]])
_CONTRAST = 40.0  # median standard deviation: 20 KiB at 256² and quality 92


def checksum(pixels: NDArray[np.uint8]) -> int:
    """The label that an image must carry."""
    return int(pixels.sum(dtype=np.uint8))


def make(case: Case, cache: Path) -> Path:
    """The dataset of a case in its folder, made if it is not there; returns the folder."""
    folder = case.folder(cache)
    if (folder / record.NAME).exists():
        return folder
    starts = range(0, case.num_samples, case.shard_size)
    # Spawned: a fork would copy the locks of whatever threads the parent has.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        tables = list(pool.map(functools.partial(_make_shard, case, str(folder / "train")), starts))
    data = part.encode_part(tables)
    storage.put_if_absent(str(folder / "train" / index.part_name(0)), data)
    runs = mixing.label_runs(table["label"] for table in tables)
    assert runs is not None
    record.commit(
        str(folder),
        DatasetRecord(
            channels=3,
            resolution=case.resolution,
            image_format=case.image_format,
            classes=CLASSES,
            splits={"train": (part.describe_part(index.part_name(0), data),)},
            label_runs={"train": runs},
        ),
    )
    return folder


def _make_shard(case: Case, split_url: str, start: int) -> pa.Table:
    """Write the shard that begins with sample `start`; returns its index rows."""
    name = index.shard_name(start // case.shard_size)
    stop = min(start + case.shard_size, case.num_samples)
    data = tar.build((f"{number:09d}", _sample(case, number)) for number in range(start, stop))
    storage.put_if_absent(storage.join(split_url, name), data)
    return index.rows_of_shard(name, data, 3)


def _sample(case: Case, number: int) -> dict[str, bytes]:
    coded = images.encode(_image(number, case.resolution), case.image_format, JPEG_QUALITY)
    pixels = images.decode(coded, channels=3).pixels
    return {case.extension: coded, "cls": str(checksum(pixels)).encode()}


def _image(number: int, resolution: int) -> NDArray[np.uint8]:
    """uint8 [R, R, 3]."""
    rng = np.random.default_rng((1, number))
    fields = _fields(resolution)
    layers = []
    for field in rng.integers(len(fields), size=2):
        layer = np.roll(fields[field], rng.integers(resolution, size=2), axis=(0, 1))
        layers.append(layer[:, ::-1] if rng.random() < 0.5 else layer)
    weight = rng.uniform(0.3, 1.0)
    contrast = _CONTRAST * np.exp(0.4 * rng.standard_normal())
    blend = weight * layers[0] + np.sqrt(1.0 - weight**2) * layers[1]
    pixels: NDArray[np.uint8] = np.clip(np.float32(contrast) * blend + rng.uniform(90, 165), 0, 255).astype(np.uint8)
    return pixels


@functools.cache
def _fields(resolution: int) -> NDArray[np.float32]:
    """Periodic base fields, mean 0 and deviation 1: [n, R, R, 3]. Small ones are large ones scaled down."""
    rng = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(_FIELD_SIZE)[:, None], np.fft.rfftfreq(_FIELD_SIZE)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf  # no mean
    falloff = frequency ** -np.array(_SLOPES)[:, None, None]
    factor = _FIELD_SIZE // resolution
    fields = []
    for _ in range(_NUM_FIELDS):
        white = np.fft.rfft2(rng.standard_normal((3, _FIELD_SIZE, _FIELD_SIZE)))
        planes = np.fft.irfft2(white * falloff, s=(_FIELD_SIZE, _FIELD_SIZE))
        planes /= planes.std(axis=(1, 2), keepdims=True)
        field = np.einsum("ij,jhw->hwi", _TO_RGB, planes)
        field = field.reshape(resolution, factor, resolution, factor, 3).mean(axis=(1, 3))
        fields.append((field / field.std()).astype(np.float32))
    return np.stack(fields)
