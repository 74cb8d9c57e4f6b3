"""Who drives a run: a numbered series of immutable objects, the highest is current.

A successor takes the next number when the last owner has released, its heartbeat is stale, or its process is dead on
the same host. Every commit first checks that no higher owner exists.
"""

import dataclasses
import json
import os
import re
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline import storage
from pipeline.errors import RetryableError

STALE_SEC = 60.0
HEARTBEAT_SEC = 15.0
_OBJECT = re.compile(r"(\d{6,})\.")


class OwnershipError(RetryableError):
    """Another driver has the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """A process, told apart from every other on its host, in its container and across restarts."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started_ticks: int
    """Start time of the process in clock ticks since boot."""


def this_process() -> Process:
    """The calling process."""
    return Process(
        host=socket.gethostname(),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        pid=os.getpid(),
        started_ticks=_started_ticks(os.getpid()) or 0,
    )


def _started_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None if there is no such process or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


def is_dead(process: Process) -> bool:
    """Whether it is known to be dead; False where it cannot be known (another host or container)."""
    here = this_process()
    same_place = (process.host, process.boot_id, process.pid_namespace) == (here.host, here.boot_id, here.pid_namespace)
    return same_place and _started_ticks(process.pid) != process.started_ticks


def current(run_url: str) -> int:
    """The highest owner number; 0 if the run never had one."""
    entries = storage.list_entries(storage.join(run_url, "owners"))
    return max((int(match[1]) for entry in entries if (match := _OBJECT.match(entry.name))), default=0)


def check(run_url: str, number: int) -> None:
    """Raise OwnershipError if a higher owner exists: what is about to be committed is no longer ours to commit."""
    highest = current(run_url)
    if highest > number:
        raise OwnershipError(f"{run_url}: owner {highest} has taken over from owner {number}; this driver stops")


class Ownership:
    """The claim on a run, kept alive by a thread; released on leaving the `with` block."""

    def __init__(self, run_url: str) -> None:
        """Take the run, or raise OwnershipError that says who has it."""
        self._run_url = run_url
        last = current(run_url)
        if last:
            self._refuse_if_alive(last)
        self.number = last + 1
        body = json.dumps(dataclasses.asdict(this_process()), sort_keys=True).encode()
        # Refreshed before the claim, so that a claim is never seen without a heartbeat.
        storage.put(self._url("heartbeat"), b"")
        if storage.put_if_absent(self._url("json"), body) is storage.Put.OTHER:
            raise OwnershipError(f"{run_url}: another driver took the run at this moment; wait for it or stop it")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def _url(self, kind: str, number: int | None = None) -> str:
        return storage.join(self._run_url, "owners", f"{number or self.number:06d}.{kind}")

    def _refuse_if_alive(self, last: int) -> None:
        if storage.stat(self._url("released", last)) is not None or storage.stat(self._url("json", last)) is None:
            return
        process = Process(**json.loads(storage.read(self._url("json", last))))
        beat = storage.stat(self._url("heartbeat", last))
        if is_dead(process) or beat is None or beat.age_sec > STALE_SEC:
            return
        raise OwnershipError(
            f"{self._run_url}: process {process.pid} on {process.host} drives this run "
            f"(last sign of life {beat.age_sec:.0f} s ago); wait for it or stop it"
        )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SEC):
            try:
                storage.put(self._url("heartbeat"), b"")
            except storage.StorageError:
                # A successor may take over after STALE_SEC; the check before each commit then stops us.
                continue

    def __enter__(self) -> "Ownership":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any:
        self._stop.set()
        self._thread.join()
        try:
            storage.put_if_absent(self._url("released"), b"")
        except storage.StorageError:
            if kind is None:
                raise  # else what ended the run is what the user must hear
