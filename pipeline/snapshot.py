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


def save(run_url: str, config: SnapshotConfig, G_ema: torch.nn.Module, D: torch.nn.Module) -> str:
    """Write a snapshot below `<run>/snapshots/`; returns its URL. Equal weights give an equal URL."""
    weights = {"G_ema": _bytes(G_ema), "D": _bytes(D)}
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
    url = storage.join(run_url, "snapshots", hashlib.sha256(data).hexdigest()[:16])
    for name, stored in weights.items():
        storage.put_if_absent(storage.join(url, f"{name}.safetensors"), stored)
    storage.put_if_absent(storage.join(url, _CONFIG), data)
    return url


def find(url: str) -> str:
    """The snapshot that a URL names: itself, or the furthest trained one of a run. Raises SnapshotError."""
    if storage.stat(storage.join(url, _CONFIG)) is not None:
        return url
    folder = storage.join(url, "snapshots")
    configs = [entry.name for entry in storage.list_entries(folder) if entry.name.endswith(f"/{_CONFIG}")]
    if not configs:
        raise SnapshotError(
            f"{url}: no snapshot here; name a finished training run or one of its snapshots (to end a run where it "
            "stands, run train again with a --train.total-kimg that it has passed)"
        )
    found = [storage.join(folder, name.removesuffix(f"/{_CONFIG}")) for name in configs]
    return max(found, key=lambda one: int(_read_config(one)[1]["cur_nimg"]))


def exists(run_url: str, cur_nimg: int) -> bool:
    """Whether a run has a snapshot that was taken at this clock."""
    names = [entry.name for entry in storage.list_entries(storage.join(run_url, "snapshots"))]
    folders = [storage.join(run_url, "snapshots", name.partition("/")[0]) for name in names if name.endswith(_CONFIG)]
    return any(int(_read_config(folder)[1]["cur_nimg"]) == cur_nimg for folder in folders)


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


def _bytes(network: torch.nn.Module) -> bytes:
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in network.state_dict().items()}
    return bytes(save_tensors(state))
