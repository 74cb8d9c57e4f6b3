import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import periods
from pipeline.config import ConfigError

UTC = datetime.UTC
MOMENTS = st.datetimes(datetime.datetime(1990, 1, 1), datetime.datetime(2150, 1, 1), timezones=st.just(UTC))
FORMS = ("hour", "day", "week", "month")


@given(MOMENTS, st.sampled_from(FORMS))
def test_the_present_period_is_one_of_its_form(now: datetime.datetime, form: str) -> None:
    period = periods.resolve(f"this-{form}", now)
    assert periods.form(period) == form
    assert periods.resolve(period, now) == period


@given(MOMENTS, st.sampled_from(FORMS), st.integers(0, 100))
def test_between_names_each_period_once_in_order(now: datetime.datetime, form: str, count: int) -> None:
    step = {"hour": 1, "day": 24, "week": 168, "month": 24 * 28}[form]
    later = now + datetime.timedelta(hours=step * count)
    first, last = (periods.resolve(f"this-{form}", moment) for moment in (now, later))
    found = list(periods.between(first, last))
    # Walked hour by hour, every period is met, and in the order of their names.
    hours = range(step * count + 1)
    walked = dict.fromkeys(periods.resolve(f"this-{form}", now + datetime.timedelta(hours=hour)) for hour in hours)
    assert [*found, last] == list(walked) == sorted(walked)


@pytest.mark.parametrize(
    ("first", "last", "found"),
    [
        ("2026-12-30", "2027-01-02", ["2026-12-30", "2026-12-31", "2027-01-01"]),
        ("2024-02-28", "2024-03-01", ["2024-02-28", "2024-02-29"]),
        ("2026-W52", "2027-W02", ["2026-W52", "2026-W53", "2027-W01"]),
        ("2026-11", "2027-02", ["2026-11", "2026-12", "2027-01"]),
        ("2026-01-31T22", "2026-02-01T01", ["2026-01-31T22", "2026-01-31T23", "2026-02-01T00"]),
        ("2026-11-22", "2026-11-22", []),
        ("2026-11-22", "2026-11-20", []),
    ],
)
def test_calendars(first: str, last: str, found: list[str]) -> None:
    assert list(periods.between(first, last)) == found


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2026-13-01", "2026-02-30", "2026-W54", "26-1-1", "2026-11-22T24", "this-year"]
)
def test_what_is_no_period_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(ConfigError, match=r"2026-11-22|calendar"):
        periods.resolve(text, datetime.datetime(2026, 11, 22, tzinfo=UTC))


def test_a_period_to_come_is_refused_but_for_the_clocks_of_other_zones() -> None:
    now = datetime.datetime(2026, 11, 22, 12, tzinfo=UTC)
    assert periods.resolve("2026-11-23", now) == "2026-11-23"
    with pytest.raises(ConfigError, match="2026-11-24 has not begun; it is 2026-11-22T12:00 UTC"):
        periods.resolve("2026-11-24", now)


def test_periods_of_two_forms_do_not_mix() -> None:
    with pytest.raises(ConfigError, match="2026-W47 is a week, and the periods here so far are days"):
        list(periods.between("2026-11-22", "2026-W47"))
