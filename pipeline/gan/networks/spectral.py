"""Spectral norm: a weight divided by an estimate of its largest singular value.

Miyato et al., "Spectral normalization for generative adversarial networks" (ICLR 2018), algorithm 1. PyTorch's own does
the same, but under autocast in bf16, and starts from PyTorch's global random state.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from pipeline.gan.precision import full_precision

_ITERATIONS_AT_START = 15


class SpectralNorm(nn.Module):
    """weight → weight / σ, σ = u · W v; in training each use first improves u and v by one power iteration."""

    u: torch.Tensor
    v: torch.Tensor
    held = False

    def __init__(self, weight: torch.Tensor, generator: torch.Generator) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        rows, columns = (torch.randn(size, generator=generator).to(weight) for size in matrix.shape)
        self.register_buffer("u", functional.normalize(rows, dim=0))
        self.register_buffer("v", functional.normalize(columns, dim=0))
        for _ in range(_ITERATIONS_AT_START):
            self._improve(matrix)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """See the class."""
        with full_precision(weight):
            matrix = weight.flatten(1)
            if self.training and not self.held:
                self._improve(matrix.detach())
            # Copies: the next use changes them in place, and a backward pass of this one may come after it.
            return weight / torch.dot(self.u.clone(), matrix @ self.v.clone())

    @torch.no_grad()
    def _improve(self, matrix: torch.Tensor) -> None:
        functional.normalize(matrix @ self.v, dim=0, out=self.u)
        functional.normalize(self.u @ matrix, dim=0, out=self.v)


def spectral_norm(module: nn.Module, generator: torch.Generator) -> None:
    """Divide a layer's weight by its norm from now on; the first estimate depends on `generator` alone."""
    assert isinstance(module.weight, torch.Tensor)
    parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight, generator))


@contextlib.contextmanager
def held(network: nn.Module) -> Iterator[None]:
    """Its estimates stay as they are, in training too: for what is more of the same batch.

    Else a network would depend on the number of parts, and be another one on ranks that have more of them.
    """
    norms = [module for module in network.modules() if isinstance(module, SpectralNorm)]
    for norm in norms:
        norm.held = True
    try:
        yield
    finally:
        for norm in norms:
            norm.held = False
