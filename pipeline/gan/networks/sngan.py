"""SNGAN: Miyato et al., "Spectral normalization for generative adversarial networks" (ICLR 2018), table 3.

Classes enter G by the gains of its batch norm and D by projection (Miyato and Koyama, "cGANs with projection
discriminator", ICLR 2018). Shapes: N batch, Z latent size, K classes, R resolution, C image channels, W width.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from pipeline.gan.networks.spectral import spectral_norm
from pipeline.gan.precision import at_least_float32

_STEM_PX, _D_BLOCKS_AT_THE_END = 4, 2


class Generator(nn.Module):
    """A linear layer to 4×4 → residual blocks that double the resolution, with batch norm and ReLU → tanh.

    z float [N, Z], label int64 [N] (ignored without classes) → float [N, C, R, R] in [-1, 1].
    """

    def __init__(self, *, widths: Sequence[int], depth: int, channels: int, num_classes: int, z_dim: int) -> None:
        """`widths` W of the stages from 4×4 to R; `depth` blocks in each stage above 4×4."""
        super().__init__()
        self.z_dim = z_dim
        self.stem = nn.Linear(z_dim, widths[0] * _STEM_PX**2)
        blocks = []
        for before, width in itertools.pairwise(widths):
            blocks += [UpBlock(before, width, 2, num_classes)]
            blocks += [UpBlock(width, width, 1, num_classes) for _ in range(depth - 1)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.stem(z).view(len(z), -1, _STEM_PX, _STEM_PX)
        for block in self.blocks:
            x = block(x, label)
        images: torch.Tensor = self.to_image(functional.relu(self.norm(x)))
        return torch.tanh(at_least_float32(images))


class Discriminator(nn.Module):
    """Residual blocks that halve the resolution down to 8×8, two that keep it → sum over pixels → one logit.

    image float [N, C, R, R] in [-1, 1], label int64 [N] → float32 logits [N]. Every weight is divided by its largest
    singular value. With classes the class's embedding · features is added to the logit.
    """

    def __init__(self, *, widths: Sequence[int], depth: int, channels: int, num_classes: int) -> None:
        """`widths` W of the stages from 8×8 to R / 2; `depth` blocks in each."""
        super().__init__()
        blocks: list[nn.Module] = []
        for before, width in itertools.pairwise([channels, *reversed(widths)]):
            blocks += [DownBlock(before, width, 2, activate_first=bool(blocks))]
            blocks += [DownBlock(width, width, 1) for _ in range(depth - 1)]
        blocks += [DownBlock(widths[0], widths[0], 1) for _ in range(_D_BLOCKS_AT_THE_END)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[0], 1)
        self.embed = nn.Embedding(num_classes, widths[0]) if num_classes else None

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        features = at_least_float32(functional.relu(self.blocks(image))).sum(dim=(2, 3))
        logits = at_least_float32(self.head(features)[:, 0])
        if self.embed is None:
            return logits
        return logits + (features * self.embed(label)).sum(1)


class ClassBatchNorm(nn.Module):
    """Batch norm whose gain and bias are the class's: float [N, W, H, H], label int64 [N] → the same shape."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=not num_classes)
        self.gain = nn.Embedding(num_classes, width) if num_classes else None
        self.bias = nn.Embedding(num_classes, width) if num_classes else None

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        normed: torch.Tensor = self.norm(x)
        if self.gain is None or self.bias is None:
            return normed
        gain, bias = (table(label).to(normed.dtype)[:, :, None, None] for table in (self.gain, self.bias))
        return torch.addcmul(bias, gain, normed)


class UpBlock(nn.Module):
    """Two 3×3 convolutions, each after batch norm and ReLU, beside a 1×1: [N, V, H, H] → [N, W, factor · H, …]."""

    def __init__(self, before: int, width: int, factor: int, num_classes: int) -> None:
        super().__init__()
        self.factor = factor
        self.norms = nn.ModuleList([ClassBatchNorm(before, num_classes), ClassBatchNorm(width, num_classes)])
        self.convs = nn.ModuleList([nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)])
        self.shortcut = nn.Conv2d(before, width, 1)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """See the class."""
        hidden = self.convs[0](self._larger(functional.relu(self.norms[0](x, label))))
        hidden = self.convs[1](functional.relu(self.norms[1](hidden, label)))
        # A 1×1 and a repetition of pixels can change places, and the smaller image is cheaper.
        return self._larger(self.shortcut(x)) + hidden

    def _larger(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.factor == 1 else functional.interpolate(x, scale_factor=self.factor, mode="nearest")


class DownBlock(nn.Module):
    """Two 3×3 convolutions with ReLU before each, beside a 1×1, and the mean of 2×2: [N, V, H, H] → [N, W, H / f, …].

    The first block sees the image itself: no ReLU before it.
    """

    def __init__(self, before: int, width: int, factor: int, *, activate_first: bool = True) -> None:
        super().__init__()
        self.factor, self.activate_first = factor, activate_first
        self.convs = nn.ModuleList([nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)])
        self.shortcut = nn.Conv2d(before, width, 1) if before != width or factor > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        hidden = self.convs[0](functional.relu(x) if self.activate_first else x)
        hidden = self._smaller(self.convs[1](functional.relu(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(self._smaller(x)))

    def _smaller(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.factor == 1 else functional.avg_pool2d(x, self.factor)


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Xavier's uniform weights with gain √2 in the 3×3 convolutions of blocks and 1 elsewhere; biases 0, norms 1 and 0.

    D's class embedding is a linear layer of a one-hot vector. D's weights are divided by their norm from here on.
    """
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            gain = math.sqrt(2) if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) else 1.0
            nn.init.xavier_uniform_(module.weight, gain, generator=generator)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, ClassBatchNorm) and module.gain is not None and module.bias is not None:
            nn.init.ones_(module.gain.weight)
            nn.init.zeros_(module.bias.weight)
    if isinstance(network, Discriminator):
        if network.embed is not None:
            nn.init.xavier_uniform_(network.embed.weight, generator=generator)
        for module in list(network.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
                spectral_norm(module, generator)
