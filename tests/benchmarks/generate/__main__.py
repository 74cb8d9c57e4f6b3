"""`make bench-generate`: the shard factory against its ceilings and against the way the known trainers generate.

Sides take turns, in rounds, each in processes of its own; a figure is the median of its rounds. Prints a table, and
JSON as the last line; exits with 1 where a must is missed.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.gan import precision
from tests.benchmarks.generate.network import make_snapshot

MUSTS = {
    "png256_vs_known_way": 6.0,
    "png256_encoder_vs_pillow": 15.0,
    "png256_vs_ceiling": 0.8,
    "png32_vs_ceiling": 0.8,
    "jpeg256_vs_ceiling": 0.8,
    "two_workers_vs_independent": 0.92,
}
FIRST_PART_MUST_SEC = 15.0
_CORES = 2
_PRECISION = precision.supported("bf16", torch.device("cpu"))
_LONG = 4
"""Windows of what is compared with whole runs of ours: about as long as those, since a core's speed drifts."""
SCALED = "png256"
"""The case in which one worker is compared with two, each held to a core: else a single one takes both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is generated."""

    name: str
    resolution: int
    image_format: str
    num_images: int
    """Of one run of ours with all workers."""
    shard_size: int
    micro_batch: int


CASES = (
    Case(name="png256", resolution=256, image_format="png", num_images=6_000, shard_size=100, micro_batch=8),
    Case(name="jpeg256", resolution=256, image_format="jpeg", num_images=6_000, shard_size=100, micro_batch=8),
    Case(name="png32", resolution=32, image_format="png", num_images=100_000, shard_size=1_000, micro_batch=100),
    Case(name="jpeg32", resolution=32, image_format="jpeg", num_images=100_000, shard_size=1_000, micro_batch=100),
)


def main(arguments: list[str]) -> int:
    """Run the cases and compare with the targets."""
    parser = argparse.ArgumentParser(prog="make bench-generate")
    parser.add_argument("--quick", action="store_true", help="one short round of one case: the harness, no figures")
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window-sec", type=float, default=6.0)
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if not options.only or case.name in options.only]
    rounds, window_sec = options.rounds, options.window_sec
    if options.quick:
        cases, rounds, window_sec = [dataclasses.replace(CASES[2], num_images=6_000)], 1, 0.2
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            found = [_round(case, folder, window_sec, number, rounds) for number in range(1, rounds + 1)]
            _show(case, found)
            ratios |= _ratios(case, found)
        first_part_sec = round(_first_part_sec(folder), 2)
    print(f"command start to first committed part: {first_part_sec} s")
    missed = _missed(ratios, first_part_sec)
    for line in missed:
        print(f"MISSED: {line}")
    print(json.dumps({"bench": "generate", "ratios": ratios, "first_part_sec": first_part_sec}), flush=True)
    return 1 if missed and not options.quick else 0


Rates = Mapping[str, float]
"""Side → images a second."""


def _round(case: Case, folder: str, window_sec: float, number: int, rounds: int) -> Rates:
    rates: dict[str, float] = {}

    def alone(kind: str, processes: int, threads: int = 1, window_sec: float = window_sec) -> float:
        return _alone(case, folder, kind, processes, threads, window_sec)

    sides = {
        "known way": lambda: alone("known_way", 1, _CORES),
        "pillow, one core": lambda: alone("pillow", 1),
        "encode, one core": lambda: alone("encode", 1),
        "independent, 1": lambda: alone("forward_and_encode", 1, window_sec=_LONG * window_sec),
        "ours, 1 worker": lambda: _ours(case, folder, 1),
        "independent, 2": lambda: alone("forward_and_encode", 2, window_sec=_LONG * window_sec),
        "encode": lambda: alone("encode", _CORES, window_sec=_LONG * window_sec),
        "forward": lambda: alone("forward", _CORES, window_sec=_LONG * window_sec),
        "ours, 2 workers": lambda: _ours(case, folder, 2),
    }
    if case.name == SCALED:
        sides["ours, 1 one-core worker"] = lambda: _ours(case, folder, 1, "--pin")
        sides["ours, 2 one-core workers"] = lambda: _ours(case, folder, 2, "--pin")
    for side, measure in sides.items():
        rates[side] = measure()
        print(f"round {number}/{rounds}: {case.name}: {side}: {rates[side]:,.1f} img/s", flush=True)
    return rates


def _alone(case: Case, folder: str, kind: str, processes: int, threads: int, window_sec: float) -> float:
    """The sum of what processes do side by side; they begin together."""
    words = ["--snapshot", _snapshot(folder, case), "--image-format", case.image_format, "--precision", _PRECISION]
    words += ["--micro-batch", str(case.micro_batch), "--threads", str(threads), "--window-sec", str(window_sec)]
    command = [sys.executable, "-m", "tests.benchmarks.generate.alone", kind, *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # As ours do in that comparison: a single process that wanders from core to core is slower than half of two.
    cores = [["--core", str(core)] if kind == "forward_and_encode" else [] for core in range(processes)]
    running = [subprocess.Popen([*command, *core], text=True, env=_environment(), **pipes) for core in cores]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", kind
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in running)


def _ours(case: Case, folder: str, workers: int, *more: str) -> float:
    words = ["--snapshot", _snapshot(folder, case), "--image-format", case.image_format, "--precision", _PRECISION]
    words += ["--micro-batch", str(case.micro_batch), "--shard-size", str(case.shard_size)]
    words += ["--workers", str(workers), "--num-images", str(case.num_images * workers // _CORES)]
    command = [sys.executable, "-m", "tests.benchmarks.generate.ours", *words, *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=_environment(), check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["img_per_sec"])


def _snapshot(folder: str, case: Case) -> str:
    return make_snapshot(folder, case.resolution)


def _environment() -> Mapping[str, str]:
    # torch and Ray count the CPUs themselves, unless a caller's shell says one.
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def _ceiling(rates: Rates) -> float:
    return 1 / (1 / rates["forward"] + 1 / rates["encode"])


def _ratios(case: Case, found: list[Rates]) -> dict[str, float]:
    def median(ratio: list[float]) -> float:
        return round(statistics.median(ratio), 3)

    ratios = {f"{case.name}_vs_ceiling": median([one["ours, 2 workers"] / _ceiling(one) for one in found])}
    ratios[f"{case.name}_vs_known_way"] = median([one["ours, 2 workers"] / one["known way"] for one in found])
    ratios[f"{case.name}_encoder_vs_pillow"] = median(
        [one["encode, one core"] / one["pillow, one core"] for one in found]
    )
    if case.name == SCALED:
        scaling = [
            one["ours, 2 one-core workers"]
            / one["ours, 1 one-core worker"]
            / (one["independent, 2"] / one["independent, 1"])
            for one in found
        ]
        ratios["two_workers_vs_independent"] = median(scaling)
    return ratios


def _show(case: Case, found: list[Rates]) -> None:
    middle = {side: statistics.median(one[side] for one in found) for side in found[0]}
    ceiling = _ceiling(middle)
    print(f"{case.name}: {case.resolution}² {case.image_format}, shards of {case.shard_size}, {_PRECISION}")
    for side, rate in (*middle.items(), ("ceiling 1/(1/forward + 1/encode)", ceiling)):
        print(f"  {side:34} {rate:10,.1f} img/s {rate / ceiling:6.2f} of the ceiling")


def _first_part_sec(folder: str) -> float:
    """From the start of the command, with the defaults of a laptop, to its first part in storage."""
    snapshot, out = make_snapshot(folder, 32), Path(folder) / "first"
    command = [sys.executable, "-m", "jobs.generate", "--snapshot", snapshot, "--out", str(out)]
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "--generate.num-images", "4000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as running:
        while not list(out.glob("train/index/part-*")):
            assert running.poll() is None, "generate ended without a part"
            time.sleep(0.01)
        elapsed = time.perf_counter() - started
        assert running.wait() == 0
    return elapsed


def _missed(ratios: Mapping[str, float], first_part_sec: float) -> list[str]:
    lines = [f"{key} is {ratios[key]}, must be {must}" for key, must in MUSTS.items() if ratios.get(key, must) < must]
    if first_part_sec > FIRST_PART_MUST_SEC:
        lines.append(f"first_part_sec is {first_part_sec}, must be at most {FIRST_PART_MUST_SEC}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
