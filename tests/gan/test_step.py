"""An iteration: its gradients against formulas written out, what moves, what stays, and the moving average."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu, softplus

from pipeline.gan import augment, bench, step
from pipeline.gan.augment import AugmentConfig
from pipeline.gan.networks.build import ImageShape, NetworkConfig, build
from pipeline.gan.presets import RECIPES
from pipeline.gan.step import Networks, Now, Rows, StepConfig
from tests.gan.noises import RowNoise

DCGAN = NetworkConfig(z_dim=8, base_width=8)
R3GAN = NetworkConfig(name="r3gan", z_dim=8, base_width=16, max_width=16, depth=1, g_embed_dim=4)
SNGAN = NetworkConfig(name="sngan", z_dim=8, base_width=8, max_width=8)
SHAPE = ImageShape(resolution=16, channels=1, num_classes=2)
CONFIG = StepConfig(precision="fp32")
LOSSES = ("minimax", "non_saturating", "hinge", "least_squares", "wasserstein", "relativistic")
PENALTIES = ("none", "r1", "r2", "r1_r2", "wgan_gp")


def networks(
    network: NetworkConfig = DCGAN, config: StepConfig = CONFIG, dtype: torch.dtype = torch.float32
) -> Networks:
    G, D = (one.to(dtype) for one in build(network, SHAPE, seed=0))
    for block in [*G.modules(), *D.modules()]:
        if hasattr(block, "shrink"):
            nn.init.normal_(block.shrink.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    G_opt, D_opt = step.optimisers(G, D, config)
    G_ema = copy.deepcopy(G).eval()
    return Networks(G=G, D=D, G_ema=G_ema, G_trained=G, D_trained=D, D_judge=D, G_opt=G_opt, D_opt=D_opt)


def rows(start: int = 0, n: int = 8, dtype: torch.dtype = torch.float32) -> Rows:
    random = torch.Generator().manual_seed(start)
    real_img = torch.rand(n, 1, 16, 16, generator=random, dtype=dtype) * 2 - 1
    return Rows(real_img=real_img, label=torch.arange(n) % 2, noise=RowNoise(range(start, start + n), dtype))


def batches(config: StepConfig, n: int = 8, dtype: torch.dtype = torch.float32) -> list[Rows]:
    return [rows(100 * number, n, dtype) for number in range(config.real_batches)]


def iterate(nets: Networks, config: StepConfig, dtype: torch.dtype = torch.float32, n: int = 8) -> dict[str, float]:
    stats = step.iterate(nets, batches(config, n, dtype), config, step.now(config, 0, 0.3), scale=1 / n)
    return {name: value.item() for name, value in stats.items()}


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def gradients(network: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(a, b, strict=True))


def d_loss_written_out(loss: str, real: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    cross_entropy = binary_cross_entropy_with_logits(real, one) + binary_cross_entropy_with_logits(gen, zero)
    return {
        "minimax": cross_entropy,
        "non_saturating": cross_entropy,
        "hinge": relu(1 - real).mean() + relu(1 + gen).mean(),
        "least_squares": ((real - 1) ** 2).mean() / 2 + (gen**2).mean() / 2,
        "wasserstein": gen.mean() - real.mean(),
        "relativistic": softplus(gen - real).mean(),
    }[loss]


def g_loss_written_out(loss: str, real: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    return {
        "minimax": -binary_cross_entropy_with_logits(gen, zero),
        "non_saturating": binary_cross_entropy_with_logits(gen, one),
        "hinge": -gen.mean(),
        "least_squares": ((gen - 1) ** 2).mean() / 2,
        "wasserstein": -gen.mean(),
        "relativistic": softplus(real - gen).mean(),
    }[loss]


def penalty_written_out(
    penalty: str, D: nn.Module, data: Rows, gen_img: torch.Tensor, gamma: float
) -> torch.Tensor | float:
    def slopes(image: torch.Tensor) -> torch.Tensor:
        image = image.detach().requires_grad_(True)
        return torch.autograd.grad(D(image, data.label).sum(), image, create_graph=True)[0].flatten(1)

    total: torch.Tensor | float = 0.0
    if "r1" in penalty:
        total = total + gamma / 2 * (slopes(data.real_img) ** 2).sum(1).mean()
    if "r2" in penalty:
        total = total + gamma / 2 * (slopes(gen_img) ** 2).sum(1).mean()
    if penalty == "wgan_gp":
        share = data.noise.uniforms("between", 1)[:, :, None, None]
        total = gamma * ((slopes(share * data.real_img + (1 - share) * gen_img).norm(dim=1) - 1) ** 2).mean()
    return total


@pytest.mark.parametrize("network", [R3GAN, SNGAN], ids=["r3gan", "sngan"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradients_are_those_of_the_formulas(network: NetworkConfig, loss: Any, penalty: Any) -> None:
    """In float64, each loss with each penalty, means over the batch; D's in its phase, then G's against the new D."""
    config = StepConfig(loss=loss, penalty=penalty, gamma=(0.7,), precision="fp32", d_lr=(1e-3,))
    nets = networks(network, config, torch.float64)
    nets.D.eval()  # spectral norm moves its estimate at each use in training
    plain = copy.deepcopy(nets)
    data = batches(config, dtype=torch.float64)
    stats = iterate(nets, config, torch.float64)

    first = data[0]
    gen_img = plain.G(first.noise.normals("z/D", 8), first.label).detach()
    real_logits, gen_logits = plain.D(first.real_img, first.label), plain.D(gen_img, first.label)
    wanted = d_loss_written_out(loss, real_logits, gen_logits)
    assert stats["d_loss"] / 8 == pytest.approx(wanted.item() if penalty == "none" else stats["d_loss"] / 8)
    total = wanted + penalty_written_out(penalty, plain.D, first, gen_img, 0.7)
    plain.D_opt.zero_grad()
    total.backward()
    assert close(gradients(plain.D), gradients(nets.D))

    last = data[-1]
    D = nets.D  # already moved
    real = D(last.real_img, last.label).detach()
    # G has moved as well: its gradient is taken at the old one.
    gen = D(plain.G(last.noise.normals("z/G", 8), last.label), last.label)
    plain.G_opt.zero_grad()
    g_loss_written_out(loss, real, gen).backward()
    assert close(gradients(plain.G), gradients(nets.G))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("loss", ["hinge", "relativistic"])
def test_parts_of_a_batch_add_up_to_it(penalty: Any, method: Any, loss: Any) -> None:
    if penalty == "wgan_gp" and method != "exact":
        return
    config = StepConfig(
        loss=loss,
        penalty=penalty,
        penalty_method=method,
        precision="fp32",
        weight_l1=0.01,
        weight_l2=0.1,
        augment=AugmentConfig(mode="fixed", p=(0.5,)),
    )
    found = []
    for size in (0, 3, 8, 1):
        nets = networks(R3GAN, config, torch.float64)
        stats = iterate(nets, dataclasses.replace(config, micro_batch=size), torch.float64)
        found.append((gradients(nets.D) + gradients(nets.G), stats))
    for parts, stats in found[1:]:
        assert close(parts, found[0][0])
        assert stats == pytest.approx(found[0][1])


def test_one_pass_over_both_is_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = StepConfig(loss="relativistic", penalty="r1_r2", precision="fp32")
    calls: list[int] = []
    found = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(step, "_mixes_rows", lambda _: True)
        nets = networks(R3GAN, config, torch.float64)
        nets.D.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
        iterate(nets, config, torch.float64)
        found.append(gradients(nets.D) + gradients(nets.G))
    assert calls == [16, 8, 8, *[8] * 4]
    assert close(*found)


def test_batch_norm_never_sees_real_and_generated_images_together() -> None:
    nets, calls = networks(DCGAN), []
    nets.D.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    iterate(nets, CONFIG)
    assert calls == [8, 8, 8]


def test_finite_differences_come_near_the_exact_step() -> None:
    """The means of both penalties over many directions; the losses themselves are the same."""
    exact, near = (
        StepConfig(loss="relativistic", penalty="r1_r2", penalty_method=method, precision="fp32", d_lr=(0.0,))
        for method in ("exact", "finite_difference")
    )
    wanted = iterate(networks(R3GAN, exact), exact, n=256)
    found = iterate(networks(R3GAN, near), near, n=256)
    for name in ("r1_penalty", "r2_penalty"):
        assert found[name] == pytest.approx(wanted[name], rel=0.2)
    for name in ("real_logits", "gen_logits", "g_loss"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-3)


def test_each_phase_moves_its_own_network_only() -> None:
    nets = networks()
    before = weights(nets.G), weights(nets.D)
    g_still, d_still = StepConfig(precision="fp32", g_lr=(0.0,)), StepConfig(precision="fp32", d_lr=(0.0,))
    iterate(nets, g_still)
    assert same(before[0], weights(nets.G))
    assert not same(before[1], weights(nets.D))
    D = weights(nets.D)
    iterate(nets, d_still)
    assert not same(before[0], weights(nets.G))
    assert same(D, weights(nets.D))
    assert all(p.requires_grad for p in nets.D.parameters())


def test_d_learns_to_tell_noise_from_a_constant() -> None:
    config = StepConfig(precision="fp32", g_lr=(0.0,), d_lr=(2e-3,))
    nets = networks(config=config)
    first = iterate(nets, config)
    for _ in range(60):
        last = iterate(nets, config)
    assert last["d_loss"] < 0.3 * first["d_loss"]
    assert last["real_prob"] / 8 > 0.8 > 0.2 > last["gen_prob"] / 8


def test_stats_are_sums_over_rows_whatever_the_number_of_d_steps() -> None:
    names = {"d_loss", "g_loss", "real_logits", "gen_logits", "real_prob", "gen_prob", "real_sign"}
    for d_steps in (1, 3):
        config = StepConfig(precision="fp32", d_steps=d_steps, d_lr=(0.0,))
        stats = iterate(networks(), config)
        assert set(stats) == names
        assert 0 < stats["real_prob"] < 8
    assert set(iterate(networks(), StepConfig(penalty="r1_r2"))) == names | {"r1_penalty", "r2_penalty"}
    assert set(iterate(networks(), StepConfig(penalty="wgan_gp"))) == names | {"gradient_penalty"}


def test_d_takes_as_many_steps_as_it_is_told_each_with_its_batch() -> None:
    config = StepConfig(precision="fp32", d_steps=3, loss="hinge")
    assert config.real_batches == 3
    assert dataclasses.replace(config, loss="relativistic").real_batches == 4
    nets, seen = networks(), []
    nets.D.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    data = batches(config)
    step.iterate(nets, data, config, step.now(config, 0, 0.0), scale=1 / 8)
    for number, batch in enumerate(data):
        assert torch.equal(seen[2 * number], batch.real_img)
    assert len(seen) == 2 * 3 + 1
    assert nets.D_opt.state_dict()["state"][0]["step"] == 3
    assert nets.G_opt.state_dict()["state"][0]["step"] == 1


def test_the_scale_makes_a_global_mean() -> None:
    """Two shares scaled by w / B and averaged are the whole: what DDP does with two ranks of unequal shares."""
    config = StepConfig(loss="relativistic", penalty="r1_r2", precision="fp32", g_lr=(0.0,), d_lr=(0.0,))
    data = batches(config, dtype=torch.float64)

    def found(part: slice, scale: float) -> list[torch.Tensor]:
        nets = networks(R3GAN, config, torch.float64)
        share = [Rows(real_img=b.real_img[part], label=b.label[part], noise=b.noise.part(part)) for b in data]
        step.iterate(nets, share, config, step.now(config, 0, 0.0), scale=scale)
        return gradients(nets.D) + gradients(nets.G)

    whole = found(slice(0, 8), 1 / 8)
    shares = [found(slice(0, 3), 2 / 8), found(slice(3, 8), 2 / 8)]
    assert close(whole, [(a + b) / 2 for a, b in zip(*shares, strict=True)])


def test_schedules_reach_the_optimisers_and_the_penalty() -> None:
    config = StepConfig(
        g_lr=(1.0, 0.5), d_lr=(3.0, 1.0), beta2=(0.9, 0.99), gamma=(8.0, 2.0), burn_in="linear", burn_in_kimg=1.0
    )
    values = step.now(config, 500, 0.0)
    wanted = Now(g_lr=0.75, d_lr=2.0, beta2=0.945, gamma=5.0, ema_half_life_kimg=10.0, augment_p=0.0)
    assert dataclasses.asdict(values) == pytest.approx(dataclasses.asdict(wanted))
    nets = networks()
    step.iterate(nets, batches(config), config, values, scale=1 / 8)
    assert (nets.G_opt.param_groups[0]["lr"], nets.D_opt.param_groups[0]["lr"]) == (0.75, 2.0)
    assert nets.D_opt.param_groups[0]["betas"] == (0.5, values.beta2)


def test_weights_are_regularised() -> None:
    """λ₁ sign(w) + λ₂ w is added to the gradient of each weight, and to no bias."""
    plain = StepConfig(precision="fp32")
    ruled = dataclasses.replace(plain, weight_l1=0.1, weight_l2=0.01)
    found = []
    for config in (plain, ruled):
        nets = networks(R3GAN, config, torch.float64)
        before = weights(nets.D)
        iterate(nets, config, torch.float64)
        found.append(gradients(nets.D))
    for weight, without, added in zip(before, *found, strict=True):
        wanted = 0.1 * weight.sign() + 0.01 * weight if weight.ndim > 1 else torch.zeros_like(weight)
        assert torch.allclose(added - without, wanted, atol=1e-12)


def test_where_augmentation_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """D never sees an image that was not changed; reals and generated ones each have numbers of their own."""
    seen: list[torch.Tensor] = []
    kept = augment.augment

    def spy(image: torch.Tensor, uniforms: torch.Tensor, p: float, config: AugmentConfig) -> torch.Tensor:
        assert p == 0.4
        seen.append(uniforms)
        return kept(image, uniforms, p, config)

    monkeypatch.setattr(step.augment, "augment", spy)
    config = StepConfig(
        loss="relativistic", penalty="r1_r2", augment=AugmentConfig(mode="fixed", p=(0.4,)), precision="fp32"
    )
    iterate(networks(R3GAN, config), config)
    assert [len(uniforms) for uniforms in seen] == [16, 8, 8]
    every = torch.cat(seen)
    assert len(every.unique(dim=0)) == len(every)


def test_what_ada_says_counts_in_its_mode_alone() -> None:
    for mode, wanted in (("none", 0.0), ("fixed", 0.2), ("adaptive", 0.7)):
        config = StepConfig(augment=AugmentConfig(mode=mode, p=(0.2,)))
        assert step.now(config, 0, 0.7).augment_p == wanted


def test_ema_halves_its_distance_in_a_half_life() -> None:
    nets = networks()
    with torch.no_grad():
        for tensor in [*nets.G.parameters(), *nets.G.buffers()]:
            tensor.zero_()
    before = [p.clone() for p in weights(nets.G_ema)]
    for _ in range(10):
        step.update_ema(nets, 10**6, 100, 1.0, 0.0)
    for start, after in zip(before, weights(nets.G_ema), strict=True):
        assert torch.allclose(after, start / 2, rtol=1e-5)


def test_ema_of_a_constant_is_the_constant() -> None:
    nets = networks()
    before = weights(nets.G_ema)
    step.update_ema(nets, 64, 64, 10.0, 0.05)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(before, weights(nets.G_ema), strict=True))


@pytest.mark.parametrize("network", [DCGAN, R3GAN, SNGAN], ids=["dcgan", "r3gan", "sngan"])
def test_bf16_stays_near_fp32(network: NetworkConfig) -> None:
    loss = "relativistic" if network is R3GAN else "non_saturating"
    exact = iterate(networks(network), StepConfig(precision="fp32", loss=loss))
    half = iterate(networks(network), StepConfig(precision="bf16", loss=loss))
    for name, value in exact.items():
        if name != "real_sign":
            assert half[name] == pytest.approx(value, rel=0.05, abs=0.1)  # bf16 has 8 bits of precision


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_within_an_iteration() -> None:
    """PyTorch itself raises where an operation makes the host wait."""
    device = torch.device("cuda")
    config = StepConfig(loss="relativistic", penalty="r1_r2", augment=AugmentConfig(mode="fixed", p=(0.5,)))
    shape = ImageShape(resolution=32, channels=3, num_classes=2)
    side = bench.our_side("ours", dataclasses.replace(RECIPES["r3gan-tiny"], step=config), shape, 8, device)
    side.iterate()
    torch.cuda.set_sync_debug_mode("error")
    try:
        side.iterate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own ways, from several places
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_compiled_is_eager(method: Any) -> None:
    config = StepConfig(loss="relativistic", penalty="r1_r2", penalty_method=method, precision="fp32", compile=True)
    found = []
    for one in (dataclasses.replace(config, compile=False), config):
        nets = networks(R3GAN, one)
        nets.D_judge = step.compile_networks(nets.G, nets.D, one)
        found.append(iterate(nets, one))
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"g_lr": (1e-3, 1e-4)}, "set burn_in_kimg above 0"),
        ({"augment": AugmentConfig(mode="fixed", p=(0.0, 0.5))}, "augment.p has a start and an end"),
        ({"gamma": ()}, "give one value or two"),
        ({"d_lr": (-1.0,)}, "not negative"),
        ({"beta2": (1.0,)}, "beta1 and beta2"),
        ({"d_steps": 0}, "d_steps"),
        ({"weight_l2": -1.0}, "weight_l2"),
        ({"penalty": "wgan_gp", "penalty_method": "finite_difference"}, "no finite differences"),
        ({"loss": "relativistic", "augment": AugmentConfig(mode="adaptive")}, "use mode fixed"),
    ],
)
def test_settings_that_mean_nothing(bad: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        StepConfig(**bad)
