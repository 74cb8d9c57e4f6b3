"""Shards damaged after they were indexed: the feed replaces and says so, or refuses; nothing else ever comes of it."""

import pytest

from tests.fuzz import pool


def _run(count: int, processes: int = 2) -> pool.Report:
    report = pool.run("tests.fuzz.chunk_cases", count, processes)
    assert not report.failures, "\n\n".join(report.failures[:5])
    assert report.cases == count
    assert min(report.verdicts()[verdict] for verdict in ("replaced", "refused", "whole")) > count / 20
    return report


def test_a_few_damaged_shards() -> None:
    _run(100, processes=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damaged_shards(capsys: pytest.CaptureFixture[str]) -> None:
    report = _run(800)
    with capsys.disabled():
        print(f"\n{report.table()}")
