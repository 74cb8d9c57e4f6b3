"""Penalties on D's gradient and on weights. Those on the gradient come a row each: the caller sums and scales them.

The squared norm of a gradient is summed over channels and pixels of a sample. Images are the inputs before any
augmentation: that lies inside D's graph.
"""

from collections.abc import Callable, Iterable

import torch

from pipeline.gan.networks.convolution import gradients_of_images_only
from pipeline.gan.precision import at_least_float32

Discriminator = Callable[[torch.Tensor], torch.Tensor]
"""Images float [N, C, H, W] → logits [N]; labels and augmentation are bound in it."""


def squared_gradient(D: Discriminator, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N] and |∇ₓD(x)|² [N], exact, to be differentiated again (double backward).

    At real images half of it times gamma is R1, at generated ones R2: Mescheder, Geiger, Nowozin, "Which training
    methods for GANs do actually converge?" (ICML 2018), eq. 9 and section 4.1.
    """
    image = image.detach().requires_grad_(True)
    logits = D(image)
    return logits, at_least_float32(_slope(logits, image)).square().sum(dim=(1, 2, 3))


def finite_difference(
    D: Discriminator, image: torch.Tensor, sign: torch.Tensor, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N] and ((D(x + σ ε) − D(x)) / σ)² [N]: |∇ₓD(x)|² without a double backward.

    ε is `sign`, -1 or 1 in each channel of each pixel. The mean over ε is |∇ₓD(x)|² but for terms of order σ, as with
    the normal ε of the approximated R1 of Lin et al., "Diffusion adversarial post-training for one-step video
    generation" (ICML 2025), there not divided by σ²; the spread is smaller (Hutchinson 1990).
    """
    image = image.detach()
    logits = D(image)
    return logits, (at_least_float32(D(image + sigma * sign) - logits) / sigma).square()


def wgan_gp(D: Discriminator, real_img: torch.Tensor, gen_img: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """(|∇D(x̂)| − 1)² [N] at x̂ = share · real + (1 − share) · generated, `share` [N] ~ U(0, 1).

    Gulrajani et al., "Improved training of Wasserstein GANs" (NeurIPS 2017), eq. 3.
    """
    between = torch.lerp(gen_img.detach(), real_img, share[:, None, None, None]).requires_grad_(True)
    # Where the gradient is 0 the norm has no derivative, and its square's would be NaN.
    norm = (at_least_float32(_slope(D(between), between)).square().sum(dim=(1, 2, 3)) + 1e-24).sqrt()
    return (norm - 1).square()


def _slope(logits: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """∇ₓD(x), to be differentiated again. A logit depends on its own image alone: the sum's gradient is each one's."""
    with gradients_of_images_only():
        (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return gradient


def weight_l1(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Σ |w| over weights; of biases and gains, tensors of one axis, nothing."""
    return torch.stack([weight.abs().sum() for weight in _weights(parameters)]).sum()


def weight_l2(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """½ Σ w² over weights; its gradient is w. Of biases and gains nothing."""
    return torch.stack([weight.square().sum() for weight in _weights(parameters)]).sum() / 2


def _weights(parameters: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return (parameter for parameter in parameters if parameter.ndim > 1)
