"""An iteration: what moves, what stays, and the moving average against its closed form."""

import copy

import pytest
import torch

from pipeline.gan import schedules, step
from pipeline.gan.networks.build import ImageShape, NetworkConfig, build
from pipeline.gan.step import Networks, Rows, StepConfig

CONFIG = StepConfig(precision="fp32")


def networks(config: StepConfig = CONFIG) -> Networks:
    G, D = build(NetworkConfig(z_dim=8, base_width=8), ImageShape(resolution=16, channels=1, num_classes=2), seed=0)
    G_opt, D_opt = step.optimisers(G, D, config)
    return Networks(G=G, D=D, G_ema=copy.deepcopy(G).eval(), G_trained=G, D_trained=D, G_opt=G_opt, D_opt=D_opt)


def rows(n: int = 8) -> Rows:
    random = torch.Generator().manual_seed(0)
    return Rows(
        real_img=torch.rand(n, 1, 16, 16, generator=random) * 2 - 1,
        label=torch.arange(n) % 2,
        d_z=torch.randn(n, 8, generator=random),
        g_z=torch.randn(n, 8, generator=random),
    )


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_phase_moves_its_own_network_only() -> None:
    nets = networks()
    G, D = weights(nets.G), weights(nets.D)
    step._d_phase(nets, rows(), CONFIG, 1 / 8)
    assert same(G, weights(nets.G))
    assert not same(D, weights(nets.D))
    D = weights(nets.D)
    step._g_phase(nets, rows(), CONFIG, 1 / 8)
    assert not same(G, weights(nets.G))
    assert same(D, weights(nets.D))
    assert all(p.requires_grad for p in nets.D.parameters())


def test_d_learns_to_tell_noise_from_a_constant() -> None:
    config = StepConfig(precision="fp32", g_lr=0.0, d_lr=2e-3)
    nets = networks(config)
    step_rows = rows()
    first = step.iterate(nets, step_rows, config, scale=1 / 8)
    for _ in range(60):
        last = step.iterate(nets, step_rows, config, scale=1 / 8)
    assert last["d_loss"] < 0.3 * first["d_loss"]
    assert last["real_prob"] / 8 > 0.8 > 0.2 > last["gen_prob"] / 8


def test_stats_are_sums_over_rows() -> None:
    stats = step.iterate(networks(), rows(), CONFIG, scale=1 / 8)
    assert set(stats) == {"d_loss", "g_loss", "real_logits", "gen_logits", "real_prob", "gen_prob"}
    assert 0 < stats["real_prob"] < 8


def test_the_scale_makes_a_global_mean() -> None:
    """Two halves scaled by w / B and averaged are the whole: what DDP does with two ranks of unequal shares."""
    nets, both = networks(), rows()
    nets.G.eval()  # batch statistics are the stated exception
    nets.D.eval()

    def gradient(part: slice, scale: float) -> list[torch.Tensor]:
        nets.D.zero_grad()
        loss = step.losses.d_loss(
            "non_saturating",
            nets.D(both.real_img[part], both.label[part]),
            nets.D(nets.G(both.d_z[part], both.label[part]).detach(), both.label[part]),
        )
        (loss * scale).backward()
        return [p.grad.clone() for p in nets.D.parameters() if p.grad is not None]

    whole = gradient(slice(0, 8), 1 / 8)
    shares = [gradient(part, 2 / 8) for part in (slice(0, 3), slice(3, 8))]
    for total, *parts in zip(whole, *shares, strict=True):
        assert torch.allclose(total, sum(parts) / 2, atol=1e-6)


@pytest.mark.parametrize("nimg", [0, 64, 100_000])
def test_ema_beta_is_the_closed_form(nimg: int) -> None:
    assert schedules.ema_beta(nimg, 64, 1000.0, 0.0) == pytest.approx(0.5 ** (64 / 1000))
    ramped = schedules.ema_beta(nimg, 64, 1000.0, 0.05)
    assert ramped == pytest.approx(0.5 ** (64 / min(1000, 0.05 * nimg)) if nimg else 0.0)
    assert schedules.ema_beta(nimg, 64, 0.0, 0.05) == 0.0


def test_ema_halves_its_distance_in_a_half_life() -> None:
    config = StepConfig(ema_half_life_kimg=1.0, ema_ramp=0.0)
    nets = networks(config)
    with torch.no_grad():
        for tensor in [*nets.G.parameters(), *nets.G.buffers()]:
            tensor.zero_()
    before = [p.clone() for p in weights(nets.G_ema)]
    for _ in range(10):
        step.update_ema(nets, 10**6, 100, config)
    for start, now in zip(before, weights(nets.G_ema), strict=True):
        assert torch.allclose(now, start / 2, rtol=1e-5)


def test_ema_of_a_constant_is_the_constant() -> None:
    nets = networks()
    before = weights(nets.G_ema)
    step.update_ema(nets, 64, 64, CONFIG)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(before, weights(nets.G_ema), strict=True))


def test_bf16_stays_near_fp32() -> None:
    exact = step.iterate(networks(), rows(), CONFIG, scale=1 / 8)
    half = step.iterate(networks(), rows(), StepConfig(precision="bf16"), scale=1 / 8)
    for name, value in exact.items():
        assert half[name].item() == pytest.approx(value.item(), rel=0.05, abs=0.1)  # bf16 has 8 bits of precision
