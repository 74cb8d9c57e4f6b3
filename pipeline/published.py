"""What a loop has published: a numbered series of objects that are written once, of which the highest rules.

`published/000003.json` says what was added, and which dataset is current since then: the added one, unless one of a
later period was published before. `latest.json` is a copy for people; nothing reads it.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline import periods, storage
from pipeline.config import ConfigError, canonical_json, from_dict, to_dict
from pipeline.errors import InputError

FORMAT = 1
_FOLDER, _COPY, _REFUSED = "published", "latest.json", "refused"
_NAME = re.compile(r"(\d{6,})\.json")
_REQUESTS = 16


class PublishedError(InputError):
    """An object of the series that is not ours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Publication:
    """A dataset that passed, and what it came from. URLs are below the loop's, so that it can be copied elsewhere."""

    period: str
    """Of the schedule; empty: a run of its own."""
    dataset: str
    """URL of the synthetic images."""
    dataset_digest: str
    """sha256 of its dataset.json."""
    report: str
    """URL of the evaluation; empty: there were no images to judge by."""
    snapshot: str
    """URL of the snapshot that made them."""
    snapshot_digest: str
    """Of that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of the series."""

    number: int
    added: Publication
    current: Publication


def series(out: str) -> list[Entry]:
    """All that a loop has published, by number. Raises PublishedError for what is not ours."""
    found = [
        match for entry in storage.list_entries(storage.join(out, _FOLDER)) if (match := _NAME.fullmatch(entry.name))
    ]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return sorted(pool.map(lambda match: _read(out, int(match[1])), found), key=lambda entry: entry.number)


def publish(out: str, added: Publication) -> Entry:
    """Add a dataset to the series, or find it there; of a period the first one stands. Safe to do twice, and beside
    others who do it.
    """
    while True:
        entries = series(out)
        # What was run by hand can be published anew after something else was: only the last one counts.
        for entry in entries if added.period else entries[-1:]:
            if entry.added == added or (added.period and entry.added.period == added.period):
                return entry
        number = entries[-1].number + 1 if entries else 1
        entry = Entry(number=number, added=added, current=_current(entries, added))
        body = {"format": FORMAT, "added": to_dict(added), "current": to_dict(entry.current)}
        data = canonical_json(body)
        if storage.put_if_absent(_url(out, entry.number), data) is not storage.Put.OTHER:
            storage.put(storage.join(out, _COPY), data)
            return entry


def note_refused(out: str, period: str, report: str) -> None:
    """Note that what a period made did not pass, and where it says why: nobody misses that period any more."""
    url = storage.join(out, _REFUSED, period, f"{report.rpartition('/')[2]}.json")
    storage.put_if_absent(url, canonical_json({"format": FORMAT, "period": period, "report": report}))


def missed(out: str, entries: Sequence[Entry], period: str) -> list[str]:
    """Periods since the first one of the series and before `period` that were neither published nor refused."""
    done = {entry.added.period for entry in entries if entry.added.period}
    if not done:
        return []
    done |= {entry.name.partition("/")[0] for entry in storage.list_entries(storage.join(out, _REFUSED))}
    return [one for one in periods.between(min(done), period) if one not in done]


def _current(entries: Sequence[Entry], added: Publication) -> Publication:
    """A late period does not take the place of a later one, nor of what was run by hand since."""
    late = added.period and any(entry.added.period > added.period for entry in entries)
    return entries[-1].current if late else added


def _url(out: str, number: int) -> str:
    return storage.join(out, _FOLDER, f"{number:06d}.json")


def _read(out: str, number: int) -> Entry:
    url = _url(out, number)
    try:
        body: dict[str, Any] = json.loads(storage.read(url))
        if body["format"] != FORMAT:
            raise PublishedError(f"{url}: format {body['format']}, and this version reads {FORMAT}; upgrade ganymede")
        added, current = (from_dict(Publication, body[name], url) for name in ("added", "current"))
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise PublishedError(f"{url}: not a publication of ganymede ({error}); choose another output URL") from error
    return Entry(number=number, added=added, current=current)
