"""`prepare`, executed by Ray Data: one task makes one shard and derives its index rows; no image reaches the driver.

Every step can be done again: a shard and its event log are pure functions of the plan and the source, and are written
by put_if_absent. A killed run is finished by the same call.
"""

import collections
import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray
from PIL import Image

from pipeline import images, storage
from pipeline.dataset import index, mixing, part, record, tar
from pipeline.errors import InputError, RetryableError
from pipeline.prepare import plan as plans
from pipeline.prepare import sources
from pipeline.prepare.plan import PrepareConfig, Unit
from pipeline.prepare.sources import ItemError, Source, SourceError

_EXAMPLES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What was made."""

    samples: Mapping[str, int]
    """Stored samples of each split."""
    classes: tuple[str, ...]
    """Class names by label."""
    converted: Mapping[str, int]
    """Images that needed a conversion, by what it was."""
    quarantined: int
    """Corrupt images left out; events/ names them."""
    ignored: int
    """Files of the source that are no images."""


@dataclasses.dataclass(frozen=True)
class _Made:
    """What a task says of its shard."""

    unit: Unit
    rows: pa.Table
    """Index rows of the stored shard."""
    events: str
    """Its event log."""

    @property
    def corrupt(self) -> int:
        return self.unit.stop - self.unit.start - len(self.rows)


def lineage(source: Source, named: str) -> dict[str, str]:
    """Where the images come from, for plan.json: as the user named it, and what it held."""
    return {"source": named, "source_digest": source.digest, "code_version": version("ganymede")}


def prepare(
    source: Source, named: str, out_url: str, config: PrepareConfig, on_progress: Callable[[int], None]
) -> Summary:
    """Make the dataset at `out_url`; needs a running Ray. `on_progress` is told of each finished shard's samples.

    `named` is the source as the user named it, for the lineage.

    Raises SourceError when too many images are corrupt, DatasetError when another dataset is at `out_url`,
    StorageError as storage does.
    """
    stored_lineage = record.settle_plan(out_url, plans.make(source, config), lineage(source, named))
    units = plans.units(source.counts(), config.shard_size)
    tally = _Tally(source.counts(), config)
    made: list[_Made] = []
    for done in _run(source, out_url, config, units):
        tally.add(done)
        made.append(done)
        on_progress(done.unit.stop - done.unit.start)
    rows = {split: _in_shard_order(made, split) for split in source.counts()}
    parts = {split: _write_parts(out_url, split, tables) for split, tables in rows.items()}
    tallies = {split: mixing.tally_pieces(table["label"] for table in tables) for split, tables in rows.items()}
    dataset = record.DatasetRecord(
        channels=config.channels,
        resolution=config.resolution,
        image_format=config.image_format,
        splits=parts,
        classes=source.classes,
        lineage=stored_lineage,
        label_runs={split: runs for split, tally in tallies.items() if (runs := tally.label_runs()) is not None},
        class_counts=_class_counts(tallies, len(source.classes)),
    )
    record.commit(out_url, dataset)
    return Summary(
        samples={split: dataset.num_samples(split) for split in parts},
        classes=source.classes,
        converted=dict(sorted(tally.converted.items())),
        quarantined=sum(tally.corrupt.values()),
        ignored=source.ignored,
    )


class _Tally:
    """Counts over the shards, and the rule that stops a run on a rotten source."""

    def __init__(self, counts: Mapping[str, int], config: PrepareConfig) -> None:
        self.converted: collections.Counter[str] = collections.Counter()
        self.corrupt: collections.Counter[str] = collections.Counter()
        self._examples: dict[str, list[str]] = {split: [] for split in counts}
        self._counts = counts
        self._fraction = config.max_corrupt_fraction

    def add(self, made: _Made) -> None:
        """Count a shard; raises SourceError as soon as its split has more corrupt images than all of it may have."""
        split = made.unit.split
        for event in map(json.loads, made.events.splitlines()):
            self.converted.update(event.get("converted", {}))
            if "reason" in event:
                self._examples[split].append(f"{event['name']} ({event['reason']})")
        self.corrupt[split] += made.corrupt
        limit = plans.corrupt_limit(self._counts[split], self._fraction)
        if self.corrupt[split] > limit:
            examples = "; ".join(self._examples[split][:_EXAMPLES])
            raise SourceError(
                f"{self.corrupt[split]} of the {self._counts[split]} images of split {split} are corrupt so far, "
                f"more than the {limit} allowed, e.g. {examples}; mend the source, or allow more with "
                "--max-corrupt-fraction"
            )


# ---------------------------------------------------------------------------------------------- on the driver


def _run(source: Source, out_url: str, config: PrepareConfig, units: Sequence[Unit]) -> Iterator[_Made]:
    """Make all shards, in whatever order they are finished."""
    planned = ray.put(_in_planned_order(source, config))
    starts = dict(zip(source.counts(), np.cumsum([0, *source.counts().values()]).tolist(), strict=False))
    maker = _ShardMaker(source.without_items(), out_url, config)

    def make(batch: pa.Table) -> pa.Table:
        unit = units[batch["id"][0].as_py()]
        first = starts[unit.split]
        items = ray.get(planned).slice(first + unit.start, unit.stop - unit.start)
        try:
            return _to_row(maker.make(unit, items))
        except (InputError, RetryableError) as error:
            return _to_row(_Made(unit, index.SCHEMA.empty_table(), ""), error)

    shards = ray.data.range(len(units), override_num_blocks=len(units))
    results = shards.map_batches(make, batch_size=1, batch_format="pyarrow")
    results.context.enable_progress_bars = False
    for batch in results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield _from_row(batch)


def _in_planned_order(source: Source, config: PrepareConfig) -> pa.Table:
    """The items with each split shuffled: a task's share is one slice."""
    first, chosen = 0, []
    for split, count in source.counts().items():
        items = source.items.slice(first, count)
        blocks = _block_sizes(items)
        if blocks is None:
            chosen.append(first + plans.order(config.seed, split, count))
        else:
            chosen.append(first + plans.order_of_blocks(config.seed, split, blocks, config.shard_size))
        first += count
    return source.items.take(pa.array(np.concatenate(chosen))).combine_chunks()


def _block_sizes(items: pa.Table) -> NDArray[np.int64] | None:
    """How many items each block has, in order; None for items without blocks."""
    if items["block"].null_count:
        return None
    blocks = items.group_by(["object", "block"], use_threads=False).aggregate([([], "count_all")])
    return blocks["count_all"].to_numpy()


def _to_row(made: _Made, error: Exception | None = None) -> pa.Table:
    """One row a shard; its index rows travel as Arrow IPC bytes.

    So does an error of ours, pickled as Ray would: raised in the task it would come back as Ray Data's own error,
    with Ray Data's advice added to its text.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, made.rows.schema) as writer:
        writer.write_table(made.rows)
    columns: dict[str, list[object]] = {name: [value] for name, value in made.unit._asdict().items()}
    columns["rows"] = [sink.getvalue().to_pybytes()]
    columns["events"] = [made.events]
    columns["error"] = [pickle.dumps(error)]
    return pa.table(columns)


def _from_row(batch: pa.Table) -> _Made:
    """Raises the error that the task met."""
    row: dict[str, Any] = batch.to_pylist()[0]
    error = pickle.loads(row["error"])
    if error is not None:
        raise error
    unit = Unit(row["split"], row["number"], row["start"], row["stop"])
    return _Made(unit, pa.ipc.open_stream(row["rows"]).read_all(), row["events"])


def _in_shard_order(made: Sequence[_Made], split: str) -> list[pa.Table]:
    """Index rows of each shard of a split."""
    return [m.rows for m in sorted(made, key=lambda m: m.unit.number) if m.unit.split == split]


def _class_counts(tallies: Mapping[str, mixing.LabelTally], num_classes: int) -> dict[str, tuple[int, ...]]:
    """Stored samples of each class of each split; empty without classes."""
    if not num_classes:
        return {}
    return {split: tally.class_counts(range(num_classes)) for split, tally in tallies.items()}


def _write_parts(out_url: str, split: str, tables: Sequence[pa.Table]) -> tuple[record.Part, ...]:
    """The split's index."""
    groups = part.fill_parts(tables)
    return tuple(_write_part(out_url, split, number, group) for number, group in enumerate(groups))


def _write_part(out_url: str, split: str, number: int, groups: Sequence[pa.Table]) -> record.Part:
    name = index.part_name(number)
    where = storage.join(out_url, split, name)
    data = part.encode_part(groups)
    if storage.put_if_absent(where, data) is storage.Put.OTHER:
        # Other bytes may say the same: another version of the Parquet library wrote them.
        data = storage.read(where)
        if not pq.read_table(pa.BufferReader(data)).equals(pa.concat_tables(groups)):
            raise record.DatasetError(f"{where}: does not list what the shards hold; choose an empty output URL")
    return part.describe_part(name, data)


# ------------------------------------------------------------------------------------------------ in a worker


@dataclasses.dataclass(frozen=True)
class _ShardMaker:
    """Makes a shard, or adopts the one that is stored."""

    source: Source
    """Without its items."""
    out_url: str
    config: PrepareConfig

    def make(self, unit: Unit, items: pa.Table) -> _Made:
        """The stored shard's index rows and event log."""
        shard = index.shard_name(unit.number)
        where = storage.join(self.out_url, unit.split, shard)
        log = storage.join(self.out_url, "events", f"{unit.split}-{shard.removesuffix('.tar')}.jsonl")
        if storage.stat(where) is None:
            data, events = self._build(unit, items)
            if events:
                storage.put_if_absent(log, events.encode())
            if storage.put_if_absent(where, data) is storage.Put.OTHER:
                data = storage.read(where)
        else:
            data, events = storage.read(where), _read_log(log)
        return _Made(unit, index.rows_of_shard(shard, data, self.config.channels), events)

    def _build(self, unit: Unit, items: pa.Table) -> tuple[bytes, str]:
        """A shard's bytes, and its event log: a JSON line for each corrupt image, one with the conversions."""
        made: dict[int, tuple[dict[str, bytes], frozenset[str]] | InputError] = {}
        for row, found in sources.read_items(self.source, items):
            try:
                made[row] = self._convert(found, items["label"][row].as_py())
            except (images.ImageError, ItemError) as error:
                made[row] = error
        events: list[dict[str, object]] = []
        samples: list[tuple[str, dict[str, bytes]]] = []
        converted: collections.Counter[str] = collections.Counter()
        for row in range(len(items)):
            key, result = plans.key(unit.start + row), made[row]
            if isinstance(result, InputError):
                events.append({"key": key, "name": items["name"][row].as_py(), "reason": str(result)})
            else:
                samples.append((key, result[0]))
                converted.update(result[1])
        if converted:
            events.append({"converted": dict(converted)})
        lines = [json.dumps(event, sort_keys=True, ensure_ascii=False) + "\n" for event in events]
        return tar.build(samples), "".join(lines)

    def _convert(self, found: sources.Found | ItemError, label: int | None) -> tuple[dict[str, bytes], frozenset[str]]:
        """A sample's files by extension, and what had to be converted. Raises ImageError, ItemError."""
        if isinstance(found, ItemError):
            raise found
        config = self.config
        if isinstance(found, bytes):
            decoded = images.decode(found, channels=config.channels)
        else:
            decoded = images.Decoded(_with_channels(found, config.channels), frozenset())
        pixels = images.resize(decoded.pixels, config.resolution, config.fit)
        files = {images.EXTENSIONS[config.image_format]: images.encode(pixels, config.image_format, config.quality)}
        if label is not None:
            files["cls"] = b"%d" % label
        return files, decoded.converted


def _with_channels(pixels: images.Pixels, channels: int) -> images.Pixels:
    """[H, W, 1 or 3] → [H, W, channels]; grey is the luma that `images.decode` makes."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def _read_log(where: str) -> str:
    try:
        return storage.read(where).decode()
    except storage.NotFoundError:
        return ""
