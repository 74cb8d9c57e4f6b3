"""DCGAN: Radford, Metz, Chintala, "Unsupervised representation learning with deep convolutional GANs" (ICLR 2016).

Shapes: N batch, Z latent size, K classes, R resolution, C image channels, W width of a stage.
"""

import itertools

import torch
from torch import nn


def stage_widths(resolution: int, base_width: int, max_width: int) -> list[int]:
    """Channels of the stages from 4×4 up to half the resolution: doubling downwards from `base_width`, capped."""
    stages = resolution.bit_length() - 3
    return [min(max_width, base_width * 2 ** (stages - 1 - i)) for i in range(stages)]


class Generator(nn.Module):
    """Noise → transposed convolutions with batch norm and ReLU, doubling the resolution stage by stage, → tanh.

    z float [N, Z], label int64 [N] (ignored without classes) → float [N, C, R, R] in [-1, 1].
    """

    def __init__(
        self, *, resolution: int, channels: int, num_classes: int, z_dim: int, base_width: int, max_width: int
    ) -> None:
        super().__init__()
        widths = stage_widths(resolution, base_width, max_width)
        self.z_dim = z_dim
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None
        inputs = z_dim * (2 if num_classes else 1)
        layers: list[nn.Module] = [nn.ConvTranspose2d(inputs, widths[0], 4, 1, 0, bias=False)]
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.embed is not None:
            z = torch.cat([z, self.embed(label)], dim=1)
        stem = z[:, :, None, None].contiguous(memory_format=torch.channels_last)
        images: torch.Tensor = self.layers(stem)
        return torch.tanh(images.float())


class Discriminator(nn.Module):
    """Strided convolutions with batch norm and leaky ReLU → one logit, whose sigmoid is the probability of "real".

    image float [N, C, R, R] in [-1, 1], label int64 [N] → float32 logits [N]. With classes a learned plane of the
    class is one more input channel (Mirza and Osindero, "Conditional generative adversarial nets", 2014). A projection
    at the head instead let G answer each class with one image, whatever z.
    """

    def __init__(self, *, resolution: int, channels: int, num_classes: int, base_width: int, max_width: int) -> None:
        super().__init__()
        widths = stage_widths(resolution, base_width, max_width)[::-1]
        self.plane = nn.Embedding(num_classes, resolution**2) if num_classes else None
        inputs = channels + (1 if num_classes else 0)
        layers: list[nn.Module] = [nn.Conv2d(inputs, widths[0], 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), nn.BatchNorm2d(wide)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 4 * 4, 1)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.plane is not None:
            plane = self.plane(label).view(-1, 1, *image.shape[2:])
            image = torch.cat([image, plane], dim=1).contiguous(memory_format=torch.channels_last)
        logits: torch.Tensor = self.head(self.layers(image).flatten(1))[:, 0]
        return logits.float()


def initialise(network: nn.Module, generator: torch.Generator, *, embedding_std: float) -> None:
    """Weights ~ N(0, 0.02), batch-norm gains ~ N(1, 0.02), biases 0, class embeddings ~ N(0, embedding_std)."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.normal_(0.0, 0.02, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1.0, 0.02, generator=generator)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, embedding_std, generator=generator)
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                bias.zero_()
