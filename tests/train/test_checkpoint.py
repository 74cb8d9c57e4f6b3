"""Checkpoints: whole or passed over, numbered, never written by one who lost the run."""

import json
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.train import checkpoint
from pipeline.train.checkpoint import CheckpointError, State
from pipeline.train.ownership import Ownership, OwnershipError


@pytest.fixture(params=["local", "s3"])
def run_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def state(cur_nimg: int) -> State:
    tensors = {name: {"w": torch.full((3,), float(cur_nimg))} for name in checkpoint.TENSOR_STATES}
    return State(tensors=tensors, control={"attempt": 1}, progress={"cur_nimg": cur_nimg}, config={"seed": 0})


def test_the_highest_is_current(run_url: str) -> None:
    with Ownership(run_url) as owner:
        assert checkpoint.latest_valid(run_url, pytest.fail) is None
        for number, cur_nimg in ((1, 64), (2, 128)):
            assert checkpoint.save(run_url, state(cur_nimg), owner.number) == number
    found = checkpoint.latest_valid(run_url, pytest.fail)
    assert found == checkpoint.Checkpoint(number=2, cur_nimg=128)
    loaded = checkpoint.load(run_url, 2)
    assert torch.equal(loaded.tensors["G"]["w"], torch.full((3,), 128.0))
    assert (loaded.control, loaded.progress, loaded.config) == ({"attempt": 1}, {"cur_nimg": 128}, {"seed": 0})


@pytest.mark.parametrize("name", [f"{name}.pt" for name in checkpoint.TENSOR_STATES] + ["progress.json", "COMMIT.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "altered"])
def test_a_damaged_one_is_passed_over_and_said(tmp_path: Path, name: str, damage: str) -> None:
    url, said = str(tmp_path), list[str]()
    with Ownership(url) as owner:
        for cur_nimg in (64, 128):
            checkpoint.save(url, state(cur_nimg), owner.number)
    path = tmp_path / "checkpoints" / "000002" / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    assert checkpoint.latest_valid(url, said.append) == checkpoint.Checkpoint(number=1, cur_nimg=64)
    if (name, damage) != ("COMMIT.json", "missing"):  # never committed: nothing was lost
        assert len(said) == 1
        assert "checkpoint 2 passed over" in said[0]


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
        with pytest.raises(OwnershipError):
            checkpoint.save(url, state(64), old.number)
        assert checkpoint.save(url, state(64), new.number) == 1


def test_old_ones_are_pruned(tmp_path: Path) -> None:
    url = str(tmp_path)
    with Ownership(url) as owner:
        for cur_nimg in range(1, 6):
            checkpoint.save(url, state(cur_nimg), owner.number)
        checkpoint.prune(url, 2)
    folders = [folder for folder in (tmp_path / "checkpoints").iterdir() if list(folder.iterdir())]
    assert sorted(folder.name for folder in folders) == ["000004", "000005"]


def test_resuming_with_other_settings_says_which() -> None:
    with pytest.raises(CheckpointError, match=r"batch_size was 64, now 32; seed was 0, now 1"):
        checkpoint.refuse_other({"seed": 0, "batch_size": 64, "x": 1}, {"seed": 1, "batch_size": 32, "x": 1}, "run")


def test_another_format_is_refused(tmp_path: Path) -> None:
    commit = {"format": 99, "cur_nimg": 1, "objects": {}}
    storage.put_if_absent(str(tmp_path / "checkpoints" / "000001" / "COMMIT.json"), json.dumps(commit).encode())
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.latest_valid(str(tmp_path), pytest.fail)
