"""`make bench-evaluate`: our metrics against scipy's root of a matrix and the `prdc` package, on the same features.

Each side is a process of its own, in turn. Prints a table, and JSON as the last line; exits with 1 where a must is
missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

MUSTS = {"prdc_speed_vs_prdc": 3.0, "fid_speed_vs_scipy": 4.0}
MEMORY_MUST = 0.2
"""prdc_memory_vs_prdc: at most."""
LARGE_MUST_BYTES = 2 * 10**9
SINGLE, DOUBLE = 1e-3, 1e-6
"""How far the two sides may differ: float32 distances near a radius fall to either side of it."""


def main(arguments: list[str]) -> int:
    """Run the sides and compare with the targets."""
    parser = argparse.ArgumentParser(prog="make bench-evaluate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of little: the harness, no figures")
    options = parser.parse_args(arguments)
    rounds = 1 if options.quick else options.rounds
    prdc = _compare("prdc", "package", rounds, *((600, 64) if options.quick else (15_000, 512)), SINGLE)
    fid = _compare("fid", "scipy", rounds, *((600, 128) if options.quick else (10_000, 2048)), DOUBLE)
    large = _side("prdc_ours", *((1_000, 64) if options.quick else (50_000, 512)))
    _show(f"prdc_ours, {'1,000' if options.quick else '50,000'} a side", large)
    ratios = {
        "prdc_speed_vs_prdc": round(prdc["package"]["sec"] / prdc["ours"]["sec"], 3),
        "prdc_memory_vs_prdc": round(prdc["ours"]["peak_bytes"] / prdc["package"]["peak_bytes"], 3),
        "fid_speed_vs_scipy": round(fid["scipy"]["sec"] / fid["ours"]["sec"], 3),
    }
    missed = _missed(ratios, large["peak_bytes"])
    for line in missed:
        print(f"MISSED: {line}")
    print(json.dumps({"bench": "evaluate", "ratios": ratios, "prdc_50k_bytes": int(large["peak_bytes"])}), flush=True)
    return 1 if missed and not options.quick else 0


def _compare(metric: str, peer: str, rounds: int, count: int, width: int, tolerance: float) -> dict[str, Any]:
    """Medians of both sides, which must find the same."""
    runs: dict[str, list[Any]] = {"ours": [], peer: []}
    for number in range(rounds):
        for side, of_side in runs.items():
            of_side.append(_side(f"{metric}_{side}", count, width))
            _show(f"round {number + 1}/{rounds}: {metric}_{side}, {count:,} x {width}", of_side[-1])
    ours, theirs = (runs[side][0]["found"] for side in ("ours", peer))
    for name, value in theirs.items():
        assert abs(ours[name] - value) <= tolerance * max(1.0, abs(value)), (name, ours[name], value)
    return {
        side: {what: statistics.median(run[what] for run in of_side) for what in ("sec", "peak_bytes")}
        for side, of_side in runs.items()
    }


def _side(side: str, count: int, width: int) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.benchmarks.evaluate.side", side, "--count", str(count), "--width", str(width)]
    # Libraries count the CPUs themselves, unless a caller's shell says one.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _show(what: str, result: dict[str, Any]) -> None:
    found = ", ".join(f"{name} {value:.6g}" for name, value in result["found"].items())
    print(f"{what}: {result['sec']:.2f} s, {result['peak_bytes'] / 1e6:,.0f} MB; {found}", flush=True)


def _missed(ratios: dict[str, float], large_bytes: float) -> list[str]:
    lines = [f"{key} is {ratios[key]}, must be {must}" for key, must in MUSTS.items() if ratios[key] < must]
    if ratios["prdc_memory_vs_prdc"] > MEMORY_MUST:
        lines.append(f"prdc_memory_vs_prdc is {ratios['prdc_memory_vs_prdc']}, must be at most {MEMORY_MUST}")
    if large_bytes > LARGE_MUST_BYTES:
        lines.append(f"50,000 a side take {large_bytes / 1e9:.2f} GB, must be at most {LARGE_MUST_BYTES / 1e9:.0f}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
