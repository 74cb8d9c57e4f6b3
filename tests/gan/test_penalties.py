"""Penalties against values by hand, closed forms and torch's own check of derivatives."""

import functools

import pytest
import torch
from torch import nn

from pipeline.gan import penalties

SHAPE = (3, 2, 4, 4)


def quadratic(image: torch.Tensor) -> torch.Tensor:
    """D(x) = Σ a x², whose gradient is 2 a x."""
    return (_A.to(image.dtype) * image.square()).sum(dim=(1, 2, 3))


_A = torch.linspace(-1, 1, 32).reshape(2, 4, 4)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def smooth_d(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small D without kinks."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0)]
    return nn.Sequential(*layers).to(dtype)


def test_squared_gradient_by_hand(image: torch.Tensor) -> None:
    logits, found = penalties.squared_gradient(quadratic, image)
    assert torch.allclose(logits, quadratic(image))
    assert torch.allclose(found, (2 * _A * image).square().sum(dim=(1, 2, 3)), rtol=1e-6)
    assert not image.requires_grad


def test_a_linear_d_is_punished_for_its_slope_wherever_the_image_is() -> None:
    weight = torch.arange(32.0).reshape(2, 4, 4)
    for image in (torch.zeros(SHAPE), torch.randn(SHAPE)):
        _, found = penalties.squared_gradient(lambda x: (x * weight).sum(dim=(1, 2, 3)), image)
        assert found.tolist() == pytest.approx([float(weight.square().sum())] * 3)


def test_r1_of_real_is_r2_of_the_same_images_row_by_row(image: torch.Tensor) -> None:
    """The two are one formula at other images; and a row's does not depend on the rows beside it."""
    D = smooth_d()
    _, whole = penalties.squared_gradient(D, image)
    _, swapped = penalties.squared_gradient(D, image.flip(0))
    parts = [penalties.squared_gradient(D, image[i : i + 1])[1] for i in range(3)]
    assert torch.allclose(whole, swapped.flip(0))
    assert torch.allclose(whole, torch.cat(parts))


def test_the_derivative_of_each_penalty_is_right(image: torch.Tensor) -> None:
    """gradcheck in float64, with respect to D's weights: through the inner gradient."""
    shape = (4, 2, 3, 3)
    other, share = image.flip(0) + 0.1, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def d(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(nn.functional.conv2d(x, weight, padding=1)).square().mean(dim=(1, 2, 3))

    kinds = [
        lambda D: penalties.squared_gradient(D, image)[1],
        lambda D: penalties.wgan_gp(D, image, other, share),
        lambda D: penalties.finite_difference(D, image, torch.ones_like(image), 0.5)[1],
    ]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    for kind in kinds:
        assert torch.autograd.gradcheck(lambda w, kind=kind: kind(functools.partial(d, w)), weight)


def signs(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(3)) * 2.0 - 1


def test_finite_differences_of_a_linear_d_are_exact() -> None:
    """(w · ε)² whatever σ; its mean over many ε is |w|²."""
    weight = torch.linspace(0, 1, 32).reshape(2, 4, 4)
    sign = signs(20_000, 2, 4, 4)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return (x * weight).sum(dim=(1, 2, 3)) + 1

    for sigma in (1.0, 0.01):
        logits, found = penalties.finite_difference(linear, torch.zeros_like(sign), sign, sigma)
        assert torch.equal(logits, torch.ones(20_000))
        assert torch.allclose(found, (sign * weight).sum(dim=(1, 2, 3)).square(), atol=1e-2, rtol=1e-3)
    assert found.mean().item() == pytest.approx(float(weight.square().sum()), rel=0.03)


def test_finite_differences_come_near_the_exact_penalty(image: torch.Tensor) -> None:
    D = smooth_d()
    _, exact = penalties.squared_gradient(D, image)
    many = image.repeat(2000, 1, 1, 1)
    _, found = penalties.finite_difference(D, many, signs(*many.shape), 0.01)
    assert torch.allclose(found.view(2000, 3).mean(0), exact, rtol=0.15)


def test_wgan_gp_by_hand() -> None:
    """A linear D of slope s: (s − 1)² for each row, wherever between the two the point is."""
    for slope, wanted in ((1.0, 0.0), (3.0, 4.0), (0.0, 1.0)):
        weight = torch.zeros(2, 4, 4)
        weight[0, 0, 0] = slope
        found = penalties.wgan_gp(
            lambda x, weight=weight: (x * weight).sum(dim=(1, 2, 3)),
            torch.randn(SHAPE),
            torch.randn(SHAPE),
            torch.rand(3),
        )
        assert found.tolist() == pytest.approx([wanted] * 3, abs=1e-5)


def test_wgan_gp_looks_between_the_two() -> None:
    real, gen = torch.full(SHAPE, 1.0), torch.full(SHAPE, -1.0)
    seen: list[torch.Tensor] = []

    def d(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach())
        return x.sum(dim=(1, 2, 3))

    penalties.wgan_gp(d, real, gen, torch.tensor([0.0, 0.25, 1.0]))
    assert [float(row.mean()) for row in seen[0]] == [-1.0, -0.5, 1.0]


def test_a_flat_d_gives_no_nan() -> None:
    weight = torch.zeros(2, 4, 4, requires_grad=True)
    penalties.wgan_gp(
        lambda x: (x * weight).sum(dim=(1, 2, 3)), torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(3)
    ).sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_weights_are_counted_and_biases_are_not() -> None:
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        network.bias.fill_(100)
    assert penalties.weight_l1(network.parameters()).item() == 6
    assert penalties.weight_l2(network.parameters()).item() == 7
    penalties.weight_l2(network.parameters()).backward()
    assert torch.equal(network.weight.grad, network.weight)
    assert network.bias.grad is None
