"""The shard factory as a user runs it, in processes that can be killed, and what it must leave behind in the end."""

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import storage
from tests.failpoint_control import Failpoints
from tests.generate.ray_cluster import RayCluster
from tests.generate.watcher import keys_of, watching

NUM_IMAGES, SHARD_SIZE, NUM_SHARDS = 80, 5, 16
_SETTINGS = {"num-images": NUM_IMAGES, "shard-size": SHARD_SIZE, "micro-batch": 2, "score": "true", "num-workers": 2}
_ROUND_SEC = 150.0
_POLL_SEC = 0.02


def seed_of_test(name: str) -> random.Random:
    """Chance for a test: GANYMEDE_TEST_SEED, or a new seed, printed so that a failure can be looked at again."""
    seed = int(os.environ.get("GANYMEDE_TEST_SEED", secrets.randbelow(2**32)))
    print(f"{name}: GANYMEDE_TEST_SEED={seed}")
    return random.Random(f"{name} {seed}")


class Driver:
    """One `ganymede generate` process."""

    def __init__(self, snapshot_url: str, out: str, environment: Mapping[str, str], log: Path) -> None:
        flags = [text for name, value in _SETTINGS.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "jobs.generate", "--snapshot", snapshot_url, "--out", out, *flags]
        self._log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, to be killed as one
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> bool:
        """SIGKILL; whether it was that which ended it."""
        if self.poll() is not None:
            return False
        os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait() == -signal.SIGKILL

    def finish(self, timeout_sec: float = 100.0) -> int:
        """Wait for its end; its exit code."""
        try:
            return self._process.wait(timeout_sec)
        finally:
            self.kill()

    def said(self) -> str:
        return self._log.read_text()


@dataclass(frozen=True)
class Rig:
    """A cluster, a plan, and the objects of an undisturbed run of the plan."""

    cluster: RayCluster
    failpoints: Failpoints
    snapshot_url: str
    expected: Mapping[str, bytes]
    logs: Path

    def start(self, out: str, extra: Mapping[str, str] | None = None) -> Driver:
        environment = {**self.cluster.environment, **(extra or {})}
        return Driver(self.snapshot_url, out, environment, self.logs / f"{secrets.token_hex(4)}.log")

    @contextmanager
    def started(self, out: str, count: int = 1, extra: Mapping[str, str] | None = None) -> Iterator[list[Driver]]:
        """Drivers of one output; none is left behind, nor a fate that nobody met."""
        drivers = [self.start(out, extra) for _ in range(count)]
        try:
            yield drivers
        finally:
            for driver in drivers:
                driver.kill()
            self.failpoints.disarm()

    def check(self, out: str) -> None:
        """Zero missing, zero repeated, and every object the one of the undisturbed run."""
        check_keys(stored := contents(out))
        assert stored.keys() == self.expected.keys()
        differ = [name for name, data in stored.items() if data != self.expected[name]]
        assert not differ, f"{out}: {differ} differ from the undisturbed run"


def contents(out: str) -> dict[str, bytes]:
    """All objects of a dataset; the event log, which says how it came about, is left out."""
    names = [entry.name for entry in storage.list_entries(out)]
    return {name: storage.read(storage.join(out, name)) for name in names if not name.startswith("events/")}


def check_keys(stored: Mapping[str, bytes]) -> None:
    """Each image of the plan once: in the shards, in the parts, and by the count of dataset.json."""
    planned = [f"{number:09d}" for number in range(NUM_IMAGES)]
    for ending in (".tar", ".parquet"):
        names = sorted(name for name in stored if name.endswith(ending))
        assert len(names) == NUM_SHARDS
        assert [key for name in names for key in keys_of(name, stored[name])] == planned
    parts = json.loads(stored["dataset.json"])["splits"]["train"]["parts"]
    assert sum(part["rows"] for part in parts) == NUM_IMAGES


@dataclass
class Round:
    """One output, made while processes are killed: by the failpoints, and at any moment from outside."""

    rig: Rig
    out: str
    chance: random.Random
    tally: Counter[str] = field(default_factory=Counter)
    """What was killed from outside, and where it was."""
    _frozen: int = 0

    def run(self, num_drivers: int, kills: Sequence[str]) -> None:
        """Let drivers finish the output while `kills`, of `actor` and `driver`, come at moments of chance. One whose
        moment comes when no such process is left is not made: the tally says which were.
        """
        due = sorted(self.chance.randrange(2, 3 * NUM_SHARDS) for _ in kills)
        pending = list(zip(due, self.chance.sample(kills, len(kills)), strict=True))
        self._frozen = len(self.rig.failpoints.frozen())
        deadline_sec = time.monotonic() + _ROUND_SEC
        with (
            watching(self.out, self.rig.expected),
            self.rig.started(self.out, num_drivers) as drivers,
        ):
            while self._go_on(drivers):
                assert time.monotonic() < deadline_sec, [driver.said() for driver in drivers]
                if pending and len(self.rig.failpoints.passed(self.out)) >= pending[0][0]:
                    pending = pending[1:] if self._kill(pending[0][1], drivers) else pending
                self._kill_nodes()
                time.sleep(_POLL_SEC)
            assert self.rig.failpoints.armed() == []
        self.rig.check(self.out)

    def _go_on(self, drivers: list[Driver]) -> bool:
        """Start again those that were killed; whether one is still at work. Any other end than a good one fails."""
        for number, driver in enumerate(drivers):
            if driver.poll() == -signal.SIGKILL:
                drivers[number] = self.rig.start(self.out)
            assert driver.poll() in (None, 0, -signal.SIGKILL), driver.said()
        return any(driver.poll() is None for driver in drivers)

    def _kill(self, what: str, drivers: list[Driver]) -> bool:
        """SIGKILL to a process of that kind; whether one died of it."""
        if what == "driver":
            killed = self.chance.choice(drivers).kill()
            self.tally["driver at any moment"] += killed
            return killed
        actors = self.rig.cluster.actors()
        if not actors:
            return False
        victim = self.chance.choice(actors)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:  # it was on its way out
            return False
        self.tally[f"actor at any moment, last {self.rig.failpoints.last_step(victim)}"] += 1
        return True

    def _kill_nodes(self) -> None:
        """SIGKILL to the nodes of actors that are frozen at a step; another joins first, so that there is room."""
        for one in self.rig.failpoints.frozen()[self._frozen :]:
            self.rig.cluster.add_node(1)
            self.rig.cluster.kill_node(one["raylet"], one["pid"])
            self.tally[f"node {one['step']}"] += 1
            self._frozen += 1
