"""R3GAN's networks: Huang et al., "The GAN is dead; long live the GAN! A modern GAN baseline" (NeurIPS 2024).

Residual blocks of grouped convolutions, two at each resolution, low-pass resampling between them, no normalisation.
D is G mirrored. Shapes: N batch, Z latent size, K classes, E embedding size, R resolution, C image channels, W width.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from pipeline.gan.precision import at_least_float32

_SLOPE, _EXPANSION, _BLOCKS_PER_STAGE, _STEM_PX = 0.2, 2, 2, 4


class Generator(nn.Module):
    """A learned 4×4 start, scaled by what z and the class say, → blocks and ×2 upsampling → 1×1 to the image.

    z float [N, Z], label int64 [N] (ignored without classes) → float32 [N, C, R, R], R = 4 · 2^(stages - 1); nothing
    holds it within [-1, 1].
    """

    def __init__(
        self, *, widths: Sequence[int], channels: int, num_classes: int, z_dim: int, embed_dim: int, group_width: int
    ) -> None:
        """`widths` W of the stages from 4×4 to the full resolution; `group_width` channels a group of a block."""
        super().__init__()
        self.z_dim = z_dim
        self.embed = nn.Embedding(num_classes, embed_dim) if num_classes else None
        self.start = nn.Parameter(torch.empty(widths[0], _STEM_PX, _STEM_PX))
        self.scale = nn.Linear(z_dim + (embed_dim if num_classes else 0), widths[0], bias=False)
        layers = _blocks(widths[0], group_width)
        for before, width in itertools.pairwise(widths):
            layers += [*_change_width(before, width), Upsample(), *_blocks(width, group_width)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 1, bias=False))

    def forward(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.embed is not None:
            z = torch.cat([z, self.embed(label)], dim=1)
        stem = self.start * self.scale(z)[:, :, None, None]
        images: torch.Tensor = self.layers(stem.contiguous(memory_format=torch.channels_last))
        return at_least_float32(images)


class Discriminator(nn.Module):
    """1×1 from the image → blocks and ×2 downsampling → a depth-wise 4×4 convolution → one logit.

    image float [N, C, R, R], label int64 [N] → float32 logits [N]. With classes the logit is the dot product of E
    features with the class's embedding (Miyato and Koyama, "cGANs with projection discriminator", ICLR 2018).
    """

    def __init__(
        self, *, widths: Sequence[int], channels: int, num_classes: int, embed_dim: int, group_width: int
    ) -> None:
        """`widths` W of the stages from 4×4 to the full resolution, as the generator's."""
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 1, bias=False)]
        for width, after in itertools.pairwise(reversed(widths)):
            layers += [*_blocks(width, group_width), Downsample(), *_change_width(width, after)]
        layers += _blocks(widths[0], group_width)
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[0], widths[0], _STEM_PX, groups=widths[0], bias=False))
        self.head = nn.Linear(widths[0], embed_dim if num_classes else 1, bias=False)
        self.embed = nn.Embedding(num_classes, embed_dim) if num_classes else None

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        features: torch.Tensor = self.head(self.layers(image).flatten(1))
        if self.embed is None:
            return at_least_float32(features[:, 0])
        return at_least_float32(features * self.embed(label)).sum(1)


class Block(nn.Module):
    """x + 1×1(lrelu(3×3 grouped(lrelu(1×1 x)))), a bias before each activation: float [N, W, H, H] → the same."""

    def __init__(self, width: int, group_width: int) -> None:
        super().__init__()
        wide = width * _EXPANSION
        self.expand = nn.Conv2d(width, wide, 1)
        self.mix = nn.Conv2d(wide, wide, 3, padding=1, groups=wide // group_width)
        self.shrink = nn.Conv2d(wide, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        hidden = functional.leaky_relu(self.expand(x), _SLOPE)
        hidden = functional.leaky_relu(self.mix(hidden), _SLOPE)
        return x + self.shrink(hidden)


class Upsample(nn.Module):
    """×2: zeros between, then the low-pass [1, 3, 3, 1] each way with gain 4: a plane keeps its height."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return functional.conv_transpose2d(x, _low_pass(x) * 4, stride=2, padding=1, groups=x.shape[1])


class Downsample(nn.Module):
    """÷2: the low-pass [1, 3, 3, 1] each way, then every other pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return functional.conv2d(x, _low_pass(x), stride=2, padding=1, groups=x.shape[1])


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Weights ~ N(0, gain / √fan_in), fan_in counting the channels of a group; biases 0; the 4×4 start ~ N(0, 1).

    In blocks the gain is that of leaky ReLU times L^(-1/4) for L blocks, and the last convolution is 0, so that a
    block begins as the identity (Zhang, Dauphin, Ma, "Fixup initialization", ICLR 2019). Elsewhere it is 1, and for the
    embedding that D takes a dot product with, 1/√E. An embedding is a linear layer of a one-hot vector: fan_in is K.
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    gains: dict[nn.Module, float] = {
        layer: _block_gain(len(blocks)) for block in blocks for layer in (block.expand, block.mix)
    }
    gains |= {block.shrink: 0.0 for block in blocks}
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                std = gains.get(module, 1.0) / math.sqrt(module.weight[0].numel())
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                gain = 1 / math.sqrt(module.embedding_dim) if isinstance(network, Discriminator) else 1.0
                module.weight.normal_(0.0, gain / math.sqrt(module.num_embeddings), generator=generator)
        if isinstance(network, Generator):
            network.start.normal_(generator=generator)


def _block_gain(num_blocks: int) -> float:
    return math.sqrt(2 / (1 + _SLOPE**2)) * float(num_blocks) ** -0.25


def _blocks(width: int, group_width: int) -> list[nn.Module]:
    return [Block(width, group_width) for _ in range(_BLOCKS_PER_STAGE)]


def _change_width(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 1, bias=False)] if before != after else []


def _low_pass(x: torch.Tensor) -> torch.Tensor:
    """The normalised separable filter for each channel of x: [W, 1, 4, 4], of x's type and device."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    return torch.outer(row, row).expand(x.shape[1], 1, 4, 4)
