"""Spectral norm against torch's exact singular values, and that a step does not disturb the one before."""

import torch
from torch import nn

from pipeline.gan.networks.spectral import spectral_norm


def layer(seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 8, 3)
    spectral_norm(conv, torch.Generator().manual_seed(0))
    return conv


def largest(weight: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2))


def test_the_largest_singular_value_becomes_one() -> None:
    conv = layer()
    for _ in range(200):
        conv(torch.zeros(1, 3, 4, 4))
    assert abs(largest(conv.weight) - 1) < 1e-4


def test_eval_does_not_move_the_estimate_and_training_does() -> None:
    conv = layer()
    before = conv.eval().weight.detach().clone()
    assert torch.equal(conv.weight, before)
    conv.train()
    assert not torch.equal(conv.weight, before)


def test_the_estimate_begins_with_the_generator_alone() -> None:
    first, again = layer(), layer()
    assert torch.equal(first.weight, again.weight)


def test_the_gradient_is_that_of_the_quotient() -> None:
    """By differences in float64, with u and v held."""
    conv = layer().double().eval()
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def of(original: torch.Tensor) -> torch.Tensor:
        norm = conv.parametrizations.weight[0]
        weight = original / torch.dot(norm.u, original.flatten(1) @ norm.v)
        return nn.functional.conv2d(image, weight).square().sum()

    original = conv.parametrizations.weight.original
    conv(image).sub(conv.bias[:, None, None]).square().sum().backward()
    held = original.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(of, held)
    (wanted,) = torch.autograd.grad(of(held), held)
    assert torch.allclose(original.grad, wanted)


def test_two_uses_before_a_backward_pass() -> None:
    conv, image = layer(), torch.randn(1, 3, 4, 4)
    first = conv(image).square().sum()
    second = conv(image).square().sum()
    (first + second).backward()
    assert conv.parametrizations.weight.original.grad.isfinite().all()


def test_bf16_does_not_reach_the_estimate() -> None:
    exact, half = layer(), layer()
    image = torch.zeros(1, 3, 4, 4)
    for _ in range(5):
        exact(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half(image)
    assert torch.equal(exact.eval().weight, half.eval().weight)
