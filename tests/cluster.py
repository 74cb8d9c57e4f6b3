"""A cluster of several nodes on this machine, as `make cluster` starts it: head, workers, S3 server, token and keys.

It runs beside the tests' process, which stays without Ray: what uses it is a process that has `environment`.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "infra" / "cluster.py"
BUCKET = "ganymede"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One that runs."""

    folder: Path
    environment: dict[str, str]
    """What a driver or a submitter needs: the tests' environment, and what the cluster's `env` sets."""
    home: Path
    said: str
    """What the command that started it printed."""

    @property
    def dashboard_url(self) -> str:
        return self.environment["RAY_API_SERVER_ADDRESS"]

    def url(self, name: str) -> str:
        """An s3:// URL in its bucket."""
        return f"s3://{BUCKET}/{name}"

    def processes(self) -> dict[str, list[int]]:
        """Node (head, worker-1, …, s3) -> ids of its living processes; a job's driver is among the head's."""
        lines = (line.partition(": ") for line in order("status", self.folder, self.home).splitlines())
        return {name: [int(pid) for pid in pids.split()] for name, _, pids in lines}

    def kill_node(self, name: str) -> None:
        """SIGKILL to every process of a node, as when its machine is gone."""
        while pids := self.processes().get(name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def add_node(self, cpus: int = 4) -> str:
        """Let one more worker join, wait until it has, and return its name."""
        return order("add-node", self.folder, self.home, f"--cpus={cpus}").strip()

    def submit(self, *words: str) -> "subprocess.Popen[str]":
        """Start `ganymede submit WORDS…`; stderr goes with stdout."""
        command = [sys.executable, "-m", "jobs.submit", *words]
        return subprocess.Popen(
            command, env=self.environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *words: str, timeout_sec: float = 300) -> tuple[int, str]:
        """`ganymede submit WORDS…` to its end: exit code and what it printed."""
        process = self.submit(*words)
        printed, _ = process.communicate(timeout=timeout_sec)
        return process.returncode, printed


def order(verb: str, folder: Path, home: Path, *flags: str) -> str:
    """Run the script; what it printed. AssertionError where it failed."""
    command = [sys.executable, str(SCRIPT), verb, f"--folder={folder}", *flags]
    done = subprocess.run(command, env={**os.environ, "HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}{logs(folder)}"
    return done.stdout


def logs(folder: Path) -> str:
    """The end of each log of the cluster."""
    return "".join(f"\n== {path}\n{path.read_text()[-1500:]}" for path in sorted((folder / "logs").glob("*.log")))


def sourced(env: Path) -> dict[str, str]:
    """The environment of a shell that has read the file, on top of what the tests have."""
    command = f"set -e; . {shlex.quote(str(env))}; exec {shlex.quote(sys.executable)} -c " + shlex.quote(
        "import json, os; print(json.dumps(dict(os.environ)))"
    )
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@contextmanager
def run_cluster(folder: Path, workers: int = 2, cpus: int = 4, head_cpus: int = 0) -> Iterator[Cluster]:
    """Start one in `folder`/cluster with a home of its own, and end it, with all that it stored, at the end."""
    at, home = folder / "cluster", folder / "home"
    home.mkdir()
    try:
        said = order("up", at, home, f"--workers={workers}", f"--cpus={cpus}", f"--head-cpus={head_cpus}")
        yield Cluster(folder=at, environment={**sourced(at / "env"), "HOME": str(home)}, home=home, said=said)
    finally:
        order("down", at, home, "--remove-data")
