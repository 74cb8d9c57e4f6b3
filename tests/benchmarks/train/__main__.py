"""`make bench-train`: our step against the plain way of writing it, and fed by the pipeline against fed from memory.

Each part is a process of its own, one after the other. Prints tables, and JSON as the last line; exits with 1 where a
must is missed.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.gan import bench

STEP_MUST, STEP_AIM, FED_MUST = 1.9, 2.5, 0.95


def main(arguments: list[str]) -> int:
    """Run the parts and compare with the targets."""
    parser = argparse.ArgumentParser(prog="make bench-train")
    parser.add_argument("--cache", type=Path, default=Path(".bench/train"), help="where the fed runs' images lie")
    parser.add_argument("--quick", action="store_true", help="one short round of everything: the harness, no figures")
    parser.add_argument("--only", choices=["step", "fed"])
    options = parser.parse_args(arguments)
    ratios: dict[str, float] = {}
    if options.only != "fed":
        quick = ["--rounds", "1", "--window-sec", "0.1", "--batch-size", "4", "--preset", "r3gan-tiny"]
        ratios |= _ratios([sys.executable, "-m", "pipeline.gan.bench", *(quick if options.quick else [])])
    if options.only != "step":
        words = [sys.executable, "-m", "tests.benchmarks.train.fed", "--cache", str(options.cache)]
        ratios |= _ratios([*words, *(["--quick"] if options.quick else [])])
    missed = _missed(ratios)
    for line in missed:
        print(f"MISSED: {line}")
    print(json.dumps({"bench": "train", "ratios": ratios}), flush=True)
    return 1 if missed and not options.quick else 0


def _ratios(command: list[str]) -> dict[str, float]:
    """Run a part, show what it prints, and return the ratios of its last line."""
    # torch counts the CPUs itself, unless a caller's shell says one.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if last:
                print(last, flush=True)
            last = line.rstrip()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    ratios: dict[str, float] = json.loads(last)["ratios"]
    return ratios


def _missed(ratios: dict[str, float]) -> list[str]:
    musts = {f"{preset}_vs_plain": STEP_MUST for preset in bench.CPU_PRESETS} | {"pipeline_vs_memory": FED_MUST}
    return [f"{key} is {ratios[key]}, must be {must}" for key, must in musts.items() if ratios.get(key, must) < must]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
