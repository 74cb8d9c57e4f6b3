"""The harness of `make bench-train`: a quick run of all of it, and when it says that a must is missed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.train.__main__ import _missed


@pytest.mark.long
def test_a_quick_run_prints_its_ratios(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.train", "--quick", "--cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bench"] == "train"
    assert set(found["ratios"]) == {
        "r3gan-tiny_vs_plain",
        "r3gan-tiny_finite_difference_vs_plain",
        "pipeline_vs_memory",
    }
    assert all(ratio > 0 for ratio in found["ratios"].values())


def test_a_missed_must_is_named() -> None:
    good = {"dcgan_vs_plain": 1.9, "sngan_vs_plain": 2.0, "r3gan-tiny_vs_plain": 2.5, "pipeline_vs_memory": 0.95}
    assert _missed(good) == []
    assert _missed({"dcgan_vs_plain": 1.89}) == ["dcgan_vs_plain is 1.89, must be 1.9"]
    assert len(_missed({**good, "pipeline_vs_memory": 0.94, "sngan_vs_plain": 1.0})) == 2
