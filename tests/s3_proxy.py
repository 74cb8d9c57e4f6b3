"""A proxy in front of the real S3 server that makes the faults of a network and of a store, one by one or by a plan."""

import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.s3_server import S3Server

MAX_IN_ROW = 2
"""Faults that a plan makes in a row of one request: storage asks again three times, boto3 below it four times."""
_SLOW_SEC = 0.3
_ERRORS = {
    "unavailable": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
    "false 412": (412, "PreconditionFailed"),
    "expired": (403, "ExpiredToken"),
}
"""What the proxy answers by itself, the server unasked."""
_OF_COMMITS = ("conflict", "false 412", "strip", "lose")
"""Faults that fit a conditional write alone."""


class Response(NamedTuple):
    """What the server answered."""

    status: int
    body: bytes
    headers: list[tuple[str, str]]


@dataclass
class FaultPlan:
    """Which request gets which fault: follows from the seed and from the request, whatever the order they come in.

    `conflict`, `false 412` and `lose` come to conditional writes; `cut` (of the response's body) to reads; `reset` in
    the midst of the request's body to writes; `unavailable` and `slow` to all.
    """

    seed: int
    probabilities: Mapping[str, float]
    max_in_row: int = MAX_IN_ROW
    made: Counter[str] = field(default_factory=Counter)
    """Faults made so far."""
    _times: Counter[str] = field(default_factory=Counter)
    _in_row: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, command: str, path: str, conditional: bool) -> str:
        """The fault of this request, or nothing."""
        request = f"{command} {path}"
        with self._lock:
            self._times[request] += 1
            chance = random.Random(f"{self.seed} {request} {self._times[request]}")
            fault = self._choose(chance, command, conditional)
            self._in_row[request] = self._in_row[request] + 1 if fault else 0
            if self._in_row[request] > self.max_in_row:
                self._in_row[request] = 0
                return ""
            self.made.update([fault] if fault else [])
            return fault

    def _choose(self, chance: random.Random, command: str, conditional: bool) -> str:
        at = chance.random()
        for fault, probability in self.probabilities.items():
            at -= probability
            if at < 0:
                return fault if _fits(fault, command, conditional) else ""
        return ""


def _fits(fault: str, command: str, conditional: bool) -> bool:
    if fault in _OF_COMMITS:
        return conditional
    return {"cut": command == "GET", "reset": command == "PUT"}.get(fault, True)


class Proxy(http.server.BaseHTTPRequestHandler):
    """In front of the real server: signs again and passes on, except for the faults it is told to make."""

    protocol_version = "HTTP/1.1"
    target: S3Server
    faults: list[str]
    """Faults still to come, one a request that they fit; `strip` stays."""
    plan: FaultPlan | None
    """Faults for a whole run."""
    expired_keys: set[str]
    """Access keys whose time is over."""
    seen: list[str]

    def handle_request(self) -> None:
        conditional = "If-None-Match" in self.headers
        self.seen.append(f"{self.command} {conditional}")
        fault = self.next_fault(conditional)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "reset":
            self.rfile.read(length // 2)
            self.reset()
            return
        body = self.rfile.read(length)
        if fault in _ERRORS:
            self.refuse(*_ERRORS[fault])
            return
        if fault == "slow":
            time.sleep(_SLOW_SEC)
        response = self.forward(body, keep_condition=fault != "strip")
        if fault == "lose":
            self.reset()
            return
        self.answer(response, len(response.body) // 2 if fault == "cut" else None)
        if fault == "cut":
            self.reset()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_request  # noqa: N815

    def next_fault(self, conditional: bool) -> str:
        if any(f"Credential={key}/" in self.headers.get("Authorization", "") for key in self.expired_keys):
            return "expired"
        if self.faults and _fits(self.faults[0], self.command, conditional):
            return self.faults[0] if self.faults[0] == "strip" else self.faults.pop(0)
        return self.plan.draw(self.command, self.path, conditional) if self.plan else ""

    def forward(self, body: bytes, keep_condition: bool) -> Response:
        dropped = {"host", "authorization", "x-amz-date", "x-amz-content-sha256", "expect", "connection"}
        dropped |= set() if keep_condition else {"if-none-match"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        request = AWSRequest(self.command, self.target.endpoint_url + self.path, headers, body)
        keys = Credentials(self.target.access_key, self.target.secret_key)
        S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
        connection = http.client.HTTPConnection(urlsplit(self.target.endpoint_url).netloc)
        connection.request(self.command, self.path, body, dict(request.headers.items()))
        found = connection.getresponse()
        response = Response(found.status, found.read(), found.getheaders())
        connection.close()
        return response

    def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>made by the proxy</Message></Error>".encode()
        self.answer(Response(status, b"" if self.command == "HEAD" else body, []))

    def answer(self, response: Response, sent_bytes: int | None = None) -> None:
        self.send_response_only(response.status)
        for name, value in response.headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = [value for name, value in response.headers if name.lower() == "content-length"]
        self.send_header("Content-Length", length[0] if length and self.command == "HEAD" else str(len(response.body)))
        self.end_headers()
        self.wfile.write(response.body[:sent_bytes])

    def reset(self) -> None:
        """End the connection with a reset, as a machine does that is gone, rather than with an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True  # a client that was killed, or that keeps its connection, shall not hold the end up
    block_on_close = False

    def shutdown_request(self, request: object) -> None:
        """Without the orderly end first, which would spoil a reset."""
        self.close_request(request)  # type: ignore[arg-type]

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients are killed in these tests."""


@contextmanager
def run_proxy(target: S3Server) -> Iterator[tuple[type[Proxy], str]]:
    """Its settings and its URL."""
    settings = {"target": target, "faults": [], "plan": None, "expired_keys": set(), "seen": []}
    handler = type("ProxyOfTest", (Proxy,), settings)
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def proxy(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Proxy]]:
    """The proxy's settings; AWS_ENDPOINT_URL leads to it."""
    del s3  # asked for so that it sets the environment first
    with run_proxy(s3_server) as (handler, url):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield handler
