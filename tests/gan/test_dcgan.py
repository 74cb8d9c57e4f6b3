"""The DCGAN networks: shapes, ranges, conditioning, initial weights."""

import dataclasses

import pytest
import torch
from torch import nn

from pipeline.gan.networks.build import ImageShape, NetworkConfig, assemble, build
from pipeline.gan.pixels import to_network, to_pixels
from pipeline.gan.sample import sample

SMALL = NetworkConfig(z_dim=8, base_width=4, max_width=16)


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_shapes_at_every_supported_size(resolution: int, channels: int, num_classes: int) -> None:
    G, D = build(SMALL, ImageShape(resolution=resolution, channels=channels, num_classes=num_classes), seed=0)
    z, label = torch.randn(2, 8), torch.tensor([0, max(0, num_classes - 1)])
    images = G(z, label)
    assert images.shape == (2, channels, resolution, resolution)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert D(images, label).shape == (2,)


@pytest.mark.parametrize(("resolution", "wanted"), [(64, [512, 256, 128, 64]), (128, [512, 512, 256, 128, 64])])
def test_widths_double_downwards_to_the_cap(resolution: int, wanted: list[int]) -> None:
    with torch.device("meta"):
        G, _ = assemble(NetworkConfig(), ImageShape(resolution=resolution, channels=3, num_classes=0))
    widths = [module.out_channels for module in G.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert widths == [*wanted, 3]


def test_depth_adds_convolutions_that_keep_the_size() -> None:
    shape = ImageShape(resolution=32, channels=1, num_classes=2)
    for depth in (1, 2, 3):
        for network in build(dataclasses.replace(SMALL, depth=depth), shape, seed=0):
            flat = [module for module in network.modules() if getattr(module, "kernel_size", None) == (3, 3)]
            assert len(flat) == 3 * (depth - 1)
    G, D = build(dataclasses.replace(SMALL, depth=3), shape, seed=0)
    label = torch.tensor([0, 1])
    assert D(G(torch.randn(2, 8), label), label).shape == (2,)


def test_published_dcgan_64_has_its_parameter_count() -> None:
    # Radford et al. at 64², z 100, widths 512 … 64, 3 channels, unconditional. By hand, k = 4×4 = 16 weights a pair:
    # G: 16(100·512 + 512·256 + 256·128 + 128·64 + 64·3) + 3 and 2(512 + 256 + 128 + 64) for batch norm.
    G, D = build(NetworkConfig(), ImageShape(resolution=64, channels=3, num_classes=0), seed=0)
    wanted = 16 * (100 * 512 + 512 * 256 + 256 * 128 + 128 * 64 + 64 * 3) + 3 + 2 * (512 + 256 + 128 + 64)
    assert sum(p.numel() for p in G.parameters()) == wanted
    # D mirrors it: biases where there is no batch norm (the first convolution and the head).
    wanted = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1 + 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in D.parameters()) == wanted


def test_labels_change_what_g_makes_and_d_thinks() -> None:
    G, D = build(SMALL, ImageShape(resolution=16, channels=1, num_classes=2), seed=0)
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    zeros, ones = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    assert not torch.equal(G.eval()(z, zeros), G(z, ones))
    images = G(z, zeros)
    assert not torch.equal(D.eval()(images, zeros), D(images, ones))


def test_initial_weights_depend_on_the_seed_alone() -> None:
    shape = ImageShape(resolution=32, channels=1, num_classes=2)
    torch.manual_seed(1)
    first = build(SMALL, shape, seed=5)
    torch.manual_seed(2)
    second, other = build(SMALL, shape, seed=5), build(SMALL, shape, seed=6)
    for network in (0, 1):
        for a, b in zip(first[network].parameters(), second[network].parameters(), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(next(first[0].parameters()), next(other[0].parameters()))


def test_initial_weights_are_the_papers() -> None:
    G, D = build(NetworkConfig(), ImageShape(resolution=64, channels=3, num_classes=0), seed=0)
    networks: list[nn.Module] = [G, D]
    weights = torch.cat([m.weight.flatten() for n in networks for m in n.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    gains = torch.cat([m.weight for n in networks for m in n.modules() if isinstance(m, nn.BatchNorm2d)])
    assert gains.mean().item() == pytest.approx(1, abs=0.005)


def test_pixels_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    values = to_network(pixels, torch.device("cpu"))
    assert values.shape == (2, 3, 16, 16)
    assert (values.min().item(), values.max().item()) == (-1.0, 1.0)
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_pixels(values), pixels)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    G, _ = build(SMALL, ImageShape(resolution=32, channels=1, num_classes=2), seed=0)
    z, label = torch.randn(6, 8), torch.tensor([0, 1] * 3)
    together = sample(G.eval(), z, label, precision="fp32")
    alone = torch.cat([sample(G, z[i : i + 1], label[i : i + 1], precision="fp32") for i in range(6)])
    # Kernels may round differently for another batch size; a pixel then moves by one level at most.
    assert (together.int() - alone.int()).abs().max() <= 1
