"""infra/drain.sh: Ray hears that the node goes away; without Ray the pod goes at once."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.generate.ray_cluster import run_cluster
from tests.infra.rendering import INFRA

BIN = Path(sys.executable).parent
_WATCH = """
import ray, time

@ray.remote(num_cpus=1)
class Busy:  # a node without work leaves at once
    def begin(self):
        return True

ray.init(log_to_driver=False, configure_logging=False)
busy = Busy.remote()
assert ray.get(busy.begin.remote())
print("watching", flush=True)
while not (draining := ray._private.state.state.get_draining_nodes()):
    time.sleep(0.05)
print("draining:", *draining.values(), flush=True)
time.sleep(60)
"""


@contextmanager
def _started(*command: str, environment: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _line(process: "subprocess.Popen[str]", start: str) -> str:
    assert process.stdout is not None
    return next(line for line in process.stdout if line.startswith(start))


@pytest.mark.slow
def test_ray_is_told_that_this_node_goes_away_and_by_when() -> None:
    with run_cluster(1, os.environ) as cluster:
        environment = {**cluster.environment, "PATH": f"{BIN}:{os.environ['PATH']}"}
        with _started(sys.executable, "-c", _WATCH, environment=environment) as watch:
            _line(watch, "watching")
            before = time.time()
            with _started("bash", str(INFRA / "drain.sh"), "10", environment=environment) as drain:
                (deadline_ms,) = _line(watch, "draining:").partition(":")[2].split()
                assert before + 10 <= int(deadline_ms) / 1000 <= time.time() + 10
                assert drain.poll() is None, "it left the pod no time"
                assert drain.wait(20) == 0


def test_without_ray_the_pod_goes_at_once(tmp_path: Path) -> None:
    (tmp_path / "ray").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ray").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    began = time.monotonic()
    done = subprocess.run(["bash", str(INFRA / "drain.sh"), "30"], env=environment, timeout=20, check=False)
    assert done.returncode != 0
    assert time.monotonic() - began < 10
