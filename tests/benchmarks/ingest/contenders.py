"""Who is measured, and how one of them is run: alone, in a process of its own, which prints JSON as its last line."""

import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tests.benchmarks.ingest.cases import Case
from tests.benchmarks.ingest.measure import Spec

_PACKAGE = "tests.benchmarks.ingest"
_ROOT = Path(__file__).parents[3]
_START_SEC = 180.0
_WORKERS = (1, 2, 4)
_TOKEN = secrets.token_hex(32)  # or Ray would write one to the home folder


class ContenderError(Exception):
    """A contender did not come to its result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One reader of a case."""

    name: str
    command: tuple[str, ...]
    """What runs it; its spec follows."""
    workers: tuple[int, ...]
    """Numbers of workers, of which the fastest is taken."""
    kind: Literal["ceiling", "ours", "peer"]
    form: Literal["shards", "litdata", "mosaicml"] = "shards"
    """The format that it reads."""

    def url(self, case: Case, cache: Path) -> Path:
        """Where its form of the data lies."""
        folder = case.folder(cache)
        return folder if self.form == "shards" else folder.with_name(f"{folder.name}-{self.form}")


def ours_and_ceiling() -> list[Contender]:
    """The ceiling, and our feed with each way to decode."""
    cores = (os.cpu_count() or 1,)
    ceiling = Contender(name="ceiling", command=_module("ceiling"), workers=cores, kind="ceiling")
    ways = [
        Contender(name=f"ganymede+{way}", command=(*_module("ours"), "steady"), workers=cores, kind="ours")
        for way in ("tasks", "trainer")
    ]
    return [ceiling, *ways]


def all_peers(case: Case, python: str) -> list[Contender]:
    """Every peer, with the fastest decoder that it can be given; `python` is that of their environment."""
    decoder = {"jpg": "simplejpeg", "png": "opencv"}[case.extension]
    command = _module("peers", python)
    return [
        stock_webdataset(python),
        Contender(name=f"webdataset+{decoder}", command=command, workers=_WORKERS, kind="peer"),
        Contender(name=f"litdata+{decoder}", command=command, workers=_WORKERS, kind="peer", form="litdata"),
        Contender(name=f"mosaicml+{decoder}", command=command, workers=_WORKERS, kind="peer", form="mosaicml"),
        Contender(name="ray_webdataset", command=_module("ray_webdataset"), workers=_WORKERS, kind="peer"),
    ]


def stock_webdataset(python: str, workers: tuple[int, ...] = _WORKERS) -> Contender:
    """The webdataset library with its own decoder."""
    return Contender(name="webdataset", command=_module("peers", python), workers=workers, kind="peer")


def _module(name: str, python: str = sys.executable) -> tuple[str, ...]:
    return python, "-m", f"{_PACKAGE}.{name}"


def convert(contender: Contender, case: Case, cache: Path) -> None:
    """Write the form of the data that a peer reads, with its own writer, if it is not there."""
    out = contender.url(case, cache)
    if contender.form != "shards" and not out.exists():
        command = (contender.command[0], "-m", f"{_PACKAGE}.convert", contender.form, str(out), *case.shards(cache))
        run_process(command, cache / "convert.log", {}, 1200.0)


def run(command: tuple[str, ...], spec: Spec, log: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """What a contender prints. Raises ContenderError."""
    output = run_process(
        (*command, spec.to_json()), log, environment, _START_SEC + spec.warmup_sec + 2 * spec.window_sec
    )
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise ContenderError(f"{spec.contender} printed no result; see {log}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def run_process(command: tuple[str, ...], log: Path, environment: Mapping[str, str], timeout_sec: float) -> str:
    """Standard output of a process that must end well; the rest of what it says goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, "RAY_AUTH_TOKEN": _TOKEN, "RAY_USAGE_STATS_ENABLED": "0", **environment}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables, cwd=_ROOT, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=timeout_sec)
        except subprocess.TimeoutExpired:
            raise ContenderError(f"no result after {timeout_sec:.0f} s; see {log}") from None
        finally:
            _end(process)
    if process.returncode:
        raise ContenderError(f"exit code {process.returncode}: {_last_line(log)}; see {log}")
    return output


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and what it started and left, as loader processes that fill queues nobody reads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
