"""Runs numbered cases in processes of their own, so that a crash, a hang or a flood of memory is caught and named.

A suite is a module with `make(seed, number)`, which returns a case, and `check(case) -> Outcome`, which raises
AssertionError, or anything else, if a property does not hold. In the process of a case: warnings are errors, whatever
is written to stderr is a failure, CPU time and memory of the check have bounds, and faulthandler ends what hangs. A
suite may have its own EXPECTED_NOISE (a pattern of lines on stderr), HANG_SEC and PEAK_BYTES.
"""

import concurrent.futures
import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

SEED = int(os.environ.get("GANYMEDE_FUZZ_SEED", "20"))
"""Which cases are made; the same seed gives the same cases."""
CASE_CPU_SEC = 10.0  # the slowest took 4.8 s on one machine, 5.8 s on a slower one
HANG_SEC = 60
"""Of wall-clock time, on a machine that others use too."""
PEAK_BYTES = 1600 * 1024**2
_ADDRESS_BYTES = 4 * 1024**3
_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    group: str
    """A row of the printed table, e.g. the format."""
    verdict: str
    """A column of the printed table, e.g. accepted or refused."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a run of cases."""

    suite: str
    seed: int
    outcomes: Counter[Outcome]
    failures: list[str]
    slowest_sec: float
    peak_bytes: int

    @property
    def cases(self) -> int:
        """How many ran."""
        return sum(self.outcomes.values()) + len(self.failures)

    def verdicts(self) -> Counter[str]:
        """How many of each verdict."""
        total: Counter[str] = Counter()
        for outcome, count in self.outcomes.items():
            total[outcome.verdict] += count
        return total

    def table(self) -> str:
        """Counts by group and verdict, and the bounds that were reached."""
        columns = sorted(self.verdicts())
        groups = sorted({outcome.group for outcome in self.outcomes})
        lines = [f"{self.suite}: {self.cases} cases, GANYMEDE_FUZZ_SEED={self.seed}"]
        lines += [" ".join([f"{'':28}", *(f"{column:>10}" for column in columns)])]
        for group in groups:
            counts = (self.outcomes[Outcome(group, column)] for column in columns)
            lines.append(" ".join([f"{group:28}", *(f"{count:>10}" for count in counts)]))
        lines += [f"slowest case {self.slowest_sec:.2f} s of CPU, peak memory {self.peak_bytes / 2**20:.0f} MiB"]
        return "\n".join(lines)


def run(suite: str, count: int, processes: int = 2, seed: int = SEED) -> Report:
    """Cases 0 … count − 1 of a suite, dealt to the processes in turn."""
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        stripes = [range(first, count, processes) for first in range(processes)]
        results = list(pool.map(lambda stripe: _stripe(suite, seed, stripe), stripes))
    lines = [line for stripe in results for line in stripe]
    outcomes = Counter(Outcome(line["group"], line["verdict"]) for line in lines if "group" in line)
    failures = [f"{suite} seed {seed} case {line['case']}: {line['failure']}" for line in lines if "failure" in line]
    slowest = max((line.get("cpu_sec", 0.0) for line in lines), default=0.0)
    peak = max((line.get("peak_bytes", 0) for line in lines), default=0)
    return Report(suite, seed, outcomes, failures, slowest, peak)


def _stripe(suite: str, seed: int, numbers: range) -> list[dict[str, Any]]:
    """The result of each case; after a crash, a fresh process goes on behind the case that caused it."""
    results: list[dict[str, Any]] = []
    while numbers:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            arguments = [suite, str(seed), str(numbers.start), str(numbers.stop), str(numbers.step)]
            command = [sys.executable, "-m", "tests.fuzz.pool", *arguments]
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
            code = subprocess.run(command, stdout=out, stderr=err, env=environment, cwd=_ROOT).returncode
            out.seek(0)
            err.seek(0)
            lines = [json.loads(line) for line in out.read().splitlines()]
            begun = {line["case"] for line in lines}
            ended = {line["case"] for line in lines if len(line) > 1}
            results += [line for line in lines if len(line) > 1]
            lost = sorted(begun - ended) or ([numbers.start] if code else [])
            results += [{"case": case, "failure": f"exit {code}: {err.read()[-4000:]}"} for case in lost]
        numbers = range(lost[0] + numbers.step, numbers.stop, numbers.step) if lost else range(0)
    return results


def _work(suite: str, seed: int, numbers: range) -> None:
    """In the process: each case, a line when it begins and a line when it ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module = importlib.import_module(suite)
    warnings.simplefilter("error")
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    faulthandler.enable()
    results = os.fdopen(os.dup(1), "w", buffering=1)
    for number in numbers:
        print(json.dumps({"case": number}), file=results)
        for result in _one(module, seed, number):
            print(json.dumps({"case": number} | result), file=results)


def _one(module: Any, seed: int, number: int) -> Iterator[dict[str, Any]]:
    """The result of one case: what `check` says, unless a bound is passed."""
    faulthandler.dump_traceback_later(getattr(module, "HANG_SEC", HANG_SEC), exit=True)
    case = module.make(seed, number)
    _forget_peak()
    before, started = _written(sys.stderr), time.process_time()
    try:
        result: dict[str, Any] = dataclasses.asdict(module.check(case))
    except BaseException:  # noqa: BLE001 — whatever it is, it is what the case found
        result = {"failure": traceback.format_exc()}
    cpu_sec = time.process_time() - started
    faulthandler.cancel_dump_traceback_later()
    peak_bytes = _peak_bytes()
    noise = _noise(module, _tail(sys.stderr, before))
    if noise:
        result = {"failure": f"wrote to stderr: {noise[:2000]}"}
    elif cpu_sec > CASE_CPU_SEC:
        result = {"failure": f"took {cpu_sec:.1f} s of CPU"}
    elif peak_bytes > getattr(module, "PEAK_BYTES", PEAK_BYTES):
        result = {"failure": f"memory grew to {peak_bytes >> 20} MiB"}
    yield result | {"cpu_sec": cpu_sec, "peak_bytes": peak_bytes}


def _forget_peak() -> None:
    """Let the peak of memory begin anew, where the system can: then the peak is that of one case."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _noise(module: Any, text: str) -> str:
    """The lines on stderr that the suite does not expect of a library."""
    expected = getattr(module, "EXPECTED_NOISE", r"(?!)")
    return "\n".join(line for line in text.splitlines() if not re.fullmatch(expected, line))


def _written(stream: TextIO) -> int:
    stream.flush()
    return os.fstat(stream.fileno()).st_size


def _tail(stream: TextIO, start: int) -> str:
    return os.pread(stream.fileno(), 2**20, start).decode("utf-8", "replace")


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]), range(*map(int, sys.argv[3:])))
