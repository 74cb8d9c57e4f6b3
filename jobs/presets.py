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

_FASHION_MNIST = {
    "prepare.resolution": 32,
    "prepare.channels": 1,
    "prepare.fit": "pad",
    "prepare.shard_size": 4096,
    "prepare.class_names": _FASHION_CLASSES,
}

# Half the published width and batch: what two cores train to recognisable garments in five minutes.
_DCGAN_SMALL = {
    "network.name": "dcgan",
    "network.z_dim": 64,
    "network.base_width": 32,
    "train.batch_size": 64,
    "train.total_kimg": 360.0,
    "train.tick_kimg": 20.0,
    "train.checkpoint_kimg": 40.0,
}

# Radford et al., section 4: z 100, batch 128, Adam 2e-4 with beta1 0.5.
_DCGAN = {
    "network.name": "dcgan",
    "network.z_dim": 100,
    "network.base_width": 64,
    "train.batch_size": 128,
    "train.total_kimg": 5000.0,
    "step.g_lr": 2e-4,
    "step.d_lr": 2e-4,
    "step.beta1": 0.5,
}

PREPARE: Presets = {"fashion-mnist": _FASHION_MNIST}
TRAIN: Presets = {"dcgan": _DCGAN, "dcgan-small": _DCGAN_SMALL}
GENERATE: Presets = {"default": {}}
RUN: Presets = {
    "demo": {
        "source": "fashion-mnist",
        **_FASHION_MNIST,
        **_DCGAN_SMALL,
        "generate.num_images": 10_000,
        "generate.shard_size": 1000,
    }
}
