"""Drivers of runs, without Ray: processes that can be killed and stopped at known steps.

`python -m tests.train.drivers` imports everything, which takes seconds, and forks a driver for each order it reads.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pipeline.dataset import record
from pipeline.dataset.index import open_split
from pipeline.errors import InputError, RetryableError
from pipeline.stream.chunk import ChunkReader, Decoder
from pipeline.stream.order import OrderPlan
from pipeline.train.ownership import Ownership
from tests.failpoint_control import Failpoints
from tests.small import make_dataset
from tests.train.test_loop import spec_of, train

_WAIT_SEC = 60.0


class Drivers:
    """Starts drivers of runs over one dataset, all with the same failpoints."""

    def __init__(self, process: "subprocess.Popen[str]", failpoints: Failpoints, folder: Path) -> None:
        self.failpoints = failpoints
        self._process, self._folder, self._started = process, folder, 0
        self._logs: dict[int, Path] = {}

    def start(self, run_url: str, **train: Any) -> int:
        """A driver that takes the run and trains to its end, `train` changing the settings; its process id."""
        log = self._folder / f"driver-{self._started}.log"
        self._started += 1
        pid = self._order(run_url=run_url, data=str(self._folder / "data"), log=str(log), train=train)
        self._logs[pid] = log
        return pid

    def wait(self, pid: int) -> int:
        """Its exit code: 0, 1 or 2 as of a command, or minus the signal that ended it."""
        return self._order(wait=pid)

    def run(self, run_url: str, **train: Any) -> int:
        """The exit code of a driver."""
        return self.wait(self.start(run_url, **train))

    def said(self, pid: int) -> str:
        """What it printed."""
        return self._logs[pid].read_text()

    def start_frozen(self, run_url: str, step: str, skip: int = 0, **train: Any) -> int:
        """A driver that now stands at a step of writing a checkpoint."""
        before, deadline_sec = len(self.failpoints.frozen()), time.monotonic() + _WAIT_SEC
        self.failpoints.arm(step, skip, "frozen")
        pid = self.start(run_url, **train)
        while len(self.failpoints.frozen()) == before:
            assert time.monotonic() < deadline_sec, self.said(pid)
            time.sleep(0.02)
        return pid

    def _order(self, **order: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


@contextmanager
def run_drivers(folder: Path, environment: Mapping[str, str]) -> Iterator[Drivers]:
    """The process that forks them, with a dataset below `folder`; none is left behind."""
    make_dataset(str(folder / "data"), num_samples=50)
    failpoints = Failpoints(folder / "failpoints")
    command = [sys.executable, "-m", "tests.train.drivers"]
    env = {**os.environ, **environment, **failpoints.environment()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=env, text=True, process_group=0, **pipes) as process:
        try:
            yield Drivers(process, failpoints, folder)
        finally:
            os.killpg(process.pid, 9)


def _serve() -> None:
    importlib.import_module("torch._dynamo")  # else each driver's first optimiser would, for a second
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _be_driver(**order)
        print(answer, flush=True)


def _be_driver(run_url: str, data: str, log: str, train: Mapping[str, Any]) -> NoReturn:
    """In the forked process, which must not come back."""
    code = 3
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = _drive(run_url, _reader_of(data), train)
    except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _drive(run_url: str, reader: ChunkReader, settings: Mapping[str, Any]) -> int:
    try:
        with Ownership(run_url) as owner:
            train(dataclasses.replace(spec_of(run_url, reader, **settings), owner=owner.number), reader)
    except (InputError, RetryableError) as error:
        print(f"{type(error).__name__}: {error}")
        return 1 if isinstance(error, RetryableError) else 2
    return 0


def _reader_of(data: str) -> ChunkReader:
    index = open_split(data, record.read(data)[0], "train")
    plan = OrderPlan(num_samples=index.num_samples, seed=0, batch_size=8, num_lanes=4, steps_per_group=3)
    return ChunkReader(index=index, plan=plan, decoder=Decoder(resolution=16, channels=1), in_tasks=True)


if __name__ == "__main__":
    _serve()
