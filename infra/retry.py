"""Runs a verb of Ganymede again where its exit code says that this is worth it: the entrypoint of every RayJob.

    python retry.py [--tries N] [--wait-sec S] [--fresh-sec S] -- COMMAND ...

KubeRay cannot tell exit codes apart, so a RayJob's own backoffLimit would repeat what must not be repeated. Here:

- 1, and death by a signal that was not sent to this process (the kernel's, when memory is short): another try, up to
  `--tries` of them, after `--wait-sec`, then twice that, and so on up to five minutes. The same command goes on where
  the last try stopped. A try that lasted longer than `--fresh-sec` did something: tries are counted anew.
- 0, 2 (bad input), 3 (the evidence says no), 130 (interrupted) and any other: the end, with that code.

What the verb prints passes through; every code but 0 is told on stderr as well, so that it stands in the job's log.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

_AGAIN = 1
_MAX_WAIT_SEC = 300.0
_LOOK_SEC = 1.0  # a signal just before a call that waits is heard only after it


class _StoppedError(Exception):
    """A signal that ends this process came while nothing ran."""


class _Runner:
    """One command at a time, and the pauses between; the signals that end this process go to the command."""

    def __init__(self) -> None:
        self.stopped_by = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._pausing = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def run(self, command: Sequence[str]) -> int:
        """The exit code, negative where a signal ended it."""
        self._child = subprocess.Popen(command)
        if self.stopped_by:  # it came before there was anything to send it to
            self._child.send_signal(self.stopped_by)
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self._child.wait(_LOOK_SEC)

    def pause(self, sec: float) -> None:
        """Raises _StoppedError where a signal ends it."""
        self._pausing = True
        if self.stopped_by:
            raise _StoppedError
        end = time.monotonic() + sec
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(_LOOK_SEC, left))
        self._pausing = False

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.stopped_by = number
        if self._pausing:
            raise _StoppedError
        if self._child is not None:
            self._child.send_signal(number)


def main(arguments: Sequence[str]) -> int:
    """Run, perhaps several times; returns the exit code of the last."""
    parser = argparse.ArgumentParser(prog="retry.py", allow_abbrev=False)
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--wait-sec", type=float, default=20.0)
    parser.add_argument("--fresh-sec", type=float, default=3600.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or options.tries < 1:
        parser.error("a command must follow --, and --tries must be at least 1")
    runner, tries = _Runner(), 0
    while True:
        began = time.monotonic()
        code = runner.run(command)
        took = time.monotonic() - began
        tries = 1 if took > options.fresh_sec else tries + 1
        if code == 0:
            return 0
        _say(f"{_named(code)} after {took:.0f} s, try {tries} of {options.tries}: {shlex.join(command)}")
        if runner.stopped_by or code > _AGAIN or tries >= options.tries:
            _say(f"the end, with exit {_as_exit(code)}")
            return _as_exit(code)
        wait = min(_MAX_WAIT_SEC, options.wait_sec * 2 ** (tries - 1))
        _say(f"again in {wait:.0f} s")
        try:
            runner.pause(wait)
        except _StoppedError:
            _say(f"the end, by {_named(-runner.stopped_by)}")
            return _as_exit(-runner.stopped_by)


def _named(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit {code}"


def _as_exit(code: int) -> int:
    """As a shell says it."""
    return 128 - code if code < 0 else code


def _say(text: str) -> None:
    sys.stderr.write(f"retry: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
