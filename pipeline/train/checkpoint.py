"""Our checkpoints: everything to resume, and the only commit of a run.

`checkpoints/<n>/` holds one object a named state and, last, COMMIT.json with their sizes and digests. The highest
whole one is current. Tensors load with weights_only=True; the rest is JSON.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipeline import storage
from pipeline.config import canonical_json
from pipeline.errors import InputError
from pipeline.train import ownership

FORMAT = 1
TENSOR_STATES = ("G", "D", "G_ema", "G_opt", "D_opt")
JSON_STATES = ("control", "progress", "config")
_COMMIT = "COMMIT.json"
_FOLDER = re.compile(r"(\d{6,})/")


class CheckpointError(InputError):
    """A checkpoint of another run or format."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint in storage."""

    number: int
    """Its place in the series."""
    cur_nimg: int
    """The clock when it was taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Everything to resume."""

    tensors: Mapping[str, Any]
    """State dicts of TENSOR_STATES, on the CPU."""
    control: Mapping[str, Any]
    """What feeds back: the attempt number (later ADA's probability, the monitor's factors)."""
    progress: Mapping[str, Any]
    """cur_nimg, tick, world size, threads."""
    config: Mapping[str, Any]
    """What a resuming run must share: seed, B, L, C, R, dataset digest, networks."""


def to_cpu(value: Any) -> Any:
    """A copy of a state dict with its tensors on the CPU: what a background writer may hold while training goes on."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    return value


def save(run_url: str, state: State, owner: int) -> int:
    """Write the next checkpoint of the series and commit it; returns its number.

    Raises OwnershipError when a higher owner exists, before anything is committed.
    """
    ownership.check(run_url, owner)
    number = max(_numbers(run_url), default=0) + 1
    objects = {f"{name}.pt": _tensor_bytes(state.tensors[name]) for name in TENSOR_STATES}
    objects |= {f"{name}.json": canonical_json(getattr(state, name)) for name in JSON_STATES}
    for name, data in objects.items():
        if storage.put_if_absent(_url(run_url, number, name), data) is storage.Put.OTHER:
            raise ownership.OwnershipError(f"{run_url}: another driver writes checkpoint {number}; this driver stops")
    commit = {
        "format": FORMAT,
        "cur_nimg": state.progress["cur_nimg"],
        "objects": {
            name: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in objects.items()
        },
    }
    ownership.check(run_url, owner)
    storage.put_if_absent(_url(run_url, number, _COMMIT), canonical_json(commit))
    return number


def latest_valid(run_url: str, on_skip: Callable[[str], None]) -> Checkpoint | None:
    """The highest checkpoint that is whole; `on_skip` is told of each damaged one passed over."""
    for number in sorted(_numbers(run_url), reverse=True):
        try:
            commit = json.loads(storage.read(_url(run_url, number, _COMMIT)))
            found_format, cur_nimg, objects = commit["format"], int(commit["cur_nimg"]), commit["objects"]
        except storage.NotFoundError:
            continue  # never committed: its writer died
        except (ValueError, KeyError, TypeError):
            on_skip(f"checkpoint {number} passed over: {_COMMIT} is damaged")
            continue
        if found_format != FORMAT:
            raise CheckpointError(f"{run_url}: checkpoint {number} has format {found_format}, not {FORMAT}")
        damage = _damage(run_url, number, objects)
        if damage is None:
            return Checkpoint(number=number, cur_nimg=cur_nimg)
        on_skip(f"checkpoint {number} passed over: {damage}")
    return None


def load(run_url: str, number: int) -> State:
    """The state of a checkpoint that `latest_valid` found."""
    tensors = {
        name: torch.load(io.BytesIO(storage.read(_url(run_url, number, f"{name}.pt"))), weights_only=True)
        for name in TENSOR_STATES
    }
    rest = {name: json_state(run_url, number, name) for name in JSON_STATES}
    return State(tensors=tensors, **rest)


def json_state(run_url: str, number: int, name: str) -> Mapping[str, Any]:
    """One of JSON_STATES alone, without the tensors."""
    found: Mapping[str, Any] = json.loads(storage.read(_url(run_url, number, f"{name}.json")))
    return found


def prune(run_url: str, keep: int) -> None:
    """Delete all but the last `keep` committed checkpoints, each one's COMMIT.json first."""
    committed = [
        number for number in sorted(_numbers(run_url)) if storage.stat(_url(run_url, number, _COMMIT)) is not None
    ]
    for number in committed[:-keep]:
        folder = storage.join(run_url, "checkpoints", f"{number:06d}")
        storage.delete(storage.join(folder, _COMMIT))
        for entry in list(storage.list_entries(folder)):
            storage.delete(storage.join(folder, entry.name))


def refuse_other(stored: Mapping[str, Any], wanted: Mapping[str, Any], run_url: str) -> None:
    """Raise CheckpointError when a run is resumed with settings that change what its clock means."""
    differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if differing:
        told = "; ".join(f"{name} was {stored.get(name)}, now {wanted.get(name)}" for name in differing)
        raise CheckpointError(
            f"{run_url}: cannot resume with other settings: {told}; restore them, or choose another out URL"
        )


def _damage(run_url: str, number: int, objects: Mapping[str, Any]) -> str | None:
    for name, said in objects.items():
        url = _url(run_url, number, name)
        found = storage.stat(url)
        if found is None:
            return f"{name} is missing"
        if found.size_bytes != said["size_bytes"]:
            return f"{name} has {found.size_bytes} bytes, not {said['size_bytes']}"
        if storage.digest(url) != said["sha256"]:
            return f"{name} was altered"
    return None


def _numbers(run_url: str) -> set[int]:
    entries = storage.list_entries(storage.join(run_url, "checkpoints"))
    return {int(match[1]) for entry in entries if (match := _FOLDER.match(entry.name))}


def _url(run_url: str, number: int, name: str) -> str:
    return storage.join(run_url, "checkpoints", f"{number:06d}", name)


def _tensor_bytes(state: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(state, sink)
    return sink.getvalue()
