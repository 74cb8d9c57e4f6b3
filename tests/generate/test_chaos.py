"""The shard factory under SIGKILL and a bad network: in the end the same bytes, and never half an object on the way."""

import dataclasses
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cli
from pipeline import storage
from tests.failpoint_control import STEPS, WORKER_STEPS, Failpoints
from tests.generate.chaos import NUM_SHARDS, Rig, Round, check_keys, contents, seed_of_test
from tests.generate.ray_cluster import run_cluster
from tests.generate.test_generate import make_snapshot
from tests.generate.watcher import watching
from tests.s3_proxy import FaultPlan, run_proxy
from tests.s3_server import S3Server

KILLS = int(os.environ.get("KILLS", "40"))
"""SIGKILLs of all the tests marked slow together; at most ten of them to whole nodes. `make test-long` has 100."""
NODE_KILLS = min(10, KILLS // 20)
AT_ANY_MOMENT = ("actor", "actor", "actor", "driver")
KILLS_OF_ROUND = len(STEPS) + len(AT_ANY_MOMENT)
BAD_NETWORK = {
    "unavailable": 0.05,
    "reset": 0.1,
    "cut": 0.1,
    "slow": 0.05,
    "conflict": 0.15,
    "false 412": 0.15,
    "lose": 0.15,
}
"""Shares of the requests that they fit: a run has some two hundred, forty of them commits, so that each kind comes."""


@pytest.fixture(scope="module")
def rig(s3_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A long-lived cluster, and what an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("factory")
    failpoints = Failpoints(folder / "failpoints")
    snapshot_url = make_snapshot(str(folder / "run"))
    environment = {**os.environ, **s3_env, **failpoints.environment()}
    with run_cluster(3, environment) as cluster:
        calm = Rig(cluster, failpoints, snapshot_url, {}, folder)
        driver = calm.start(str(folder / "undisturbed"))
        assert driver.finish() == 0, driver.said()
        expected = contents(str(folder / "undisturbed"))
        check_keys(expected)
        yield Rig(cluster, failpoints, snapshot_url, expected, folder)


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else str(request.getfixturevalue("s3"))


def test_a_kill_at_each_step_of_a_commit(rig: Rig, out: str) -> None:
    before = len(rig.failpoints.killed())
    for step in STEPS:
        rig.failpoints.arm(step)
    Round(rig, out, seed_of_test("each step")).run(1, [])
    assert sorted(rig.failpoints.killed()[before:]) == sorted(STEPS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("store", ["local", "s3"])
def test_random_kills(rig: Rig, request: pytest.FixtureRequest, tmp_path: Path, store: str) -> None:
    """Rounds of ten kills: one at each step, and four at any moment; one driver, or two at once, in turn."""
    root = str(tmp_path) if store == "local" else str(request.getfixturevalue("s3"))
    chance, tally = seed_of_test(f"random kills, {store}"), Counter[str]()
    rounds = -(-(KILLS - NODE_KILLS) // (2 * KILLS_OF_ROUND))
    before = len(rig.failpoints.killed())
    number = 0
    while number < rounds or sum(tally.values()) < len(AT_ANY_MOMENT) * rounds:
        for step in STEPS:
            rig.failpoints.arm(step, chance.randrange(NUM_SHARDS // 2) if step in WORKER_STEPS else 0)
        Round(rig, f"{root}/{number}", chance, tally).run(1 + number % 2, AT_ANY_MOMENT)
        number += 1
    at_steps = Counter(rig.failpoints.killed()[before:])
    show(at_steps | tally)
    assert at_steps == dict.fromkeys(STEPS, number)
    assert (at_steps | tally).total() >= KILLS_OF_ROUND * rounds
    assert rounds >= min(5, KILLS // 20)  # so each step at least five times when there are 100 kills


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nodes_are_killed(rig: Rig, tmp_path: Path) -> None:
    """The driver's own node has no CPU: every actor lies on a node that dies while the actor is at a known step."""
    chance, tally = seed_of_test("nodes"), Counter[str]()
    with run_cluster(0, rig.cluster.environment) as cluster:
        on_nodes = dataclasses.replace(rig, cluster=cluster)
        cluster.add_node(1)
        cluster.add_node(1)
        for first in range(0, NODE_KILLS, 5):
            for number in range(first, min(first + 5, NODE_KILLS)):
                rig.failpoints.arm(WORKER_STEPS[number % len(WORKER_STEPS)], chance.randrange(4), "frozen")
            Round(on_nodes, str(tmp_path / f"{first}"), chance, tally).run(1, [])
    show(tally)
    assert tally.total() == NODE_KILLS


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_through_a_bad_network(rig: Rig, s3: str, s3_server: S3Server) -> None:
    plan = FaultPlan(seed=seed_of_test("network").randrange(2**32), probabilities=BAD_NETWORK)
    with run_proxy(s3_server) as (proxy, url):
        proxy.plan = plan
        with watching(s3, rig.expected), rig.started(s3, extra=through(url)) as (driver,):
            assert driver.finish(200) == 0, driver.said()
        show(plan.made)
    assert plan.made.keys() == BAD_NETWORK.keys()
    rig.check(s3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_credentials_that_expire_in_mid_run(rig: Rig, s3: str, s3_server: S3Server) -> None:
    with run_proxy(s3_server) as (proxy, url):
        proxy.plan = FaultPlan(seed=0, probabilities={"slow": 1.0}, max_in_row=10**9)  # else it could be done before
        with rig.started(s3, extra=through(url, "expires")) as (driver,):
            while len(list(storage.list_entries(f"{s3}/train/index"))) < 2:
                assert driver.poll() is None, driver.said()
                time.sleep(0.05)
            proxy.expired_keys.add("expires")
            assert driver.finish() == cli.EXIT_BAD_INPUT, driver.said()
        check_complaint(driver.said(), s3_server)
        assert storage.stat(f"{s3}/dataset.json") is None
        proxy.plan = None
        with rig.started(s3, extra=through(url, "new")) as (driver,):
            assert driver.finish() == 0, driver.said()
        assert "goes on" in driver.said()
    rig.check(s3)


def check_complaint(said: str, server: S3Server) -> None:
    """One line says what happened, where, and what to do."""
    what = r"ganymede generate: access refused \((ExpiredToken|403)\)"  # the answer to a HEAD has no body to say which
    assert re.match(what + " to s3://.*: check AWS_ACCESS_KEY_ID", said.splitlines()[-1])
    assert "Traceback" not in said
    assert server.secret_key not in said


def through(url: str, access_key: str | None = None) -> dict[str, str]:
    """The environment of a driver that goes to S3 by the proxy, and whose workers do: as `ray job submit` gives it."""
    variables = {"AWS_ENDPOINT_URL": url} | ({"AWS_ACCESS_KEY_ID": access_key} if access_key else {})
    return variables | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": variables}})}


def show(counts: Counter[str]) -> None:
    print("\n".join(f"{count:4d}  {name}" for name, count in sorted(counts.items())), f"{counts.total():4d}", sep="\n")
