"""The fixed generators that are measured, `bench-256` and `bench-32`: untrained, with the statistics of photographs.

What an encoder takes depends on the pixels. In photographs an octave of frequency has about the energy of the one
below, or down to half of it. Here each layer enlarges smoothly what the one before made and adds edges: about half.
"""

import math

import torch
from torch import nn

from pipeline import snapshot
from pipeline.gan.networks.build import ImageShape, NetworkConfig, build
from pipeline.snapshot import SnapshotConfig

_BASE_WIDTH = {32: 64, 256: 24}
_DETAIL = 2.0  # 256² PNG files then have about 100 KiB, as photographs have
_CONTRAST = 0.6  # standard deviation before tanh


def make_snapshot(folder: str, resolution: int, seed: int = 0) -> str:
    """Write a snapshot of the generator for RGB images of `resolution`; returns its URL. Equal bytes at every call."""
    network = NetworkConfig(z_dim=64, base_width=_BASE_WIDTH[resolution], max_width=192)
    shape = ImageShape(resolution=resolution, channels=3, num_classes=0)
    G, D = build(network, shape, seed=seed)
    give_detail(G.eval(), torch.Generator().manual_seed(seed))
    config = SnapshotConfig(network=network, shape=shape, classes=(), cur_nimg=0, precision="fp32", lineage={})
    return snapshot.save(folder, config, G, D.eval())


@torch.no_grad()
def give_detail(G: nn.Module, generator: torch.Generator) -> None:
    """Weights of every layer: channels mixed at random, enlarged smoothly, and their slopes across and down. Each
    channel is centred, so that its ReLU cuts through it: that makes the edges.
    """
    layers = [module for module in G.modules() if isinstance(module, nn.ConvTranspose2d)]
    smooth, slope = torch.tensor([[1.0, 3.0, 3.0, 1.0], [-1.0, -1.0, 1.0, 1.0]]) / 4
    kernels = [smooth[:, None] * smooth, *(_DETAIL * one for one in (slope[:, None] * smooth, smooth[:, None] * slope))]
    layers[0].weight.normal_(generator=generator)
    for layer in layers[1:]:
        inputs, outputs = layer.weight.shape[:2]
        mixes = torch.randn(len(kernels), inputs, outputs, generator=generator)
        layer.weight.copy_(torch.einsum("kio,kyx->ioyx", mixes, torch.stack(kernels)) * math.sqrt(2 / inputs))
    z, label = torch.randn(64, G.z_dim, generator=generator), torch.zeros(64, dtype=torch.int64)  # type: ignore[call-overload]
    for module in G.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of this one pass
    G.train()(z, label)
    image = torch.atanh(G.eval()(z, label).double().clamp(-1 + 1e-9, 1 - 1e-9))
    gain = _CONTRAST / image.std()
    assert layers[-1].bias is not None
    layers[-1].weight.mul_(gain)
    layers[-1].bias.copy_(-image.mean(dim=(0, 2, 3)) * gain)
