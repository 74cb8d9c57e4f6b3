"""`make cluster` and `ganymede submit`: every verb as a job, once at a time, and closed to whoever has no token."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from jobs import cli, submit
from pipeline import storage
from tests.cluster import ROOT, SCRIPT, Cluster, order, run_cluster, sourced
from tests.jobs.test_run_job import FLAGS, make_source
from tests.open_ports import answer, listening, rpc_answers

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
PREPARE = "--prepare.resolution 16 --prepare.channels 1"
TRAIN = (
    "--network.z-dim 8 --network.base-width 8 --train.batch-size 16 --train.num-lanes 2 --train.tick-kimg 0.25 "
    "--train.checkpoint-kimg 0.5"
)
GENERATE = "--generate.num-images 60 --generate.shard-size 30"
EVALUATE = (
    "--evaluate.num-samples 40 --evaluate.classifier-steps 5 --evaluate.utility-steps 0 --gates.min-utility 0 "
    "--gates.min-copies-p-value 0"
)
OPEN_PATHS = {"/", "/status", "/healthz", "/api/authentication_mode", "/api/healthz", "/api/local_raylet_healthz"}
"""What may answer without a token, beside counters for Prometheus: that a server is there, and how full its disk is."""
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with run_cluster(tmp_path_factory.mktemp("cluster"), workers=2) as running:
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    make_source(folder)
    return str(folder)


@pytest.fixture
def s3(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pipeline.storage` of this process reaches the cluster's objects."""
    for name, value in cluster.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)


def ray(cluster: Cluster, *words: str) -> str:
    """`ray WORDS…` as one types it; what it printed on stdout."""
    command = [sys.executable, "-m", "ray.scripts.scripts", *words]
    done = subprocess.run(command, env=cluster.environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(ready: Callable[[], bool], process: "subprocess.Popen[str]", limit_sec: float = 300) -> None:
    deadline_sec = time.monotonic() + limit_sec
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_sec
        time.sleep(0.1)


def done(result: tuple[int, str]) -> str:
    """What a job printed, which succeeded."""
    code, printed = result
    assert code == 0, printed
    return printed


@pytest.fixture(scope="module")
def images(cluster: Cluster, source: str) -> str:
    """URL of a small dataset that a job prepared."""
    url = cluster.url("images")
    printed = done(cluster.run("--", "prepare", "--source", source, "--out", url, *PREPARE.split()))
    assert "prepare: " in printed
    return url


@pytest.fixture(scope="module")
def synthetic(cluster: Cluster, images: str) -> tuple[str, str]:
    """URLs of a run and of what it made, by jobs."""
    run, out = cluster.url("run"), cluster.url("made")
    done(cluster.run("--", "train", "--dataset", images, "--out", run, *TRAIN.split(), "--train.total-kimg", "0.1"))
    printed = done(cluster.run("--", "generate", "--snapshot", run, "--out", out, *GENERATE.split()))
    assert "\r" not in printed
    assert "\x1b" not in printed
    assert re.search(r"^generate: .*60/60 \(100%\)", printed, re.MULTILINE)
    return run, out


def test_every_other_verb_is_a_job(cluster: Cluster, images: str, synthetic: tuple[str, str]) -> None:
    run, made = synthetic
    assert "60 images as their index says" in done(cluster.run("--", "verify", "--dataset", made))
    assert "gc: " in done(cluster.run("--", "gc", "--dataset", made))
    report = ["--real", images, "--synthetic", made, "--snapshot", run, "--out", cluster.url("report")]
    printed = done(cluster.run("--", "evaluate", *report, *EVALUATE.split(), "--cache", cluster.url("cache")))
    assert "report.html" in printed


@pytest.mark.usefixtures("s3")
def test_stopped_in_the_middle_and_submitted_again_it_goes_on(cluster: Cluster, images: str) -> None:
    url = cluster.url("stopped")
    words = ["train", "--dataset", images, "--out", url, *TRAIN.split(), "--train.total-kimg", "4"]
    name = submit.submission_id("train", url)
    rivals = [cluster.submit("--", *words), cluster.submit("--", *words)]  # at once: Ray decides
    while all(rival.poll() is None for rival in rivals):
        time.sleep(0.1)
    loser, winner = sorted(rivals, key=lambda rival: rival.poll() is None)
    assert loser.returncode == cli.EXIT_BAD_INPUT, loser.communicate()[0]
    told = loser.communicate()[0].splitlines()[-1]
    assert f"ray job logs -f {name}" in told or "another submitter" in told

    wait_until(lambda: any("COMMIT" in entry.name for entry in storage.list_entries(f"{url}/checkpoints")), winner)
    # PyTorch's own socket, at which the training workers meet, cannot be told where to listen; nothing else is open.
    assert sum(address not in LOOPBACK for _, address in listening(cluster).values()) <= 1
    code, printed = cluster.run("--", *words)
    assert code == cli.EXIT_BAD_INPUT
    assert len(printed.splitlines()) == 1
    for part in (f"{url}: job {name} of ", "is running since", f"ray job stop {name}"):
        assert part in printed

    ray(cluster, "job", "stop", name)
    printed = winner.communicate()[0]
    assert winner.returncode == cli.EXIT_FAILED
    assert f"job {name} was stopped; the same command goes on" in printed.splitlines()[-1]
    printed = done(cluster.run("--", *words))
    assert "train: goes on from checkpoint " in printed
    assert "\r" not in printed
    assert "\x1b" not in printed
    assert printed.count("Running entrypoint for job") == 1  # the log of the job before is not shown again
    assert "already done" in done(cluster.run("--", *words))


def test_ctrl_c_stops_only_the_printing(cluster: Cluster, synthetic: tuple[str, str]) -> None:
    # A shell that starts the tests in its background lets them ignore SIGINT, and what they start as well.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    follower = cluster.submit("--", "verify", "--dataset", synthetic[1])
    signal.signal(signal.SIGINT, before)
    assert follower.stdout is not None
    while "Running entrypoint for job" not in (line := follower.stdout.readline()):
        assert line, "it ended"
    follower.send_signal(signal.SIGINT)
    printed = follower.communicate()[0]
    assert follower.returncode == cli.EXIT_INTERRUPTED
    name = submit.submission_id("verify", synthetic[1])
    assert printed.splitlines()[-1].endswith(
        f"the job goes on; follow it: ray job logs -f {name}; stop it: ray job stop {name}"
    )
    assert "60 images as their index says" in ray(cluster, "job", "logs", "-f", name)


@pytest.mark.usefixtures("s3")
def test_exit_codes_come_back_with_the_last_lines(cluster: Cluster, synthetic: tuple[str, str]) -> None:
    missing = cluster.url("nothing")
    code, printed = cluster.run("--", "verify", "--dataset", missing)
    assert code == cli.EXIT_BAD_INPUT
    assert f"ganymede verify: {missing}: no dataset here" in printed
    assert printed.splitlines()[-1].endswith("failed: exit code 2")

    torn = cluster.url("torn")
    for entry in storage.list_entries(synthetic[1]):
        if not entry.name.endswith("shard-000001.tar"):
            storage.put(f"{torn}/{entry.name}", storage.read(f"{synthetic[1]}/{entry.name}"))
    code, printed = cluster.run("--", "verify", "--dataset", torn)
    assert code == cli.EXIT_REFUSED
    assert "shard-000001.tar" in printed
    assert printed.splitlines()[-1].endswith("failed: exit code 3")


def test_a_job_runs_what_was_sent_along(cluster: Cluster, tmp_path: Path, synthetic: tuple[str, str]) -> None:
    copy = tmp_path / "repository"
    for name in ("jobs", "pipeline"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    changed = (copy / "jobs" / "gc.py").read_text().replace("nothing to remove", "nothing to remove, says the copy")
    (copy / "jobs" / "gc.py").write_text(changed)
    printed = done(cluster.run("--working-dir", str(copy), "--", "gc", "--dataset", synthetic[1]))
    assert "nothing to remove, says the copy" in printed
    assert "says the copy" not in done(cluster.run("--image", "--", "gc", "--dataset", synthetic[1]))
    code = (
        "import ray, jobs.cli; ray.init(); print('driver', jobs.cli.__file__); "
        "where = lambda: __import__('pipeline.storage').storage.__file__; "
        "print('task', ray.get(ray.remote(where).remote()))"
    )
    words = ["--submission-id", "by-hand", "--working-dir", str(copy), "--", "python", "-c", code]
    printed = ray(cluster, "job", "submit", *words)
    for who in ("driver", "task"):
        assert re.search(rf"{who} \S+/working_dir_files/", printed), printed
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", *words]
    twice = subprocess.run(command, env=cluster.environment, cwd="/", capture_output=True, text=True)
    assert twice.returncode != 0
    assert "by-hand already exists" in twice.stderr


def without_token(cluster: Cluster, token: str = "") -> dict[str, str]:
    """The environment of somebody else."""
    names = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH_")}
    return {**names, **({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {})}


def test_ray_refuses_who_has_no_token(cluster: Cluster) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    enter = [sys.executable, "-c", "import ray; ray.init(); print('inside')"]
    ask = [sys.executable, "-m", "jobs.submit", "--", "gc", "--dataset", cluster.url("images")]
    others = ["", "0" * 64]
    tried = []
    for token in others:
        environment = without_token(cluster, token)
        tried += [subprocess.Popen(command, env=environment, cwd="/", text=True, **pipes) for command in (enter, ask)]
    for token in others:
        header = {"Authorization": f"Bearer {token}"} if token else {}
        for path in ("/api/jobs/", "/api/version", "/nodes?view=summary", "/api/cluster_status"):
            assert answer(port_of(cluster.dashboard_url), path, header)[0] in (401, 403), path
    for process in tried:
        out, err = process.communicate(timeout=120)
        if process.args == ask:
            assert process.returncode == cli.EXIT_BAD_INPUT
            assert "refuses the token" in err
            assert len(err.splitlines()) == 1
        else:
            assert process.returncode != 0
            assert "inside" not in out
            assert "AuthenticationError" in err


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.mark.parametrize("keys", [None, ("0" * 20, "0" * 40)], ids=["none", "others"])
def test_the_s3_server_refuses_who_has_no_keys(cluster: Cluster, images: str, keys: tuple[str, str] | None) -> None:
    once = {"s3": {"addressing_style": "path"}, "retries": {"total_max_attempts": 1}}
    client = boto3.session.Session(*(keys or ()), region_name="us-east-1").client(
        "s3",
        endpoint_url=cluster.environment["AWS_ENDPOINT_URL"],
        config=Config(**once, **({} if keys else {"signature_version": UNSIGNED})),
    )
    bucket, _, prefix = images.removeprefix("s3://").partition("/")
    calls: list[Callable[[], object]] = [
        lambda: client.list_buckets(),
        lambda: client.list_objects_v2(Bucket=bucket),
        lambda: client.get_object(Bucket=bucket, Key=f"{prefix}/dataset.json"),
        lambda: client.put_object(Bucket=bucket, Key="intruder", Body=b"x"),
        lambda: client.delete_object(Bucket=bucket, Key=f"{prefix}/dataset.json"),
    ]
    for call in calls:
        with pytest.raises(ClientError) as refusal:
            call()
        assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


@pytest.mark.usefixtures("images")
def test_nothing_listens_beyond_loopback_or_answers_strangers(cluster: Cluster) -> None:
    found = listening(cluster)
    assert {node for node, _ in found.values()} == {"head", "worker-1", "worker-2", "s3"}
    assert {address for _, address in found.values()} <= LOOPBACK
    secrets = [(cluster.folder / "token").read_text().encode(), cluster.environment["AWS_SECRET_ACCESS_KEY"].encode()]
    refused = set()
    for port, (node, _) in found.items():
        paths = ["/", "/metrics", "/status", "/api/jobs/", "/api/job_agent/jobs/", "/buckets/ganymede", "/dir/assign"]
        answers = {path: answer(port, path) for path in [*paths, "/nodes?view=summary", "/ganymede/ready", "/1,01"]}
        for path, (status, body) in answers.items():
            assert not any(secret in body for secret in secrets)
            if 200 <= status < 400:
                assert path in OPEN_PATHS or body.startswith(b"# HELP"), (node, port, path, body[:200])
        if not any(status for status, _ in answers.values()):
            refused |= {(node, code) for code in rpc_answers(port)}
    assert refused >= {("head", "UNAUTHENTICATED"), ("worker-1", "UNAUTHENTICATED"), ("worker-2", "UNAUTHENTICATED")}
    assert {code for node, code in refused if node == "s3"} == {"UNAVAILABLE"}  # no certificate, no connection


def test_secrets_are_the_users_own(cluster: Cluster) -> None:
    for name in (".", "s3", "logs", "tls"):
        assert (cluster.folder / name).stat().st_mode & 0o777 == 0o700, name
    for name in ("token", "env", "s3.json", "state.json", "tls/key.pem"):
        assert (cluster.folder / name).stat().st_mode & 0o777 == 0o600, name
    # Ray opens its own folder, with sockets that ask for no token, to all: the one around it must not be.
    assert (cluster.folder / "ray").resolve().stat().st_mode & 0o777 == 0o700
    assert not list(cluster.home.glob(".ray/*"))
    jobs = ray(cluster, "job", "list")
    assert cluster.environment["AWS_SECRET_ACCESS_KEY"] not in jobs
    again = order("up", cluster.folder, cluster.home)
    assert again.splitlines()[0] == f"A cluster runs in {cluster.folder} already."
    assert again.splitlines()[1:] == cluster.said.splitlines()[1:]


def make(target: str, folder: Path, flags: str = "") -> str:
    """A target as one types it, with a home of its own; what it printed on stdout."""
    command = ["make", "--silent", "-o", ".venv/installed", target, f"CLUSTER_FLAGS=--folder={folder} {flags}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HOME": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def marked(state: str) -> list[int]:
    """Processes that have the cluster's id in their environment, asked for by another way than the script's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if state.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_the_two_lines_after_make_cluster(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "c"
    command = [sys.executable, str(SCRIPT), "up", f"--folder={folder}", "--workers=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as half:
        wait_until((folder / "logs" / "head.log").exists, half)
        half.kill()
    text = (folder / "state.json").read_text()
    (first,) = re.findall(r'"id": "(\w+)"', text)
    assert marked(first)
    assert "is stopped" in make("cluster-down", folder)
    assert marked(first) == []

    printed = make("cluster", folder, "--workers=1")
    (second,) = re.findall(r'"id": "(\w+)"', (folder / "state.json").read_text())
    scratch = (folder / "ray").resolve()
    pasted = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert len(pasted) == 2
    tiny = f"--source {shlex.quote(source)} {FLAGS}"
    assert "--preset demo" in pasted[1]
    script = "\n".join([pasted[0], pasted[1].replace("--preset demo", tiny)])
    shell = {"HOME": str(tmp_path), "PATH": os.defpath}
    job = subprocess.run(["sh", "-c", script], cwd=ROOT, env=shell, capture_output=True, text=True)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "published as number 1: s3://ganymede/demo/synthetic/" in job.stdout
    assert sourced(folder / "env")["RAY_AUTH_TOKEN_PATH"] == str(folder / "token")

    assert "is stopped" in make("cluster-down", folder)
    assert marked(second) == []
    assert not scratch.exists()
    assert sorted(path.name for path in folder.iterdir()) == [".ganymede-cluster", "logs", "s3"]
    assert "No cluster runs" in make("cluster-down", folder, "--remove-data")
    assert not folder.exists()
