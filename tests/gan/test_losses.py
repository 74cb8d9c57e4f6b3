"""Losses against hand-computed values, and their behaviour far from zero."""

import math

import pytest
import torch

from pipeline.gan import losses

REAL, GEN = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_d_loss_is_equation_1() -> None:
    wanted = -sum(log_sigmoid(x) for x in (0.0, 2.0)) - sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in (0.0, -1.0))
    assert losses.d_loss(REAL, GEN).item() == pytest.approx(wanted, rel=1e-6)
    assert losses.d_loss(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(2 * math.log(2))


def test_g_losses() -> None:
    minimax = sum(math.log(1 - 1 / (1 + math.exp(-x))) for x in (0.0, -1.0))
    assert losses.g_loss("minimax", GEN).item() == pytest.approx(minimax, rel=1e-6)
    saturating_free = -sum(log_sigmoid(x) for x in (0.0, -1.0))
    assert losses.g_loss("non_saturating", GEN).item() == pytest.approx(saturating_free, rel=1e-6)


@pytest.mark.parametrize("size", [60.0, 1000.0])
def test_nothing_overflows(size: float) -> None:
    far = torch.tensor([size, -size])
    assert losses.d_loss(far, far).item() == pytest.approx(2 * size)
    assert losses.g_loss("minimax", far).item() == pytest.approx(-size)
    assert losses.g_loss("non_saturating", far).item() == pytest.approx(size)


def test_gradients() -> None:
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for name in ("minimax", "non_saturating"):
        assert torch.autograd.gradcheck(lambda x, name=name: losses.g_loss(name, x), logits)
    assert torch.autograd.gradcheck(losses.d_loss, (logits, logits.detach().flip(0).requires_grad_()))


def test_only_non_saturating_pushes_when_d_wins() -> None:
    def gradient(name: losses.LossName) -> float:
        logit = torch.tensor([-20.0], requires_grad=True)
        losses.g_loss(name, logit).backward()
        assert logit.grad is not None
        return abs(logit.grad.item())

    assert gradient("minimax") < 1e-8
    assert gradient("non_saturating") > 0.99
