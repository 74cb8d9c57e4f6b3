"""dataset.json, the commit record of a dataset: written last, and readers trust only what it lists."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import storage
from pipeline.config import ConfigError, from_dict
from pipeline.errors import InputError

FORMAT = 1
NAME = "dataset.json"
PLAN_NAME = "plan.json"
DESCRIPTIONS = ("README.md", "croissant.json", "samples.png")
"""What a generated dataset says of itself to people and catalogues; nothing of ours reads it."""
_SHOWN_CHARACTERS = 60


class DatasetError(InputError):
    """A URL that holds no dataset of ours, an unfinished one, or another one than was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One Parquet file of the index."""

    name: str
    """Path below the split, e.g. index/part-00000.parquet."""
    rows: int
    """Samples it lists."""
    sha256: str
    """Digest of the stored file."""
    size_bytes: int = 0
    """Size of the stored file; 0: readers take it whole."""
    footer_bytes: int = 0
    """Size of its end, which says where the rows lie."""
    footer_sha256: str = ""
    """Digest of that end, which holds the digests of all before it; empty: readers take the file whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelRuns:
    """How well a split's samples are mixed, in the order of the index."""

    mean: float
    """Mean number of consecutive samples of one class."""
    independent: float
    """The same if each sample's class were drawn from the split's frequencies: 1 / (1 − Σp²)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """What a dataset holds."""

    channels: int
    """1 (grey) or 3 (RGB)."""
    resolution: int
    """Height and width in pixels."""
    image_format: str
    """png, jpeg or webp; mixed: indexed foreign shards, with images of any format and size."""
    splits: Mapping[str, tuple[Part, ...]]
    """Split name → its index parts, in order."""
    classes: tuple[str, ...] = ()
    """Class names by label; empty: no labels."""
    lineage: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Where the images came from."""
    label_runs: Mapping[str, LabelRuns] = dataclasses.field(default_factory=dict)
    """Split name → how its labels are mixed; a split without two classes is not there."""
    class_counts: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Split name → its samples of each class, by label; a split of a dataset without classes, or one that an earlier
    version described, is not there."""
    shards_url: str = ""
    """Where the shards lie that the index names; empty: in the folder of their split, beside the index."""

    def num_samples(self, split: str) -> int:
        """Samples of a split; raises DatasetError for a split that is not there."""
        if split not in self.splits:
            raise DatasetError(f"no split {split!r}; this dataset has {', '.join(sorted(self.splits))}")
        return sum(part.rows for part in self.splits[split])

    def label_run_ratio(self, split: str) -> float:
        """How many times longer runs of one class are than in independent draws: about 1 where samples are mixed.

        1.0 where there are no labels, one class, or nothing was measured.
        """
        runs = self.label_runs.get(split)
        return runs.mean / runs.independent if runs else 1.0


def encode_json(value: Mapping[str, Any]) -> bytes:
    """JSON for a person to read and for a digest to depend on: sorted keys, two spaces, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def encode(record: DatasetRecord) -> bytes:
    """The bytes of dataset.json."""
    body = {
        "format": FORMAT,
        "channels": record.channels,
        "resolution": record.resolution,
        "image_format": record.image_format,
        "classes": list(record.classes),
        "splits": {name: _encode_split(record, name) for name in record.splits},
        "lineage": dict(record.lineage),
        "shards_url": record.shards_url,
    }
    return encode_json(body)


def _encode_split(record: DatasetRecord, name: str) -> dict[str, Any]:
    body: dict[str, Any] = {"parts": [dataclasses.asdict(part) for part in record.splits[name]]}
    if name in record.label_runs:
        body["label_runs"] = dataclasses.asdict(record.label_runs[name])
    if name in record.class_counts:
        body["class_counts"] = list(record.class_counts[name])
    return body


def decode(data: bytes, where: str) -> DatasetRecord:
    """dataset.json → record; raises DatasetError for what is not ours."""
    try:
        body = json.loads(data)
        if body["format"] != FORMAT:
            raise DatasetError(f"{where}: format {body['format']}, and this version reads {FORMAT}; upgrade ganymede")
        splits = {name: tuple(_decode_part(part) for part in split["parts"]) for name, split in body["splits"].items()}
        return DatasetRecord(
            channels=body["channels"],
            resolution=body["resolution"],
            image_format=body["image_format"],
            classes=tuple(body["classes"]),
            splits=splits,
            lineage=body["lineage"],
            label_runs={
                name: from_dict(LabelRuns, split["label_runs"], where)
                for name, split in body["splits"].items()
                if "label_runs" in split
            },
            class_counts={
                name: _decode_counts(split["class_counts"], len(body["classes"]))
                for name, split in body["splits"].items()
                if "class_counts" in split
            },
            shards_url=body.get("shards_url", ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DatasetError(
            f"{where}: not a dataset record of ganymede ({error}); name a URL `prepare` wrote"
        ) from error


def _decode_part(body: Mapping[str, Any]) -> Part:
    """`config.from_dict` would take 46 µs, and there can be a million of them."""
    part = Part(**body)
    for field in dataclasses.fields(Part):
        if type(getattr(part, field.name)) is not field.type:
            raise TypeError(f"{field.name} of a part is {getattr(part, field.name)!r}")
    return part


def _decode_counts(counts: Any, num_classes: int) -> tuple[int, ...]:
    if len(counts) != num_classes or any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"class_counts of a split must be {num_classes} numbers, one a class, none below 0")
    return tuple(counts)


def read(url: str) -> tuple[DatasetRecord, str]:
    """The record at a dataset URL and its digest (sha256 of dataset.json), which names the dataset."""
    where = storage.join(url, NAME)
    try:
        data = storage.read(where)
    except storage.NotFoundError:
        unfinished = storage.stat(storage.join(url, PLAN_NAME)) is not None
        hint = "an unfinished dataset; run the command that makes it again" if unfinished else "no dataset here"
        raise DatasetError(f"{url}: {hint} ({NAME} is missing)") from None
    return decode(data, where), hashlib.sha256(data).hexdigest()


def commit(url: str, record: DatasetRecord) -> None:
    """Write dataset.json, the one commit point; raises DatasetError if another one is there."""
    if storage.put_if_absent(storage.join(url, NAME), encode(record)) is storage.Put.OTHER:
        raise DatasetError(f"{url}: holds another {NAME}; choose an empty output URL")


def settle_plan(url: str, plan: Mapping[str, Any], lineage: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write plan.json first, or adopt the equal plan that is there; returns the stored lineage.

    Lineage is the first driver's: it is not compared, since a later version may finish an earlier one's work.
    Raises DatasetError when the URL holds another plan, or files without a plan.
    """
    where = storage.join(url, PLAN_NAME)
    body = {"format": FORMAT, "plan": dict(plan), "lineage": dict(lineage)}
    if (
        storage.stat(where) is None
        and not _has_rival(url)
        and storage.put_if_absent(where, encode_json(body)) is not storage.Put.OTHER
    ):
        return lineage
    found, found_lineage = _read_plan(where)
    wanted = json.loads(encode_json(plan))
    if found != wanted:
        differs = ", ".join(_differences(found, wanted))
        raise DatasetError(
            f"{url}: holds another dataset, its plan differs in {differs} (plan {_short_digest(found)} there, "
            f"{_short_digest(wanted)} here); choose another output URL, or give the settings it was started with"
        )
    return found_lineage


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What differs between two plans, by dotted names: `config.seed (1 there, 2 here)`."""
    for name in sorted(found.keys() | wanted.keys()):
        there, here = found.get(name, "absent"), wanted.get(name, "absent")
        if isinstance(there, Mapping) or isinstance(here, Mapping):
            theirs, ours = (value if isinstance(value, Mapping) else {} for value in (there, here))
            yield from _differences(theirs, ours, f"{where}{name}.")
        elif there != here:
            yield f"{where}{name} ({_short(there)} there, {_short(here)} here)"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _short_digest(plan: Mapping[str, Any]) -> str:
    return hashlib.sha256(encode_json(plan)).hexdigest()[:12]


def stored_plan(url: str) -> Mapping[str, Any]:
    """What plan.json at a dataset URL says was meant to be made; raises DatasetError for what is not ours."""
    return _read_plan(storage.join(url, PLAN_NAME))[0]


def _read_plan(where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan and lineage."""
    try:
        stored = json.loads(storage.read(where))
        found, found_format, lineage = dict(stored["plan"]), stored["format"], dict(stored["lineage"])
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{where}: not a plan of ganymede ({error}); choose an empty output URL") from error
    if found_format != FORMAT:
        raise DatasetError(f"{where}: format {found_format}, and this version writes {FORMAT}; finish it with that one")
    return found, lineage


def _has_rival(url: str) -> bool:
    """Whether another driver settled its plan meanwhile; raises DatasetError for files without a plan."""
    entry = next(iter(storage.list_entries(url)), None)
    if entry is None:
        return False
    if storage.stat(storage.join(url, PLAN_NAME)) is None:  # a rival's plan is there before any other of its objects
        raise DatasetError(
            f"{url}: not empty (holds {entry.name}) and not a dataset of ours; choose an empty output URL"
        )
    return True
