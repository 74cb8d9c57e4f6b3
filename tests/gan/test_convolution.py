"""Our convolution and resampling against PyTorch's own: values, gradients, and gradients of gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.gan.networks.convolution import Conv2d, downsample, gradients_of_images_only, upsample

GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 4, "groups": 4, "bias": False},
    {"kernel_size": 4, "stride": 2, "padding": 1},
]


def pair(geometry: dict[str, int], dtype: torch.dtype = torch.float64) -> tuple[Conv2d, nn.Conv2d]:
    ours, theirs = Conv2d(4, 8, **geometry).to(dtype), nn.Conv2d(4, 8, **geometry).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def photo(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(3, 4, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_(True)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_values_and_both_derivatives_are_pytorchs(geometry: dict[str, int]) -> None:
    found = []
    for conv in pair(geometry):
        image = photo()
        out = conv(image).tanh()
        (slope,) = torch.autograd.grad(out.sum(), image, create_graph=True)
        (out.square().sum() + slope.square().sum()).backward()
        found.append([out.detach(), slope.detach(), image.grad, *(p.grad for p in conv.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_derivatives_by_differences(geometry: dict[str, int]) -> None:
    conv, image = pair(geometry)[0], photo()
    parameters = [p.detach().clone().requires_grad_(True) for p in conv.parameters()]

    def of(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(dict(conv.named_parameters()), values, strict=True))
        return torch.func.functional_call(conv, named, (x,))

    assert torch.autograd.gradcheck(of, (image, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(of, (image, *parameters), fast_mode=True)


@pytest.mark.parametrize("resample", [upsample, downsample])
def test_resampling_has_two_derivatives(resample: Callable[[torch.Tensor], torch.Tensor]) -> None:
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(resample, image)
    assert torch.autograd.gradgradcheck(lambda x: resample(x).square(), image)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_resampling_is_the_filter(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Against the filter as a strided convolution, and its transpose."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    low_pass = torch.outer(row, row).expand(3, 1, 4, 4)
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    larger = functional.conv_transpose2d(image, low_pass * 4, stride=2, padding=1, groups=3)
    smaller = functional.conv2d(image, low_pass, stride=2, padding=1, groups=3)
    close = {"atol": 1e-12} if dtype == torch.float64 else {"atol": 0.03, "rtol": 0.02}
    for found, wanted in ((upsample(image.to(dtype)), larger), (downsample(image.to(dtype)), smaller)):
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=memory_format)
        assert torch.allclose(found.double(), wanted, **close)


def test_weights_are_left_out_where_only_images_are_asked_for() -> None:
    """The slope is the same, its own gradients reach the weights, and no weight's gradient was computed for it."""
    conv, _ = pair(GEOMETRIES[2])
    image = photo()
    out = conv(image).tanh().sum()
    with gradients_of_images_only(), torch.profiler.profile() as seen:
        (slope,) = torch.autograd.grad(out, image, create_graph=True)
    computed = [event.key for event in seen.key_averages()]
    assert "_OfX" in computed
    assert "_OfW" not in computed
    slope.square().sum().backward()
    assert conv.weight.grad.abs().max() > 0
    with torch.profiler.profile() as seen:
        conv(photo()).tanh().sum().backward()
    assert "_OfW" in [event.key for event in seen.key_averages()]


def test_under_autocast_it_computes_in_bf16_and_gradients_are_float32() -> None:
    ours, theirs = pair(GEOMETRIES[1], torch.float32)
    found = []
    for conv in (ours, theirs):
        image = photo(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = conv(image)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert image.grad.dtype == conv.weight.grad.dtype == torch.float32
        found.append([out.detach().float(), image.grad, conv.weight.grad, conv.bias.grad])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=0.1)
