"""R3GAN's networks: Huang et al., "The GAN is dead; long live the GAN! A modern GAN baseline" (NeurIPS 2024).

Residual blocks of grouped convolutions, low-pass resampling between them, no normalisation.
D is G mirrored. Shapes: N batch, Z latent size, K classes, E embedding size, R resolution, C image channels, W width.
"""

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional

from pipeline.gan.networks.convolution import Conv2d, downsample, memory_format, upsample
from pipeline.gan.precision import as_autocast, at_least_float32, full_precision

_SLOPE, _EXPANSION, _STEM_PX = 0.2, 2, 4


class Generator(nn.Module):
    """A learned 4×4 start, scaled by what z and the class say, → blocks and ×2 upsampling → 1×1 to the image.

    z float [N, Z], label int64 [N] (ignored without classes) → float32 [N, C, R, R], R = 4 · 2^(stages - 1); nothing
    holds it within [-1, 1].
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        depth: int,
        group_width: int,
        bf16_stages: int,
        channels: int,
        num_classes: int,
        z_dim: int,
        embed_dim: int,
    ) -> None:
        """`widths` W of the stages from 4×4 to the full resolution; `depth` blocks in each, of groups of `group_width`
        channels. Below the `bf16_stages` largest resolutions it computes in float32, whatever autocast says.
        """
        super().__init__()
        self.z_dim = z_dim
        self.embed = nn.Embedding(num_classes, embed_dim) if num_classes else None
        self.start = nn.Parameter(torch.empty(widths[0], _STEM_PX, _STEM_PX))
        self.scale = nn.Linear(z_dim + (embed_dim if num_classes else 0), widths[0], bias=False)
        stages = [_blocks(widths[0], depth, group_width)]
        for before, width in itertools.pairwise(widths):
            stages += [[*_change_width(before, width), Upsample(), *_blocks(width, depth, group_width)]]
        stages[-1] += [Conv2d(widths[-1], channels, 1, bias=False)]
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.in_float32 = [index < len(widths) - bf16_stages for index in range(len(widths))]

    def forward(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.embed is not None:
            z = torch.cat([z, self.embed(label)], dim=1)
        with full_precision(z):
            stem = self.start * self.scale(z)[:, :, None, None]
        # A sum lies as its first term does: without this, everything that a block adds to would be copied to NCHW.
        stem = stem.contiguous(memory_format=self._memory_format())
        return at_least_float32(_through(stem, self.stages, self.in_float32))

    def _memory_format(self) -> torch.memory_format:
        mix = next(module.mix for module in self.modules() if isinstance(module, Block))
        return memory_format(mix.weight)


class Discriminator(nn.Module):
    """1×1 from the image → blocks and ×2 downsampling → a depth-wise 4×4 convolution → one logit.

    image float [N, C, R, R], label int64 [N] → float32 logits [N]. With classes the logit is the dot product of E
    features with the class's embedding (Miyato and Koyama, "cGANs with projection discriminator", ICLR 2018).
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        depth: int,
        group_width: int,
        bf16_stages: int,
        channels: int,
        num_classes: int,
        embed_dim: int,
    ) -> None:
        """As the generator's."""
        super().__init__()
        stages: list[list[nn.Module]] = [[Conv2d(channels, widths[-1], 1, bias=False)]]
        for width, after in itertools.pairwise(reversed(widths)):
            stages[-1] += [*_blocks(width, depth, group_width), Downsample()]
            stages += [_change_width(width, after)]
        stages[-1] += _blocks(widths[0], depth, group_width)
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.in_float32 = [index >= bf16_stages for index in range(len(widths))]
        self.pool = Conv2d(widths[0], widths[0], _STEM_PX, groups=widths[0], bias=False)
        self.head = nn.Linear(widths[0], embed_dim if num_classes else 1, bias=False)
        self.embed = nn.Embedding(num_classes, embed_dim) if num_classes else None

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        pixels = at_least_float32(_through(image, self.stages, self.in_float32))
        with full_precision(image):
            features: torch.Tensor = self.head(self.pool(pixels).flatten(1))
            return features[:, 0] if self.embed is None else (features * self.embed(label)).sum(1)


class Block(nn.Module):
    """x + 1×1(lrelu(3×3 grouped(lrelu(1×1 x)))), a bias before each activation: float [N, W, H, H] → the same."""

    def __init__(self, width: int, group_width: int) -> None:
        super().__init__()
        wide = width * _EXPANSION
        self.expand = Conv2d(width, wide, 1)
        self.mix = Conv2d(wide, wide, 3, padding=1, groups=wide // group_width)
        self.shrink = Conv2d(wide, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        hidden = functional.leaky_relu(self.expand(x), _SLOPE)
        hidden = functional.leaky_relu(self.mix(hidden), _SLOPE)
        return x + self.shrink(hidden)


class Upsample(nn.Module):
    """float [N, W, H, H] → [N, W, 2H, 2H]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return upsample(x)


class Downsample(nn.Module):
    """float [N, W, H, H] → [N, W, H / 2, H / 2]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return downsample(x)


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


def _through(x: torch.Tensor, stages: Iterable[nn.Module], in_float32: Iterable[bool]) -> torch.Tensor:
    for stage, full in zip(stages, in_float32, strict=True):
        if full:
            with full_precision(x):
                x = stage(at_least_float32(x))
        else:
            x = stage(as_autocast(x))
    return x


def _blocks(width: int, depth: int, group_width: int) -> list[nn.Module]:
    return [Block(width, group_width) for _ in range(depth)]


def _change_width(before: int, after: int) -> list[nn.Module]:
    return [Conv2d(before, after, 1, bias=False)] if before != after else []
