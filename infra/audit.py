"""Ask PyPI for known vulnerabilities of every locked version: `make audit`.

Exit 1 for a finding or a lock that cannot be read. A service that does not answer, or does not know a version, is told
and is no failure: what cannot be asked says nothing about the lock.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "requirements-dev.lock")
SERVICE_URL = "https://pypi.org/pypi/pip/json"
_TIMEOUT_SEC = 5
_WHOLE_TIMEOUT_SEC = 300


def answers(url: str) -> bool:
    """Whether the service gives its answer within 5 s."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SEC):
            return True
    except (OSError, ValueError):
        return False


def audit(command: list[str], service_url: str = SERVICE_URL) -> int:
    """Run `command` (pip-audit and its options) on both lock files; returns the exit code."""
    if not answers(service_url):
        _say("the vulnerability service cannot be reached; nothing was checked")
        return 0
    command = [*command, "--format=json", "--disable-pip", "--require-hashes", "--progress-spinner=off"]
    command += [f"--timeout={_TIMEOUT_SEC}", *(f"--requirement={ROOT / name}" for name in LOCKS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WHOLE_TIMEOUT_SEC)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        _say(f"the vulnerability service took more than {_WHOLE_TIMEOUT_SEC} s; nothing was checked")
        return 0
    except ValueError:  # pip-audit says nothing on stdout where it could not finish
        sys.stderr.write(done.stderr)
        return 1 if answers(service_url) else 0
    return _tell(packages)


def _say(text: str) -> None:
    sys.stdout.write(f"audit: {text}\n")


def _tell(packages: list[dict[str, object]]) -> int:
    found = [package for package in packages if package.get("vulns")]
    unknown = [package for package in packages if "skip_reason" in package]
    for package in found:
        names = ", ".join(vulnerability["id"] for vulnerability in package["vulns"])  # type: ignore[attr-defined]
        _say(f"{package['name']} {package['version']}: {names}")
    _say(f"{len(packages) - len(unknown)} of {len(packages)} locked versions checked, {len(found)} vulnerable")
    if unknown:
        _say(f"the service does not know the other {len(unknown)}: nothing is said about them")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(audit([sys.executable, "-m", "pip_audit"]))
