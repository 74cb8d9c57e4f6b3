"""A Ray cluster of several nodes on this machine, in a process of its own: it outlives drivers, and can lose nodes.

In the tests' process a second Ray would be in the way of the session's own (`ray_session` in conftest).
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_OBJECT_STORE_BYTES = 80 * 10**6
_PR_SET_CHILD_SUBREAPER = 36
_END_SEC = 20.0


class RayCluster:
    """Orders to the process that has the cluster."""

    def __init__(self, process: "subprocess.Popen[str]", environment: Mapping[str, str]) -> None:
        self._process = process
        self.environment = {**environment, "RAY_ADDRESS": self._read()}
        """What a driver needs."""

    def add_node(self, num_cpus: int) -> None:
        """Let a node join, and wait until it has."""
        self._order(f"add {num_cpus}")

    def kill_node(self, raylet: int, worker: int) -> None:
        """SIGKILL to the raylet of a node and to a worker there; the node's other processes follow the raylet."""
        self._order(f"kill {raylet} {worker}")

    def drain_node(self, number: int, sec: float) -> None:
        """Tell the node that joined as that number, from 0, that it is taken away in `sec`."""
        self._order(f"drain {number} {sec}")

    def drop_node(self, number: int) -> None:
        """Take it away: SIGKILL to all of its processes."""
        self._order(f"drop {number}")

    def actors(self) -> list[int]:
        """Process ids of the actors that make shards."""
        titles = {pid: Path(f"/proc/{pid}/cmdline") for pid in descendants(self._process.pid)}
        return [pid for pid, path in titles.items() if _read_bytes(path).startswith(b"ray::MapWorker(MapBatches(")]

    def _order(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        assert self._read() == "done"

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"the cluster's process ended, exit code {self._process.wait(10)}"
        return line


def descendants(pid: int) -> list[int]:
    """Ids of the living processes that a process started, and those started, in turn."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        state, parent = _read_bytes(path).rpartition(b")")[2].split()[:2] or (b"Z", b"0")
        if state not in (b"Z", b"X"):
            parents.setdefault(int(parent), []).append(int(path.parent.name))
    found = list(parents.get(pid, []))
    for one in found:  # grows as we go
        found += parents.get(one, [])
    return found


def _read_bytes(path: Path) -> bytes:
    """A file of /proc; empty when the process has ended meanwhile."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return path.read_bytes()
    return b""


@contextmanager
def run_cluster(num_cpus: int, environment: Mapping[str, str]) -> Iterator[RayCluster]:
    """Start a cluster whose workers have `environment`, and end all its processes at the end."""
    temp = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: a socket's path may have 107 bytes
    environment = {**environment, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, __file__, str(num_cpus)],
        # RAY_TMPDIR: else a plain ray.init() of another test would find this cluster by its note in /tmp/ray.
        env={**environment, "RAY_TMPDIR": temp},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield RayCluster(process, environment)
    finally:
        _end(process)
        shutil.rmtree(temp)


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill the cluster's processes by their ids, those first that could start others."""
    deadline_sec = time.monotonic() + _END_SEC
    while pids := descendants(process.pid):
        assert time.monotonic() < deadline_sec, f"processes that do not end: {pids}"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    process.kill()
    process.communicate()


def serve(num_cpus: int) -> None:
    """Start the head, say its address, then follow orders from standard input until it ends."""
    from ray.cluster_utils import Cluster

    # Workers whose raylet was killed stay below this process, so that it can be told which processes are the cluster's.
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    head = {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(cluster.address, file=told, flush=True)
    added: list[Any] = []
    for line in sys.stdin:
        match line.split():
            case ["add", cpus]:
                added.append(cluster.add_node(num_cpus=int(cpus), object_store_memory=_OBJECT_STORE_BYTES))
            case ["kill", raylet, worker]:
                _kill_node(cluster, int(raylet), int(worker))
            case ["drain", number, sec]:
                _drain_node(cluster, added[int(number)].node_id, float(sec))
            case ["drop", number]:
                cluster.remove_node(added[int(number)], allow_graceful=False)
        print("done", file=told, flush=True)


def _kill_node(cluster: Any, raylet: int, worker: int) -> None:
    (node,) = (node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet)
    cluster.remove_node(node, allow_graceful=False)  # first, so that it cannot tell of the worker's death
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)


def _drain_node(cluster: Any, node_id: str, sec: float) -> None:
    """As a spot machine's notice does it, by way of the operator of a cluster."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason, deadline_ms = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), int((time.time() + sec) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(node_id, reason, "a test", deadline_ms)
    assert accepted, why


if __name__ == "__main__":
    serve(int(sys.argv[1]))
