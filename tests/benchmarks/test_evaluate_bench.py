"""The harness of `make bench-evaluate`: a quick run of all of it, and when it says that a must is missed."""

import json
import subprocess
import sys

from tests.benchmarks.evaluate.__main__ import MUSTS, _missed


def test_a_quick_run_prints_its_ratios() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.evaluate", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bench"] == "evaluate"
    assert set(found["ratios"]) == {*MUSTS, "prdc_memory_vs_prdc"}
    assert all(ratio > 0 for ratio in found["ratios"].values())


def test_missed_musts_are_named() -> None:
    good = {**MUSTS, "prdc_memory_vs_prdc": 0.2}
    assert _missed(good, 2e9) == []
    assert _missed({**good, "fid_speed_vs_scipy": 3.9}, 2e9) == ["fid_speed_vs_scipy is 3.9, must be 4.0"]
    assert _missed({**good, "prdc_memory_vs_prdc": 0.21}, 0) == ["prdc_memory_vs_prdc is 0.21, must be at most 0.2"]
    assert _missed(good, 2.1e9) == ["50,000 a side take 2.10 GB, must be at most 2"]
