"""Random changes of the images that D sees, so that it cannot learn a small dataset by heart.

Karras et al., "Training generative adversarial networks with limited data" (NeurIPS 2020), appendix B: as long as each
change is made to less than about 0.8 of the images, real and generated alike, G does not learn to make it. All of it is
differentiable, twice, in the image: gradient penalties are taken at the image before.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import torch
from torch.nn import functional

from pipeline.gan.precision import full_precision
from pipeline.gan.schedules import Schedule

NUM_UNIFORMS = 29
"""Random numbers a row needs."""

_SHIFT, _SCALE_STD, _STRETCH_STD, _NUDGE_STD = 0.125, 0.2, 0.2, 0.125
_BRIGHTNESS_STD, _CONTRAST_STD, _SATURATION_STD, _CUTOUT = 0.2, 0.5, 1.0, 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Which changes, and how often."""

    mode: Literal["none", "fixed", "adaptive"] = "none"
    """none; fixed: with probability p; adaptive: with one that follows how sure D is of real images (ADA)."""
    p: Schedule = (0.0,)
    """fixed: probability of each change, or its start and end over the burn-in; adaptive: the first value."""
    target: float = 0.6
    """adaptive: p grows while the mean sign of D's logits of real images is above this, else it falls."""
    ramp_kimg: float = 500.0
    """adaptive: thousand images in which p can go from 0 to 1."""
    flip: float = 1.0
    """Mirror, half of the time: times p."""
    rotate: float = 1.0
    """By quarters of a turn, and by any angle: times p."""
    shift: float = 1.0
    """By whole pixels up to an eighth of the image, and by any distance (std 0.125): times p."""
    scale: float = 1.0
    """Both ways alike, and one way against the other (std 0.2 of a factor of 2): times p."""
    colour: float = 0.5
    """Brightness, contrast, light for dark, hue, saturation: times p. Grey images have the first three."""
    cutout: float = 1.0
    """A square of half the height made grey: times p."""

    def __post_init__(self) -> None:
        weights = (self.flip, self.rotate, self.shift, self.scale, self.colour, self.cutout)
        if not all(0 <= share <= 1 for share in (*weights, *self.p)) or len(self.p) not in (1, 2):
            raise ValueError("p (one value or two) and the weight of each change must lie in [0, 1]")
        if self.ramp_kimg <= 0 or not -1 < self.target < 1:
            raise ValueError("ramp_kimg must be above 0, and target must lie between -1 and 1")


def augment(image: torch.Tensor, uniforms: torch.Tensor, p: float, config: AugmentConfig) -> torch.Tensor:
    """float NCHW [-1, 1] → the same shape, a change made to a row with probability p × its weight.

    `uniforms` [N, NUM_UNIFORMS] in (0, 1) decide everything: equal rows give equal changes.
    """
    if p == 0:
        return image
    with full_precision(image):
        draws = _Draws(uniforms, p)
        grid = functional.affine_grid(_place(draws, config, image.shape[2]), list(image.shape), align_corners=False)
        moved = resample(image, grid.to(image.dtype))
        return _cutout(_colour(moved, draws, config), draws, config)


def adapted(p: float, mean_sign: float, seen_nimg: float, config: AugmentConfig) -> float:
    """ADA's next p after `seen_nimg` images with the mean sign of D's logits of real ones (section 3.1, r_t)."""
    step = seen_nimg / (config.ramp_kimg * 1000)
    return min(1.0, max(0.0, p + (step if mean_sign > config.target else -step)))


class _Draws:
    """Takes columns of random numbers in turn; each change is gated by one of them."""

    def __init__(self, uniforms: torch.Tensor, p: float) -> None:
        self._columns = iter(uniforms.unbind(1))
        self._p = p

    def uniform(self) -> torch.Tensor:
        """U(0, 1) [N]."""
        return next(self._columns)

    def normal(self) -> torch.Tensor:
        """N(0, 1) [N]."""
        return torch.erfinv(self.uniform() * 2 - 1) * math.sqrt(2)

    def gated(self, weight: float, value: torch.Tensor) -> torch.Tensor:
        """`value` with probability p × weight, else 0."""
        return torch.where(self.uniform() < self._p * weight, value, 0.0)


def _place(draws: _Draws, config: AugmentConfig, resolution: int) -> torch.Tensor:
    """Where each pixel comes from: [N, 2, 3], coordinates in [-1, 1]."""
    flip = 1 - 2 * draws.gated(config.flip, (draws.uniform() * 2).floor())
    quarter = draws.gated(config.rotate, (draws.uniform() * 4).floor()) * (math.pi / 2)
    shift = [draws.uniform() * 2 - 1 for _ in range(2)]
    whole = draws.gated(config.shift, torch.ones_like(flip))
    blit = [whole * (one * _SHIFT * resolution).round() * (2 / resolution) for one in shift]
    scale = torch.exp2(draws.gated(config.scale, draws.normal() * _SCALE_STD))
    angle = draws.gated(config.rotate, (draws.uniform() * 2 - 1) * math.pi)
    stretch = torch.exp2(draws.gated(config.scale, draws.normal() * _STRETCH_STD))
    nudged = draws.gated(config.shift, torch.ones_like(flip))
    nudge = [nudged * draws.normal() * (2 * _NUDGE_STD) for _ in range(2)]
    moves = (
        _scaled(flip, torch.ones_like(flip)),
        _turned(quarter),
        _shifted(*blit),
        _scaled(scale, scale),
        _scaled(stretch, 1 / stretch),
        _turned(angle),
        _shifted(*nudge),
    )
    return functools.reduce(torch.matmul, moves)[:, :2]


def _matrix(*rows: torch.Tensor) -> torch.Tensor:
    """Six entries [N] → [N, 3, 3] with a last row of 0 0 1."""
    zero, one = torch.zeros_like(rows[0]), torch.ones_like(rows[0])
    return torch.stack([*rows, zero, zero, one], dim=1).view(-1, 3, 3)


def _scaled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(x)
    return _matrix(x, zero, zero, zero, y, zero)


def _turned(angle: torch.Tensor) -> torch.Tensor:
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _matrix(cos, -sin, zero, sin, cos, zero)


def _shifted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix(one, zero, x, zero, one, y)


def _colour(image: torch.Tensor, draws: _Draws, config: AugmentConfig) -> torch.Tensor:
    """An affine map of the colour of all pixels of a row alike."""
    brightness = draws.gated(config.colour, draws.normal() * _BRIGHTNESS_STD)[:, None, None]
    contrast = torch.exp2(draws.gated(config.colour, draws.normal() * _CONTRAST_STD))[:, None, None]
    swapped = draws.gated(config.colour, (draws.uniform() * 2).floor())[:, None, None]
    hue = draws.gated(config.colour, (draws.uniform() * 2 - 1) * math.pi)[:, None, None]
    saturation = torch.exp2(draws.gated(config.colour, draws.normal() * _SATURATION_STD))[:, None, None]
    pixels = image.flatten(2)
    grey = pixels.mean(dim=1, keepdim=True)
    around = (1 - 2 * swapped) * grey
    if image.shape[1] == 3:
        tint = pixels - grey
        # A turn about the grey axis k = (1, 1, 1) / √3, across which k × v is (v₃ − v₂, v₁ − v₃, v₂ − v₁) / √3.
        across = (tint.roll(1, dims=1) - tint.roll(-1, dims=1)) / math.sqrt(3)
        around = around + saturation * (hue.cos() * tint + hue.sin() * across)
    return (contrast * (around + brightness)).to(image.dtype).view_as(image)


def _cutout(image: torch.Tensor, draws: _Draws, config: AugmentConfig) -> torch.Tensor:
    size, one = image.shape[2], torch.ones(len(image), device=image.device)
    cut = draws.gated(config.cutout, one)
    middle = (torch.arange(size, device=image.device) + 0.5) / size
    inside = [(middle - draws.uniform()[:, None]).abs() < _CUTOUT / 2 for _ in range(2)]
    hole = inside[0][:, :, None] & inside[1][:, None, :] & (cut > 0)[:, None, None]
    return image.masked_fill(hole[:, None], 0.0)


def resample(image: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Bilinear `grid_sample`, mirrored at the border, that can be differentiated twice in the image.

    image float NCHW, grid float [N, H, W, 2] without gradient → NCHW. PyTorch's own has no second derivative, but it is
    linear in the image: the derivative of its adjoint is itself.
    """
    out: torch.Tensor = _Resample.apply(image, grid)  # type: ignore[no-untyped-call]
    return out


_BILINEAR, _MIRRORED = 0, 2


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = image.shape
        return functional.grid_sample(image, grid, padding_mode="reflection", align_corners=False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grid,) = ctx.saved_tensors
        back: torch.Tensor = _Adjoint.apply(gradients[0], grid, ctx.shape)  # type: ignore[no-untyped-call]
        return back, None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, grid: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(grid)
        # Of the image only the shape matters, since no gradient of the grid is asked for.
        image = gradient.new_empty(1).expand(shape)
        backward = torch.ops.aten.grid_sampler_2d_backward
        back: torch.Tensor = backward(gradient, image, grid, _BILINEAR, _MIRRORED, False, (True, False))[0]
        return back

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return resample(gradients[0], grid), None, None
