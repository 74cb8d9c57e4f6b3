"""Pictures of a dataset for a person to look at."""

import numpy as np
from numpy.typing import NDArray

from pipeline import images, storage
from pipeline.dataset.index import open_split
from pipeline.dataset.record import DatasetRecord

_SEARCHED_SAMPLES = 20_000


def grid(pixels: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """uint8 [n, R, R, C], n a multiple of `columns` → one image [n / columns · R, columns · R, C], row by row."""
    count, height, width, channels = pixels.shape
    rows = count // columns
    tiled = pixels.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiled.reshape(rows * height, columns * width, channels))


def class_rows(url: str, record: DatasetRecord, split: str, columns: int, rows: int) -> NDArray[np.uint8]:
    """The first `columns` samples of each of the first `rows` classes among the first 20,000 samples, a row a class;
    without classes the first samples. Black where there are too few. uint8 image.
    """
    reader = open_split(url, record, split)
    table = reader.rows(0, min(_SEARCHED_SAMPLES, reader.num_samples))
    label = table["label"].fill_null(0).to_numpy()
    count = min(rows, len(record.classes)) or 1
    wanted = [np.flatnonzero(label == row)[:columns] for row in range(count)]
    pixels = np.zeros((count * columns, record.resolution, record.resolution, record.channels), np.uint8)
    for row, samples in enumerate(wanted):
        for column, number in enumerate(samples):
            one = table.slice(int(number), 1).to_pylist()[0]
            data = storage.read_range(reader.shard_url(one["shard"]), one["offset"], one["size"])
            images.decode_into(data, pixels[row * columns + column])
    return grid(pixels, columns)
