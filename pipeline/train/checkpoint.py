"""Our checkpoints: everything to resume, and the only commit of a run.

`checkpoints/<n>/` holds one object a named state and, last, COMMIT.json with their sizes and digests and its own. The
highest whole one is current. Tensors load with weights_only=True; the rest is JSON.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from pipeline import storage
from pipeline.config import canonical_json, digest
from pipeline.errors import InputError, RetryableError
from pipeline.train import ownership

FORMAT = 2
TENSOR_STATES = ("G", "D", "G_ema", "G_opt", "D_opt")
JSON_STATES = ("control", "progress", "config")
OBJECTS = (*(f"{name}.pt" for name in TENSOR_STATES), *(f"{name}.json" for name in JSON_STATES))
"""What a checkpoint consists of, in the order in which it is written; COMMIT follows."""
COMMIT = "COMMIT.json"
_STORED = re.compile(r"(\d{6,})/(.+)")
_NUMBERS_TRIED = 10

_Listing = dict[int, dict[str, int]]
"""Number of a checkpoint, whole or not → name of an object → bytes."""


class CheckpointError(InputError):
    """A checkpoint of another run or format, or one that is not there."""


class DamagedCheckpointError(RetryableError):
    """What was read of a checkpoint is not what was written; passed over, the one before it may still do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint in storage."""

    number: int
    """Its place in the series."""
    cur_nimg: int
    """The clock when it was taken."""
    attempt: int
    """The attempt it belongs to; a rollback begins the next."""
    objects: Mapping[str, Mapping[str, Any]]
    """`size_bytes` and `sha256` of each of OBJECTS."""
    passed_over: tuple[int, ...] = ()
    """Committed ones above it that `latest_valid` did not take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Everything to resume."""

    tensors: Mapping[str, Any]
    """State dicts of TENSOR_STATES, on the CPU."""
    control: Mapping[str, Any]
    """What feeds back: the attempt number, ADA's probability, the monitor's factors on learning rates and gamma."""
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
    objects = {f"{name}.pt": _tensor_bytes(state.tensors[name]) for name in TENSOR_STATES}
    objects |= {f"{name}.json": canonical_json(getattr(state, name)) for name in JSON_STATES}
    return _commit(run_url, objects, owner, state.progress["cur_nimg"], state.control["attempt"])


def rollback(run_url: str, number: int, owner: int, changes: Mapping[str, float]) -> int:
    """Make the state of an older checkpoint the current one, as a new checkpoint; returns the number of that.

    It is the next attempt's first: the same data, other noise, and `control` with `changes` (`lr_factor`, …).
    """
    commits, _ = _commits(run_url, _listing(run_url))
    sources = {one.number: one for one in commits}
    if number not in sources:
        raise CheckpointError(f"{run_url}: no checkpoint {number} to go back to; there are {sorted(sources)}")
    objects = {name: _read(run_url, sources[number], name) for name in OBJECTS}
    attempt = max(one.attempt for one in commits) + 1
    objects["control.json"] = canonical_json(json.loads(objects["control.json"]) | changes | {"attempt": attempt})
    return _commit(run_url, objects, owner, sources[number].cur_nimg, attempt)


def _commit(run_url: str, objects: Mapping[str, bytes], owner: int, cur_nimg: int, attempt: int) -> int:
    """Put OBJECTS, and COMMIT last, under the next free number; returns it."""
    ownership.check(run_url, owner)
    said = {
        "format": FORMAT,
        "cur_nimg": cur_nimg,
        "attempt": attempt,
        "owner": owner,
        "objects": {
            name: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in objects.items()
        },
    }
    sealed = {**objects, COMMIT: _sealed(said)}
    first = max(_listing(run_url), default=0) + 1
    for number in range(first, first + _NUMBERS_TRIED):
        if _put(run_url, number, sealed, owner):
            return number
    raise ownership.OwnershipError(
        f"{run_url}: another process keeps writing checkpoints here, {first} to {number}; stop it and run again"
    )


def _put(run_url: str, number: int, objects: Mapping[str, bytes], owner: int) -> bool:
    """Whether they are stored under `number`; False if a former owner, slow to stop, has written there meanwhile."""
    for name, data in objects.items():
        if name == COMMIT:
            ownership.check(run_url, owner)
        if storage.put_if_absent(_url(run_url, number, name), data) is storage.Put.OTHER:
            ownership.check(run_url, owner)
            return False
    return True


def latest_valid(run_url: str, on_skip: Callable[[str], None], damaged: Collection[int] = ()) -> Checkpoint | None:
    """The current checkpoint: the highest that is whole, tensors on S3 as far as their metadata tell (`load` reads).

    `on_skip` is told of each committed one that is passed over: damaged, found so by `load` (those in `damaged`), or
    committed after a rollback by a process that still went on with the attempt before.
    """
    listing = _listing(run_url)
    commits, wrong = _commits(run_url, listing)
    wrong |= {number: "it was found damaged when it was read" for number in damaged if number in listing}
    found = None
    for one in sorted(commits, key=lambda one: (one.attempt, one.number), reverse=True):
        damage = wrong.get(one.number) or _damage(run_url, one, listing[one.number])
        if damage is None:
            found = one
            break
        wrong[one.number] = damage
    floor = found.number if found else 0
    late = "the run had gone back to an earlier one before it was written"
    over = sorted({number for number in (*wrong, *(one.number for one in commits)) if number > floor}, reverse=True)
    for number in over:
        on_skip(f"checkpoint {number} passed over: {wrong.get(number, late)}")
    return dataclasses.replace(found, passed_over=tuple(over)) if found else None


def load(run_url: str, checkpoint: Checkpoint) -> State:
    """Its state. Raises DamagedCheckpointError if what is read is not what was written."""
    tensors = {
        name: torch.load(io.BytesIO(_read(run_url, checkpoint, f"{name}.pt")), weights_only=True)
        for name in TENSOR_STATES
    }
    rest = {name: json.loads(_read(run_url, checkpoint, f"{name}.json")) for name in JSON_STATES}
    return State(tensors=tensors, **rest)


def json_state(run_url: str, number: int, name: str) -> Mapping[str, Any]:
    """One of JSON_STATES alone, without the tensors, of a checkpoint that `latest_valid` found: it has read them."""
    found: Mapping[str, Any] = json.loads(storage.read(_url(run_url, number, f"{name}.json")))
    return found


def prune(run_url: str, keep: int, damaged: Collection[int] = ()) -> None:
    """Delete what lies below the last `keep` checkpoints, and what was begun below the last and never committed.

    Those in `damaged`, incomplete ones and those of an attempt that had been left do not count.
    """
    listing = _listing(run_url)
    commits, _ = _commits(run_url, listing)
    whole = [one for one in commits if one.number not in damaged and not _misfit(one, listing[one.number])]
    kept = [one.number for one in _in_line(whole)][-keep:]
    for number, names in sorted(listing.items()):
        if kept and (number < kept[0] or (number < kept[-1] and COMMIT not in names)):
            for name in sorted(names, key=lambda name: name != COMMIT):  # COMMIT first
                storage.delete(_url(run_url, number, name))


def refuse_other(stored: Mapping[str, Any], wanted: Mapping[str, Any], run_url: str) -> None:
    """Raise CheckpointError when a run is resumed with settings that change what its clock means."""
    differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if differing:
        told = "; ".join(f"{name} was {stored.get(name)}, now {wanted.get(name)}" for name in differing)
        raise CheckpointError(
            f"{run_url}: cannot resume with other settings: {told}; restore them, or choose another out URL"
        )


def _in_line(ascending: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Without those of an attempt below that of an earlier one."""
    kept: list[Checkpoint] = []
    for one in ascending:
        if not kept or one.attempt >= kept[-1].attempt:
            kept.append(one)
    return kept


def _commits(run_url: str, listing: _Listing) -> tuple[list[Checkpoint], dict[int, str]]:
    """What is committed, by number; and what is wrong with a COMMIT that says nothing that can be trusted."""
    found, wrong = [], {}
    for number in sorted(number for number, names in listing.items() if COMMIT in names):
        try:
            said = _opened(storage.read(_url(run_url, number, COMMIT)))
        except storage.NotFoundError:
            continue  # another process drives the run, and has deleted it since we looked
        if said is not None and said["format"] != FORMAT:
            raise CheckpointError(
                f"{run_url}: checkpoint {number} has format {said['format']}, not {FORMAT}; "
                "go on with the version that wrote it, or choose another out URL"
            )
        if said is None or said["objects"].keys() != set(OBJECTS):
            wrong[number] = f"{COMMIT} is damaged"
        else:
            fields = {name: said[name] for name in ("cur_nimg", "attempt", "objects")}
            found.append(Checkpoint(number=number, **fields))
    return found, wrong


def _sealed(said: Mapping[str, Any]) -> bytes:
    """As JSON with a digest of its own."""
    return canonical_json({**said, "sha256": digest(said)})


def _opened(data: bytes) -> dict[str, Any] | None:
    """What `_sealed` was given, if not a byte has changed since."""
    try:
        said = json.loads(data)
        if not isinstance(said, dict):
            return None
        said.pop("sha256", None)
        return said if _sealed(said) == data else None
    except ValueError:
        return None


def _misfit(one: Checkpoint, sizes: Mapping[str, int]) -> str | None:
    """What a listing says against it."""
    for name, said in one.objects.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != said["size_bytes"]:
            return f"{name} has {sizes[name]} bytes, not {said['size_bytes']}"
    return None


def _damage(run_url: str, one: Checkpoint, sizes: Mapping[str, int]) -> str | None:
    """What is wrong with its objects. Small ones are read; S3 is trusted on the tensors, which are to be read once."""
    misfit = _misfit(one, sizes)
    if misfit:
        return misfit
    for name, said in one.objects.items():
        url = _url(run_url, one.number, name)
        small = name.endswith(".json")
        if (hashlib.sha256(storage.read(url)).hexdigest() if small else storage.digest(url)) != said["sha256"]:
            return f"{name} was altered"
    return None


def _read(run_url: str, checkpoint: Checkpoint, name: str) -> bytes:
    url = _url(run_url, checkpoint.number, name)
    try:
        data = storage.read(url)
    except storage.NotFoundError as error:
        raise DamagedCheckpointError(f"{url} is missing: run again, to go on from the checkpoint before") from error
    if hashlib.sha256(data).hexdigest() != checkpoint.objects[name]["sha256"]:
        raise DamagedCheckpointError(f"{url} was altered: run again, to go on from the checkpoint before")
    return data


def _listing(run_url: str) -> _Listing:
    found: _Listing = {}
    for entry in storage.list_entries(storage.join(run_url, "checkpoints")):
        if match := _STORED.fullmatch(entry.name):
            found.setdefault(int(match[1]), {})[match[2]] = entry.size_bytes
    return found


def _url(run_url: str, number: int, name: str) -> str:
    return storage.join(run_url, "checkpoints", f"{number:06d}", name)


def _tensor_bytes(state: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(state, sink)
    return sink.getvalue()
