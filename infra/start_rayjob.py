"""Starts a RayJob with the spec of another one, and waits for its end: what the scheduled CronJob runs.

    python start_rayjob.py --template NAME --job JOB --job-uid UID

NAME is a RayJob that is suspended, so it never starts. The new one is called JOB-ray; the CronJob's job JOB owns it.
A second pod of that job finds it and waits for it, and when the job is deleted, by hand or by the history limits,
the RayJob goes too. (It may not have the job's own name: KubeRay gives the RayJob's name to the job that submits it.)
Where one of an earlier tick still runs, that one is waited for, and none is started.

Exit codes: 0 it succeeded; 1 the API server did not answer for `--lost-sec`, try again; 2 the template is missing, or
the API server refuses; 3 the RayJob failed: its own log says why.
Only the standard library: it needs nothing but Python, and the pod's service account.
"""

import argparse
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_LABEL = "ganymede/schedule"
_ENDED = ("Complete", "Failed", "ValidationFailed")
_REQUEST_SEC = 30.0
_REFUSED = (400, 401, 403, 404, 422)


class _RefusedError(Exception):
    """No other try will do better."""


class _LostError(Exception):
    """The API server does not answer, or not as it should."""


class _Api:
    """RayJobs of one namespace."""

    def __init__(self, url: str, account: Path) -> None:
        namespace = (account / "namespace").read_text().strip()
        self._url = f"{url}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._token = account / "token"
        ca = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(ca)) if url.startswith("https:") else None

    def get(self, name: str) -> dict[str, Any]:
        """One RayJob."""
        return self._ask("GET", f"/{urllib.parse.quote(name)}")

    def of_schedule(self, template: str) -> list[dict[str, Any]]:
        """Those that were started from a template."""
        return self._ask("GET", f"?{urllib.parse.urlencode({'labelSelector': f'{_LABEL}={template}'})}")["items"]

    def create(self, rayjob: dict[str, Any]) -> None:
        """A new one, or the one that is there by that name."""
        self._ask("POST", "", rayjob)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        token = self._token.read_text().strip()  # read again each time: Kubernetes renews it
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_REQUEST_SEC, context=self._tls) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if method == "POST" and error.code == 409:
                return None
            text = f"{method} {self._url}{path}: {error.code} {error.read(500).decode(errors='replace')}"
            raise (_RefusedError if error.code in _REFUSED else _LostError)(text) from error
        except (OSError, ValueError) as error:
            raise _LostError(f"{method} {self._url}{path}: {error}") from error


def main(arguments: Sequence[str]) -> int:
    """Start or find it, follow it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="start_rayjob.py", allow_abbrev=False)
    parser.add_argument("--template", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--job-uid", required=True)
    parser.add_argument("--poll-sec", type=float, default=15.0)
    parser.add_argument("--lost-sec", type=float, default=600.0)
    parser.add_argument("--api", default=_in_cluster())
    parser.add_argument("--account", default=_ACCOUNT)
    options = parser.parse_args(arguments)
    name, said, heard = "", "", time.monotonic()
    try:
        api = _Api(options.api, Path(options.account))
        while True:
            try:
                name = name or _start(api, options)
                status = api.get(name).get("status") or {}
                heard = time.monotonic()
            except _LostError as error:
                if time.monotonic() - heard > options.lost_sec:
                    _say(str(error))
                    return 1
                time.sleep(options.poll_sec)
                continue
            now = f"{status.get('jobDeploymentStatus') or 'new'} {status.get('jobStatus') or ''}".rstrip()
            if now != said:
                _say(f"{name}: {now}")
                said = now
            if status.get("jobDeploymentStatus") in _ENDED:
                return _verdict(name, status)
            time.sleep(options.poll_sec)
    except (_RefusedError, OSError) as error:
        _say(str(error))
        return 2


def _in_cluster() -> str:
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{what}", "") for what in ("HOST", "PORT"))
    return f"https://{f'[{host}]' if ':' in host else host}:{port}"


def _start(api: _Api, options: argparse.Namespace) -> str:
    """The name of the RayJob to follow."""
    name = f"{options.job}-ray"
    for other in api.of_schedule(options.template):
        if (other.get("status") or {}).get("jobDeploymentStatus") not in _ENDED and other["metadata"]["name"] != name:
            _say(f"{other['metadata']['name']} of an earlier tick still runs: waiting for that one")
            return str(other["metadata"]["name"])
    spec = dict(api.get(options.template)["spec"])
    spec.pop("suspend", None)
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": options.job, "uid": options.job_uid}
    metadata = {"name": name, "labels": {_LABEL: options.template}, "ownerReferences": [owner]}
    api.create({"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec})
    return name


def _verdict(name: str, status: dict[str, Any]) -> int:
    if status["jobDeploymentStatus"] == "Complete" and status.get("jobStatus") == "SUCCEEDED":
        return 0
    said = " ".join(str(status.get("message") or status.get("reason") or "it says no more").split())
    _say(f"{name} did not succeed: {said}; its log: kubectl logs job/{name}")
    return 3


def _say(text: str) -> None:
    sys.stderr.write(f"start_rayjob: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
