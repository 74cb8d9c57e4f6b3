"""What Prometheus would read of a real training run and a real generation, from the metrics agent of a real Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.ray_metrics import COUNTERS, GAUGES, STATS
from pipeline.train import log
from tests.s3_proxy import Proxy, proxy

__all__ = ["proxy"]

CHUNK_BYTES = 6 * 16 * 16
"""Six samples of 16², grey, which the tasks of this run decode."""


def test_names_have_units_and_say_what_they_are() -> None:
    assert not set(COUNTERS) & set(GAUGES)
    for name, text in {**COUNTERS, **GAUGES}.items():
        assert name.startswith("ganymede_")
        assert not name.endswith(("_total", "_seconds"))  # Ray adds the first; units are ours
        assert text.endswith(".")


def test_puts_tried_again_are_counted_whoever_tries(s3: str, proxy: type[Proxy]) -> None:
    """By us after a conflict, by boto3 after a lost answer; a put that goes well counts for nothing."""
    for faults, retries in (([], 0), (["conflict"], 1), (["lose"], 1), (["reset"], 1), (["lose"] * 6, 6)):
        before = storage.put_retries()
        proxy.faults.extend(faults)
        storage.put_if_absent(f"{s3}/{len(faults)}-{''.join(faults[:1])}", b"data")
        assert (storage.put_retries() - before, proxy.faults) == (retries, [])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_and_a_generation_tell_what_they_did(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.ray_metrics_driver", str(tmp_path)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280, env=environment)
    page = json.loads(done.stdout.splitlines()[-1])
    seen = page["seen"]
    _generated(seen, str(tmp_path / "out"))
    _trained(seen, str(tmp_path / "run"))
    names = {name.partition("|")[0].removeprefix("ray_").removesuffix("_total") for name in seen}
    assert names == {*COUNTERS, *GAUGES}
    # What a living process set once, long ago, is shown still: alerts compare with it.
    for name in (f"total_nimg|{tmp_path}/run", f"fid|{tmp_path}/run", f"shards_left|{tmp_path}/out"):
        assert f"ray_ganymede_{name}" in page["last"]


def _generated(seen: dict[str, float], out: str) -> None:
    shards = {name: value for name, value in seen.items() if "_shards_total|" in name}
    assert shards == {f"ray_ganymede_shards_total|{out}|{kind}": n for kind, n in (("written", 2), ("adopted", 1))}
    assert seen[f"ray_ganymede_generated_nimg_total|{out}"] == 25
    assert seen[f"ray_ganymede_shards_left|{out}"] == 0


def _trained(seen: dict[str, float], run: str) -> None:
    ticks, events = log.read_stats(run), list(log.read_events(run))

    def of(name: str) -> float:
        return seen[f"ray_ganymede_{name}|{run}"]

    assert len(ticks) == 10
    assert (of("cur_nimg"), of("total_nimg")) == (2000, 2000)
    assert (of("read_nimg_total"), of("steps_total")) == (2000, 250)
    replaced = sum(event["count"] for event in events if event["event"] == "quarantined")
    assert of("quarantined_nimg_total") == replaced > 0
    assert of("read_bytes_total") % CHUNK_BYTES == 0
    assert of("read_bytes_total") >= 2000 * 16 * 16
    waited = sum(tick["data_wait_share"] * tick["elapsed_sec"] for tick in ticks)
    for name, wanted in (
        ("step_sec_total", sum(tick["elapsed_sec"] for tick in ticks)),
        ("data_wait_sec_total", waited),
        ("checkpoint_sec_total", sum(tick["checkpoint_sec"] for tick in ticks)),
    ):
        assert of(name) == pytest.approx(wanted)
        assert wanted > 0
    for stat in set(STATS) & set(ticks[0]):
        assert seen[f"ray_ganymede_stat|{run}|{stat}"] in [pytest.approx(tick[stat]) for tick in ticks]
    assert of("fid") == 12.5
    assert of("put_retries_total") == 3
