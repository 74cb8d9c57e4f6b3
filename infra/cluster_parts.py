"""The folder of a cluster of one machine, the processes in it, and how they are known. See cluster.py."""

import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import socket

READY_SEC = 120.0
END_SEC = 30.0
BUCKET = "ganymede"
MARK = "GANYMEDE_CLUSTER"
"""The environment variable by which the cluster's processes are known: ID/NAME, with NAME head, worker-N or s3."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes a driver take 127.0.0.1 for this machine's address; see ray_start_loopback.py."""
_OURS = ".ganymede-cluster"
_SECRET_FILES = ("env", "token", "s3.json", "ray")
_NOT_INHERITED = ("AWS_", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_", "RAY_JOB_", MARK, *LOOPBACK)


class ClusterError(Exception):
    """The cluster cannot be started or stopped; says why and where the log is."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What must be known of a cluster; stored in its folder before anything starts."""

    id: str
    scratch: str
    """Folder of Ray's files and of sockets, with a short name below /tmp: a socket's path may have 107 bytes."""
    gcs_port: int
    dashboard_port: int
    s3_port: int
    workers: int
    cpus: int


class Cluster:
    """The folder of a cluster, and its processes."""

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state = folder, state
        self.logs = folder / "logs"

    def ray_temp(self, name: str) -> str:
        """Ray's own folder of a node, open to all by Ray's doing; the folder around it is not. Nodes that shared one
        would remove from each other the folder that a running job works in.
        """
        return f"{self.state.scratch}/{name}"

    @property
    def dashboard_url(self) -> str:
        """Of the dashboard and the job API."""
        return f"http://127.0.0.1:{self.state.dashboard_port}"

    def s3_environment(self) -> dict[str, str]:
        """What a client of the S3 server needs."""
        (identity,) = json.loads((self.folder / "s3.json").read_text())["identities"]
        (key,) = identity["credentials"]
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.state.s3_port}",
            "AWS_ACCESS_KEY_ID": key["accessKey"],
            "AWS_SECRET_ACCESS_KEY": key["secretKey"],
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def token_environment(self) -> dict[str, str]:
        """What makes a process know the token."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Start a process of the cluster, apart from this terminal; what it prints is in logs/NAME.log."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_INHERITED)}
        own = {
            "PATH": f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH', os.defpath)}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "SPT_NOENV": "1",  # else Ray writes a worker's title over its environment, and the mark is lost
            MARK: f"{self.state.id}/{name}",
        }
        with (self.logs / f"{name}.log").open("wb") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env={**inherited, **own, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> dict[str, list[int]]:
        """Name -> ids of its living processes, for all that it started, those of jobs included."""
        mark = f"{MARK}={self.state.id}/".encode()
        found: dict[str, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # ended meanwhile, or another user's
                for variable in path.read_bytes().split(b"\0"):
                    if variable.startswith(mark):
                        found.setdefault(variable[len(mark) :].decode(), []).append(int(path.parent.name))
        return found

    def end(self, keep_data: bool) -> int:
        """End all of its processes, by id; how many there were. To keep its data, the S3 server needs some seconds."""
        count = len(_all(self.processes()))
        if keep_data:
            for pid in self.processes().get("s3", []):
                _signal(pid, signal.SIGTERM)
            with suppress(ClusterError):  # it writes what it holds in memory
                wait_for(lambda: "s3" not in self.processes(), "", END_SEC)
        deadline_sec = time.monotonic() + END_SEC
        while pids := _all(self.processes()):  # again and again: one may have started another meanwhile
            if time.monotonic() > deadline_sec:
                raise ClusterError(f"processes that do not end: {pids}")
            for pid in pids:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.1)
        return count

    def forget(self) -> None:
        """Remove its secrets and Ray's own folder; logs and what the S3 server stored stay."""
        shutil.rmtree(self.state.scratch, ignore_errors=True)
        shutil.rmtree(self.folder / "tls", ignore_errors=True)
        for name in (*_SECRET_FILES, "state.json"):  # the state last: it names the rest
            (self.folder / name).unlink(missing_ok=True)

    def write_env(self) -> None:
        """The file for a shell: addresses, token, keys, and the path to `ray` and `ganymede`."""
        values = {
            **self.token_environment(),
            **self.s3_environment(),
            **LOOPBACK,
            "RAY_ADDRESS": f"127.0.0.1:{self.state.gcs_port}",
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
        }
        lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
        lines.append(f'export PATH={shlex.quote(sysconfig.get_path("scripts"))}:"$PATH"')
        (self.folder / "env").write_text("\n".join(lines) + "\n")


def load(folder: Path) -> Cluster | None:
    """The cluster of a folder, running or not; None where there is none."""
    try:
        return Cluster(folder, State(**json.loads((folder / "state.json").read_text())))
    except FileNotFoundError:
        return None


def create(folder: Path, *, workers: int, cpus: int, dashboard_port: int, s3_port: int) -> Cluster:
    """Make the folder, with new secrets; a port of 0 is one that is free. Objects stored before stay.

    Raises ClusterError for a folder that holds something else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_ours(folder)
    folder.chmod(0o700)
    (folder / _OURS).touch()
    shutil.rmtree(folder / "logs", ignore_errors=True)
    (folder / "logs").mkdir()
    ports = free_ports(3)
    state = State(
        id=secrets.token_hex(8),
        scratch=tempfile.mkdtemp(prefix="ganymede-", dir="/tmp"),
        gcs_port=ports[0],
        dashboard_port=dashboard_port or ports[1],
        s3_port=s3_port or ports[2],
        workers=workers,
        cpus=cpus,
    )
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    (folder / "token").write_text(secrets.token_hex(32))
    key = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
    identity = {"name": "ganymede", "credentials": [key], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    cluster = Cluster(folder, state)
    (folder / "ray").symlink_to(state.scratch)
    cluster.write_env()
    return cluster


def check_ours(folder: Path) -> None:
    """Raise ClusterError for a folder that holds something else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / _OURS).exists():
        raise ClusterError(f"{folder}: holds something else than a cluster; give another --folder")


def wait_for(ready: Callable[[], bool], otherwise: str, limit_sec: float = READY_SEC) -> None:
    """Ask until it is so; ClusterError(otherwise) where it is not in time."""
    deadline_sec = time.monotonic() + limit_sec
    while not ready():
        if time.monotonic() > deadline_sec:
            raise ClusterError(otherwise)
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """TCP ports on 127.0.0.1 that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]


def _all(processes: Mapping[str, list[int]]) -> list[int]:
    return [pid for pids in processes.values() for pid in pids]


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
