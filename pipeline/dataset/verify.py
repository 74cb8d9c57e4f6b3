"""Whether what is stored is what dataset.json and the index say: every byte is read again, every image decoded."""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import images, storage
from pipeline.dataset import index, record, tar
from pipeline.dataset.record import DatasetError, DatasetRecord, Part

_PROBLEMS_SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What one part's shards turned out to be."""

    split: str
    part: str
    samples: int
    shards: Mapping[str, tuple[int, int]]
    """Of each shard, the samples in this part of the index, and those that are stored."""
    first_key: str
    last_key: str
    problems: tuple[str, ...]
    """What, where; empty: all is as the index says."""


def check_part(url: str, dataset: DatasetRecord, split: str, listed: Part) -> Found:
    """Read the shards of an index part again: count, keys, labels, places, and the digest of every image's pixels.

    Never raises for what is stored: that is told in `problems`. Raises StorageUnavailableError where nobody can tell.
    """
    split_url = storage.join(url, split)
    try:
        rows = _rows(storage.join(split_url, listed.name), listed)
    except storage.StorageUnavailableError:
        raise
    except (DatasetError, storage.StorageError) as error:
        return Found(
            split=split, part=listed.name, samples=0, shards={}, first_key="", last_key="", problems=(str(error),)
        )
    problems: list[str] = []
    shards: dict[str, tuple[int, int]] = {}
    for shard in pc.unique(rows["shard"]).to_pylist():
        wanted = rows.filter(pc.equal(rows["shard"], shard))
        stored, wrong = _check_shard(storage.join(split_url, shard), shard, wanted, dataset)
        shards[shard] = len(wanted), stored
        problems += wrong
    keys = rows["key"].to_pylist()
    if keys != sorted(set(keys)):
        problems.append(f"{split}/{listed.name}: keys are not in order, or one is there twice")
    return Found(
        split=split,
        part=listed.name,
        samples=len(rows),
        shards=shards,
        first_key=keys[0],
        last_key=keys[-1],
        problems=tuple(problems[:_PROBLEMS_SHOWN]),
    )


def _rows(url: str, listed: Part) -> pa.Table:
    """A part's rows, from the store and not from a reader's cache."""
    data = storage.read(url)
    if hashlib.sha256(data).hexdigest() != listed.sha256:
        raise DatasetError(f"{url}: its digest is not the one in {record.NAME}")
    return pq.read_table(pa.BufferReader(data))


def _check_shard(url: str, shard: str, wanted: pa.Table, dataset: DatasetRecord) -> tuple[int, list[str]]:
    """Samples in a shard, and what is wrong with those that `wanted` lists: other parts may list more of them."""
    try:
        found = index.rows_of_shard(shard, storage.read(url), dataset.channels)
    except storage.StorageUnavailableError:
        raise
    except (storage.StorageError, tar.TarError, images.ImageError, ValueError) as error:
        return len(wanted), [f"{url}: {error}"]
    stored = len(found)
    places = pc.index_in(wanted["key"], value_set=found["key"].combine_chunks())
    if places.null_count:
        key = wanted["key"][pc.is_null(places).to_pylist().index(True)].as_py()
        return stored, [f"{url}: {places.null_count} samples of the index are not in it, e.g. {key}"]
    found, problems = found.take(places), []
    for name in index.SCHEMA.names:
        differs = [a != b for a, b in zip(found[name].to_pylist(), wanted[name].to_pylist(), strict=True)]
        if any(differs):
            key = wanted["key"][differs.index(True)].as_py()
            problems.append(f"{url}: {name} of key {key} is not what the index says ({sum(differs)} samples)")
    highest = pc.max(found["label"]).as_py()
    if highest is not None and highest >= max(1, len(dataset.classes)):
        problems.append(f"{url}: label {highest}, and there are {len(dataset.classes)} classes")
    return stored, problems


def check_whole(url: str, found: Sequence[Found]) -> list[str]:
    """What only all parts together can tell: each key once in a split, and as many images as the plan meant."""
    problems = [problem for one in found for problem in one.problems]
    for before, after in itertools.pairwise(found):
        if before.split == after.split and before.samples and after.samples and after.first_key <= before.last_key:
            problems.append(f"{after.split}/{after.part}: begins with key {after.first_key}, before the last one's end")
    problems += _miscounted(found)
    meant = record.stored_plan(url).get("config", {}).get("num_images")
    samples = sum(one.samples for one in found)
    if meant is not None and samples != meant:
        problems.append(f"{url}: {samples} images, and {meant} were meant")
    return problems


def _miscounted(found: Sequence[Found]) -> Iterator[str]:
    """Shards that hold more samples than all parts list, or that are listed twice."""
    indexed: Counter[tuple[str, str]] = Counter()
    stored: dict[tuple[str, str], int] = {}
    for one in found:
        for shard, (rows, samples) in one.shards.items():
            indexed[one.split, shard] += rows
            stored[one.split, shard] = samples
    for (split, shard), rows in indexed.items():
        if rows != stored[split, shard]:
            yield f"{split}/{shard}: {stored[split, shard]} samples, {rows} in the index"
