"""A Ray cluster and an S3 server of your own on one machine, on 127.0.0.1 alone, with a token and keys of its own.

    python cluster.py up [--folder DIR] [--workers N] [--cpus N] [--head-cpus N] [--object-store-mb N]
                         [--dashboard-port P] [--s3-port P]
    python cluster.py add-node [--folder DIR] [--cpus N] [--object-store-mb N]
    python cluster.py status [--folder DIR]
    python cluster.py down [--folder DIR] [--remove-data]

`up` starts SeaweedFS (`weed server -s3`), a head and workers (`ray start`), waits until all answer, and prints what to
paste; where they run already it says so and prints the same. All that it keeps lies in the folder, mode 0700: the
token, the keys, `env` for a shell, logs, and what the S3 server stores. `down` ends the processes that `up` started,
also where that was interrupted, and no others: each has the cluster's id in its environment; `status` lists them.
Objects stay for the next `up` unless --remove-data is given. Nodes count CPUs by name, so several fit on two cores.

Needs Linux. Exit codes: 0 done or already done, 1 something did not start or end (its log is named), 2 bad arguments.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import cluster_s3
from cluster_parts import BUCKET, READY_SEC, Cluster, ClusterError, check_ours, create, free_ports, load, wait_for

HERE = Path(__file__).parent
FOLDER = HERE.parent / ".cluster"


def up(folder: Path, options: argparse.Namespace) -> int:
    """start what is not there and say how to use it"""
    before = load(folder)
    if before is not None and before.processes():
        if not (_alive_nodes(before) and cluster_s3.stores(before)):
            raise ClusterError(f"{folder}: parts of a cluster run, and it does not answer: {_down_command(folder)}")
        _say(f"A cluster runs in {folder} already.", *_how(before))
        return 0
    if before is not None:
        before.forget()
    cluster = create(
        folder,
        workers=options.workers,
        cpus=options.cpus,
        dashboard_port=options.dashboard_port,
        s3_port=options.s3_port,
    )
    try:
        cluster_s3.start(cluster)
        _start_ray(cluster, options)
    except BaseException:  # a key press too: nothing half started is left
        cluster.end(keep_data=True)
        raise
    _say(
        f"The cluster runs: a head, {options.workers} workers that count {options.cpus} CPUs each, S3.", *_how(cluster)
    )
    return 0


def add_node(folder: Path, options: argparse.Namespace) -> int:
    """let one more worker join, and print its name"""
    cluster = load(folder)
    if cluster is None or not _alive_nodes(cluster):
        raise ClusterError(f"no cluster runs in {folder}")
    used = {path.stem for path in cluster.logs.glob("worker-*.log")}
    name = next(f"worker-{n}" for n in range(1, len(used) + 2) if f"worker-{n}" not in used)
    _start_worker(cluster, name, options)
    _say(name)
    return 0


def status(folder: Path, _options: argparse.Namespace) -> int:
    """print each node's name and process ids"""
    cluster = load(folder)
    found = cluster.processes() if cluster else {}
    if not found:
        raise ClusterError(f"no cluster runs in {folder}")
    _say(*(f"{name}: {' '.join(map(str, pids))}" for name, pids in sorted(found.items())))
    return 0


def down(folder: Path, options: argparse.Namespace) -> int:
    """end the cluster's processes and forget its secrets"""
    cluster = load(folder)
    count = 0
    if cluster is not None:
        count = cluster.end(keep_data=not options.remove_data)
        cluster.forget()
    _say(f"The cluster in {folder} is stopped: {count} processes." if count else f"No cluster runs in {folder}.")
    if options.remove_data:
        check_ours(folder)
        shutil.rmtree(folder, ignore_errors=True)
    elif (folder / "s3").exists():
        _say(f"What it stored is kept in {folder / 's3'} for the next one; --remove-data removes it.")
    return 0


def _start_ray(cluster: Cluster, options: argparse.Namespace) -> None:
    """Head, then workers, until all answer."""
    flags = ["--head", f"--port={cluster.state.gcs_port}", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    flags += [f"--dashboard-port={cluster.state.dashboard_port}"]
    flags += [f"--ray-client-server-port={free_ports(1)[0]}"]
    _start_node(cluster, "head", flags, options.head_cpus, options.object_store_mb)
    wait_for(lambda: "head" in _alive_nodes(cluster), f"the dashboard does not answer; see {cluster.logs}")
    for number in range(1, options.workers + 1):  # in turn: Ray gives a node 30 s to start, and there are few cores
        _start_worker(cluster, f"worker-{number}", options)


def _start_worker(cluster: Cluster, name: str, options: argparse.Namespace) -> None:
    """Returns when it has joined."""
    _start_node(cluster, name, [f"--address=127.0.0.1:{cluster.state.gcs_port}"], options.cpus, options.object_store_mb)
    wait_for(lambda: name in _alive_nodes(cluster), f"{name} did not join; see {cluster.logs}")


def _start_node(cluster: Cluster, name: str, flags: Sequence[str], cpus: int, store_mb: int) -> None:
    """`ray start`, which ends when its node runs."""
    command = [sys.executable, str(HERE / "ray_start_loopback.py"), *flags, f"--node-name={name}", "--num-gpus=0"]
    # Its own number is the same for every Ray of a machine, and a head whose agent has no port takes no job.
    command += [f"--dashboard-agent-listen-port={free_ports(1)[0]}"]
    command += [f"--num-cpus={cpus}", f"--object-store-memory={store_mb * 10**6}", "--log-color=false"]
    process = cluster.start(
        name,
        [*command, "--node-ip-address=127.0.0.1", f"--temp-dir={cluster.ray_temp(name)}"],
        cluster.token_environment() | cluster.s3_environment(),
    )
    try:
        failed = process.wait(READY_SEC) != 0
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        raise ClusterError(f"`ray start` failed for {name}; see {cluster.logs / name}.log")


def _alive_nodes(cluster: Cluster) -> set[str]:
    """Names of the nodes that the dashboard knows as alive; none where it does not answer. One that died may be among
    them for some seconds, and a name is given once.
    """
    request = urllib.request.Request(f"{cluster.dashboard_url}/nodes?view=summary")
    request.add_header("Authorization", f"Bearer {(cluster.folder / 'token').read_text()}")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            nodes = json.load(response)["data"]["summary"]
    except (OSError, KeyError, ValueError):
        return set()
    raylets = [node.get("raylet", {}) for node in nodes]
    return {raylet.get("nodeName", "") for raylet in raylets if raylet.get("state") == "ALIVE"}


def _how(cluster: Cluster) -> list[str]:
    """What to paste, and where things are."""
    repository, out = shlex.quote(str(HERE.parent)), f"s3://{BUCKET}/demo"
    return [
        "",
        f"  . {shlex.quote(str(cluster.folder / 'env'))}",
        f"  ray job submit --working-dir {repository} -- python -m jobs.run --preset demo --out {out}",
        "",
        f"or, so that it exists once and its exit code comes back: ganymede submit -- run --preset demo --out {out}",
        f"dashboard: {cluster.dashboard_url} (asks for the token, which is in {cluster.folder / 'token'})",
        f"logs: {cluster.logs} and {cluster.folder / 'ray' / 'head' / 'session_latest' / 'logs'}",
        f"stop it: {_down_command(cluster.folder)}",
    ]


def _down_command(folder: Path) -> str:
    if folder == FOLDER:
        return "make cluster-down"
    return f"python {shlex.quote(str(HERE / 'cluster.py'))} down --folder {shlex.quote(str(folder))}"


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster.py", allow_abbrev=False)
    verbs = parser.add_subparsers(required=True)
    for name, act in (("up", up), ("add-node", add_node), ("status", status), ("down", down)):
        verb = verbs.add_parser(name, allow_abbrev=False, help=act.__doc__)
        verb.set_defaults(act=act)
        verb.add_argument("--folder", type=Path, default=FOLDER, help="its own folder [default .cluster]")
        if act in (up, add_node):
            verb.add_argument("--cpus", type=_count, default=4, help="that a worker counts, by name")
            verb.add_argument(
                "--object-store-mb", type=_count, default=200, help="shared memory of a node, at least 80"
            )
    verbs.choices["up"].add_argument("--workers", type=_count, default=2)
    verbs.choices["up"].add_argument("--head-cpus", type=_count, default=0, help="0: the head does no work")
    verbs.choices["up"].add_argument("--dashboard-port", type=_count, default=0, help="0: one that is free")
    verbs.choices["up"].add_argument("--s3-port", type=_count, default=0, help="0: one that is free")
    verbs.choices["down"].add_argument("--remove-data", action="store_true", help="all that the S3 server stored too")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError
    return number


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    options = _parser().parse_args(arguments)
    os.umask(0o077)  # what it keeps is the user's own
    try:
        return int(options.act(options.folder.absolute(), options))
    except ClusterError as error:
        sys.stderr.write(f"cluster: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("cluster: interrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
