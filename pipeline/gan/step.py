"""One iteration of training: the D phase, the G phase, the moving average. Knows no rank, path, logger or Ray."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import nn

from pipeline.gan import losses, schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Loss, optimisers, precision and averaging."""

    loss: Literal["minimax", "non_saturating", "hinge", "least_squares"] = "non_saturating"
    """What D and G minimise; see losses.py."""
    g_lr: float = 2e-4
    """Adam's learning rate for G."""
    d_lr: float = 2e-4
    """Adam's learning rate for D."""
    beta1: float = 0.5
    """Adam's first decay, both networks."""
    beta2: float = 0.999
    """Adam's second decay, both networks."""
    ema_half_life_kimg: float = 10.0
    """Half-life of G_ema in thousand images; 0: G_ema is G."""
    ema_ramp: float = 0.05
    """The half-life is at most this share of the images seen; 0: no ramp."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the forward and backward passes; weights and optimiser stay float32."""

    def __post_init__(self) -> None:
        if min(self.g_lr, self.d_lr) < 0 or min(self.ema_half_life_kimg, self.ema_ramp) < 0:
            raise ValueError("g_lr, d_lr, ema_half_life_kimg and ema_ramp must not be negative")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError("beta1 and beta2 must lie in [0, 1)")


@dataclasses.dataclass(kw_only=True)
class Networks:
    """G and D, each as it is and as it is trained (the same object, or its DDP wrapper), G_ema and the optimisers."""

    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    G_trained: nn.Module
    D_trained: nn.Module
    G_opt: torch.optim.Optimizer
    D_opt: torch.optim.Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What one rank feeds to an iteration: its rows of the global batch."""

    real_img: torch.Tensor  # float32 NCHW [-1, 1]
    label: torch.Tensor  # int64 [n], 0 without classes
    d_z: torch.Tensor  # float32 [n, Z], noise of the D phase
    g_z: torch.Tensor  # float32 [n, Z], noise of the G phase


def optimisers(G: nn.Module, D: nn.Module, config: StepConfig) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """Adam for G and for D."""
    betas = (config.beta1, config.beta2)
    return (
        torch.optim.Adam(G.parameters(), lr=config.g_lr, betas=betas, fused=True),
        torch.optim.Adam(D.parameters(), lr=config.d_lr, betas=betas, fused=True),
    )


def iterate(nets: Networks, rows: Rows, config: StepConfig, *, scale: float) -> Mapping[str, torch.Tensor]:
    """D phase, then G phase, on this rank's rows; returns detached sums over them.

    `scale` = world size / global batch: losses are sums over local rows, so that the mean that DDP takes over ranks is
    the mean over the global batch, whatever each rank's share.
    """
    stats = _d_phase(nets, rows, config, scale)
    return stats | _g_phase(nets, rows, config, scale)


def _d_phase(nets: Networks, rows: Rows, config: StepConfig, scale: float) -> dict[str, torch.Tensor]:
    with torch.no_grad(), _precision(config, rows.real_img.device):
        gen_img = nets.G(rows.d_z, rows.label)
    nets.D_opt.zero_grad(set_to_none=True)
    with _precision(config, rows.real_img.device):
        real_logits = nets.D_trained(rows.real_img, rows.label)
        gen_logits = nets.D_trained(gen_img, rows.label)
    loss = losses.d_loss(config.loss, real_logits, gen_logits)
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    nets.D_opt.step()
    return {
        "d_loss": loss.detach(),
        "real_logits": real_logits.detach().sum(),
        "gen_logits": gen_logits.detach().sum(),
        "real_prob": torch.sigmoid(real_logits.detach()).sum(),
        "gen_prob": torch.sigmoid(gen_logits.detach()).sum(),
    }


def _g_phase(nets: Networks, rows: Rows, config: StepConfig, scale: float) -> dict[str, torch.Tensor]:
    nets.G_opt.zero_grad(set_to_none=True)
    with frozen(nets.D), _precision(config, rows.real_img.device):
        gen_logits = nets.D(nets.G_trained(rows.g_z, rows.label), rows.label)
        loss = losses.g_loss(config.loss, gen_logits)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
    nets.G_opt.step()
    return {"g_loss": loss.detach()}


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Its parameters take no gradient: DDP then has no unused ones and the backward pass does less."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


@torch.no_grad()
def update_ema(nets: Networks, cur_nimg: int, batch_size: int, config: StepConfig) -> None:
    """G_ema ← β G_ema + (1 − β) G, batch-norm statistics too: averaged weights need averaged statistics."""
    beta = schedules.ema_beta(cur_nimg, batch_size, config.ema_half_life_kimg * 1000, config.ema_ramp)
    ours, theirs = _float_state(nets.G_ema), _float_state(nets.G)
    torch._foreach_lerp_(ours, theirs, 1.0 - beta)


def _float_state(network: nn.Module) -> list[torch.Tensor]:
    tensors = [*network.parameters(), *network.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


def _precision(config: StepConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")
