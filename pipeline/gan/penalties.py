"""Penalties on D's gradient and on weights, exact to a double backward. Each is a sum over the rows given.

The squared norm of a gradient is summed over channels and pixels of a sample. Images are the inputs before any
augmentation: that lies inside D's graph.
"""

from collections.abc import Callable, Iterable

import torch

from pipeline.gan.precision import at_least_float32

Discriminator = Callable[[torch.Tensor], torch.Tensor]
"""Images float [N, C, H, W] → logits [N]; labels and augmentation are bound in it."""


def squared_gradient(D: Discriminator, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N] and Σ |∇ₓD(x)|², a scalar that can be differentiated again.

    At real images half of it times gamma is R1, at generated ones R2: Mescheder, Geiger, Nowozin, "Which training
    methods for GANs do actually converge?" (ICML 2018), eq. 9 and section 4.1.
    """
    image = image.detach().requires_grad_(True)
    logits = D(image)
    # The sum: a logit depends on its own image only, so that the gradient of all is each one's own.
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return logits, at_least_float32(gradient).square().sum()


def finite_difference(
    D: Discriminator, image: torch.Tensor, logits: torch.Tensor, noise: torch.Tensor, sigma: float
) -> torch.Tensor:
    """Σ ((D(x + σ ε) − D(x)) / σ)², ε `noise` ~ N(0, 1) of the images' shape: needs no double backward.

    Its mean over ε is Σ |∇ₓD(x)|² but for terms of order σ². The approximated R1 of Lin et al., "Diffusion adversarial
    post-training for one-step video generation" (ICML 2025), divided by σ².
    """
    return (at_least_float32(D(image.detach() + sigma * noise) - logits) / sigma).square().sum()


def wgan_gp(D: Discriminator, real_img: torch.Tensor, gen_img: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Σ (|∇D(x̂)| − 1)² at x̂ = share · real + (1 − share) · generated, `share` [N] ~ U(0, 1).

    Gulrajani et al., "Improved training of Wasserstein GANs" (NeurIPS 2017), eq. 3.
    """
    between = torch.lerp(gen_img.detach(), real_img, share[:, None, None, None]).requires_grad_(True)
    (gradient,) = torch.autograd.grad(D(between).sum(), between, create_graph=True)
    # Where the gradient is 0 the norm has no derivative, and its square's would be NaN.
    norm = (at_least_float32(gradient).square().sum(dim=(1, 2, 3)) + 1e-12).sqrt()
    return (norm - 1).square().sum()


def weight_l1(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Σ |w| over weights; of biases and gains, tensors of one axis, nothing."""
    return torch.stack([weight.abs().sum() for weight in _weights(parameters)]).sum()


def weight_l2(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """½ Σ w² over weights; its gradient is w. Of biases and gains nothing."""
    return torch.stack([weight.square().sum() for weight in _weights(parameters)]).sum() / 2


def _weights(parameters: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return (parameter for parameter in parameters if parameter.ndim > 1)
