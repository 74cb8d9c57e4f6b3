"""FID while a run trains: for each snapshot a Ray task of our own, one at a time, which the driver starts and notes.

Neither the ranks nor what reads for them know of it, so none of them waits for it. What is still to do lies in storage:
a snapshot that is noted as taken and has no FID noted. So the next driver of a run knows it too.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from pipeline import snapshot, storage
from pipeline.dataset.index import IndexReader
from pipeline.errors import InputError
from pipeline.snapshot import Taken
from pipeline.train import log, ownership
from pipeline.train.fid import measure
from pipeline.train.spec import RunSpec

_WAIT_SEC = 300.0
"""At the end of a run, for what is still to come."""
_LIST_SEC, _LOOK_SEC = 10.0, 0.5
_NICE = 10


# No CPU of Ray's: the one that workers leave free is there to read data, and a task that asked for it would take it, or
# wait for it for ever. This one takes the time that others leave, by its low priority. That a process cannot put off
# again: so it ends with the task, and is never given another to do.
@ray.remote(num_cpus=0, max_calls=1)
def _task(spec: RunSpec, index: IndexReader, url: str) -> float:
    os.nice(_NICE)
    torch.set_num_threads(1)
    return storage.patiently(functools.partial(measure, spec, index, url), spec.train.storage_timeout_sec)


class Fids:
    """FIDs of a run's snapshots, as its driver has them made and notes them."""

    def __init__(self, spec: RunSpec, index: IndexReader) -> None:
        """`index`: of the training images."""
        self._spec, self._index = spec, index
        self._running: tuple[Taken, Any] | None = None
        self._failed: set[Taken] = set()
        self._next_list_sec = 0.0

    def look(self) -> Mapping[str, float]:
        """Start the next task, or note what the one that runs has found: then this, as `fid`. Waits for neither.

        Raises OwnershipError where another driver has the run.
        """
        try:
            return self._finish() if self._running else self._start()
        except InputError:
            return {}  # no store, or no such note: tried again at the next look, and said by `wait` if it stays so

    def wait(self, on_known: Callable[[Mapping[str, float]], None], say: Callable[[str], None]) -> None:
        """For those still to come, but not for long: `on_known` hears of each, `say` why some will not be known."""
        until_sec = time.monotonic() + _WAIT_SEC
        try:
            while self._running or self._to_come():
                if time.monotonic() > until_sec:
                    say(f"ends without the FID of its last snapshots, which took more than {_WAIT_SEC:.0f} s")
                    return
                self._next_list_sec = 0.0
                on_known(self.look())
                time.sleep(_LOOK_SEC)
        except InputError as error:
            say(f"ends without the FID of its last snapshots: {error}")

    def stop(self) -> None:
        """End what runs."""
        if self._running:
            ray.cancel(self._running[1], force=True)

    def _to_come(self) -> list[Taken]:
        train = self._spec.train
        if not train.snapshot_kimg or not train.fid_samples:
            return []
        return [taken for taken in snapshot.without_fid(self._spec.run_url) if taken not in self._failed]

    def _start(self) -> Mapping[str, float]:
        if time.monotonic() > self._next_list_sec:
            self._next_list_sec = time.monotonic() + _LIST_SEC
            for taken in self._to_come()[:1]:
                self._running = taken, _task.remote(self._spec, self._index, taken.url(self._spec.run_url))
        return {}

    def _finish(self) -> Mapping[str, float]:
        assert self._running
        taken, result = self._running
        if not ray.wait([result], timeout=0)[0]:
            return {}
        found: dict[str, float] = {}
        try:
            found["fid"] = ray.get(result)
        except RayError as error:
            self._fail(taken, error)
        else:
            self._note(taken, found["fid"])
        self._running, self._next_list_sec = None, 0.0
        return found

    def _note(self, taken: Taken, fid: float) -> None:
        """In the statistics, then as done; what is then of no more use is removed."""
        run_url = self._spec.run_url
        ownership.check(run_url, self._spec.owner)
        log.put_fid(run_url, taken.attempt, taken.cur_nimg, fid)
        snapshot.note_fid(run_url, taken, fid)
        snapshot.prune(run_url)

    def _fail(self, taken: Taken, error: RayError) -> None:
        """Say why. The next driver of the run tries again."""
        run_url, cause = self._spec.run_url, getattr(error, "cause", None) or error
        reason = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
        where = {"cur_nimg": taken.cur_nimg, "snapshot": taken.url(run_url)}
        log.put_event(run_url, self._spec.owner, "fid_failed", **where, reason=reason)
        self._failed.add(taken)
