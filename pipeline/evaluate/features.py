"""Features of images by networks that others trained, so that numbers can be set beside published ones.

`inception` is the network that FID is defined by, `dinov2` one whose distances agree better with people, `exported` any
module of the user's. Nothing is downloaded: each is read from a file that the user has.

Images are resized by an antialiased bicubic filter, and not rounded to bytes after: what most libraries call bicubic or
bilinear skips pixels when it makes images smaller, and that and rounding change FID by as much as good models differ
(Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation"). So numbers are to be set beside
those of clean-fid, not those of pytorch-fid, which resizes without antialiasing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pipeline import storage
from pipeline.config import ConfigError
from pipeline.evaluate import dinov2, exported, inception, weights
from pipeline.evaluate.weights import FeaturesError
from pipeline.images import Pixels

__all__ = ["FeaturesConfig", "FeaturesError", "digest", "load"]

_AT_ONCE = 16
_IMAGENET_MEAN, _IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which network's features are compared."""

    network: Literal["domain", "inception", "dinov2", "exported"] = "domain"
    """domain: our classifier of the real images; inception: that of FID; dinov2: ViT-S/14, B/14 or L/14, as the weights
    are; exported: any module, float32 [N, 3, R, R] in [-1, 1] to [N, F]."""
    weights: str = ""
    """Path or s3:// URL of the network's weights (torch.save or safetensors), or of the exported module (torch.export
    or TorchScript). inception without: those that pytorch-fid or torch-fidelity has left in torch's cache."""
    resolution: int = 0
    """Of exported: side, in pixels, that images are resized to; 0: as they are."""

    def __post_init__(self) -> None:
        if self.weights and self.network == "domain":
            raise ConfigError("weights are of inception, dinov2 or exported, and network is domain; name the network")
        if not self.weights and self.network in ("dinov2", "exported"):
            raise ConfigError(f"network {self.network} needs weights: a path or s3:// URL")
        if self.resolution < 0:
            raise ConfigError(f"resolution must be at least 0, not {self.resolution}")
        if self.resolution and self.network != "exported":
            raise ConfigError(f"resolution is of exported modules; {self.network} has its own, leave it out")


def digest(config: FeaturesConfig) -> str:
    """Hex sha256 of the weights, or of the exported module; empty for domain. Raises FeaturesError where there are
    none, and StorageError.
    """
    return "" if config.network == "domain" else weights.digest(_url(config))


def load(config: FeaturesConfig) -> Callable[[Pixels], NDArray[np.float32]]:
    """uint8 [N, R, R, C] → float32 [N, F], on the CPU. One channel is repeated to three. The network is read here.
    Raises FeaturesError for weights that are missing or do not fit, and StorageError; what it returns raises
    FeaturesError for features that are none.
    """
    assert config.network != "domain"
    url = _url(config)
    if config.network == "inception":
        return functools.partial(_features, inception.load(url), _for_inception, url)
    if config.network == "dinov2":
        return functools.partial(_features, dinov2.load(url), _for_dinov2, url)
    prepare = functools.partial(_for_exported, side=config.resolution)
    return functools.partial(_features, exported.load(url), prepare, url)


def _url(config: FeaturesConfig) -> str:
    """Of the weights: those given, or those of inception in torch's cache."""
    if config.weights:
        return config.weights
    folder = storage.join(torch.hub.get_dir(), "checkpoints")
    for name in inception.FILES:
        if storage.stat(storage.join(folder, name)) is not None:
            return storage.join(folder, name)
    raise FeaturesError(
        f"{folder}: neither {' nor '.join(inception.FILES)} is here, as pytorch-fid and torch-fidelity leave them when "
        "they are first used, and nothing is downloaded; give the path or s3:// URL of either as weights"
    )


def _features(
    network: Callable[[torch.Tensor], torch.Tensor],
    prepare: Callable[[Pixels], torch.Tensor],
    url: str,
    pixels: Pixels,
) -> NDArray[np.float32]:
    with torch.no_grad():
        parts = [network(prepare(pixels[at : at + _AT_ONCE])) for at in range(0, len(pixels), _AT_ONCE)]
    found = torch.cat(parts).numpy()
    if not np.isfinite(found).all():
        raise FeaturesError(f"{url}: gives features that are infinite or not numbers; give other weights")
    return found


def _for_inception(pixels: Pixels) -> torch.Tensor:
    """uint8 [N, R, R, C] → float32 [N, 3, 299, 299] in [-1, 1), as its own graph scales it: by 128, not by 127.5."""
    return (resized(pixels, inception.SIDE) - 128.0) / 128.0


def _for_dinov2(pixels: Pixels) -> torch.Tensor:
    """uint8 [N, R, R, C] → float32 [N, 3, 224, 224], less ImageNet's mean, by its deviation."""
    mean, deviation = (torch.tensor(of).view(3, 1, 1) for of in (_IMAGENET_MEAN, _IMAGENET_DEVIATION))
    return (resized(pixels, dinov2.SIDE) / 255.0 - mean) / deviation


def _for_exported(pixels: Pixels, side: int) -> torch.Tensor:
    """uint8 [N, R, R, C] → float32 [N, 3, side, side] in [-1, 1]; side 0: R."""
    return resized(pixels, side or pixels.shape[1]) / 127.5 - 1.0


def resized(pixels: Pixels, side: int) -> torch.Tensor:
    """uint8 [N, R, R, C], C 1 or 3 → float32 [N, 3, side, side] in [0, 255], not rounded."""
    image = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).to(torch.float32)
    if image.shape[-1] != side:
        image = functional.interpolate(image, size=(side, side), mode="bicubic", antialias=True).clamp(0.0, 255.0)
    return image.expand(-1, 3, -1, -1).contiguous()
