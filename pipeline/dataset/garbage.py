"""What lies at a dataset's URL and is not of it: leftovers of writers that died, shards of runs that were given up."""

from collections.abc import Iterator

from pipeline import storage
from pipeline.dataset import part, record
from pipeline.dataset.record import DatasetError, DatasetRecord

_LIVING_SEC = 3600.0
"""A temporary object younger than this may be one that is being written."""
_EVENTS = "events/"


def unnamed(url: str, *, abandon: bool) -> list[str]:
    """Names below `url` that no reader will ask for, in the order in which they can be removed.

    Raises DatasetError for a URL that holds no dataset of ours, and for an unfinished one unless it is to be abandoned:
    then all of it is named, plan.json last, so that an interrupted removal can be taken up again.
    """
    entries = [entry.name for entry in storage.list_entries(url)]
    if record.NAME in entries:
        named = set(_names(url, record.read(url)[0]))
        rest = [name for name in entries if name not in named and not name.startswith(_EVENTS)]
    elif record.PLAN_NAME not in entries:
        raise DatasetError(f"{url}: no dataset here ({record.NAME} and {record.PLAN_NAME} are missing)")
    elif not abandon:
        raise DatasetError(
            f"{url}: an unfinished dataset; finish it with the command that makes it, or give it up with --abandon"
        )
    else:
        rest = [name for name in entries if name != record.PLAN_NAME] + [record.PLAN_NAME]
    return [*_leftovers(url), *rest]


def _names(url: str, dataset: DatasetRecord) -> Iterator[str]:
    """All that a finished dataset consists of."""
    yield from (record.NAME, record.PLAN_NAME, *record.DESCRIPTIONS)
    for split, parts in dataset.splits.items():
        for listed in parts:
            yield f"{split}/{listed.name}"
            rows = part.read_rows(storage.join(url, split, listed.name), listed, 0, listed.rows)
            if not dataset.shards_url:
                yield from (f"{split}/{shard}" for shard in rows["shard"].unique().to_pylist())


def _leftovers(url: str) -> Iterator[str]:
    for entry in storage.list_temporary(url):
        found = storage.stat(storage.join(url, entry.name))
        if found is not None and found.age_sec > _LIVING_SEC:
            yield entry.name
