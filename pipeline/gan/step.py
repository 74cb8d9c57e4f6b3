"""One iteration of training: D phases, the G phase, the moving average. Knows no rank, path, logger or Ray."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from pipeline.gan import augment, losses, penalties, schedules
from pipeline.gan.augment import AugmentConfig
from pipeline.gan.networks import spectral
from pipeline.gan.noise import Noise
from pipeline.gan.precision import Precision, autocast
from pipeline.gan.schedules import Schedule

_SCHEDULED = ("g_lr", "d_lr", "beta2", "gamma", "ema_half_life_kimg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Loss, penalties, optimisers, augmentation, averaging, arithmetic."""

    loss: losses.LossName = "non_saturating"
    """What D and G minimise; see losses.py."""
    d_steps: int = 1
    """D phases before each G phase, each with its own real batch; an iteration counts as one batch of images seen."""
    penalty: Literal["none", "r1", "r2", "r1_r2", "wgan_gp"] = "none"
    """On D's gradient: at real images, at generated ones, at both, or between them."""
    penalty_method: Literal["exact", "finite_difference"] = "exact"
    """R1 and R2 by a double backward, or by D at a nearby image: cheaper, noisier, and D can be compiled."""
    penalty_sigma: float = 0.01
    """finite_difference: how far the nearby image lies from the image, each channel of each pixel."""
    gamma: Schedule = (1.0,)
    """Weight of the penalty: gamma / 2 times R1 and R2, gamma times WGAN-GP. One value, or start and end of burn-in."""
    weight_l1: float = 0.0
    """Weight of the sum of the absolute values of a network's weights, in the loss of each network."""
    weight_l2: float = 0.0
    """Weight of half their sum of squares."""
    g_lr: Schedule = (2e-4,)
    """Adam's learning rate for G. One value, or start and end of burn-in."""
    d_lr: Schedule = (2e-4,)
    """Adam's learning rate for D. One value, or start and end of burn-in."""
    beta1: float = 0.5
    """Adam's first decay, both networks."""
    beta2: Schedule = (0.999,)
    """Adam's second decay, both networks. One value, or start and end of burn-in."""
    ema_half_life_kimg: Schedule = (10.0,)
    """Half-life of G_ema in thousand images; 0: G_ema is G. One value, or start and end of burn-in."""
    ema_ramp: float = 0.05
    """The half-life is at most this share of the images seen; 0: no ramp."""
    burn_in_kimg: float = 0.0
    """Thousand images over which what has a start and an end goes from the one to the other."""
    burn_in: schedules.BurnIn = "cosine"
    """The way it goes."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """Random changes of what D sees."""
    precision: Precision = "bf16"
    """Arithmetic of forward and backward passes; weights and optimiser stay float32. fp32 where bf16 is emulated."""
    compile: bool = False
    """torch.compile, but for D where a penalty needs its second derivative. Pays on GPUs."""
    micro_batch: int = 0
    """Most rows of a forward pass of one worker, the gradients being added up; batch norm sees so many. 0: all."""

    def __post_init__(self) -> None:
        pairs = {name: getattr(self, name) for name in _SCHEDULED} | {"augment.p": self.augment.p}
        for name, values in pairs.items():
            if len(values) not in (1, 2) or min(values) < 0:
                raise ValueError(f"{name} is {values}: give one value or two, not negative")
            if len(values) == 2 and self.burn_in_kimg <= 0:
                raise ValueError(f"{name} has a start and an end; set burn_in_kimg above 0, or give one value")
        if min(self.ema_ramp, self.weight_l1, self.weight_l2, self.burn_in_kimg, self.micro_batch) < 0:
            raise ValueError("ema_ramp, weight_l1, weight_l2, burn_in_kimg and micro_batch must not be negative")
        if not (0 <= self.beta1 < 1 and max(self.beta2) < 1):
            raise ValueError("beta1 and beta2 must lie in [0, 1)")
        if self.d_steps < 1 or self.penalty_sigma <= 0:
            raise ValueError("d_steps must be at least 1 and penalty_sigma above 0")
        if self.penalty == "wgan_gp" and self.penalty_method != "exact":
            raise ValueError("penalty wgan_gp has no finite differences; set penalty_method exact")
        if self.augment.mode == "adaptive" and self.loss in ("wasserstein", "relativistic"):
            raise ValueError(
                f"augment.mode adaptive reads the sign of D's logits, which says nothing with loss {self.loss}; "
                "use mode fixed"
            )

    @property
    def real_batches(self) -> int:
        """R, real batches an iteration consumes: one a D phase, and one more where G's loss sees reals."""
        return self.d_steps + (self.loss == "relativistic")

    @property
    def differentiates_d_twice(self) -> bool:
        """Whether D's gradient is itself differentiated."""
        return self.penalty != "none" and self.penalty_method == "exact"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Now:
    """What StepConfig's schedules say at one clock."""

    g_lr: float
    d_lr: float
    beta2: float
    gamma: float
    ema_half_life_kimg: float
    augment_p: float


@dataclasses.dataclass(kw_only=True)
class Networks:
    """G and D, each as it is and as it is trained (the same object, or its DDP wrapper), G_ema and the optimisers."""

    G: nn.Module
    D: nn.Module
    G_ema: nn.Module
    G_trained: nn.Module
    D_trained: nn.Module
    D_judge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """D as the G phase calls it: D itself, or its compiled form where the D phase cannot use that."""
    G_opt: torch.optim.Optimizer
    D_opt: torch.optim.Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What one rank feeds to one phase: its rows of a global batch."""

    real_img: torch.Tensor  # float32 NCHW [-1, 1]
    label: torch.Tensor  # int64 [n], 0 without classes
    noise: Noise

    def parts(self, size: int) -> Iterator["Rows"]:
        """Runs of at most `size` rows; 0: all in one."""
        if not size or size >= len(self.label):
            yield self
            return
        for start in range(0, len(self.label), size):
            rows = slice(start, start + size)
            yield Rows(real_img=self.real_img[rows], label=self.label[rows], noise=self.noise.part(rows))


def optimisers(G: nn.Module, D: nn.Module, config: StepConfig) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    """Adam for G and for D (Kingma and Ba, ICLR 2015)."""
    betas = (config.beta1, config.beta2[0])
    return (
        torch.optim.Adam(G.parameters(), lr=config.g_lr[0], betas=betas, fused=True),
        torch.optim.Adam(D.parameters(), lr=config.d_lr[0], betas=betas, fused=True),
    )


def now(config: StepConfig, cur_nimg: int, augment_p: float) -> Now:
    """The values of an iteration that starts at `cur_nimg`; `augment_p` is what ADA says, if it is asked."""
    at = functools.partial(
        schedules.value_at, cur_nimg=cur_nimg, burn_in_nimg=config.burn_in_kimg * 1000, shape=config.burn_in
    )
    p = {"none": 0.0, "fixed": at(config.augment.p), "adaptive": augment_p}[config.augment.mode]
    return Now(**{name: at(getattr(config, name)) for name in _SCHEDULED}, augment_p=p)


def iterate(
    nets: Networks, batches: Sequence[Rows], config: StepConfig, values: Now, *, scale: float
) -> Mapping[str, torch.Tensor]:
    """D phases, then the G phase, on this rank's rows of R batches; returns detached sums over the rows of a batch.

    `scale` = world size / global batch: losses are sums over local rows, so that the mean that DDP takes over ranks is
    the mean over the global batch, whatever each rank's share. The G phase takes the last batch, with noise of its own.
    """
    assert len(batches) == config.real_batches
    betas = (config.beta1, values.beta2)
    for optimiser, lr in ((nets.D_opt, values.d_lr), (nets.G_opt, values.g_lr)):
        optimiser.param_groups[0].update(lr=lr, betas=betas)
    sums: dict[str, torch.Tensor] = {}
    d_loss, g_loss = (functools.partial(loss, nets, config, values) for loss in (_d_loss, _g_loss))
    for rows in batches[: config.d_steps]:
        _add(sums, _phase(nets, nets.D_opt, nets.D_trained, rows, d_loss, config, scale))
    sums = {name: value / config.d_steps for name, value in sums.items()}
    with frozen(nets.D):
        return sums | _phase(nets, nets.G_opt, nets.G_trained, batches[-1], g_loss, config, scale)


_Loss = Callable[[Rows], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Rows → the sum of their losses, and sums to report."""


def _phase(
    nets: Networks,
    optimiser: torch.optim.Optimizer,
    trained: nn.Module,
    rows: Rows,
    loss_of: _Loss,
    config: StepConfig,
    scale: float,
) -> dict[str, torch.Tensor]:
    """One step of an optimiser on all rows, in parts if need be."""
    optimiser.zero_grad(set_to_none=True)
    sums: dict[str, torch.Tensor] = {}
    parts = list(rows.parts(config.micro_batch))
    for number, part in enumerate(parts):
        last = part is parts[-1]
        with contextlib.ExitStack() as stack:
            if number:
                stack.enter_context(spectral.held(nets.D))
            if not last:
                # Ranks average their gradients once a phase: while its last part goes backward.
                stack.enter_context(_no_sync(trained))
            with autocast(config.precision, part.real_img.device):
                loss, stats = loss_of(part)
            total = loss * scale + _of_weights(trained, config) if last else loss * scale
            total.backward()  # type: ignore[no-untyped-call]
        _add(sums, stats)
    optimiser.step()
    return sums


def _d_loss(
    nets: Networks, config: StepConfig, values: Now, rows: Rows
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.no_grad():
        gen_img = nets.G(rows.noise.normals("z/D", _z_dim(nets)), rows.label)
    logits, squares = _judged(nets, config, values, rows, {"real": rows.real_img, "gen": gen_img})
    loss = losses.d_loss(config.loss, logits["real"], logits["gen"])
    stats = _of_logits(logits) | {"d_loss": loss.detach()}
    for name, kind in (("r1_penalty", "real"), ("r2_penalty", "gen")):
        if kind in squares:
            loss = loss + squares[kind].sum() * (values.gamma / 2)
            stats[name] = squares[kind].detach().sum()
    if config.penalty == "wgan_gp":
        share = rows.noise.uniforms("between", 1)[:, 0]
        between = penalties.wgan_gp(
            _view(nets.D_trained, config, values, rows, ["D/between"]), rows.real_img, gen_img, share
        )
        loss = loss + between.sum() * values.gamma
        stats["gradient_penalty"] = between.detach().sum()
    return loss, stats


def _g_loss(
    nets: Networks, config: StepConfig, values: Now, rows: Rows
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    gen_img = nets.G_trained(rows.noise.normals("z/G", _z_dim(nets)), rows.label)
    gen_logits = _view(nets.D_judge, config, values, rows, ["G/gen"])(gen_img)
    if config.loss == "relativistic":
        with torch.no_grad():
            real_logits = _view(nets.D_judge, config, values, rows, ["G/real"])(rows.real_img)
        loss = losses.relativistic_g_loss(real_logits, gen_logits)
    else:
        loss = losses.g_loss(config.loss, gen_logits)
    return loss, {"g_loss": loss.detach()}


_PENALISED: Mapping[str, set[str]] = {"r1": {"real"}, "r2": {"gen"}, "r1_r2": {"real", "gen"}}


def _judged(
    nets: Networks, config: StepConfig, values: Now, rows: Rows, images: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Logits [n] of real and generated images, and the squared norm [n] of D's gradient where it is penalised.

    One pass over both where D treats each row alone and the penalty treats both alike: larger batches are faster.
    """
    penalised = _PENALISED.get(config.penalty, set())
    together = len(penalised) != 1 and not _mixes_rows(nets.D)
    logits: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    for kinds in [["real", "gen"]] if together else [["real"], ["gen"]]:
        D = _view(nets.D_trained, config, values, rows, [f"D/{kind}" for kind in kinds])
        image = torch.cat([images[kind] for kind in kinds])
        if kinds[0] not in penalised:
            judged = D(image)
        elif config.penalty_method == "exact":
            judged, slopes = penalties.squared_gradient(D, image)
            squares |= _split(kinds, slopes)
        else:
            signs = torch.cat([rows.noise.signs(f"sign/{kind}", image[0].numel()) for kind in kinds])
            judged, slopes = penalties.finite_difference(D, image, signs.view_as(image), config.penalty_sigma)
            squares |= _split(kinds, slopes)
        logits |= _split(kinds, judged)
    return logits, squares


def _split(kinds: list[str], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(kinds, rows.chunk(len(kinds)), strict=True))


def _view(
    D: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    config: StepConfig,
    values: Now,
    rows: Rows,
    purposes: list[str],
) -> penalties.Discriminator:
    """D as a function of images alone, as many times the rows as there are purposes: labels and changes are bound."""
    label, p = rows.label.repeat(len(purposes)), values.augment_p
    if p == 0:
        return lambda image: D(image, label)
    uniforms = torch.cat([rows.noise.uniforms(f"augment/{one}", augment.NUM_UNIFORMS) for one in purposes])
    return lambda image: D(augment.augment(image, uniforms, p, config.augment), label)


def _of_logits(logits: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    real, gen = logits["real"].detach(), logits["gen"].detach()
    return {
        "real_logits": real.sum(),
        "gen_logits": gen.sum(),
        "real_prob": torch.sigmoid(real).sum(),
        "gen_prob": torch.sigmoid(gen).sum(),
        "real_sign": real.sign().sum(),
    }


def _of_weights(network: nn.Module, config: StepConfig) -> torch.Tensor | float:
    l1 = config.weight_l1 * penalties.weight_l1(network.parameters()) if config.weight_l1 else 0.0
    return l1 + (config.weight_l2 * penalties.weight_l2(network.parameters()) if config.weight_l2 else 0.0)


def _mixes_rows(D: nn.Module) -> bool:
    """Batch norm: real and generated images never share its statistics."""
    return any(isinstance(module, nn.BatchNorm2d) for module in D.modules())


def _z_dim(nets: Networks) -> int:
    z_dim = nets.G.z_dim
    assert isinstance(z_dim, int)
    return z_dim


def _no_sync(trained: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Of DDP: leave out the exchange between ranks. A bare network has none."""
    no_sync: Callable[[], contextlib.AbstractContextManager[None]] = getattr(trained, "no_sync", contextlib.nullcontext)
    return no_sync()


def _add(sums: dict[str, torch.Tensor], more: Mapping[str, torch.Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


@contextlib.contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Its parameters take no gradient: DDP then has no unused ones and the backward pass does less."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def compile_networks(
    G: nn.Module, D: nn.Module, config: StepConfig
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Compile G, and D where nothing differentiates it twice, in place; returns D as the G phase is to call it."""
    if not config.compile:
        return D
    G.compile()
    if config.differentiates_d_twice:
        return torch.compile(D)
    D.compile()
    return D


@torch.no_grad()
def update_ema(nets: Networks, cur_nimg: int, batch_size: int, half_life_kimg: float, ramp: float) -> None:
    """G_ema ← β G_ema + (1 − β) G, batch-norm statistics too: averaged weights need averaged statistics."""
    beta = schedules.ema_beta(cur_nimg, batch_size, half_life_kimg * 1000, ramp)
    ours, theirs = _float_state(nets.G_ema), _float_state(nets.G)
    torch._foreach_lerp_(ours, theirs, 1.0 - beta)


def _float_state(network: nn.Module) -> list[torch.Tensor]:
    tensors = [*network.parameters(), *network.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
