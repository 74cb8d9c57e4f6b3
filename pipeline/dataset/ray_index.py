"""The index of foreign shards, built by Ray Data: one task reads the headers of a few shards and writes their part.

Every step can be done again: a part is a pure function of its shards and is written by put_if_absent. A killed run is
finished by the same call.
"""

import dataclasses
import pickle
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from pipeline import storage
from pipeline.dataset import foreign, index, mixing, part, record
from pipeline.dataset.foreign import ForeignConfig, Shard, Unit
from pipeline.dataset.label import MAX_CLASSES, LabelError, number_classes, parse_label
from pipeline.dataset.mixing import LabelTally
from pipeline.dataset.record import DatasetError, DatasetRecord, Part
from pipeline.errors import InputError, RetryableError

_IGNORED = "ganymede.ignored"
_NAMES_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What was indexed."""

    samples: int
    """Rows, of all splits."""
    ignored: int
    """Samples without an image, which are left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Made:
    """What a task says of its part, from the stored bytes."""

    unit: Unit
    part: Part
    labels: LabelTally
    ignored: int
    unlabelled: str
    """Shard and key of a sample without a label, if there is one."""


def is_done(shards_url: str, index_url: str, config: ForeignConfig) -> bool:
    """Whether the index of these shards is finished. Raises DatasetError where another one, or none, is at the URL."""
    if storage.stat(storage.join(index_url, record.NAME)) is None:
        return False
    # What was found then stands: shards that were added or changed since are a matter for another index.
    stored = record.stored_plan(index_url)
    wanted = foreign.settings(shards_url, config)
    record.settle_plan(index_url, wanted | {"listing": stored.get("listing")}, {})
    return True


def build(
    shards_url: str,
    shards: Sequence[Shard],
    index_url: str,
    config: ForeignConfig,
    on_progress: Callable[[int], None],
) -> Summary:
    """Index shards (as `foreign.list_shards` gives them) into `index_url`; needs a running Ray.

    `on_progress` is told of the number of shards of each finished part. Raises TarError or LabelError naming a shard
    that cannot be indexed, DatasetError where another dataset is at `index_url`, StorageError as storage does.
    """
    plan = foreign.settings(shards_url, config) | {"listing": foreign.listing(shards)}
    found = {"source": shards_url, "source_digest": plan["listing"]["sha256"], "code_version": version("ganymede")}
    lineage = record.settle_plan(index_url, plan, found)
    made: list[_Made] = []
    for one in _run(shards_url, index_url, config, foreign.units(shards)):
        made.append(one)
        on_progress(len(one.unit.shards))
    made.sort(key=lambda one: one.unit.number)
    splits = {split: [one for one in made if one.unit.split == split] for split in {one.unit.split for one in made}}
    tallies = {split: sum((one.labels for one in own), LabelTally({})) for split, own in splits.items()}
    classes = _classes(shards_url, made, config.label_field)
    dataset = DatasetRecord(
        channels=config.channels,
        resolution=config.resolution,
        image_format="mixed",
        classes=classes,
        splits={split: tuple(one.part for one in own) for split, own in splits.items()},
        lineage=lineage,
        label_runs={split: runs for split, tally in tallies.items() if (runs := tally.label_runs()) is not None},
        # A part names its classes as `classes` does: they are made of what parts say.
        class_counts={split: tally.class_counts(classes) for split, tally in tallies.items()} if classes else {},
        shards_url=shards_url,
    )
    samples = sum(one.part.rows for one in made)
    if not samples:
        raise DatasetError(f"{shards_url}: no images in its {len(shards)} shards; name a URL of WebDataset shards")
    record.commit(index_url, dataset)
    return Summary(samples=samples, ignored=sum(one.ignored for one in made))


def _classes(url: str, made: Sequence[_Made], label_field: str) -> tuple[str, ...]:
    """The classes of all shards: numbers as they are, names in the order of the alphabet."""
    labels = set().union(*(one.labels.counts for one in made)) - {None}
    unlabelled = next((one.unlabelled for one in made if one.unlabelled), "")
    if unlabelled and (labels or label_field != "cls"):
        raise LabelError(f"{url}: {unlabelled} has no label at {label_field}; see --foreign.label-field")
    if len(labels) > MAX_CLASSES:
        shown = ", ".join(sorted(map(str, labels))[:_NAMES_SHOWN])
        raise LabelError(
            f"{url}: {len(labels)} classes at {label_field} (e.g. {shown}), more than {MAX_CLASSES}; "
            "see --foreign.label-field"
        )
    return number_classes((parse_label(label, url) for label in labels), (), url)[1]


def _run(shards_url: str, index_url: str, config: ForeignConfig, units: Sequence[Unit]) -> Iterator[_Made]:
    """Make all parts, in whatever order they are finished."""
    units_ref = ray.put(list(units))

    def make(batch: pa.Table) -> pa.Table:
        unit = ray.get(units_ref)[batch["id"][0].as_py()]
        try:
            result: object = _make(shards_url, index_url, config, unit)
        except (InputError, RetryableError) as error:
            result = error
        # Pickled, an error too: raised in the task it would come back with Ray Data's advice added to its text.
        return pa.table({"result": [pickle.dumps(result)]})

    numbers = ray.data.range(len(units), override_num_blocks=len(units))
    results = numbers.map_batches(make, batch_size=1, batch_format="pyarrow")
    results.context.enable_progress_bars = False
    for batch in results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        result = pickle.loads(batch["result"][0].as_py())
        if isinstance(result, Exception):
            raise result
        yield result


def _make(shards_url: str, index_url: str, config: ForeignConfig, unit: Unit) -> _Made:
    """Write a unit's part, or adopt the one that is stored."""
    name = index.part_name(unit.number)
    where = storage.join(index_url, unit.split, name)
    if storage.stat(where) is None:
        found = [foreign.rows_of_shard(shards_url, shard, config.label_field) for shard in unit.shards]
        ignored = sum(without for _, without in found)
        data = part.encode_part([rows for rows, _ in found], {_IGNORED: str(ignored)})
        if storage.put_if_absent(where, data) is storage.Put.OTHER:
            data = storage.read(where)
    else:
        data = storage.read(where)
    rows = pq.read_table(pa.BufferReader(data))
    unlabelled = rows.filter(pc.is_null(rows["label"])).slice(0, 1).to_pylist()
    return _Made(
        unit=unit,
        part=part.describe_part(name, data),
        labels=mixing.tally(rows["label"]),
        ignored=int(part.note(data, _IGNORED)),
        unlabelled=f"{unlabelled[0]['shard']}: {unlabelled[0]['key']}" if unlabelled else "",
    )
