"""The yardstick of bench.py, kept as it is: a GAN iteration as tutorials write it, with the mathematics of step.py.

Eager, float32, NCHW, PyTorch's own layers and default Adam, real and generated images judged apart, a loop for the
moving average. It shares the shape of the networks with what it measures, and nothing else.
"""

import copy

import torch
from torch import nn
from torch.nn import functional

from pipeline.gan.networks import convolution, r3gan
from pipeline.gan.step import StepConfig


class _Upsample(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv_transpose2d(x, _low_pass(x) * 4, stride=2, padding=1, groups=x.shape[1])


class _Downsample(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, _low_pass(x), stride=2, padding=1, groups=x.shape[1])


def _low_pass(x: torch.Tensor) -> torch.Tensor:
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    return torch.outer(row, row).expand(x.shape[1], 1, 4, 4)


def plain_layers(network: nn.Module) -> nn.Module:
    """The same network, in place, of PyTorch's own layers."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, convolution.Conv2d):
                setattr(module, name, _pytorchs(child))
            elif isinstance(child, r3gan.Upsample | r3gan.Downsample):
                setattr(module, name, _Upsample() if isinstance(child, r3gan.Upsample) else _Downsample())
    return network


def _pytorchs(conv: convolution.Conv2d) -> nn.Conv2d:
    assert not isinstance(conv.padding, str)
    kernel_px, padding_px = conv.kernel_size[0], conv.padding[0]
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, kernel_px, padding=padding_px, groups=conv.groups)
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain


class PlainTrainer:
    """G, D and their optimisers; knows what the measured presets need and no more."""

    def __init__(self, G: nn.Module, D: nn.Module, config: StepConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.G, self.D = (
            plain_layers(network).to(device=device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            for network in (G, D)
        )
        self.G_ema = copy.deepcopy(self.G).eval()
        betas = (config.beta1, config.beta2[0])
        self.G_opt = torch.optim.Adam(self.G.parameters(), lr=config.g_lr[0], betas=betas)
        self.D_opt = torch.optim.Adam(self.D.parameters(), lr=config.d_lr[0], betas=betas)

    def iterate(self, real_img: torch.Tensor, label: torch.Tensor) -> None:
        """D steps, a G step, the moving average. real_img float32 NCHW, contiguous."""
        for _ in range(self.config.d_steps):
            self._train_d(real_img, label)
        self._train_g(real_img, label)
        with torch.no_grad():
            for averaged, parameter in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
                averaged.copy_(torch.lerp(parameter, averaged, 0.999))

    def _z(self, count: int) -> torch.Tensor:
        assert isinstance(self.G.z_dim, int)
        return torch.randn(count, self.G.z_dim, device=self.device)

    def _train_d(self, real_img: torch.Tensor, label: torch.Tensor) -> None:
        self.D_opt.zero_grad()
        gen_img = self.G(self._z(len(label)), label).detach()
        penalised = self.config.penalty == "r1_r2"
        real_img, gen_img = (image.detach().requires_grad_(penalised) for image in (real_img, gen_img))
        real_logits = self.D(real_img, label)
        gen_logits = self.D(gen_img, label)
        if self.config.loss == "relativistic":
            loss = functional.softplus(gen_logits - real_logits).mean()
        elif self.config.loss == "hinge":
            loss = functional.relu(1 - real_logits).mean() + functional.relu(1 + gen_logits).mean()
        else:
            ones, zeros = torch.ones_like(real_logits), torch.zeros_like(gen_logits)
            entropy = functional.binary_cross_entropy_with_logits
            loss = entropy(real_logits, ones) + entropy(gen_logits, zeros)
        if penalised:
            r1 = self._squared_gradient(real_logits, real_img)
            r2 = self._squared_gradient(gen_logits, gen_img)
            loss = loss + self.config.gamma[0] / 2 * (r1 + r2)
        loss.backward()  # type: ignore[no-untyped-call]
        self.D_opt.step()

    @staticmethod
    def _squared_gradient(logits: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3)).mean()

    def _train_g(self, real_img: torch.Tensor, label: torch.Tensor) -> None:
        self.G_opt.zero_grad()
        self.D.requires_grad_(False)
        gen_logits = self.D(self.G(self._z(len(label)), label), label)
        if self.config.loss == "relativistic":
            loss = functional.softplus(self.D(real_img, label) - gen_logits).mean()
        elif self.config.loss == "hinge":
            loss = -gen_logits.mean()
        else:
            loss = functional.binary_cross_entropy_with_logits(gen_logits, torch.ones_like(gen_logits))
        loss.backward()  # type: ignore[no-untyped-call]
        self.D.requires_grad_(True)
        self.G_opt.step()
