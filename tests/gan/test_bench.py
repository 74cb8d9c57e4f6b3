"""The benchmark of the step: both sides do the same mathematics, each in its own way."""

import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pipeline.gan import bench, step
from pipeline.gan.bench_plain import PlainTrainer, plain_layers
from pipeline.gan.networks.build import ImageShape, build
from pipeline.gan.networks.convolution import Conv2d
from pipeline.gan.presets import RECIPES, Recipe
from pipeline.gan.step import Rows
from tests.gan.noises import RowNoise

CPU = torch.device("cpu")
SHAPE = ImageShape(resolution=32, channels=3, num_classes=2)


def narrow(preset: str) -> Recipe:
    recipe = RECIPES[preset]
    return dataclasses.replace(
        recipe,
        network=dataclasses.replace(recipe.network, base_width=16, max_width=16, d_width_ratio=1.0),
        step=dataclasses.replace(recipe.step, precision="fp32"),
    )


@pytest.mark.parametrize("preset", bench.CPU_PRESETS)
def test_both_sides_move_the_networks_alike(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One iteration from equal weights, images and noise."""
    # Spectral norm counts its uses: two passes here, as there. That one pass is as good, test_step.py says.
    monkeypatch.setattr(step, "_mixes_rows", lambda _: True)
    recipe, noise = narrow(preset), RowNoise(range(8))
    nets = bench.networks(recipe, SHAPE, CPU)
    plain = PlainTrainer(*build(recipe.network, SHAPE, seed=0), recipe.step, CPU)
    begun = {name: value.detach().clone() for name, value in nets.D.named_parameters()}
    rows = Rows(real_img=torch.rand(8, 3, 32, 32) * 2 - 1, label=torch.arange(8) % 2, noise=noise)
    drawn: Iterator[str] = iter(["z/D"] * recipe.step.d_steps + ["z/G"])
    plain._z = lambda _: noise.normals(next(drawn), recipe.network.z_dim)  # type: ignore[method-assign]
    values = step.now(recipe.step, 0, 0.0)
    step.iterate(nets, [rows] * recipe.step.real_batches, recipe.step, values, scale=1 / 8)
    plain.iterate(rows.real_img, rows.label)
    assert next(drawn, None) is None
    for ours, theirs in ((nets.G, plain.G), (nets.D, plain.D)):
        wanted = dict(theirs.named_parameters())
        for name, value in ours.named_parameters():
            # Adam's first steps are as long for the smallest gradient as for the largest: near 0 rounding decides them,
            # and a bias before a batch norm has none but that.
            assert value.ndim == 1 or (value - wanted[name]).abs().mean() < 0.05 * values.d_lr, name
    moved = [(value - begun[name]).abs().mean() > 0.5 * values.d_lr for name, value in nets.D.named_parameters()]
    assert sum(moved) > len(moved) / 4


def test_the_plain_side_is_pytorchs_own_in_nchw() -> None:
    for preset in bench.CPU_PRESETS:
        recipe = narrow(preset)
        trainer = PlainTrainer(*build(recipe.network, SHAPE, seed=0), recipe.step, CPU)
        formats: list[bool] = []
        for network in (trainer.G, trainer.D):
            for module in network.modules():
                assert not type(module).__module__.endswith("networks.convolution")
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    module.register_forward_hook(lambda _, __, out, seen=formats: seen.append(out.is_contiguous()))
        label = torch.zeros(4, dtype=torch.int64)
        trainer.D(trainer.G(torch.randn(4, recipe.network.z_dim), label), label)
        assert formats
        assert all(formats), preset


def test_plain_layers_compute_the_same() -> None:
    recipe = narrow("r3gan-tiny")
    for network, inputs in zip(build(recipe.network, SHAPE, 0), ((4, 64), (4, 3, 32, 32)), strict=True):
        x, label = torch.randn(inputs), torch.arange(4) % 2
        before = network(x, label)
        assert torch.allclose(plain_layers(network)(x, label), before, atol=1e-5)


def test_operations_are_counted() -> None:
    """A linear layer by hand, forward and backward, and the same with a gradient of a gradient."""
    weight = torch.randn(8, 8, requires_grad=True)
    image = torch.randn(4, 8, requires_grad=True)
    with bench._Flops() as counter:
        (image @ weight).sum().backward()
    assert counter.total == 3 * 2 * 4 * 8 * 8


@pytest.mark.slow
def test_it_prints_json_last(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(
        ["--preset", "r3gan-tiny", "--batch-size", "4", "--rounds", "1", "--window-sec", "0.1", "--device", "cpu"]
    )
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["bench"] == "train"
    assert set(last["ratios"]) == {"r3gan-tiny_vs_plain", "r3gan-tiny_finite_difference_vs_plain"}
    assert all(ratio > 0 for ratio in last["ratios"].values())


@pytest.mark.parametrize("groups", [1, 4])
def test_operations_are_counted_by_hand_too(groups: int) -> None:
    """A grouped convolution, its two gradients, and what a penalty adds to them."""
    conv = Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
    image = torch.randn(2, 8, 4, 4, requires_grad=True)
    forward = 2 * (2 * 8 * 4 * 4) * (8 // groups * 9)
    with bench._Flops() as counter:
        conv(image).sum().backward()
    assert counter.total == 3 * forward
    with bench._Flops() as counter:
        (slope,) = torch.autograd.grad(conv(image).square().sum(), image, create_graph=True)
        of_slope = counter.total
        slope.square().sum().backward()
    assert of_slope == 3 * forward  # the gradient of the weight too, which only the step leaves out
    assert counter.total == (3 + 4) * forward  # of the slope in g and w; of the output in w and, as the image asks, x
