"""Checkpoints: whole or passed over, numbered, never written by one who lost the run."""

import hashlib
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch

from pipeline import storage
from pipeline.config import ConfigError, canonical_json, digest
from pipeline.train import checkpoint
from pipeline.train.checkpoint import COMMIT, OBJECTS, CheckpointError, DamagedCheckpointError, State
from pipeline.train.ownership import Ownership, OwnershipError
from pipeline.train.spec import TrainConfig


@pytest.fixture(params=["local", "s3"])
def run_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def state(cur_nimg: int, attempt: int = 1) -> State:
    tensors = {name: {"w": torch.full((3,), float(cur_nimg))} for name in checkpoint.TENSOR_STATES}
    control = {"attempt": attempt, "augment_p": 0.0}
    return State(tensors=tensors, control=control, progress={"cur_nimg": cur_nimg}, config={"seed": 0})


def save_all(run_url: str, *clocks: int) -> int:
    """A checkpoint at each clock; the number of the owner, who keeps the run."""
    owner = Ownership(run_url).number
    for cur_nimg in clocks:
        checkpoint.save(run_url, state(cur_nimg), owner)
    return owner


def current(run_url: str, *damaged: int) -> tuple[int | None, list[str]]:
    """Number of the current checkpoint, and what is said of those passed over."""
    said: list[str] = []
    found = checkpoint.latest_valid(run_url, said.append, damaged)
    return (found.number if found else None), said


def test_the_highest_is_current(run_url: str) -> None:
    with Ownership(run_url) as owner:
        assert checkpoint.latest_valid(run_url, pytest.fail) is None
        for number, cur_nimg in ((1, 64), (2, 128)):
            assert checkpoint.save(run_url, state(cur_nimg), owner.number) == number
    found = checkpoint.latest_valid(run_url, pytest.fail)
    assert found is not None
    assert (found.number, found.cur_nimg, found.attempt, found.passed_over) == (2, 128, 1, ())
    assert found == pickle.loads(pickle.dumps(found)) == checkpoint.latest_valid(run_url, pytest.fail)
    assert len(pickle.dumps(found)) < 4096  # it travels from the driver to every rank
    loaded = checkpoint.load(run_url, found)
    assert torch.equal(loaded.tensors["G"]["w"], torch.full((3,), 128.0))
    assert (loaded.progress, loaded.config) == ({"cur_nimg": 128}, {"seed": 0})
    assert loaded.control == {"attempt": 1, "augment_p": 0.0}
    commit = json.loads(storage.read(f"{run_url}/checkpoints/000002/{COMMIT}"))
    assert (commit["owner"], commit["attempt"]) == (1, 1)


@pytest.mark.parametrize("name", [*OBJECTS, COMMIT])
@pytest.mark.parametrize("damage", ["cut", "missing", "altered"])
def test_a_damaged_one_is_passed_over_and_said(tmp_path: Path, name: str, damage: str) -> None:
    url = str(tmp_path)
    save_all(url, 64, 128)
    last = checkpoint.latest_valid(url, pytest.fail)
    assert last is not None
    path = tmp_path / "checkpoints" / "000002" / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "cut" else bytes([*data[:-1], data[-1] ^ 1]))
    number, said = current(url)
    assert number == 1
    if (name, damage) == (COMMIT, "missing"):  # never committed: nothing was lost
        assert not said
    else:
        assert len(said) == 1
        assert said[0].startswith(f"checkpoint 2 passed over: {name} ")
    if name != COMMIT:  # it may as well happen between the look and the reading
        with pytest.raises(DamagedCheckpointError, match=f"000002/{name} (is missing|was altered): run again"):
            checkpoint.load(url, last)


def test_no_byte_of_a_commit_can_change_unseen(tmp_path: Path) -> None:
    url = str(tmp_path)
    save_all(url, 64, 128)
    path = tmp_path / "checkpoints" / "000002" / COMMIT
    data = path.read_bytes()
    for place in range(len(data)):
        for mask in (1, 0x20):  # 0x20: the other case of a letter
            path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
            assert current(url) == (1, [f"checkpoint 2 passed over: {COMMIT} is damaged"]), (place, mask)
    for other in (b"", b"{}", b"[]", b"7", b"null", data + b" ", b" " + data, data[:-1]):
        path.write_bytes(other)
        assert current(url)[0] == 1, other


def test_what_its_metadata_hide_is_seen_when_it_is_read(s3: str, s3_env: dict[str, str]) -> None:
    """Other bytes of the same length under the digest of the old ones, as a store that rots or a copy gone wrong."""
    save_all(s3, 64, 128)
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3_env["AWS_ENDPOINT_URL"])
    bucket, _, prefix = s3.removeprefix("s3://").partition("/")
    for name in (*OBJECTS, COMMIT):
        url = f"{s3}/checkpoints/000002/{name}"
        key, data = f"{prefix}/checkpoints/000002/{name}", storage.read(url)
        metadata = {"sha256": hashlib.sha256(data).hexdigest()}
        client.put_object(Bucket=bucket, Key=key, Body=bytes([*data[:-1], data[-1] ^ 1]), Metadata=metadata)
        assert storage.digest(url) == metadata["sha256"]
        found = checkpoint.latest_valid(s3, lambda _: None)
        assert found is not None
        if name.endswith(".pt"):
            assert found.number == 2
            with pytest.raises(DamagedCheckpointError, match=f"{name} was altered"):
                checkpoint.load(s3, found)
            assert current(s3, 2) == (1, ["checkpoint 2 passed over: it was found damaged when it was read"])
        else:
            assert found.number == 1
            checkpoint.load(s3, found)
        client.put_object(Bucket=bucket, Key=key, Body=data, Metadata=metadata)
    assert current(s3) == (2, [])


def objects_of(run_url: str, number: int) -> Mapping[str, Any]:
    objects: Mapping[str, Any] = json.loads(storage.read(f"{run_url}/checkpoints/{number:06d}/{COMMIT}"))["objects"]
    return objects


def test_a_torn_one_keeps_its_number_to_itself(tmp_path: Path) -> None:
    url = str(tmp_path)
    storage.put_if_absent(storage.join(url, "checkpoints", "000001", "G.pt"), b"half")
    with Ownership(url) as owner:
        assert checkpoint.save(url, state(64), owner.number) == 2


def test_one_who_lost_the_run_commits_nothing(tmp_path: Path) -> None:
    url = str(tmp_path)
    with Ownership(url) as old:
        pass
    with Ownership(url) as new:
        for write in (checkpoint.save, lambda *_: checkpoint.rollback(url, 1, old.number, {})):
            with pytest.raises(OwnershipError):
                write(url, state(64), old.number)
            assert checkpoint.save(url, state(64), new.number)
    assert {json.loads(path.read_bytes())["owner"] for path in tmp_path.glob(f"checkpoints/*/{COMMIT}")} == {new.number}


def test_old_ones_are_pruned(run_url: str) -> None:
    save_all(run_url, 1, 2, 3, 4, 5)
    checkpoint.prune(run_url, 2)
    assert stored(run_url) == [4, 5]


def test_only_whole_ones_count_as_kept(tmp_path: Path) -> None:
    """3 was altered, as `load` found; of 4 an object is missing; 5 was never committed; 7 is being written."""
    url = str(tmp_path)
    owner = save_all(url, 1, 2, 3, 4, 5, 6)
    folder = tmp_path / "checkpoints"
    (folder / "000004" / "D.pt").unlink()
    (folder / "000005" / COMMIT).unlink()
    storage.put_if_absent(f"{url}/checkpoints/000007/G.pt", b"begun")
    checkpoint.prune(url, 2, damaged=[3])
    assert stored(url) == [2, 3, 4, 6, 7]
    assert current(url, 3) == (6, [])
    (folder / "000006" / "G.pt").write_bytes(b"")
    assert current(url, 3)[0] == 2
    assert checkpoint.save(url, state(7), owner) == 8
    checkpoint.prune(url, 2)
    assert stored(url) == [3, 4, 6, 8]  # this time nobody has found 3 damaged


def stored(run_url: str) -> list[int]:
    """Numbers under which something lies."""
    return sorted({int(entry.name[:6]) for entry in storage.list_entries(f"{run_url}/checkpoints")})


def test_what_was_passed_over_is_told_to_who_prunes(tmp_path: Path) -> None:
    url = str(tmp_path)
    save_all(url, 1, 2, 3)
    (tmp_path / "checkpoints" / "000003" / "D.pt").write_bytes(b"")
    found = checkpoint.latest_valid(url, lambda _: None, {2})
    assert found is not None
    assert (found.number, found.passed_over) == (1, (3, 2))


def test_a_rollback_is_a_new_checkpoint_of_the_next_attempt(run_url: str) -> None:
    owner = save_all(run_url, 64, 128, 192)
    assert checkpoint.rollback(run_url, 2, owner, {"lr_factor": 0.5}) == 4
    found = checkpoint.latest_valid(run_url, pytest.fail)
    assert found is not None
    assert (found.number, found.cur_nimg, found.attempt) == (4, 128, 2)
    loaded = checkpoint.load(run_url, found)
    assert loaded.control == {"attempt": 2, "augment_p": 0.0, "lr_factor": 0.5}
    assert torch.equal(loaded.tensors["D_opt"]["w"], torch.full((3,), 128.0))
    different = [name for name in OBJECTS if found.objects[name] != objects_of(run_url, 2)[name]]
    assert different == ["control.json"]
    assert checkpoint.rollback(run_url, 1, owner, {}) == 5
    again = checkpoint.latest_valid(run_url, pytest.fail)
    assert again is not None
    assert (again.cur_nimg, again.attempt) == (64, 3)
    with pytest.raises(CheckpointError, match=r"no checkpoint 9 to go back to; there are \[1, 2, 3, 4, 5\]"):
        checkpoint.rollback(run_url, 9, owner, {})


def test_a_damaged_one_is_not_gone_back_to(tmp_path: Path) -> None:
    url = str(tmp_path)
    owner = save_all(url, 64, 128)
    path = tmp_path / "checkpoints" / "000001" / "D_opt.pt"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamagedCheckpointError, match=r"D_opt\.pt was altered"):
        checkpoint.rollback(url, 1, owner, {})
    assert stored(url) == [1, 2]


def test_what_a_late_process_commits_after_a_rollback_is_passed_over(tmp_path: Path) -> None:
    """As a rank of a group that was ended for the rollback may: it has the owner's number, so no check stops it."""
    url = str(tmp_path)
    owner = save_all(url, 64, 128)
    assert checkpoint.rollback(url, 1, owner, {}) == 3
    assert checkpoint.save(url, state(192, attempt=1), owner) == 4
    told = "checkpoint 4 passed over: the run had gone back to an earlier one before it was written"
    assert current(url) == (3, [told])
    assert checkpoint.save(url, state(128, attempt=2), owner) == 5
    assert current(url) == (5, [])
    checkpoint.prune(url, 2)
    assert stored(url) == [3, 4, 5]
    for number in (3, 5):  # all of the second attempt is lost: better the first than nothing
        (tmp_path / "checkpoints" / f"{number:06d}" / "G.pt").write_bytes(b"")
    assert current(url)[0] == 4


def test_resuming_with_other_settings_says_which() -> None:
    with pytest.raises(CheckpointError, match=r"batch_size was 64, now 32; seed was 0, now 1"):
        checkpoint.refuse_other({"seed": 0, "batch_size": 64, "x": 1}, {"seed": 1, "batch_size": 32, "x": 1}, "run")


def test_another_format_is_refused_if_it_is_known_to_be_one(tmp_path: Path) -> None:
    commit = {"format": 99, "what": "ever"}
    path = tmp_path / "checkpoints" / "000001" / COMMIT
    os.makedirs(path.parent)
    path.write_bytes(canonical_json(commit))
    assert current(str(tmp_path)) == (None, [f"checkpoint 1 passed over: {COMMIT} is damaged"])
    path.write_bytes(canonical_json(commit | {"sha256": digest(commit)}))
    with pytest.raises(CheckpointError, match="format 99, not 2"):
        checkpoint.latest_valid(str(tmp_path), pytest.fail)


def test_a_commit_that_leaves_an_object_out_counts_for_nothing(tmp_path: Path) -> None:
    url = str(tmp_path)
    save_all(url, 64, 128)
    path = tmp_path / "checkpoints" / "000002" / COMMIT
    commit = json.loads(path.read_bytes())
    del commit["sha256"], commit["objects"]["D.pt"]
    path.write_bytes(canonical_json(commit | {"sha256": digest(commit)}))
    assert current(url) == (1, [f"checkpoint 2 passed over: {COMMIT} is damaged"])


def test_fewer_are_not_kept_than_it_takes_to_go_back() -> None:
    with pytest.raises(ConfigError, match="num_to_keep must be at least 2 so that a run can go back, not 1"):
        TrainConfig(num_to_keep=1)
