"""Losses against hand-computed values, and their behaviour far from zero."""

import math
import typing

import pytest
import torch

from pipeline.gan import losses

REAL, GEN = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


SEPARATE = typing.get_args(losses.SeparateLossName)
ALL = typing.get_args(losses.LossName)


@pytest.mark.parametrize("name", ["minimax", "non_saturating"])
def test_d_loss_is_equation_1(name: losses.LossName) -> None:
    wanted = -sum(log_sigmoid(x) for x in (0.0, 2.0)) - sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in (0.0, -1.0))
    assert losses.d_loss(name, REAL, GEN).item() == pytest.approx(wanted, rel=1e-6)
    assert losses.d_loss(name, torch.zeros(1), torch.zeros(1)).item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize(
    ("name", "d", "g"),
    [
        ("minimax", None, sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in (0.0, -1.0))),
        ("non_saturating", None, -sum(log_sigmoid(x) for x in (0.0, -1.0))),
        ("hinge", (1 + 0) + (1 + 0), 0 + 1),  # real 0 and 2, generated 0 and -1
        ("least_squares", (1 + 1 + 0 + 1) / 2, (1 + 4) / 2),
        ("wasserstein", -1 - 2, 0 + 1),
        ("relativistic", math.log(2) + math.log1p(math.exp(-3)), math.log(2) + math.log1p(math.exp(3))),
    ],
)
def test_values_by_hand(name: losses.LossName, d: float | None, g: float) -> None:
    if d is not None:
        assert losses.d_loss(name, REAL, GEN).item() == pytest.approx(d, rel=1e-6)
    found = losses.relativistic_g_loss(REAL, GEN) if name == "relativistic" else losses.g_loss(name, GEN)
    assert found.item() == pytest.approx(g, rel=1e-6)


@pytest.mark.parametrize("size", [60.0, 1000.0])
def test_nothing_overflows(size: float) -> None:
    far = torch.tensor([size, -size])
    for name in ALL:
        assert losses.d_loss(name, far, -far).isfinite()
    for name in SEPARATE:
        assert losses.g_loss(name, far).isfinite()
    assert losses.d_loss("minimax", far, far).item() == pytest.approx(2 * size)
    assert losses.g_loss("minimax", far).item() == pytest.approx(-size)
    assert losses.g_loss("non_saturating", far).item() == pytest.approx(size)
    assert losses.relativistic_g_loss(far, -far).item() == pytest.approx(2 * size)


def test_gradients() -> None:
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    other = logits.detach().flip(0).requires_grad_()
    for name in SEPARATE:
        assert torch.autograd.gradcheck(lambda x, name=name: losses.g_loss(name, x), logits)
    for name in ALL:
        assert torch.autograd.gradcheck(lambda x, y, name=name: losses.d_loss(name, x, y), (logits, other))
    assert torch.autograd.gradcheck(losses.relativistic_g_loss, (logits, other))


@pytest.mark.parametrize("name", ALL)
def test_each_network_pushes_its_own_way(name: losses.LossName) -> None:
    """D lifts real and lowers generated logits; G lifts generated ones, and of relativistic pairs lowers the real."""
    real, gen = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    losses.d_loss(name, real, gen + 0.5).backward()
    assert (real.grad < 0).all()
    assert (gen.grad > 0).all()
    real.grad = gen.grad = None
    loss = losses.relativistic_g_loss(real, gen) if name == "relativistic" else losses.g_loss(name, gen)
    loss.backward()
    assert (gen.grad < 0).all()
    assert name != "relativistic" or (real.grad > 0).all()


def test_a_pair_is_a_row() -> None:
    """Other partners, another loss."""
    real, gen = torch.tensor([0.0, 4.0]), torch.tensor([4.0, 0.0])
    assert not torch.isclose(losses.d_loss("relativistic", real, gen), losses.d_loss("relativistic", real, gen.flip(0)))


def test_only_non_saturating_pushes_when_d_wins() -> None:
    def gradient(name: losses.SeparateLossName) -> float:
        logit = torch.tensor([-20.0], requires_grad=True)
        losses.g_loss(name, logit).backward()
        assert logit.grad is not None
        return abs(logit.grad.item())

    assert gradient("minimax") < 1e-8
    assert gradient("non_saturating") > 0.99
