"""Recipes and how networks are made to fit a dataset: every preset builds and takes a step."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.gan import bench, step
from pipeline.gan.networks.build import ImageShape, NetworkConfig, assemble, build, shape_for
from pipeline.gan.presets import RECIPES
from pipeline.gan.step import Rows
from tests.gan.noises import RowNoise


def classes_of(preset: str) -> int:
    return 3 if RECIPES[preset].network.labels == "required" else 0


@pytest.mark.parametrize("preset", sorted(RECIPES))
def test_every_preset_is_whole_on_the_meta_device(preset: str) -> None:
    """At its full width: shapes agree from z to logit."""
    network = RECIPES[preset].network
    size = network.resolution or 64
    with torch.device("meta"):
        G, D = assemble(network, shape_for(network, size, 3, classes_of(preset)))
        label = torch.zeros(2, dtype=torch.int64)
        image = G(torch.empty(2, network.z_dim), label)
        assert image.shape == (2, 3, size, size)
        assert D(image, label).shape == (2,)


@pytest.mark.parametrize("preset", sorted(RECIPES))
def test_every_preset_takes_a_step(preset: str) -> None:
    """With narrow networks; in the middle of its burn-in, so that everything scheduled is between its ends."""
    recipe = RECIPES[preset]
    width = recipe.network.group_width
    network = dataclasses.replace(recipe.network, base_width=width, max_width=width, d_width_ratio=1.0)
    recipe = dataclasses.replace(recipe, network=network)
    shape = shape_for(network, network.resolution or 32, 3, classes_of(preset))
    nets = bench.networks(recipe, shape, torch.device("cpu"))
    before = [p.detach().clone() for p in (*nets.G.parameters(), *nets.D.parameters())]
    middle = round(recipe.step.burn_in_kimg * 500)
    values = step.now(recipe.step, middle, 0.0)
    assert values.augment_p == pytest.approx(recipe.step.augment.p[-1] / 2)
    rows = [
        Rows(
            real_img=torch.rand(2, 3, shape.resolution, shape.resolution) * 2 - 1,
            label=torch.arange(2),
            noise=RowNoise(range(2 * number, 2 * number + 2)),
        )
        for number in range(recipe.step.real_batches)
    ]
    stats = step.iterate(nets, rows, recipe.step, values, scale=1 / 2)
    step.update_ema(nets, middle, 2, values.ema_half_life_kimg, recipe.step.ema_ramp)
    assert all(math.isfinite(value) for value in stats.values())
    after = (*nets.G.parameters(), *nets.D.parameters())
    # The first convolutions of a residual block move from the second step on.
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(before) / 5


def test_batches_divide_among_their_lanes() -> None:
    assert all(recipe.batch_size % recipe.num_lanes == 0 for recipe in RECIPES.values())


def formats_in(D: nn.Module, image: torch.Tensor, label: torch.Tensor) -> list[bool]:
    """Of what each convolution gives, whether it is channels-last."""
    seen: list[bool] = []
    for module in D.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    D(image, label)
    return seen


def test_weights_are_channels_last_and_so_is_what_flows() -> None:
    for name in ("dcgan", "sngan", "r3gan"):
        config = NetworkConfig(name=name, z_dim=8, base_width=16, max_width=32)
        G, D = build(config, ImageShape(resolution=32, channels=3, num_classes=2), seed=0)
        image = G(torch.randn(4, 8), torch.arange(4) % 2)
        assert image.is_contiguous(memory_format=torch.channels_last), name
        assert all(formats_in(D, image, torch.arange(4) % 2)), name


@pytest.mark.parametrize(
    ("settings", "dataset", "why"),
    [
        ({"resolution": 256}, (32, 3, 0), "network.resolution is 256 and the images have 32²"),
        ({"labels": "required"}, (32, 3, 0), "the dataset has no classes"),
        ({}, (24, 3, 0), "no network for 24²"),
        ({}, (1024, 3, 0), "no network for 1024²"),
        ({}, (32, 2, 0), "no network for 32² × 2"),
    ],
)
def test_networks_and_datasets_at_odds(settings: dict[str, Any], dataset: tuple[int, int, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        shape_for(NetworkConfig(**settings), *dataset)


def test_labels_are_ignored_where_told() -> None:
    assert shape_for(NetworkConfig(labels="ignored"), 32, 3, 10).num_classes == 0
    assert shape_for(NetworkConfig(), 32, 3, 10).num_classes == 10


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"z_dim": 0}, "z_dim"),
        ({"base_width": 64, "max_width": 32}, "base_width"),
        ({"name": "r3gan", "base_width": 24, "max_width": 48}, "group_width 16"),
        ({"name": "r3gan", "base_width": 16, "max_width": 16, "d_width_ratio": 0.5}, "group_width 16"),
        ({"d_width_ratio": 0.001}, "d_width_ratio"),
        ({"depth": -1}, "depth"),
    ],
)
def test_settings_that_mean_nothing(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        NetworkConfig(**bad)
