"""DCGAN: Radford, Metz, Chintala, "Unsupervised representation learning with deep convolutional GANs" (ICLR 2016).

Shapes: N batch, Z latent size, K classes, R resolution, C image channels, W width of a stage.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from pipeline.gan.precision import at_least_float32


class Generator(nn.Module):
    """Noise → transposed convolutions with batch norm and ReLU, doubling the resolution stage by stage, → tanh.

    z float [N, Z], label int64 [N] (ignored without classes) → float [N, C, R, R] in [-1, 1].
    """

    def __init__(self, *, widths: Sequence[int], depth: int, channels: int, num_classes: int, z_dim: int) -> None:
        """`widths` of the stages from 4×4 to half the resolution; `depth` convolutions in each, all but one of 3×3."""
        super().__init__()
        self.z_dim = z_dim
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None
        inputs = z_dim * (2 if num_classes else 1)
        layers: list[nn.Module] = [nn.ConvTranspose2d(inputs, widths[0], 4, 1, 0, bias=False)]
        for wide, narrow in itertools.pairwise(widths):
            layers += [*_normalised(wide, nn.ReLU(inplace=True)), *_deeper(wide, depth, nn.ReLU(inplace=True))]
            layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)]
        last = widths[-1]
        layers += [*_normalised(last, nn.ReLU(inplace=True)), *_deeper(last, depth, nn.ReLU(inplace=True))]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(last, channels, 4, 2, 1))

    def forward(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.embed is not None:
            z = torch.cat([z, self.embed(label)], dim=1)
        images: torch.Tensor = self.layers(z[:, :, None, None])
        return torch.tanh(at_least_float32(images))


class Discriminator(nn.Module):
    """Strided convolutions with batch norm and leaky ReLU → one logit, whose sigmoid is the probability of "real".

    image float [N, C, R, R] in [-1, 1], label int64 [N] → float32 logits [N]. With classes a learned plane of the
    class is one more input channel (Mirza and Osindero, "Conditional generative adversarial nets", 2014). A projection
    at the head instead let G answer each class with one image, whatever z.
    """

    def __init__(self, *, widths: Sequence[int], depth: int, channels: int, num_classes: int) -> None:
        """`widths` of the stages from 4×4 to half the resolution, as the generator's."""
        super().__init__()
        resolution = 4 * 2 ** len(widths)
        self.plane = nn.Embedding(num_classes, resolution**2) if num_classes else None
        inputs, last = channels + (1 if num_classes else 0), widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(inputs, last, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        layers += _deeper(last, depth, nn.LeakyReLU(0.2, inplace=True))
        for narrow, wide in itertools.pairwise(reversed(widths)):
            layers += [nn.Conv2d(narrow, wide, 4, 2, 1, bias=False)]
            layers += _normalised(wide, nn.LeakyReLU(0.2, inplace=True))
            layers += _deeper(wide, depth, nn.LeakyReLU(0.2, inplace=True))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[0] * 4 * 4, 1)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.plane is not None:
            plane = self.plane(label).view(-1, 1, *image.shape[2:])
            image = torch.cat([image, plane], dim=1)
        logits: torch.Tensor = self.head(self.layers(image).flatten(1))[:, 0]
        return at_least_float32(logits)


def _normalised(width: int, activation: nn.Module) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), activation]


def _deeper(width: int, depth: int, activation: nn.Module) -> list[nn.Module]:
    """The convolutions of a stage beyond the one that resamples."""
    return [
        layer
        for _ in range(depth - 1)
        for layer in (nn.Conv2d(width, width, 3, 1, 1, bias=False), *_normalised(width, activation))
    ]


# A class that speaks as loud as z (std 1) is all that G hears: images of a class then hardly differed (spread over z
# 0.48 of the real images' after 80 kimg of Fashion-MNIST, against 0.80 with 0.3).
_G_EMBEDDING_STD, _D_EMBEDDING_STD = 0.3, 1.0


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Weights ~ N(0, 0.02), batch-norm gains ~ N(1, 0.02), biases 0, embeddings ~ N(0, 0.3) in G, N(0, 1) in D."""
    embedding_std = _G_EMBEDDING_STD if isinstance(network, Generator) else _D_EMBEDDING_STD
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
