"""Storage through the proxy's fault plans: whatever the network does, a write is done once and reads are whole."""

import os
import random

import pytest

from pipeline import storage
from pipeline.storage import Put, StorageError, join
from tests.s3_proxy import FaultPlan, Proxy, proxy

__all__ = ["proxy"]


@pytest.mark.parametrize("fault", ["unavailable", "conflict", "false 412", "reset", "lose", "slow"])
def test_a_write_is_done_once_whatever_the_network_does(s3: str, proxy: type[Proxy], fault: str) -> None:
    data = random.Random(fault).randbytes(300_000)
    proxy.plan = plan = FaultPlan(seed=0, probabilities={fault: 1.0})
    assert storage.put_if_absent(join(s3, "object"), data) is (Put.SAME if fault == "lose" else Put.CREATED)
    assert storage.put_if_absent(join(s3, "object"), b"other") is Put.OTHER
    assert plan.made[fault] >= 1
    proxy.plan = None
    assert storage.read(join(s3, "object")) == data


@pytest.mark.parametrize("fault", ["unavailable", "cut", "slow"])
def test_a_read_is_whole_whatever_the_network_does(s3: str, proxy: type[Proxy], fault: str) -> None:
    data = random.Random(fault).randbytes(300_000)
    storage.put(join(s3, "object"), data)
    # One in a row: boto3 waits long before a third try.
    proxy.plan = plan = FaultPlan(seed=0, probabilities={fault: 1.0}, max_in_row=1)
    assert storage.read(join(s3, "object")) == data
    assert storage.read_range(join(s3, "object"), 7, 1000) == data[7:1007]
    assert [(entry.name, entry.size_bytes) for entry in storage.list_entries(s3)] == [("object", len(data))]
    assert plan.made[fault] >= 2  # of an object, and of a listing


def test_credentials_that_expire_are_told_as_such(s3: str, proxy: type[Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put(join(s3, "object"), b"data")
    proxy.expired_keys.add(os.environ["AWS_ACCESS_KEY_ID"])
    with pytest.raises(StorageError, match=r"access refused \(ExpiredToken\) to .*: check AWS_ACCESS_KEY_ID"):
        storage.read(join(s3, "object"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert storage.read(join(s3, "object")) == b"data"


def test_a_plan_follows_from_its_seed_and_the_request_alone() -> None:
    probabilities = {"unavailable": 0.2, "lose": 0.2, "reset": 0.1}
    requests = [("PUT", f"/object-{n % 7}", True) for n in range(70)]

    def drawn(seed: int, order: list[tuple[str, str, bool]]) -> dict[str, list[str]]:
        plan = FaultPlan(seed=seed, probabilities=probabilities)
        faults: dict[str, list[str]] = {}
        for request in order:
            faults.setdefault(request[1], []).append(plan.draw(*request))
        return faults

    assert drawn(3, requests) == drawn(3, sorted(requests))
    assert drawn(3, requests) != drawn(4, requests)
    made = [fault for faults in drawn(3, requests).values() for fault in faults]
    assert set(made) == {*probabilities, ""}
