"""Convolutions and resampling whose second derivatives are as fast as their first.

PyTorch's double backward of a grouped convolution takes one group after the other, and its depth-wise transposed
convolution has no fast bf16 kernel. All of these are linear in each of their inputs, so that the derivative of a
derivative is again one of the same few operations. Layers from here also leave weights out of a gradient that only
images are asked for, which PyTorch's engine does not tell a function.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipeline.gan.networks import grouped
from pipeline.gan.precision import as_autocast

_images_only = 0


@contextlib.contextmanager
def gradients_of_images_only() -> Iterator[None]:
    """Within it, gradients of weights are left out. For all threads: a GPU's backward pass runs in one of its own."""
    global _images_only
    _images_only += 1
    try:
        yield
    finally:
        _images_only -= 1


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`; the same parameters and values."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert not isinstance(self.padding, str)
        geometry = (list(self.stride), list(self.padding), list(self.dilation), False, [0, 0], self.groups)
        input, weight = as_autocast(input), as_autocast(weight)
        bias = None if bias is None else as_autocast(bias)
        out: torch.Tensor = _Convolution.apply(input, weight, bias, geometry)  # type: ignore[no-untyped-call]
        return out


class _Convolution(torch.autograd.Function):
    """x, w, b → x * w + b."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, geometry: Any) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        if not _pays(x, w, geometry):
            return torch.ops.aten.convolution(x, w, b, *geometry)
        out = grouped.convolve(x, w, geometry[-1])
        return out if b is None else out + b[:, None, None]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,), (x, w) = gradients, ctx.saved_tensors
        for_x, for_w, for_b, _ = ctx.needs_input_grad
        of_x = _of_x(g, w, x, ctx.geometry) if for_x else None
        of_w = _of_w(x, g, w, ctx.geometry) if for_w and not _images_only else None
        of_b = g.sum(dim=(0, 2, 3)) if for_b and not _images_only else None
        return of_x, of_w, of_b, None


class _OfX(torch.autograd.Function):
    """The gradient of a convolution in its image: g, w → ∂⟨g, x * w⟩/∂x. Of x it takes the shape alone."""

    @staticmethod
    def forward(ctx: Any, g: torch.Tensor, w: torch.Tensor, x: torch.Tensor, geometry: Any) -> torch.Tensor:
        ctx.save_for_backward(g, w)
        ctx.geometry = geometry
        if _pays(g, w, geometry):
            return grouped.of_x(g, w, geometry[-1])
        backward = torch.ops.aten.convolution_backward
        out: torch.Tensor = backward(g, x, w, None, *geometry, (True, False, False))[0]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gg,), (g, w) = gradients, ctx.saved_tensors
        for_g, for_w, _, _ = ctx.needs_input_grad
        of_g = _convolution(gg, w, ctx.geometry) if for_g else None
        of_w = _of_w(gg, g, w, ctx.geometry) if for_w and not _images_only else None
        return of_g, of_w, None, None


class _OfW(torch.autograd.Function):
    """The gradient of a convolution in its weight: x, g → ∂⟨g, x * w⟩/∂w. Of w it takes the shape alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, g: torch.Tensor, w: torch.Tensor, geometry: Any) -> torch.Tensor:
        ctx.save_for_backward(x, g)
        ctx.geometry = geometry
        if _pays(x, w, geometry):
            return grouped.of_w(x, g, geometry[-1]).contiguous(memory_format=memory_format(w))
        backward = torch.ops.aten.convolution_backward
        out: torch.Tensor = backward(g, x, w, None, *geometry, (False, True, False))[1]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gg,), (x, g) = gradients, ctx.saved_tensors
        for_x, for_g, _, _ = ctx.needs_input_grad
        of_x = _of_x(g, gg, x, ctx.geometry) if for_x else None
        return of_x, _convolution(x, gg, ctx.geometry) if for_g else None, None, None


def _pays(x: torch.Tensor, w: torch.Tensor, geometry: Any) -> bool:
    stride, padding, *_, groups = geometry
    return grouped.pays(x, w, groups, stride, padding)


def _convolution(x: torch.Tensor, w: torch.Tensor, geometry: Any) -> torch.Tensor:
    out: torch.Tensor = _Convolution.apply(x, w, None, geometry)  # type: ignore[no-untyped-call]
    return out


def _of_x(g: torch.Tensor, w: torch.Tensor, x: torch.Tensor, geometry: Any) -> torch.Tensor:
    out: torch.Tensor = _OfX.apply(g, w, x.detach(), geometry)  # type: ignore[no-untyped-call]
    return out


def _of_w(x: torch.Tensor, g: torch.Tensor, w: torch.Tensor, geometry: Any) -> torch.Tensor:
    out: torch.Tensor = _OfW.apply(x, g, w.detach(), geometry)  # type: ignore[no-untyped-call]
    return out


def upsample(x: torch.Tensor) -> torch.Tensor:
    """×2: zeros between, then the low-pass [1, 3, 3, 1] / 8 each way with gain 4: a plane keeps its height."""
    out: torch.Tensor = _Upsample.apply(x)  # type: ignore[no-untyped-call]
    return out


def downsample(x: torch.Tensor) -> torch.Tensor:
    """÷2: the low-pass [1, 3, 3, 1] / 8 each way, then every other pixel."""
    out: torch.Tensor = _Downsample.apply(x)  # type: ignore[no-untyped-call]
    return out


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        # Inside, the filter is bilinear interpolation; a border of zeros makes it so at the edge.
        padded = functional.pad(x, (1, 1, 1, 1))
        larger = functional.interpolate(padded, scale_factor=2, mode="bilinear", align_corners=False)
        return larger[:, :, 2:-2, 2:-2].contiguous(memory_format=memory_format(x))

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return downsample(gradients[0]) * 4


class _Downsample(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        # Filled on the device: a list from the host would make it wait for the kernels before.
        row = torch.full((4,), 1 / 8, device=x.device, dtype=x.dtype)
        row[1:3] = 3 / 8
        low_pass = torch.outer(row, row).expand(x.shape[1], 1, 4, 4)
        return functional.conv2d(x, low_pass, stride=2, padding=1, groups=x.shape[1])

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return upsample(gradients[0]) / 4


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """How the values of x lie: channels-last or contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
