"""The harness of `make bench-ingest`: what it accepts from a contender, what it makes of the rates, and a quick run."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.ingest import report
from tests.benchmarks.ingest.measure import Batch, CheckError, Spec, steady_rate
from tests.benchmarks.ingest.report import Row

SPEC = Spec(
    contender="test",
    url="",
    shards=[],
    extension="png",
    resolution=4,
    num_samples=64,
    batch_size=8,
    num_images=10**9,
    workers=1,
    warmup_sec=0.0,
    window_sec=0.05,
)


def batch(label_error: int = 0, **changed: object) -> Batch:
    """A good batch, but for what is changed."""
    image = np.random.default_rng(0).integers(256, size=(8, 4, 4, 3), dtype=np.uint8)
    label = image.sum(axis=(1, 2, 3)) % 256 + label_error
    for name, value in changed.items():
        image = getattr(image, name)(value)
    return image, label


def test_a_rate_counts_the_images_of_the_window() -> None:
    result = steady_rate(itertools.repeat(batch()), SPEC)
    assert result["images"] / result["seconds"] == result["img_per_sec"]
    assert result["images"] % 8 == 0
    assert result["proven"] >= 1


def test_the_clock_stands_still_between_passes() -> None:
    asked: list[None] = []

    def passes() -> Iterator[Batch | None]:
        while True:
            yield from [batch()] * 4
            asked.append(None)
            yield None

    result = steady_rate(passes(), SPEC)
    assert asked
    assert result["seconds"] >= SPEC.window_sec


@pytest.mark.parametrize(
    "bad", [batch(label_error=1), batch(astype=np.float32), batch(reshape=(8, 3, 4, 4)), (batch()[0][:7], batch()[1])]
)
def test_a_batch_that_was_not_asked_for_is_refused(bad: Batch) -> None:
    with pytest.raises(CheckError):
        steady_rate(itertools.repeat(bad), SPEC)


def test_ratios_take_the_default_of_ours_and_the_fastest_peer() -> None:
    def row(kind: str, *rates: float, is_default: bool = False, case: str = "jpeg256 local") -> Row:
        return Row(case=case, contender=kind, kind=kind, workers=1, rates=rates, is_default=is_default)  # type: ignore[arg-type]

    rows = [row("ceiling", 90, 100, 500), row("ours", 300), row("ours", 80, is_default=True), row("peer", 20)]
    rows += [row("peer", 40), row("peer", 1000, case="png32 local")]
    figures = report.ratios(rows)
    assert figures == {
        "jpeg256_local_vs_ceiling": 0.8,
        "jpeg256_local_vs_peer": 2.0,
        "jpeg256_s3_vs_ceiling": None,
        "png32_local_vs_peer": None,
    }
    assert report.missed({**figures, "growth_mb": 301.0}) == ["growth_mb"]
    assert json.loads(report.last_line(figures))["ratios"] == figures


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_quick_run_measures_its_figures(tmp_path: Path) -> None:
    """All but the long plan, which takes a minute whatever the images."""
    command = [sys.executable, "-m", "tests.benchmarks.ingest", "--quick", "--cache", str(tmp_path)]
    command += [word for name in ("jpeg256", "png32", "first_batch", "growth") for word in ("--only", name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["bench"] == "ingest"
    assert all(ratio > 0 for ratio in last["ratios"].values())
    assert last["first_batch_sec"] > 0
    assert last["first_batch_long_plan_sec"] is None
    assert isinstance(last["growth_mb"], float)
