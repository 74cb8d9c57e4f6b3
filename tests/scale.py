"""A dataset as large as one likes that takes no time to make: one real shard and one real part under many names."""

import dataclasses
import os
from pathlib import Path

from pipeline.dataset import index, record
from pipeline.dataset.part import MAX_PART_GROUPS, describe_part, encode_part
from pipeline.dataset.record import DatasetRecord, Part
from tests.small import CLASSES, shard_bytes


def made_up_dataset(folder: Path | str, num_shards: int, samples_per_shard: int, resolution: int = 16) -> str:
    """The URL of a dataset below a local folder, split `train`, grey, two classes in turn.

    Every part lists the same 128 shards, which are one file: what differs from a real dataset is that readers find
    the shards in the machine's memory.
    """
    split = Path(folder) / "train"
    (split / "index").mkdir(parents=True)
    shard = shard_bytes(0, samples_per_shard, resolution)
    (split / index.shard_name(0)).write_bytes(shard)
    whole, left = divmod(num_shards, MAX_PART_GROUPS)
    rows = index.rows_of_shard(index.shard_name(0), shard, 1)
    names = [index.shard_name(number) for number in range(min(num_shards, MAX_PART_GROUPS))]
    for name in names[1:]:
        os.link(split / names[0], split / name)
    shards = [rows.set_column(2, "shard", [[name] * len(rows)]) for name in names]
    parts = []
    if whole:
        parts += _link(split, 0, encode_part(shards), whole)
    if left:
        parts += _link(split, whole, encode_part(shards[:left]), 1)
    made = DatasetRecord(
        channels=1, resolution=resolution, image_format="png", classes=CLASSES, splits={"train": tuple(parts)}
    )
    (Path(folder) / record.NAME).write_bytes(record.encode(made))
    return str(folder)


def _link(split: Path, first: int, data: bytes, count: int) -> list[Part]:
    """The same part under the names of `count` parts."""
    names = [index.part_name(number) for number in range(first, first + count)]
    described = describe_part(names[0], data)
    (split / names[0]).write_bytes(data)
    for name in names[1:]:
        os.link(split / names[0], split / name)
    return [dataclasses.replace(described, name=name) for name in names]
