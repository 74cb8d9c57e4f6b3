"""What a cluster's processes listen on, and what they answer to somebody who has no token."""

import http.client
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from tests.cluster import Cluster

RPCS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Push",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.RayletDriver/ClusterInfo",
)


def listening(cluster: Cluster) -> dict[int, tuple[str, str]]:
    """Port -> node and address, of all that the cluster's processes listen on."""
    owners: dict[str, str] = {}
    for name, pids in cluster.processes().items():
        for pid in pids:
            with suppress(OSError):
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        owners[os.readlink(link)] = name
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            node = owners.get(f"socket:[{fields[9]}]")
            if fields[3] == "0A" and node is not None:
                address, port = fields[1].split(":")
                packed = b"".join(struct.pack("<I", int(address[at : at + 8], 16)) for at in range(0, len(address), 8))
                family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
                found[int(port, 16)] = (node, socket.inet_ntop(family, packed))
    return found


def answer(port: int, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body of a GET; (0, b"") from a port that speaks no HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read()
    except (http.client.HTTPException, OSError):
        return 0, b""
    finally:
        connection.close()


def rpc_answers(port: int) -> set[str]:
    """What the calls above get from a port without a token; none may be let through."""
    codes = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for rpc in RPCS:
            with pytest.raises(grpc.RpcError) as refusal:
                channel.unary_unary(rpc)(b"", timeout=10)
            codes.add(refusal.value.code().name)
    assert codes <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}, (port, codes)
    return codes
