"""The whole loop by `ray job submit` on a cluster of three nodes over S3, losing nodes, then scheduled and killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.cluster import Cluster, run_cluster
from tests.jobs.test_run_job import FLAGS, make_source

ROOT = Path(__file__).parents[2]
LONG = {
    "--train.total-kimg 0.1": "--train.total-kimg 4",
    "--train.tick-kimg 0.05": "--train.tick-kimg 0.5 --train.checkpoint-kimg 1",
    "--generate.num-images 60": "--generate.num-images 9000 --workers.cpus-per-worker 0.5",
    "--generate.shard-size 30": "--generate.shard-size 100",
}
"""So that there is time to kill in."""
WAIT_SEC = 240.0
TRAINS, GENERATES = b"ray::RayTrainWorker", b"ray::MapWorker(MapBatches("

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


class Bucket:
    """What lies below the loop's URL."""

    def __init__(self, cluster: Cluster, url: str) -> None:
        env = cluster.environment
        keys = {"aws_access_key_id": env["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": env["AWS_SECRET_ACCESS_KEY"]}
        self._client = boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys)
        self.url = url
        self._bucket, _, self._prefix = url.removeprefix("s3://").partition("/")

    def names(self, pattern: str) -> list[str]:
        """Of the objects, sorted."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=f"{self._prefix}/")
        found = (entry["Key"].removeprefix(f"{self._prefix}/") for page in pages for entry in page.get("Contents", ()))
        return sorted(name for name in found if re.fullmatch(pattern, name))

    def read(self, name: str) -> bytes:
        """An object."""
        body: bytes = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{name}")["Body"].read()
        return body

    def events(self) -> list[dict[str, Any]]:
        """Of the training."""
        segments = [self.read(name) for name in self.names(r"training/\w+/events/.*\.jsonl")]
        return [json.loads(line) for segment in segments for line in segment.splitlines()]

    def series(self) -> list[tuple[str, str]]:
        """Periods added and current, by number."""
        entries = [json.loads(self.read(name)) for name in self.names(r"published/\d+\.json")]
        return [(entry["added"]["period"], entry["current"]["period"]) for entry in entries]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with run_cluster(tmp_path_factory.mktemp("cluster"), workers=2) as running:
        yield running


class Loop:
    """`ganymede run` as jobs of a cluster."""

    def __init__(self, cluster: Cluster, source: Path, url: str) -> None:
        self.cluster, flags = cluster, FLAGS
        for short, long in LONG.items():
            assert short in flags
            flags = flags.replace(short, long)
        self._words = ["--source", str(source), "--out", url, *flags.split()]

    def submit(self, *more: str) -> "subprocess.Popen[str]":
        """`ganymede submit`, which follows the job to its end and has its exit code."""
        return self.cluster.submit("--", "run", *self._words, *more)

    def submit_by_ray(self, *more: str) -> "subprocess.Popen[str]":
        """`ray job submit` without an id of ours, so that Ray takes it beside another one of the same run."""
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(ROOT), "--"]
        command = [*ray, "python", "-m", "jobs.run", *self._words, *more]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.cluster.environment, cwd="/", **pipes)

    def run(self, *more: str) -> str:
        """What a job that succeeded has printed."""
        job = self.submit(*more)
        printed = job.communicate(timeout=WAIT_SEC)[0]
        assert job.returncode == 0, printed
        return printed

    def find(self, title: bytes) -> tuple[str, int] | None:
        """Node and id of a process whose command line begins so."""
        for name, pids in self.cluster.processes().items():
            for pid in pids:
                with suppress(OSError):  # it has ended meanwhile
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title):
                        return name, pid
        return None


def wait_for(ready: Callable[[], Any], job: "subprocess.Popen[str]") -> Any:
    """What `ready` answers, once it is true; the job must not end before."""
    deadline_sec = time.monotonic() + WAIT_SEC
    while not (found := ready()):
        assert job.poll() is None, job.communicate()[0]
        if time.monotonic() > deadline_sec:
            job.kill()
            pytest.fail(f"nothing came in {WAIT_SEC:.0f} s: {job.communicate()[0]}")
        time.sleep(0.05)
    return found


def lose_a_node(loop: Loop, title: bytes, job: "subprocess.Popen[str]") -> None:
    """SIGKILL to all processes of the worker node that has one with that title."""
    name, _ = wait_for(lambda: loop.find(title), job)
    assert name.startswith("worker-")
    loop.cluster.kill_node(name)


def test_the_loop_on_a_cluster_that_loses_nodes_then_by_period(cluster: Cluster, tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    bucket = Bucket(cluster, "s3://ganymede/loop")
    loop = Loop(cluster, tmp_path / "source", bucket.url)

    job = loop.submit()
    wait_for(lambda: len(bucket.names(r"training/\w+/checkpoints/\d+/COMMIT.json")) >= 2, job)
    lose_a_node(loop, TRAINS, job)
    cluster.add_node()
    made = r"synthetic/\w+/train/index/part-\d+\.parquet"
    wait_for(lambda: len(bucket.names(made)) >= 3, job)
    lose_a_node(loop, GENERATES, job)
    assert len(bucket.names(made)) < 90
    cluster.add_node()
    printed = job.communicate(timeout=WAIT_SEC)[0]
    assert job.returncode == 0, printed
    assert "verify: 9,000 images as their index says" in printed
    assert "published as number 1" in printed
    restarted = [event for event in bucket.events() if event["event"] == "restarted"]
    assert restarted
    print([event["wasted_steps"] for event in restarted], "steps of training done again")
    assert bucket.series() == [("", "")]

    objects = bucket.names(r"(images|training|synthetic|report|published)/.*")
    again = loop.run()
    assert again.count("already done") == 5
    assert bucket.names(r"(images|training|synthetic|report|published)/.*") == objects

    few = ("--generate.num-images", "600")
    loop.run("--period", "2026-11-20", *few)
    job = loop.submit("--period", "2026-11-21", *few)
    before = len(bucket.names(made))
    wait_for(lambda: len(bucket.names(made)) > before, job)
    found = loop.find(b"python\0-m\0jobs.run\0")
    assert found is not None
    os.kill(found[1], signal.SIGKILL)
    printed = job.communicate(timeout=WAIT_SEC)[0]
    assert job.returncode == 1, printed
    assert bucket.series() == [("", ""), ("2026-11-20", "2026-11-20")]
    last = ("--period", "2026-11-22", "--catch-up", *few)
    rivals = [loop.submit(*last), loop.submit(*last), loop.submit_by_ray(*last)]
    said = [rival.communicate(timeout=WAIT_SEC)[0] for rival in rivals]
    # One works. Ray refuses another of its name, and the loop's owner one that has none.
    assert sum(rival.returncode == 0 for rival in rivals) == 1, said
    assert sum("2026-11-22 published as number" in text for text in said) == 1, said
    days = ["2026-11-20", "2026-11-21", "2026-11-22"]
    assert bucket.series() == [("", ""), *((day, day) for day in days)]
    assert "already done, 2026-11-21 was published" in loop.run("--period", "2026-11-21", "--catch-up", *few)
    assert bucket.series() == [("", ""), *((day, day) for day in days)]
    assert len(bucket.names(r"synthetic/\w+/dataset.json")) == 4
