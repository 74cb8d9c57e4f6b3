"""Python imports this file at its start where this folder is on PYTHONPATH: then a process can die at a commit step.

The control folder that GANYMEDE_FAILPOINTS names holds what shall happen, so that a process that is running already
(a worker of a cluster that lives long) hears of it: `armed/NUMBER STEP SKIP FATE` meets the process that comes to STEP
after SKIP others have passed there. Rename is atomic, so each meets just one. Its FATE is to be `killed` at once, or to
be `frozen` there until someone kills it, or removes what it has claimed. `passed.log` gets a line for every step that a
process comes to, `frozen.log` one for each that stands still. Nothing but the standard library is imported here.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_WRAPPED = "pipeline.storage"
_CHECKPOINT = re.compile(r".*/checkpoints/\d+/(\w+\.(?:pt|json))")
_STEPS = {
    "put_if_absent": (
        (re.compile(r".*/train/shard-\d+\.tar"), "shard put"),
        (re.compile(r".*/train/index/part-\d+\.parquet"), "part put"),
        (re.compile(r".*/dataset\.json"), "dataset.json"),
        (_CHECKPOINT, r"checkpoint \1 put"),
    ),
    "delete": ((_CHECKPOINT, r"checkpoint \1 delete"),),
}
"""Function of pipeline.storage → URLs that it is called with → what is done then."""

_ONE_THREAD = threading.Lock()
"""A process meets one fate: its other threads stand still at their next step while one is frozen."""


def _come_to(folder: str, step: str, url: str) -> None:
    """Write down that this process is at a step, and let it meet its fate if there is one for it."""
    who = {"pid": os.getpid(), "raylet": int(os.environ.get("RAY_RAYLET_PID", 0))}
    line = b"\n" + json.dumps({**who, "step": step, "url": url}).encode()
    with _ONE_THREAD:
        _append(os.path.join(folder, "passed.log"), line)
        fate, claimed = _claim(folder, step)
        if fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "frozen":
            _append(os.path.join(folder, "frozen.log"), line)
        while fate == "frozen" and os.path.exists(claimed):
            time.sleep(0.05)


def _claim(folder: str, step: str) -> tuple[str, str]:
    """The fate of this process here and its file, or "". Only the first that is armed for a step counts who passes."""
    armed = os.path.join(folder, "armed")
    for name in sorted(os.listdir(armed)):
        number, _, rest = name.partition(" ")
        of_step, skip, fate = rest.rsplit(" ", 2)
        if of_step != step:
            continue
        left = int(skip) - 1
        to = (
            os.path.join(folder, "claimed", name) if left < 0 else os.path.join(armed, f"{number} {step} {left} {fate}")
        )
        try:
            os.rename(os.path.join(armed, name), to)
        except FileNotFoundError:  # another process came at the same moment: this one was not there
            return "", ""
        return (fate, to) if left < 0 else ("", "")
    return "", ""


def _append(path: str, line: bytes) -> None:
    """One write in append mode: not mixed with another's, and there even if this process dies next. Where a page of the
    file ends, a reader may see half of it, and half may be all if this process is killed: a line begins with its end.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def _wrap(
    folder: str, function: Callable[..., Any], steps: Sequence[tuple[re.Pattern[str], str]]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(url: str, *data: bytes) -> Any:
        what = next((match.expand(name) for pattern, name in steps if (match := pattern.fullmatch(url))), None)
        if what is None:
            return function(url, *data)
        _come_to(folder, f"before {what}", url)
        done = function(url, *data)
        _come_to(folder, f"after {what}", url)
        return done

    return wrapped


class _Loader(importlib.abc.Loader):
    """Loads as the loader it stands for, then wraps."""

    def __init__(self, loader: importlib.abc.Loader, folder: str) -> None:
        self._loader, self._folder = loader, folder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for name, steps in _STEPS.items():
            setattr(module, name, _wrap(self._folder, getattr(module, name), steps))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, folder: str) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _WRAPPED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._folder)
        return spec


if "GANYMEDE_FAILPOINTS" in os.environ:
    sys.meta_path.insert(0, _Finder(os.environ["GANYMEDE_FAILPOINTS"]))
