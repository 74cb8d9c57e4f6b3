"""The vision transformers of DINOv2 (Oquab et al. 2023), patches of 14, under the names of the published weights.

Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", found that distances between their features
agree with people more than those of Inception do. ViT-S, ViT-B and ViT-L are told apart by their weights; ViT-g, whose
blocks are others, and the variants with register tokens are refused.
"""

import functools
import math

import torch
from torch import nn
from torch.nn import functional

from pipeline.evaluate import weights
from pipeline.evaluate.weights import FeaturesError

SIDE = 224
DEPTHS = {384: 12, 768: 12, 1024: 24}
"""Blocks by width."""

_PATCH, _HEAD, _PUBLISHED_ROWS = 14, 64, 37
_EPSILON = 1e-6
_OFFSET = 0.1
_FILES = "dinov2_vits14_pretrain.pth, dinov2_vitb14_pretrain.pth or dinov2_vitl14_pretrain.pth"


def load(url: str) -> "DinoV2":
    """With weights from a file. Raises FeaturesError, StorageError."""
    state = weights.state_dict(url)
    width = state["cls_token"].shape[-1] if "cls_token" in state else 0
    if width not in DEPTHS:
        found = f"its cls_token has width {width}" if width else "cls_token is missing"
        raise FeaturesError(f"{url}: not weights of a ViT-S, B or L of DINOv2: {found}; give {_FILES}")
    return weights.fitted(functools.partial(DinoV2, width), state, url, f"a DINOv2 of width {width} ({_FILES})")


class DinoV2(nn.Module):
    """float32 [N, 3, 224, 224], less the mean and by the deviation of ImageNet → float32 [N, F], its class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + _PUBLISHED_ROWS**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # for training; in the file
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, _PATCH, stride=_PATCH)})
        self.blocks = nn.ModuleList(_Block(width) for _ in range(DEPTHS[width]))
        self.norm = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed["proj"](image)
        tokens = torch.cat([self.cls_token.expand(len(image), -1, -1), patches.flatten(2).mT], dim=1)
        tokens = tokens + positions(self.pos_embed, patches.shape[-1])
        for block in self.blocks:
            tokens = block(tokens)
        token: torch.Tensor = self.norm(tokens[:, 0])
        return token


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPSILON)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=_EPSILON)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.ls1["gamma"] * self._attended(self.norm1(tokens))
        inner = functional.gelu(self.mlp["fc1"](self.norm2(tokens)))
        result: torch.Tensor = tokens + self.ls2["gamma"] * self.mlp["fc2"](inner)
        return result

    def _attended(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, T, F] → [N, T, F]; heads of 64."""
        split = self.attn["qkv"](tokens).reshape(*tokens.shape[:2], 3, -1, _HEAD)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each [N, heads, T, 64]
        found = functional.scaled_dot_product_attention(queries, keys, values)
        result: torch.Tensor = self.attn["proj"](found.transpose(1, 2).flatten(2))
        return result


def positions(published: torch.Tensor, rows: int) -> torch.Tensor:
    """The embedding [1, 1 + 37², F] of the places of 37 × 37 patches → [1, 1 + rows², F], that of the class first.

    As the published code has it: bicubic, without antialiasing (only the variants with registers have that), and scaled
    by (rows + 0.1) / 37 instead of rows / 37. The 0.1 was to save it from rounding, and moves what is found a little.
    """
    side = math.isqrt(published.shape[1] - 1)
    if side == rows:
        return published
    grid = published[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scaled = functional.interpolate(grid, scale_factor=(rows + _OFFSET) / side, mode="bicubic")
    return torch.cat([published[:, :1], scaled.flatten(2).mT], dim=1)
