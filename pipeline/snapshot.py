"""A snapshot: what a trained run leaves to be used. G_ema and D as safetensors, and config.json, written last.

It lies between its writer (train) and its readers (generate, later evaluate and fine-tuning), which do not know each
other. It is named by its digest, and is enough to generate and to score: no pickle, no code.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline import storage
from pipeline.config import ConfigError, canonical_json, from_dict, to_dict
from pipeline.errors import InputError
from pipeline.gan.networks.build import ImageShape, NetworkConfig, build

FORMAT = 1
_CONFIG = "config.json"
_WEIGHTS = ("G_ema", "D")
_TAKEN, _ENDS, _FIDS = "snapshots/taken", "snapshots/ends", "fid"
"""Series of a run that trains: what it took, what of that it ended with, and the FID of each."""


class SnapshotError(InputError):
    """A snapshot that is missing, truncated, altered, or not ours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """What config.json says beside the digests of the weights."""

    network: NetworkConfig
    """Architecture."""
    shape: ImageShape
    """What G makes."""
    classes: tuple[str, ...]
    """Class names by label; empty: unconditional."""
    cur_nimg: int
    """Images seen when it was taken."""
    precision: str
    """bf16 or fp32, as it was trained."""
    lineage: Mapping[str, Any]
    """Training run, dataset digest, code version."""
    class_counts: tuple[int, ...] = ()
    """Samples of each class in the split that was learnt from, by label; empty: unconditional, or not known."""

    def __post_init__(self) -> None:
        counts = self.class_counts
        if counts and (len(counts) != len(self.classes) or min(counts) < 0):
            raise ConfigError(f"class_counts must be {len(self.classes)} numbers, one a class, none below 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Networks in eval mode on the CPU, and where they come from."""

    digest: str
    config: SnapshotConfig
    G_ema: torch.nn.Module
    D: torch.nn.Module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
    """A snapshot that a run took at the end of a tick; of each attempt there is one at a clock."""

    attempt: int
    """Of the run."""
    cur_nimg: int
    """Images seen."""
    name: str
    """Of its folder below `<run>/snapshots/`."""

    def url(self, run_url: str) -> str:
        """Where it lies."""
        return storage.join(run_url, "snapshots", self.name)


def save(run_url: str, config: SnapshotConfig, G_ema: torch.nn.Module, D: torch.nn.Module) -> str:
    """Write a snapshot below `<run>/snapshots/`; returns its URL. Equal weights give an equal URL."""
    return save_states(run_url, config, {"G_ema": G_ema.state_dict(), "D": D.state_dict()})


def save_states(run_url: str, config: SnapshotConfig, states: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """The same from the state dicts of G_ema and D."""
    weights = {name: _bytes(states[name]) for name in _WEIGHTS}
    body = {
        "format": FORMAT,
        "network": to_dict(config.network),
        "shape": to_dict(config.shape),
        "classes": list(config.classes),
        "cur_nimg": config.cur_nimg,
        "precision": config.precision,
        "lineage": dict(config.lineage),
        "class_counts": list(config.class_counts),
        "weights": {name: hashlib.sha256(data).hexdigest() for name, data in weights.items()},
    }
    data = canonical_json(body)
    url = url_of(run_url, hashlib.sha256(data).hexdigest())
    for name, stored in weights.items():
        storage.put_if_absent(storage.join(url, f"{name}.safetensors"), stored)
    storage.put_if_absent(storage.join(url, _CONFIG), data)
    return url


def url_of(run_url: str, digest: str) -> str:
    """Where a run has the snapshot of this digest, if it has it."""
    return storage.join(run_url, "snapshots", digest[:16])


def is_one(url: str) -> bool:
    """Whether a snapshot lies at a URL."""
    return storage.stat(storage.join(url, _CONFIG)) is not None


def find(url: str) -> str:
    """The snapshot that a URL names: itself, or the furthest trained one of a run. Raises SnapshotError."""
    if is_one(url):
        return url
    folder = storage.join(url, "snapshots")
    configs = [entry.name for entry in storage.list_entries(folder) if entry.name.endswith(f"/{_CONFIG}")]
    if not configs:
        raise SnapshotError(
            f"{url}: no snapshot here; name a finished training run or one of its snapshots (to end a run where it "
            "stands, run train again with a --train.total-kimg that it has passed)"
        )
    found = [storage.join(folder, name.removesuffix(f"/{_CONFIG}")) for name in configs]
    return max(found, key=clock)


def first(run_url: str, cur_nimg: int) -> str | None:
    """The URL of a run's first snapshot that has seen so many images or more; None: there is none yet."""
    found = ((clock(storage.join(run_url, "snapshots", name)), name) for name in _stored(run_url))
    name = min((one for one in found if one[0] >= cur_nimg), default=(0, None))[1]
    return None if name is None else storage.join(run_url, "snapshots", name)


def clock(url: str) -> int:
    """Images seen when a snapshot was taken. Raises SnapshotError."""
    return int(_read_config(url)[1]["cur_nimg"])


def exists(run_url: str, cur_nimg: int) -> bool:
    """Whether a run has a snapshot that was taken at this clock."""
    return any(clock(storage.join(run_url, "snapshots", name)) == cur_nimg for name in _stored(run_url))


def load(url: str) -> Snapshot:
    """Read and verify a snapshot. Raises SnapshotError where it is truncated, altered or not ours."""
    digest, body = _read_config(url)
    try:
        config = SnapshotConfig(
            network=from_dict(NetworkConfig, body["network"], url),
            shape=from_dict(ImageShape, body["shape"], url),
            classes=tuple(body["classes"]),
            cur_nimg=int(body["cur_nimg"]),
            precision=str(body["precision"]),
            lineage=body["lineage"],
            class_counts=tuple(map(int, body.get("class_counts", ()))),  # an earlier version does not say
        )
        wanted = {name: str(body["weights"][name]) for name in _WEIGHTS}
        G_ema, D = build(config.network, config.shape, seed=0)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise SnapshotError(f"{url}: {_CONFIG} is not a snapshot's of ganymede ({error})") from error
    for name, network in (("G_ema", G_ema), ("D", D)):
        _load_weights(storage.join(url, f"{name}.safetensors"), wanted[name], network)
    return Snapshot(digest=digest, config=config, G_ema=G_ema, D=D)


def was_taken(run_url: str, attempt: int, cur_nimg: int) -> bool:
    """Whether a run has noted a snapshot of this attempt and clock, be it removed since."""
    return storage.stat(storage.join(run_url, _TAKEN, _key(attempt, cur_nimg))) is not None


def note_taken(run_url: str, taken: Taken) -> None:
    """Note a snapshot that is stored. The first of its attempt and clock counts."""
    _note(run_url, _TAKEN, taken, {})


def note_end(run_url: str, taken: Taken) -> None:
    """Note that a run ended with a snapshot that was noted, or that it is used: be it one that an interval made, it
    stays.
    """
    _note(run_url, _ENDS, taken, {})


def note_fid(run_url: str, taken: Taken, fid: float) -> None:
    """Note the FID of a snapshot that was noted."""
    _note(run_url, _FIDS, taken, {"fid": fid})


def without_fid(run_url: str) -> list[Taken]:
    """What was noted as taken and has no FID noted, by attempt and clock."""
    known = set(_keys(run_url, _FIDS))
    return [_noted(run_url, _TAKEN, key)[0] for key in _keys(run_url, _TAKEN) if key not in known]


def keep(run_url: str, url: str) -> None:
    """Let no run that goes on remove that snapshot of it: something else relies on it."""
    for taken, _ in (_noted(run_url, _TAKEN, key) for key in _keys(run_url, _TAKEN)):
        if taken.url(run_url) == url:
            note_end(run_url, taken)


def best(run_url: str, up_to: int | None = None) -> tuple[str, float] | None:
    """URL and FID of the snapshot with the lowest one, of those that a run still has and that have seen no more images
    than `up_to`; None: no FID is known.
    """
    found = [(taken.url(run_url), fid) for taken, fid in _with_fid(run_url) if up_to is None or taken.cur_nimg <= up_to]
    return min(found, key=lambda one: one[1], default=None)


def prune(run_url: str) -> None:
    """Remove what intervals made and whose FID is known, but for the newest and that with the lowest FID.

    Only the owner of the run may.
    """
    found, kept = _with_fid(run_url), {*_keys(run_url, _ENDS), max(_keys(run_url, _TAKEN), default="")}
    lowest = min((fid for _, fid in found), default=0.0)
    for taken, fid in found:
        if fid > lowest and _key(taken.attempt, taken.cur_nimg) not in kept:
            for name in (_CONFIG, *(f"{name}.safetensors" for name in _WEIGHTS)):  # config.json first: then it is none
                storage.delete(storage.join(taken.url(run_url), name))


def _key(attempt: int, cur_nimg: int) -> str:
    return f"{attempt:04d}-{cur_nimg:012d}.json"


def _keys(run_url: str, series: str) -> list[str]:
    """Of the notes of a series, by attempt and clock."""
    entries = storage.list_entries(storage.join(run_url, series))
    return [entry.name for entry in entries if entry.name.endswith(".json")]


def _note(run_url: str, series: str, taken: Taken, more: Mapping[str, float]) -> None:
    url = storage.join(run_url, series, _key(taken.attempt, taken.cur_nimg))
    storage.put_if_absent(url, canonical_json({**dataclasses.asdict(taken), **more}))


def _noted(run_url: str, series: str, key: str) -> tuple[Taken, Mapping[str, Any]]:
    """A note, and what it says besides."""
    url = storage.join(run_url, series, key)
    try:
        body = json.loads(storage.read(url))
        return Taken(**{field.name: body.pop(field.name) for field in dataclasses.fields(Taken)}), body
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"{url}: not a note of ganymede ({type(error).__name__}: {error}); remove it") from error


def _with_fid(run_url: str) -> list[tuple[Taken, float]]:
    """Snapshots that a run still has and whose FID is known, and that."""
    stored, notes = _stored(run_url), [_noted(run_url, _FIDS, key) for key in _keys(run_url, _FIDS)]
    return [(taken, float(more["fid"])) for taken, more in notes if taken.name in stored]


def _stored(run_url: str) -> set[str]:
    """Names of a run's snapshots."""
    entries = storage.list_entries(storage.join(run_url, "snapshots"))
    return {entry.name.partition("/")[0] for entry in entries if entry.name.endswith(f"/{_CONFIG}")}


def _read_config(url: str) -> tuple[str, dict[str, Any]]:
    where = storage.join(url, _CONFIG)
    try:
        data = storage.read(where)
        body = json.loads(data)
        found = body["format"], body["weights"], int(body["cur_nimg"])
    except storage.NotFoundError as error:
        raise SnapshotError(f"{url}: no snapshot here ({_CONFIG} is missing)") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{where}: not a snapshot of ganymede ({type(error).__name__}: {error})") from error
    if found[0] != FORMAT:
        raise SnapshotError(f"{where}: format {found[0]}, and this version reads {FORMAT}; upgrade ganymede")
    return hashlib.sha256(data).hexdigest(), body


def _load_weights(url: str, wanted: str, network: torch.nn.Module) -> None:
    try:
        data = storage.read(url)
    except storage.NotFoundError as error:
        raise SnapshotError(f"{url}: missing; the snapshot is incomplete, take another one") from error
    if hashlib.sha256(data).hexdigest() != wanted:
        raise SnapshotError(
            f"{url}: truncated or altered (its digest is not the one in {_CONFIG}); take another snapshot"
        )
    try:
        network.load_state_dict(load_tensors(data))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise SnapshotError(f"{url}: does not fit the network that {_CONFIG} names ({error})") from error
    network.eval().requires_grad_(False)


def _bytes(state: Mapping[str, torch.Tensor]) -> bytes:
    return bytes(save_tensors({name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}))
