"""What `prepare` will make, decided before anything is made: configuration, order, shards and keys."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import images, philox, storage
from pipeline.config import ConfigError, to_dict
from pipeline.dataset import record
from pipeline.prepare.listing import Source

RESOLUTIONS = (16, 32, 64, 128, 256, 512)
_LABEL_FIELDS = ("cls", "folder")
_WINDOW_BLOCKS = 64
_WINDOW_SHARDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How images become shards."""

    resolution: int = 32
    """Height and width of the images in pixels: 16, 32, 64, 128, 256 or 512."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    fit: Literal["crop", "pad"] = "crop"
    """crop: the largest centred square, scaled; pad: the whole image, never enlarged, on black."""
    image_format: Literal["png", "jpeg", "webp"] = "png"
    """Format of the images in the shards."""
    quality: int = 95
    """Of JPEG and WebP, 1 to 100; 90 and more keep JPEG's colours at full resolution."""
    shard_size: int = 1024
    """Samples planned for a shard."""
    seed: int = 0
    """Of the shuffle."""
    max_corrupt_fraction: float = 0.01
    """Stop when more than this part of a split's images cannot be decoded; 0 stops at the first."""
    label_field: str = "cls"
    """Where the class is: of WebDataset cls, json:KEY or folder; of Parquet column:NAME, else what looks like it."""
    image_column: str = ""
    """Column of Parquet files that holds the images; empty: what looks like it."""
    class_names: tuple[str, ...] = ()
    """Names of the classes by label; empty: the source's own."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value outside its range."""
        _require(self.resolution in RESOLUTIONS, "resolution", self.resolution, f"one of {RESOLUTIONS}")
        _require(self.channels in (1, 3), "channels", self.channels, "1 (grey) or 3 (RGB)")
        _require(1 <= self.quality <= 100, "quality", self.quality, "1 to 100")
        _require(1 <= self.shard_size <= 1_000_000, "shard_size", self.shard_size, "1 to 1000000")
        fraction = self.max_corrupt_fraction
        _require(0 <= fraction < 1, "max_corrupt_fraction", fraction, "at least 0 and below 1")
        field = self.label_field
        known = field in _LABEL_FIELDS or re.fullmatch(r"(json|column):.+", field) is not None
        _require(known, "label_field", field, "cls, json:KEY, folder or column:NAME")
        distinct = len(set(self.class_names)) == len(self.class_names)
        _require(distinct, "class_names", ",".join(self.class_names), "names that differ")


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; it must be {wanted}")


class Unit(NamedTuple):
    """One unit of work: shard `number` of a split holds the planned positions start … stop − 1."""

    split: str
    number: int
    start: int
    stop: int


def units(counts: Mapping[str, int], shard_size: int) -> list[Unit]:
    """Every shard, split by split."""
    return [
        Unit(split, number, number * shard_size, min(count, (number + 1) * shard_size))
        for split, count in sorted(counts.items())
        for number in range(math.ceil(count / shard_size))
    ]


def order(seed: int, split: str, count: int) -> NDArray[np.int64]:
    """Which of a split's items stands at each planned position: one seeded shuffle of the whole split."""
    return philox.permutation(philox.stream_key(seed, f"shuffle/{split}"), count)


def order_of_blocks(seed: int, split: str, block_sizes: NDArray[np.int64], shard_size: int) -> NDArray[np.int64]:
    """The same for items in blocks (row groups) that are read whole: a shard is made of few, and yet well mixed.

    The blocks, `block_sizes` items in each, are dealt to windows of at least 64 blocks and 8 shards: of every run of
    as many blocks as there are windows each window gets one, by the seed. Then each window is shuffled. So a source
    that is sorted by class gives windows that all look like the whole of it; with less than two windows it is one
    shuffle.

    The cost: a block is read by the shards of its window, about 8, or 64 · (items of a block) / shard_size where that
    is more; in one shuffle of all items it would be read by nearly as many shards as it has items, or as there are.
    """
    count, num_blocks = int(block_sizes.sum()), len(block_sizes)
    windows = max(1, min(num_blocks // _WINDOW_BLOCKS, count // (_WINDOW_SHARDS * shard_size)))
    by_chance = philox.permutation(philox.stream_key(seed, f"blocks/{split}"), num_blocks)
    dealt = np.lexsort((by_chance, np.arange(num_blocks) // windows))
    window = np.empty(num_blocks, np.int64)
    window[dealt] = np.arange(num_blocks) % windows
    return np.lexsort((order(seed, split, count), np.repeat(window, block_sizes)))


def key(position: int) -> str:
    """A sample's key, from its planned position in its split."""
    return f"{position:09d}"


def corrupt_limit(count: int, max_fraction: float) -> int:
    """How many of `count` images may be corrupt."""
    return math.floor(count * max_fraction)


def make(source: Source, config: PrepareConfig) -> dict[str, Any]:
    """The plan as plan.json holds it: all that the bytes of the shards depend on.

    max_corrupt_fraction is not among it: a run that it stopped may go on with another.
    """
    settings = to_dict(config)
    del settings["max_corrupt_fraction"]
    return {
        "verb": "prepare",
        "config": settings,
        "source": {"kind": source.kind, "digest": source.digest},
        "encoder": images.encoder(config.image_format),
        "splits": source.counts(),
        "classes": list(source.classes),
    }


def is_done(out_url: str, plan: Mapping[str, Any]) -> bool:
    """Whether the dataset of this plan is finished. Raises DatasetError where another one was begun."""
    if storage.stat(storage.join(out_url, record.NAME)) is None:
        return False
    record.settle_plan(out_url, plan, {})
    return True
