"""WebDataset shards that others wrote: what lies at a URL, and the index rows of a shard, by reads of its headers."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.config import ConfigError, to_dict
from pipeline.dataset import index, tar
from pipeline.dataset.label import MAX_CLASSES, LabelError, sample_label
from pipeline.dataset.names import IMAGE_EXTENSIONS, SPLITS, is_hidden
from pipeline.dataset.part import MAX_PART_GROUPS
from pipeline.dataset.record import DatasetError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_MAX_LABEL_BYTES = 1024**2
_MIN_TASKS = 256  # shards are handed out one by one up to so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignConfig:
    """How WebDataset shards without a dataset.json of ours are read."""

    resolution: int = 256
    """Height and width in pixels that images of another size are cropped and resized to."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    label_field: str = "cls"
    """Where the class is: cls, json:KEY or folder."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value outside its range."""
        size = self.resolution
        if not 16 <= size <= 512 or size & (size - 1):
            raise ConfigError(f"resolution is {size}; it must be 16, 32, 64, 128, 256 or 512")
        if self.channels not in (1, 3):
            raise ConfigError(f"channels is {self.channels}; it must be 1 (grey) or 3 (RGB)")
        if not re.fullmatch(r"cls|folder|json:.+", self.label_field):
            raise ConfigError(f"label_field is {self.label_field}; it must be cls, json:KEY or folder")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar."""

    split: str
    name: str
    """Path below the URL of the shards."""
    size_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One unit of work: consecutive shards of a split, whose rows are one part."""

    split: str
    number: int
    """Of the part, in its split."""
    shards: tuple[Shard, ...]


def list_shards(url: str) -> list[Shard]:
    """The tars at a URL in the order of (split, name); folders train, test, val and validation at its top are splits.

    No tar: an empty list. Raises DatasetError where some lie in a split and some do not, and for compressed ones.
    """
    entries = [entry for entry in storage.list_entries(url) if not is_hidden(entry.name)]
    packed = [entry.name for entry in entries if entry.name.endswith(_COMPRESSED)]
    tars = [entry for entry in entries if entry.name.endswith(".tar")]
    if packed:
        raise DatasetError(f"{url}: holds compressed tars (e.g. {packed[0]}); unpack them, shards are read in place")
    splits = [SPLITS.get(entry.name.split("/")[0].lower()) if "/" in entry.name else None for entry in tars]
    if None in splits and any(splits):
        out = tars[splits.index(None)].name
        raise DatasetError(
            f"{url}: {out} lies outside the split folders (train, test, val) that others lie in; move it"
        )
    shards = [
        Shard(split=split or "train", name=entry.name, size_bytes=entry.size_bytes)
        for split, entry in zip(splits, tars, strict=True)
    ]
    return sorted(shards, key=lambda shard: shard.split)


def settings(url: str, config: ForeignConfig) -> dict[str, Any]:
    """What is asked for, as plan.json holds it."""
    return {"verb": "index", "shards_url": url, "config": to_dict(config)}


def listing(shards: Sequence[Shard]) -> dict[str, Any]:
    """What was found, as plan.json holds it beside the settings: names and sizes."""
    lines = "".join(f"{shard.split}\0{shard.name}\0{shard.size_bytes}\n" for shard in shards)
    return {"shards": len(shards), "sha256": hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()}


def units(shards: Sequence[Shard]) -> list[Unit]:
    """The units of work, in order. How many shards one has follows from their number alone, never from the workers."""
    size = min(MAX_PART_GROUPS, max(1, len(shards) // _MIN_TASKS))
    out: list[Unit] = []
    for split in dict.fromkeys(shard.split for shard in shards):
        own = [shard for shard in shards if shard.split == split]
        for number, start in enumerate(range(0, len(own), size)):
            out.append(Unit(split=split, number=number, shards=tuple(own[start : start + size])))
    return out


def rows_of_shard(url: str, shard: Shard, label_field: str) -> tuple[pa.Table, int]:
    """A shard's rows (FOREIGN_SCHEMA), and how many of its samples have no image and are left out.

    Headers are read, and labels. Raises TarError, LabelError, StorageError.
    """
    where = storage.join(url, shard.name)
    window = tar.Window(functools.partial(storage.read_range, where), shard.size_bytes)
    members: list[tar.Member] = []
    labels: dict[str, int | str | None] = {}
    for member in tar.walk(window.read, shard.size_bytes, where):
        members.append(member)
        key, extension = tar.split_name(member.name)
        # Now, while it is in the window; it may come before or after the image.
        if extension == label_field.partition(":")[0]:
            labels[key] = _label(tar.Sample(key, {extension: member}), window, label_field, where)
    columns: dict[str, list[object]] = {name: [] for name in index.FOREIGN_SCHEMA.names}
    samples = tar.group(members, where)
    for sample in samples:
        image = next((found for extension, found in sample.members.items() if extension in IMAGE_EXTENSIONS), None)
        if image is None:
            continue
        label = _label(sample, window, label_field, where) if label_field == "folder" else labels.get(sample.key)
        columns["key"].append(sample.key)
        columns["label"].append(None if label is None else str(label))
        columns["offset"].append(image.offset)
        columns["size"].append(image.size_bytes)
    count = len(columns["key"])
    columns |= {"shard": [shard.name] * count, "shard_size": [shard.size_bytes] * count, "sha256": [None] * count}
    return pa.table(columns, schema=index.FOREIGN_SCHEMA), len(samples) - count


def _label(sample: tar.Sample, window: tar.Window, label_field: str, where: str) -> int | str | None:
    """The label of a sample, of which only what the label field names need be there."""

    def read(member: tar.Member) -> bytes:
        if member.size_bytes > _MAX_LABEL_BYTES:
            raise LabelError(f"{where}: {member.name} has {member.size_bytes} bytes, more than a label may have")
        return window.read(member.offset, member.size_bytes)

    label = sample_label(sample, read, label_field, where)
    if isinstance(label, int) and not 0 <= label < MAX_CLASSES:
        raise LabelError(f"{where}: the label of {sample.key} is {label}; numbers must lie in 0 … {MAX_CLASSES - 1}")
    return label
