"""Fine-tuning: a run that begins with the weights of a snapshot. Clock, optimisers and schedules begin anew."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pipeline import snapshot, storage
from pipeline.config import to_dict
from pipeline.errors import InputError
from pipeline.gan.networks.build import ImageShape, NetworkConfig
from pipeline.gan.step import Networks
from pipeline.snapshot import Snapshot, SnapshotConfig
from pipeline.train.spec import RunSpec

_FREE = ("resolution", "labels", "bf16_stages")
"""Settings of a network that its weights do not depend on, its shape being given."""
_ROW_A_CLASS = ("weight", "parametrizations.weight.original", "parametrizations.weight.0.u")
"""Entries of an embedding, of a spectrally normed one the latter two, that have a row for each class."""
_POWER_ITERATIONS = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inherited:
    """What a run took over."""

    snapshot: str
    """Digest."""
    remade: tuple[str, ...]
    """Entries of G and D that keep, as a whole or for new classes, the values that a new run has."""
    new_classes: tuple[str, ...]
    """Classes that the snapshot does not know."""


def refuse_other(url: str, config: SnapshotConfig, spec: RunSpec) -> None:
    """Raise InputError where a snapshot's networks are not those of a run, classes apart."""
    there, here = _sizes(config.shape, config.network), _sizes(spec.shape, spec.network)
    differing = [name for name in here if there[name] != here[name]]
    if differing:
        told = "; ".join(f"{name} is {there[name]} there and {here[name]} here" for name in differing)
        remedy = ", ".join(_remedy(name, there[name]) for name in differing)
        raise InputError(f"{url}: this run cannot begin with its weights: {told}; {remedy}, or name another snapshot")


def _sizes(shape: ImageShape, network: NetworkConfig) -> Mapping[str, Any]:
    """What the shapes of weights depend on."""
    own = {f"network.{name}": value for name, value in to_dict(network).items() if name not in _FREE}
    return {"resolution": shape.resolution, "channels": shape.channels} | own


def _remedy(name: str, value: object) -> str:
    flag = f"{name.replace('_', '-')} {value}"
    return f"set --{flag}" if name.startswith("network.") else f"use images made with --prepare.{flag}"


def new_classes(config: SnapshotConfig, spec: RunSpec) -> tuple[str, ...]:
    """The run's classes that a snapshot does not know."""
    return tuple(name for name in spec.classes if name not in config.classes)


def begin(nets: Networks, spec: RunSpec) -> Inherited:
    """Give a run's new networks the weights of the snapshot `spec.init_from`: G and G_ema those of its G_ema."""
    source = storage.patiently(functools.partial(_source, spec), spec.train.storage_timeout_sec)
    classes = spec.classes, source.config.classes
    inherit(nets.G_ema, source.G_ema, *classes)
    remade = [f"G.{name}" for name in inherit(nets.G, source.G_ema, *classes)]
    remade += [f"D.{name}" for name in inherit(nets.D, source.D, *classes)]
    return Inherited(snapshot=source.digest, remade=tuple(remade), new_classes=new_classes(source.config, spec))


def _source(spec: RunSpec) -> Snapshot:
    source = snapshot.load(snapshot.find(spec.init_from))
    if source.digest != spec.lineage["init_from"]:  # a run's last one was another when this run began
        raise InputError(
            f"{spec.init_from}: its snapshot is no longer {spec.lineage['init_from']}; name that one itself"
        )
    refuse_other(spec.init_from, source.config, spec)
    return source


@torch.no_grad()
def inherit(
    network: nn.Module, donor: nn.Module, classes: tuple[str, ...], donor_classes: tuple[str, ...]
) -> list[str]:
    """Copy a network's state from a donor's, what belongs to a class by the class's name.

    Returns the names of entries that keep their own values: as a whole where a network with classes differs from one
    without, or for classes that the donor does not know.
    """
    given, embeddings, kept = donor.state_dict(), _embeddings(network), []
    by_class = {f"{name}.{entry}" for name in embeddings for entry in _ROW_A_CLASS}
    known = [name for name in classes if name in donor_classes]
    to_row, from_row = (
        torch.tensor([names.index(name) for name in known]).long() for names in (classes, donor_classes)
    )
    for name, own in network.state_dict().items():
        source = given.get(name)
        if source is not None and name in by_class:
            own[to_row] = source[from_row].to(own.device)
            if len(known) < len(classes):
                kept.append(name)
        elif source is None or source.shape != own.shape:
            kept.append(name)
        else:
            own.copy_(source)
    if classes != donor_classes:
        _estimate_norms(embeddings.values())
    return kept


def _embeddings(network: nn.Module) -> dict[str, nn.Embedding]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Embedding)}


def _estimate_norms(embeddings: Iterable[nn.Embedding]) -> None:
    """Find the spectral norms of tables whose rows are others now: each use of a weight improves its estimate."""
    for embedding in embeddings:
        if parametrize.is_parametrized(embedding):
            for _ in range(_POWER_ITERATIONS):
                _ = embedding.weight
