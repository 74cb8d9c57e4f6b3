"""Grouped 3×3 convolutions as products of matrices: in float32, cuDNN launches a kernel for every group.

With R3GAN's 96 groups that was half of an iteration on a GPU. Here all groups go in one batched product. Stride 1,
padding 1; N batch, G groups, c and o channels of a group before and after. Linear in both inputs, like the convolution.
"""

import torch
from torch.nn import functional

from pipeline.gan.precision import full_precision


def pays(x: torch.Tensor, w: torch.Tensor, groups: int, stride: list[int], padding: list[int]) -> bool:
    """Whether a convolution is of this kind, and on a device and in a type where this is faster."""
    ours = groups > 1 and w.shape[1] > 1 and list(w.shape[2:]) == [3, 3] and stride == [1, 1] and padding == [1, 1]
    return ours and x.is_cuda and x.dtype == torch.float32


def convolve(x: torch.Tensor, w: torch.Tensor, groups: int) -> torch.Tensor:
    """x [N, G·c, H, W], w [G·o, c, 3, 3] → x * w, [N, G·o, H, W], channels-last."""
    taps = _by_group(w, 0, groups).permute(0, 3, 4, 2, 1).flatten(1, 3)  # [G, 9·c, o]
    out = _product(_windows(x, groups), taps).view(groups, len(x), *x.shape[2:], -1)  # [G, N, H, W, o]
    return out.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def of_x(g: torch.Tensor, w: torch.Tensor, groups: int) -> torch.Tensor:
    """∂⟨g, x * w⟩/∂x: again a convolution, with the taps turned round and c and o exchanged."""
    turned = _by_group(w, 0, groups).transpose(1, 2).flatten(0, 1).flip(2, 3)
    return convolve(g, turned, groups)


def of_w(x: torch.Tensor, g: torch.Tensor, groups: int) -> torch.Tensor:
    """∂⟨g, x * w⟩/∂w, [G·o, c, 3, 3]."""
    rows = _by_group(g, 1, groups).permute(1, 0, 3, 4, 2).flatten(1, 3)  # [G, N·H·W, o]
    taps = _product(_windows(x, groups).transpose(1, 2), rows)
    return taps.view(groups, 3, 3, -1, rows.shape[2]).permute(0, 4, 3, 1, 2).flatten(0, 1)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in their own type: gradients are asked for within autocast, which a convolution's derivative ignores."""
    with full_precision(a):
        return torch.bmm(a, b)


def _windows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """The 3×3 surroundings of every pixel, [G, N·H·W, 9·c]."""
    windows = functional.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # [N, G·c, H, W, 3, 3]
    return _by_group(windows, 1, groups).permute(1, 0, 3, 4, 5, 6, 2).flatten(4).flatten(1, 3)


def _by_group(x: torch.Tensor, dim: int, groups: int) -> torch.Tensor:
    """A dimension of G·c values as two, of G and of c."""
    split: torch.Tensor = x.unflatten(dim, (groups, -1))  # type: ignore[no-untyped-call]
    return split
