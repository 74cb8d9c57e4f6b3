"""Named settings of each verb, as dotted overrides of its configuration. Flags and --config win over them."""

from collections.abc import Mapping
from typing import Any

Presets = Mapping[str, Mapping[str, Any]]

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

FASHION_MNIST: Mapping[str, Any] = {
    "prepare.resolution": 32,
    "prepare.channels": 1,
    "prepare.fit": "pad",
    "prepare.shard_size": 4096,
    "prepare.class_names": _FASHION_CLASSES,
}

PREPARE: Presets = {"fashion-mnist": FASHION_MNIST}
GENERATE: Presets = {"default": {}}
