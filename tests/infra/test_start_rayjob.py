"""infra/start_rayjob.py against an API server that is made here: what it creates, what it waits for, how it ends."""

import json
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.infra.rendering import INFRA

PREFIX = "/apis/ray.io/v1/namespaces/ganymede/rayjobs"
TEMPLATE = {"metadata": {"name": "ganymede-nightly"}, "spec": {"entrypoint": "x", "suspend": True}}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


class ApiServer(ThreadingHTTPServer):
    """RayJobs by name; each goes through its statuses, one a look."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rayjobs: dict[str, dict[str, Any]] = {"ganymede-nightly": dict(TEMPLATE)}
        self.statuses: list[dict[str, Any]] = [DONE]
        self.answer_with: list[int] = []
        """Codes to answer the next requests with."""
        self.created: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        if self._refused():
            return
        path, _, query = self.path.partition("?")
        if path == PREFIX:
            key, _, value = urllib.parse.parse_qs(query)["labelSelector"][0].partition("=")
            found = [o for o in self.server.rayjobs.values() if o["metadata"].get("labels", {}).get(key) == value]
            self._send(200, {"items": found})
            return
        rayjob = self.server.rayjobs.get(path.removeprefix(f"{PREFIX}/"))
        if rayjob is None:
            self._send(404, {"message": "not found"})
            return
        if "suspend" not in rayjob["spec"]:
            rayjob["status"] = self.server.statuses.pop(0) if len(self.server.statuses) > 1 else self.server.statuses[0]
        self._send(200, rayjob)

    def do_POST(self) -> None:
        rayjob = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        name = rayjob["metadata"]["name"]
        if name in self.server.rayjobs:
            self._send(409, {"message": "already exists"})
            return
        self.server.created.append(rayjob)
        self.server.rayjobs[name] = dict(rayjob)
        self._send(201, rayjob)

    def _refused(self) -> bool:
        if self.headers["Authorization"] != "Bearer the-token":
            self._send(401, {"message": "no such token"})
            return True
        if self.server.answer_with:
            self._send(self.server.answer_with.pop(0), {"message": "told to"})
            return True
        return False

    def _send(self, code: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def api() -> Iterator[ApiServer]:
    """A server with the template."""
    with ApiServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """What Kubernetes mounts into a pod."""
    (tmp_path / "namespace").write_text("ganymede")
    (tmp_path / "token").write_text("the-token\n")
    return tmp_path


def _start(api: ApiServer | str, account: Path, *flags: str) -> tuple[int, str]:
    url = api if isinstance(api, str) else f"http://127.0.0.1:{api.server_address[1]}"
    done = subprocess.run(
        [
            sys.executable, str(INFRA / "start_rayjob.py"), "--template", "ganymede-nightly",
            "--job", "ganymede-nightly-29", "--job-uid", "u-1",
            "--poll-sec", "0.02", "--api", url, "--account", str(account), *flags,
        ],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_it_creates_the_templates_spec_unsuspended_and_owned_by_the_job(api: ApiServer, account: Path) -> None:
    api.statuses = [
        {},
        {"jobDeploymentStatus": "Initializing"},
        {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
        DONE,
    ]
    code, said = _start(api, account)
    assert code == 0, said
    assert api.created == [
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {
                "name": "ganymede-nightly-29-ray",
                "labels": {"ganymede/schedule": "ganymede-nightly"},
                "ownerReferences": [
                    {"apiVersion": "batch/v1", "kind": "Job", "name": "ganymede-nightly-29", "uid": "u-1"}
                ],
            },
            "spec": {"entrypoint": "x"},
        }
    ]
    for word in ("Initializing", "Running RUNNING", "Complete SUCCEEDED"):
        assert word in said


def test_a_rayjob_that_fails_is_exit_3_with_its_message(api: ApiServer, account: Path) -> None:
    api.statuses = [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "failed with exit code 3,\nlogs"}
    ]
    code, said = _start(api, account)
    assert code == 3
    assert "failed with exit code 3, logs" in said
    assert "kubectl logs job/ganymede-nightly-29-ray" in said


def test_a_rayjob_that_was_stopped_did_not_succeed(api: ApiServer, account: Path) -> None:
    api.statuses = [{"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}]
    assert _start(api, account)[0] == 3


def test_a_second_pod_of_the_same_job_waits_for_the_same_rayjob(api: ApiServer, account: Path) -> None:
    api.statuses = [{"jobDeploymentStatus": "Running"}, DONE]
    assert _start(api, account)[0] == 0
    assert _start(api, account)[0] == 0
    assert len(api.created) == 1


def test_one_of_an_earlier_tick_that_still_runs_is_waited_for(api: ApiServer, account: Path) -> None:
    labels = {"ganymede/schedule": "ganymede-nightly"}
    running = {
        "metadata": {"name": "earlier", "labels": labels},
        "spec": {},
        "status": {"jobDeploymentStatus": "Running"},
    }
    ended = {"metadata": {"name": "ended", "labels": labels}, "spec": {}, "status": DONE}
    api.rayjobs |= {"earlier": running, "ended": ended}
    code, said = _start(api, account)
    assert code == 0
    assert api.created == []
    assert "earlier of an earlier tick still runs" in said


def test_a_missing_template_is_bad_input(api: ApiServer, account: Path) -> None:
    api.rayjobs.clear()
    code, said = _start(api, account)
    assert code == 2
    assert "404" in said


def test_a_token_that_is_refused_is_bad_input(api: ApiServer, account: Path) -> None:
    (account / "token").write_text("another")
    assert _start(api, account)[0] == 2


def test_a_pod_without_an_account_is_bad_input(api: ApiServer, account: Path) -> None:
    (account / "namespace").unlink()
    assert _start(api, account)[0] == 2


def test_a_server_that_fails_for_a_while_is_asked_again(api: ApiServer, account: Path) -> None:
    api.answer_with = [500, 503, 429]
    assert _start(api, account)[0] == 0


def test_a_server_that_does_not_answer_is_worth_another_try(account: Path) -> None:
    code, said = _start("http://127.0.0.1:9", account, "--lost-sec", "0.2")
    assert code == 1
    assert "127.0.0.1:9" in said
