"""requirements.lock and requirements-dev.lock: whole, with hashes, and what this environment has; infra/audit.py."""

import http.server
import importlib.metadata
import json
import re
import sys
import sysconfig
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from infra import audit
from infra.lock import LEFT_OUT
from tests.infra.rendering import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(text) for text in PROJECT["dependencies"]]
DEV = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]
LOCKS = {name: (ROOT / name).read_text() for name in audit.LOCKS}
PIN = re.compile(
    r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.]+)(?: ; (?P<marker>[^\\\n]+?))?"
    r"(?: \\\n +--hash=sha256:[0-9a-f]{64})+\n"
)


def _pins(text: str) -> list[re.Match[str]]:
    return list(PIN.finditer(text))


PINS = {
    pin["name"]: pin["version"]
    for text in LOCKS.values()
    for pin in _pins(text)
    if pin["marker"] is None or Marker(pin["marker"]).evaluate()
}
"""What the locks want here: some pins are for other platforms."""


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_is_nothing_but_pins_with_hashes(name: str) -> None:
    assert len(_pins(LOCKS[name])) > 50
    assert re.fullmatch(r"#[^\n]*\n", PIN.sub("", LOCKS[name])), "a line that is no pin, or a pin without hashes"
    assert "://" not in LOCKS[name]


def test_a_package_stands_once_and_torch_never() -> None:
    names = [pin["name"] for text in LOCKS.values() for pin in _pins(text)]
    assert len(names) == len(set(names))
    assert not [name for name in names if LEFT_OUT.match(f"{name}==")]


@pytest.mark.parametrize(
    ("requirement", "locks"),
    [*((item, ["requirements.lock"]) for item in RUNTIME), *((item, list(LOCKS)) for item in DEV)],
    ids=lambda value: value.name if isinstance(value, Requirement) else "",
)
def test_a_requirement_of_the_project_has_one_pin_that_fits(requirement: Requirement, locks: list[str]) -> None:
    name = canonicalize_name(requirement.name)
    found = [pin["version"] for lock in locks for pin in _pins(LOCKS[lock]) if pin["name"] == name]
    if name == "torch":
        assert found == []
        assert re.fullmatch(r"==[\d.]+", str(requirement.specifier))
    else:
        assert len(found) == 1
        assert requirement.specifier.contains(found[0])


def test_this_environment_has_what_is_locked_and_nothing_else() -> None:
    # Ray puts packages of its own on the path, once it is imported.
    found = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {canonicalize_name(item.name): item.version for item in found}
    assert {name: installed.get(name) for name in PINS} == PINS, "make install"
    others = {name for name in installed if name not in PINS and not LEFT_OUT.match(f"{name}==")}
    assert others == {"ganymede"}


class _Service(http.server.BaseHTTPRequestHandler):
    """Answers as OSV does: jinja2 has a vulnerability, nothing else has."""

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        bad = {"id": "CANARY-1", "modified": "2026-01-01T00:00:00Z", "affected": [], "summary": "made for this test"}
        self._answer({"vulns": [bad]} if asked["package"]["name"] == self.server.vulnerable else {})  # type: ignore[attr-defined]

    def _answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[http.server.ThreadingHTTPServer]:
    """A vulnerability service of our own, on loopback."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Service) as server:
        server.vulnerable = ""  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _audit(url: str, tmp_path: Path) -> int:
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service=osv", f"--osv-url={url}"]
    return audit.audit([*command, f"--cache-dir={tmp_path}"], url)


def test_pip_audit_passes_and_fails_by_what_the_service_says(
    service: http.server.ThreadingHTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{service.server_port}"
    assert _audit(url, tmp_path) == 0
    assert f"{len(PINS)} of {len(PINS)} locked versions checked, 0 vulnerable" in capsys.readouterr().out
    service.vulnerable = "jinja2"  # type: ignore[attr-defined]
    assert _audit(url, tmp_path) == 1
    assert f"audit: jinja2 {PINS['jinja2']}: CANARY-1" in capsys.readouterr().out


def test_a_service_out_of_reach_is_told_and_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.audit(["no-such-command"], "http://127.0.0.1:1") == 0
    assert "cannot be reached; nothing was checked" in capsys.readouterr().out


def test_a_lock_that_cannot_be_audited_is_a_failure(service: http.server.ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{service.server_port}"
    assert audit.audit([sys.executable, "-c", "raise SystemExit('cannot read the lock')"], url) == 1


def test_versions_that_the_service_does_not_know_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"name": "a", "version": "1", "vulns": []}
    assert audit._tell([known, {"name": "b", "skip_reason": "not found"}]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 locked versions checked" in said
    assert "does not know the other 1" in said
