"""R3GAN's networks: the published parameter counts, their shapes, their filters and how they begin."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from pipeline.gan.networks import r3gan
from pipeline.gan.networks.build import assemble, shape_for
from pipeline.gan.presets import RECIPES

TINY = (48, 32, 32, 16)
NO_LABEL = torch.zeros(2, dtype=torch.int64)


def networks(
    widths: Sequence[int],
    *,
    classes: int = 0,
    channels: int = 3,
    z: int = 64,
    g_embed: int = 64,
    d_embed: int = 64,
    bf16_stages: int = 9,
) -> tuple[r3gan.Generator, r3gan.Discriminator]:
    """G and D with initial weights."""
    both = {
        "widths": widths,
        "depth": 2,
        "group_width": 16,
        "bf16_stages": bf16_stages,
        "channels": channels,
        "num_classes": classes,
    }
    G = r3gan.Generator(**both, z_dim=z, embed_dim=g_embed)
    D = r3gan.Discriminator(**both, embed_dim=d_embed)
    for seed, network in enumerate((G, D)):
        r3gan.initialise(network, torch.Generator().manual_seed(seed))
    return G, D


def millions(network: nn.Module) -> float:
    return round(sum(p.numel() for p in network.parameters()) / 1e6, 2)


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("r3gan-cifar10", (20.78, 21.28)),
        ("r3gan-ffhq64", (22.43, 22.38)),
        ("r3gan-ffhq256", (23.06, 23.01)),
        ("r3gan-imagenet32", (82.91, 86.55)),
        ("r3gan-imagenet64", (103.57, 107.21)),
    ],
)
def test_parameter_counts_are_the_published_ones(preset: str, wanted: tuple[float, float]) -> None:
    network, size = RECIPES[preset].network, RECIPES[preset].network.resolution
    classes = {"r3gan-cifar10": 10, "r3gan-imagenet32": 1000, "r3gan-imagenet64": 1000}.get(preset, 0)
    with torch.device("meta"):
        G, D = assemble(network, shape_for(network, size, 3, classes))
        images = G(torch.empty(2, 64), NO_LABEL.to("meta"))
        assert images.shape == (2, 3, size, size)
        assert D(images, NO_LABEL.to("meta")).shape == (2,)
    assert (millions(G), millions(D)) == wanted


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stages", [3, 4, 6])
def test_shapes_and_that_every_weight_learns(classes: int, channels: int, stages: int) -> None:
    """The last convolution of a block is 0 at first, so that those before it learn from the second step on."""
    G, D = networks((32,) * stages, classes=classes, channels=channels)
    label = torch.tensor([0, max(0, classes - 1)])
    for network in (G, D):
        for module in network.modules():
            if isinstance(module, r3gan.Block):
                nn.init.normal_(module.shrink.weight, std=0.1)
    image = G(torch.randn(2, 64), label)
    assert image.shape == (2, channels, 4 * 2 ** (stages - 1), 4 * 2 ** (stages - 1))
    logits = D(image, label)
    assert logits.shape == (2,)
    logits.sum().backward()
    for network in (G, D):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_the_class_changes_the_image_and_the_logit() -> None:
    G, D = networks(TINY, classes=3)
    z, image = torch.randn(2, 64), torch.randn(2, 3, 32, 32)
    for zero, one in ((G(z, NO_LABEL), G(z, NO_LABEL + 1)), (D(image, NO_LABEL), D(image, NO_LABEL + 1))):
        assert not torch.allclose(zero, one)


def test_resampling_keeps_planes_and_ramps_within_the_border() -> None:
    plane = torch.full((1, 2, 8, 8), 3.0)
    assert torch.allclose(r3gan.Upsample()(plane)[..., 1:-1, 1:-1], torch.tensor(3.0))
    assert torch.allclose(r3gan.Downsample()(plane)[..., 1:-1, 1:-1], torch.tensor(3.0))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    up, down = r3gan.Upsample()(ramp)[0, 0, 4], r3gan.Downsample()(ramp)[0, 0, 2]
    assert torch.allclose(up[2:-2], torch.arange(16.0)[2:-2] / 2 - 0.25)
    assert torch.allclose(down[1:-1], torch.arange(4.0)[1:-1] * 2 + 0.5)


def test_up_and_down_are_each_others_transpose() -> None:
    """But for the gain of 4: no pixel weighs more than another."""
    small, large = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 16, 16)
    forth = (r3gan.Upsample()(small) * large).sum()
    back = (small * r3gan.Downsample()(large)).sum() * 4
    assert torch.allclose(forth, back, rtol=1e-4)


def test_a_checkerboard_does_not_pass_the_low_pass() -> None:
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    assert r3gan.Downsample()(board.expand(1, 1, 16, 16))[..., 1:-1, 1:-1].abs().max() < 1e-6


def test_blocks_begin_as_the_identity() -> None:
    G, D = networks(TINY)
    x = torch.randn(2, 48, 4, 4)
    for network in (G, D):
        blocks = [module for module in network.modules() if isinstance(module, r3gan.Block)]
        assert len(blocks) == 2 * len(TINY)
        block = next(block for block in blocks if block.expand.in_channels == 48)
        assert torch.equal(block(x), x)


def test_initial_weights_have_the_stated_spread() -> None:
    G, D = networks((256,) * 4, classes=50, g_embed=64, d_embed=256)
    gain = math.sqrt(2 / 1.04) * 8**-0.25
    block = next(module for module in D.modules() if isinstance(module, r3gan.Block))
    wanted = {
        block.expand.weight: gain / math.sqrt(256),
        block.mix.weight: gain / math.sqrt(16 * 9),
        block.shrink.weight: 0.0,
        G.scale.weight: 1 / math.sqrt(128),
        G.start: 1.0,
        D.head.weight: 1 / math.sqrt(256),
        D.embed.weight: 1 / math.sqrt(256 * 50),
        G.embed.weight: 1 / math.sqrt(50),
    }
    for weight, std in wanted.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert abs(weight.mean().item()) <= 0.05 * std
    assert not block.mix.bias.any()


def test_equal_seeds_give_equal_weights() -> None:
    first, again = networks(TINY, classes=2), networks(TINY, classes=2)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_double_backward_runs_and_bf16_stays_close() -> None:
    _, D = networks(TINY)
    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(D(image, NO_LABEL).sum(), image, create_graph=True)
    gradient.square().sum().backward()
    assert D.head.weight.grad is not None
    exact = D(image, NO_LABEL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(D(image, NO_LABEL), exact, atol=0.05, rtol=0.05)


def test_the_small_stages_stay_in_float32() -> None:
    """Of four stages two may compute in bf16: what the others give is float32 under autocast, and unrounded."""
    G, D = networks(TINY, bf16_stages=2)
    seen: dict[nn.Module, torch.dtype] = {}
    for network in (G, D):
        for stage in network.stages:
            stage.register_forward_hook(lambda module, _, out: seen.__setitem__(module, out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        D(G(torch.randn(2, 64), NO_LABEL), NO_LABEL)
    whole, half = torch.float32, torch.bfloat16
    assert [seen[stage] for stage in G.stages] == [whole, whole, half, half]
    assert [seen[stage] for stage in D.stages] == [half, half, whole, whole]
