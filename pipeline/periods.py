"""Periods of a schedule, in UTC: an hour `2026-11-22T05`, a day `2026-11-22`, a week `2026-W47` (ISO 8601), a month
`2026-11`. The form says how long a period is, and names of one form sort as their times do.
"""

import datetime
import re
from collections.abc import Iterator

from pipeline.config import ConfigError

_FORMS = {
    "hour": r"\d{4}-\d\d-\d\dT\d\d",
    "day": r"\d{4}-\d\d-\d\d",
    "week": r"\d{4}-W\d\d",
    "month": r"\d{4}-\d\d",
}
_WRITTEN = {"hour": "%Y-%m-%dT%H", "day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}
_STEPS = {"hour": datetime.timedelta(hours=1), "day": datetime.timedelta(days=1), "week": datetime.timedelta(weeks=1)}
_AHEAD = datetime.timedelta(days=1)  # of UTC, a clock's zone may be


def resolve(text: str, now: datetime.datetime) -> str:
    """The period that a text names: one of the forms above, or `this-hour`, `this-day`, `this-week`, `this-month` at
    `now` (UTC). Raises ConfigError for what is no period, and for one that has not begun.
    """
    word = text.removeprefix("this-")
    if word != text and word in _FORMS:
        return now.strftime(_WRITTEN[word])
    if _begin(text) > now.replace(tzinfo=None) + _AHEAD:
        raise ConfigError(f"period {text} has not begun; it is {now:%Y-%m-%dT%H:%M} UTC")
    return text


def form(period: str) -> str:
    """hour, day, week or month. Raises ConfigError for what is no period."""
    for name, pattern in _FORMS.items():
        if re.fullmatch(pattern, period):
            return name
    raise ConfigError(
        f"period {period!r} is none: write an hour as 2026-11-22T05, a day as 2026-11-22, a week as 2026-W47, a month "
        "as 2026-11, or this-hour, this-day, this-week, this-month; all in UTC"
    )


def between(first: str, last: str) -> Iterator[str]:
    """From `first` on, all periods before `last`. Raises ConfigError where one is of another form."""
    if form(first) != form(last):
        raise ConfigError(f"period {last} is a {form(last)}, and the periods here so far are {form(first)}s")
    period = first
    while period < last:
        yield period
        period = _next(period)


def _begin(period: str) -> datetime.datetime:
    name = form(period)
    try:
        if name == "week":
            return datetime.datetime.strptime(f"{period}-1", f"{_WRITTEN[name]}-%u")
        return datetime.datetime.strptime(period, _WRITTEN[name])
    except ValueError as error:
        raise ConfigError(f"period {period} is not in the calendar ({error})") from error


def _next(period: str) -> str:
    name, begin = form(period), _begin(period)
    # A month has at most 31 days, and none has 60.
    after = begin + datetime.timedelta(days=31) if name == "month" else begin + _STEPS[name]
    return after.strftime(_WRITTEN[name])
