"""SNGAN's networks: shapes, the published widths, conditioning, bounded slopes."""

import pytest
import torch
from torch import nn

from pipeline.gan.networks import sngan
from pipeline.gan.networks.build import ImageShape, NetworkConfig, build
from pipeline.gan.presets import RECIPES

SMALL = NetworkConfig(name="sngan", z_dim=8, base_width=4, max_width=16, d_width_ratio=0.5)


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize(("channels", "num_classes"), [(1, 0), (3, 3)])
def test_shapes_at_every_supported_size(resolution: int, channels: int, num_classes: int) -> None:
    G, D = build(SMALL, ImageShape(resolution=resolution, channels=channels, num_classes=num_classes), seed=0)
    label = torch.tensor([0, max(0, num_classes - 1)])
    image = G(torch.randn(2, 8), label)
    assert image.shape == (2, channels, resolution, resolution)
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    logits = D(image, label)
    assert logits.shape == (2,)
    logits.sum().backward()
    for network in (G, D):
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_published_sizes() -> None:
    """Miyato et al., table 3, by hand: 3×3 + 3×3 + 1×1 a block, every convolution with bias."""

    def block(before: int, width: int) -> int:
        return 9 * before * width + 9 * width * width + before * width + 3 * width

    G, D = build(RECIPES["sngan"].network, ImageShape(resolution=32, channels=3, num_classes=0), seed=0)
    norms = 3 * 2 * (2 * 256) + 2 * 256
    wanted = 128 * 4096 + 4096 + 3 * block(256, 256) + norms + 9 * 256 * 3 + 3
    assert sum(p.numel() for p in G.parameters()) == wanted
    plain = 2 * (9 * 128 * 128 + 128)  # the last two blocks have no 1×1: they keep size and width
    assert sum(p.numel() for p in D.parameters()) == block(3, 128) + block(128, 128) + 2 * plain + 128 + 1


def test_every_layer_of_d_is_normalised() -> None:
    _, D = build(SMALL, ImageShape(resolution=32, channels=3, num_classes=5), seed=0)
    layers = [module for module in D.modules() if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding)]
    assert len(layers) == 2 * 4 + 2 + 2
    for _ in range(50):
        D(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_labels_change_what_g_makes_and_d_thinks() -> None:
    G, D = build(SMALL, ImageShape(resolution=16, channels=1, num_classes=2), seed=0)
    zeros = torch.zeros(4, dtype=torch.int64)
    for norm in (module for module in G.modules() if isinstance(module, sngan.ClassBatchNorm)):
        nn.init.normal_(norm.gain.weight)  # at first every class has the same gains
    z = torch.randn(4, 8)
    image = G.eval()(z, zeros)
    assert not torch.allclose(image, G(z, zeros + 1))
    assert not torch.allclose(D.eval()(image, zeros), D(image, zeros + 1))


def test_the_first_block_sees_the_image_itself() -> None:
    """No ReLU before it, and one before each of the others."""
    _, D = build(SMALL, ImageShape(resolution=16, channels=1, num_classes=0), seed=0)
    seen: list[torch.Tensor] = []
    for block in D.blocks:
        block.convs[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.randn(1, 1, 16, 16)
    D(image, torch.zeros(1, dtype=torch.int64))
    assert torch.equal(seen[0], image)
    assert all(inputs.min() >= 0 for inputs in seen[1:])


def test_class_gains_and_biases_by_hand() -> None:
    norm = sngan.ClassBatchNorm(2, num_classes=2)
    with torch.no_grad():
        norm.gain.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        norm.bias.weight.copy_(torch.tensor([[0.0, 0.0], [5.0, 6.0]]))
    x = torch.randn(6, 2, 4, 4)
    label = torch.tensor([0, 1, 0, 1, 1, 0])
    flat = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    wanted = flat * norm.gain.weight[label][:, :, None, None] + norm.bias.weight[label][:, :, None, None]
    assert torch.allclose(norm(x, label), wanted, atol=1e-5)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    shape = ImageShape(resolution=32, channels=1, num_classes=2)
    torch.manual_seed(1)
    first = build(SMALL, shape, seed=5)
    torch.manual_seed(2)
    for one, other in zip(first, build(SMALL, shape, seed=5), strict=True):
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
