import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import published, storage
from pipeline.published import Publication, PublishedError


def publication(period: str = "", dataset: str = "synthetic/a") -> Publication:
    return Publication(
        period=period,
        dataset=dataset,
        dataset_digest="d" * 64,
        report="report/r",
        snapshot="s",
        snapshot_digest="e" * 64,
    )


def test_the_highest_number_says_what_is_current(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert published.series(out) == []
    for number, day in enumerate(("2026-11-20", "2026-11-21"), 1):
        assert published.publish(out, publication(day)).number == number
    entries = published.series(out)
    assert [entry.added.period for entry in entries] == ["2026-11-20", "2026-11-21"]
    assert entries[-1].current == entries[-1].added
    assert json.loads((tmp_path / "latest.json").read_text())["current"]["period"] == "2026-11-21"


def test_a_late_period_is_added_and_does_not_become_current(tmp_path: Path) -> None:
    out = str(tmp_path)
    published.publish(out, publication("2026-11-22"))
    entry = published.publish(out, publication("2026-11-20"))
    assert (entry.number, entry.added.period, entry.current.period) == (2, "2026-11-20", "2026-11-22")
    assert published.publish(out, publication("2026-11-23")).current.period == "2026-11-23"


def test_published_twice_is_published_once(tmp_path: Path) -> None:
    out = str(tmp_path)
    first = published.publish(out, publication("2026-11-22"))
    published.publish(out, publication("2026-11-23"))
    assert published.publish(out, publication("2026-11-22")) == first
    assert len(published.series(out)) == 2


def test_a_period_is_published_once_whatever_is_made_of_it(tmp_path: Path) -> None:
    """As when a second driver began before the first had published, with other settings."""
    out = str(tmp_path)
    first = published.publish(out, publication("2026-11-22"))
    assert published.publish(out, publication("2026-11-22", "synthetic/other")) == first
    assert len(published.series(out)) == 1


def test_a_late_period_takes_no_place_of_what_was_run_by_hand_after_a_later_one(tmp_path: Path) -> None:
    out = str(tmp_path)
    published.publish(out, publication("2026-11-22"))
    by_hand = published.publish(out, publication(dataset="synthetic/by-hand"))
    late = published.publish(out, publication("2026-11-20"))
    assert (late.added.period, late.current) == ("2026-11-20", by_hand.added)


def test_what_was_run_by_hand_can_become_current_again(tmp_path: Path) -> None:
    out = str(tmp_path)
    for dataset in ("synthetic/a", "synthetic/b", "synthetic/a", "synthetic/a"):
        published.publish(out, publication(dataset=dataset))
    assert [entry.current.dataset for entry in published.series(out)] == ["synthetic/a", "synthetic/b", "synthetic/a"]


def test_many_at_once_make_one_series(tmp_path: Path) -> None:
    days = [f"2026-11-{day:02d}" for day in range(1, 13)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda day: published.publish(str(tmp_path), publication(day)), days * 2))
    entries = published.series(str(tmp_path))
    assert [entry.number for entry in entries] == list(range(1, 13))
    assert sorted(entry.added.period for entry in entries) == days
    assert entries[-1].current.period == days[-1]


@given(st.permutations([f"2026-11-{day:02d}" for day in range(1, 6)]))
def test_current_is_the_latest_period_in_whatever_order(
    tmp_path_factory: pytest.TempPathFactory, days: list[str]
) -> None:
    out = str(tmp_path_factory.mktemp("series"))
    for count, day in enumerate(days, 1):
        assert published.publish(out, publication(day)).current.period == max(days[:count])


def test_missed_are_those_between_that_were_neither_published_nor_refused(tmp_path: Path) -> None:
    out = str(tmp_path)
    assert published.missed(out, published.series(out), "2026-11-22") == []
    for day in ("2026-11-18", "2026-11-20"):
        published.publish(out, publication(day))
    published.note_refused(out, "2026-11-21", "report/abc")
    assert published.missed(out, published.series(out), "2026-11-24") == ["2026-11-19", "2026-11-22", "2026-11-23"]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format": 1, "added": {}, "current": {}}', b'{"format": 2}'])
def test_what_is_not_ours_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    url = storage.join(str(tmp_path), "published", "000001.json")
    storage.put_if_absent(url, data)
    with pytest.raises(PublishedError, match=r"000001\.json"):
        published.series(str(tmp_path))
