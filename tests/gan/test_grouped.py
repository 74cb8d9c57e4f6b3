"""Grouped convolutions as products of matrices, against PyTorch's; on a CPU too, where they are not used."""

import dataclasses
from typing import Any

import pytest
import torch

from pipeline.gan import bench, step
from pipeline.gan.networks import grouped
from pipeline.gan.networks.build import ImageShape
from pipeline.gan.presets import RECIPES
from pipeline.gan.step import Rows
from tests.gan.noises import RowNoise


def geometry(groups: int) -> tuple[Any, ...]:
    return [1, 1], [1, 1], [1, 1], False, [0, 0], groups


def assert_pytorchs(x: torch.Tensor, w: torch.Tensor, groups: int, rtol: float) -> None:
    out = torch.ops.aten.convolution(x, w, None, *geometry(groups))
    g = torch.randn_like(out)
    of_x, of_w, _ = torch.ops.aten.convolution_backward(g, x, w, None, *geometry(groups), (True, True, False))
    found = grouped.convolve(x, w, groups), grouped.of_x(g, w, groups), grouped.of_w(x, g, groups)
    for ours, theirs in zip(found, (out, of_x, of_w), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= rtol * theirs.norm()


@pytest.mark.parametrize(("groups", "before", "after", "px"), [(2, 3, 5, 6), (4, 2, 2, 4), (3, 4, 1, 8)])
def test_values_and_derivatives(groups: int, before: int, after: int, px: int) -> None:
    x = torch.randn(3, groups * before, px, px, dtype=torch.float64)
    w = torch.randn(groups * after, before, 3, 3, dtype=torch.float64)
    assert_pytorchs(x, w, groups, rtol=1e-12)
    assert_pytorchs(x.to(memory_format=torch.channels_last), w, groups, rtol=1e-12)


@pytest.mark.gpu
def test_values_and_derivatives_on_a_gpu() -> None:
    torch.backends.cudnn.allow_tf32 = False
    x, w = torch.randn(16, 1536, 8, 8, device="cuda"), torch.randn(1536, 16, 3, 3, device="cuda")
    assert grouped.pays(x, w, 96, [1, 1], [1, 1])
    assert_pytorchs(x, w, 96, rtol=1e-5)


def test_an_iteration_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of R3GAN's, with bf16 in its upper stages: gradients are asked for within autocast and outside of it."""
    recipe = RECIPES["r3gan-tiny"]
    network = dataclasses.replace(recipe.network, base_width=16, max_width=16, group_width=8, bf16_stages=2)
    recipe = dataclasses.replace(recipe, network=network)
    found, asked = [], []

    def pays(x: torch.Tensor, w: torch.Tensor, groups: int, *_: Any) -> bool:
        asked.append(groups)
        return groups > 1 and w.shape[1] > 1 and w.shape[2] == 3 and x.dtype == torch.float32

    for ours in (False, True):
        if ours:
            monkeypatch.setattr(grouped, "pays", pays)
        nets = bench.networks(recipe, ImageShape(resolution=32, channels=3, num_classes=2), torch.device("cpu"))
        with torch.no_grad():
            for parameter in [*nets.G.parameters(), *nets.D.parameters()]:
                parameter.add_(0.02)  # so that no block is the identity
        rows = Rows(real_img=torch.ones(4, 3, 32, 32) / 2, label=torch.arange(4) % 2, noise=RowNoise(range(4)))
        batches = [rows] * recipe.step.real_batches
        stats = step.iterate(nets, batches, recipe.step, step.now(recipe.step, 0, 0.0), scale=1 / 4)
        found.append({name: float(value) for name, value in stats.items()})
    assert 2 in asked
    assert found[1] == pytest.approx(found[0], rel=0.02)  # bf16 rounds what float32 has summed in another order
