"""One unit of work: one shard made, committed, and its part derived from the stored bytes.

Every step may be repeated and may meet a rival: what is stored first is the truth, and is adopted.
"""

import dataclasses
import enum
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import images, storage
from pipeline.dataset import index, tar
from pipeline.dataset.record import DatasetError
from pipeline.generate.factory import Factory, Sample, key_of
from pipeline.generate.plan import GeneratePlan

SPLIT = "train"
SCHEMA = index.SCHEMA.append(pa.field("seed", pa.int64())).append(pa.field("score", pa.float32()))


class Outcome(enum.StrEnum):
    """How a shard came to be in storage."""

    WRITTEN = "written"
    """By us."""
    ADOPTED = "adopted"
    """It was there, or a rival wrote the same bytes."""
    CONFLICTED = "conflicted"
    """A rival wrote other bytes while we made ours; what it stored was checked and adopted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """A committed part."""

    shard: int
    rows: int
    sha256: str
    outcome: Outcome = Outcome.ADOPTED
    """Of its shard; that of a part which is only looked up is that it was there."""


_OUTCOMES = {
    storage.Put.CREATED: Outcome.WRITTEN,
    storage.Put.SAME: Outcome.ADOPTED,
    storage.Put.OTHER: Outcome.CONFLICTED,
}


def part_url(out_url: str, shard: int) -> str:
    """The URL of a shard's part, which is its receipt."""
    return storage.join(out_url, SPLIT, index.part_name(shard))


def write_shard(out_url: str, factory: Factory, shard: int) -> Receipt:
    """Make shard number `shard` of the factory's plan unless it is there, then its part unless it is there. Raises
    DatasetError for a shard in storage that is not one of this plan.
    """
    name = index.shard_name(shard)
    url = storage.join(out_url, SPLIT, name)
    stored = None if storage.stat(url) is None else storage.read(url)
    outcome = Outcome.ADOPTED
    if stored is None:
        with factory.making:
            stored = build_shard(factory, shard)
        put = storage.put_if_absent(url, stored)
        outcome = _OUTCOMES[put]
        if put is storage.Put.OTHER:
            stored = storage.read(url)
    part = encode_part(factory, shard, stored, url)
    if storage.put_if_absent(part_url(out_url, shard), part) is storage.Put.OTHER:
        raise DatasetError(f"{part_url(out_url, shard)}: does not describe {name}; delete the part and run again")
    return dataclasses.replace(receipt(part_url(out_url, shard), shard, factory.plan), outcome=outcome)


def build_shard(factory: Factory, shard: int) -> bytes:
    """The tar of a shard: key (seed, 9 digits), image, and .cls with classes; a pure function of the plan on one
    hardware class.
    """
    return tar.build(factory.samples(micro_batches(factory.plan, shard)))


def make_again(factory: Factory, keys: Sequence[str]) -> Iterator[Sample]:
    """Key and files of chosen samples, with the bytes that their shards have on one hardware class: each is made in the
    micro-batch that it was made in, since kernels round differently in another. Raises DatasetError for a key that
    the plan does not have.
    """
    plan = factory.plan
    numbers = {_number(plan, key) for key in keys}
    shards = sorted({number // plan.config.shard_size for number in numbers})
    batches = [seeds for shard in shards for seeds in micro_batches(plan, shard) if numbers & set(seeds.tolist())]
    return (one for one in factory.samples(batches) if one[0] in set(keys))


def _number(plan: GeneratePlan, key: str) -> int:
    number = int(key) if key.isascii() and key.isdigit() else plan.config.num_images
    if number >= plan.config.num_images or key != key_of(number):
        last = key_of(plan.config.num_images - 1)
        raise DatasetError(f"key {key!r} is not of this plan, whose keys are {key_of(0)} to {last}")
    return number


def micro_batches(plan: GeneratePlan, shard: int) -> list[NDArray[np.int64]]:
    """The numbers of a shard's images, as they go through G together."""
    seeds, size = plan.seeds(shard), plan.config.micro_batch
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def encode_part(factory: Factory, shard: int, stored: bytes, where: str) -> bytes:
    """The part of a stored shard, from its bytes; raises DatasetError if they are not of the factory's plan."""
    plan = factory.plan
    rows = index.rows_of_shard(index.shard_name(shard), stored, plan.channels)
    seeds = plan.seeds(shard)
    wanted = [key_of(seed) for seed in seeds.tolist()]
    if rows["key"].to_pylist() != wanted:
        raise DatasetError(
            f"{where}: does not hold the images {wanted[0]} to {wanted[-1]} of this plan; choose another URL"
        )
    rows = rows.append_column(SCHEMA.field("seed"), pa.array(seeds))
    scores = _scores(factory, rows, stored) if plan.config.score else pa.nulls(len(seeds), pa.float32())
    rows = rows.append_column(SCHEMA.field("score"), scores)
    return index.encode_part([rows])


def _scores(factory: Factory, rows: pa.Table, stored: bytes) -> pa.Array:
    """D's logit of each image of a shard, decoded from its stored bytes."""
    places = zip(rows["offset"].to_pylist(), rows["size"].to_pylist(), strict=True)
    files = [stored[offset : offset + size] for offset, size in places]
    pixels = np.stack(images.decode_all(files, factory.plan.channels))
    labels = rows["label"].fill_null(0).to_numpy().astype("int64")
    return pa.array(factory.scores(pixels, labels), pa.float32())


def receipt(url: str, shard: int, plan: GeneratePlan) -> Receipt:
    """The receipt that a stored part is."""
    return Receipt(shard=shard, rows=len(plan.seeds(shard)), sha256=storage.digest(url))
