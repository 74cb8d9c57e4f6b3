"""Named settings of the verbs that train: the recipes of `pipeline.gan`, as dotted overrides."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jobs.presets import FASHION_MNIST, Presets
from pipeline.gan.presets import RECIPES

_SNAPSHOTS, _SNAPSHOTS_SMALL = 50, 3
"""Of a run; small ones last minutes, and each costs seconds."""
_SMALL = ("dcgan-small", "r3gan-tiny")


def _settings(name: str) -> Mapping[str, Any]:
    recipe = RECIPES[name]
    return {
        **_dotted("network", dataclasses.asdict(recipe.network)),
        **_dotted("step", dataclasses.asdict(recipe.step)),
        "train.batch_size": recipe.batch_size,
        "train.num_lanes": recipe.num_lanes,
        "train.total_kimg": recipe.total_kimg,
        "train.snapshot_kimg": recipe.total_kimg / (_SNAPSHOTS_SMALL if name in _SMALL else _SNAPSHOTS),
    }


def _dotted(prefix: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inner = isinstance(value, Mapping)
        found |= _dotted(f"{prefix}.{name}", value) if inner else {f"{prefix}.{name}": value}
    return found


TRAIN: Presets = {name: {**_settings(name), "feed.flip": recipe.mirror} for name, recipe in RECIPES.items()}
RUN: Presets = {
    **TRAIN,
    "demo": {
        "source": "fashion-mnist",
        **FASHION_MNIST,
        **_settings("dcgan-small"),
        "train.total_kimg": 160.0,  # less than half of the recipe: two cores without bf16 take eight minutes for it
        "train.snapshot_kimg": 80.0,
        "train.tick_kimg": 20.0,
        "train.checkpoint_kimg": 40.0,
        "train.fid_samples": 1000,
        "generate.num_images": 10_000,
        "generate.shard_size": 1000,
        "evaluate.classifier_steps": 500,
        "evaluate.utility_steps": 250,
    },
}
