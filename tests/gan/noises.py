"""Noise for tests of the step: a row's numbers depend on its number and the purpose alone."""

import dataclasses
import hashlib
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class RowNoise:
    """`pipeline.gan.noise.Noise` of rows by number."""

    rows: Sequence[int]
    dtype: torch.dtype = torch.float32

    def normals(self, purpose: str, count: int) -> torch.Tensor:
        return self._drawn(purpose, lambda random: torch.randn(count, generator=random))

    def uniforms(self, purpose: str, count: int) -> torch.Tensor:
        return self._drawn(purpose, lambda random: torch.rand(count, generator=random).clamp(1e-6, 1 - 1e-6))

    def signs(self, purpose: str, count: int) -> torch.Tensor:
        return self._drawn(purpose, lambda random: torch.randint(0, 2, (count,), generator=random) * 2.0 - 1)

    def part(self, rows: slice) -> "RowNoise":
        return dataclasses.replace(self, rows=self.rows[rows])

    def _drawn(self, purpose, draw) -> torch.Tensor:
        drawn = []
        for row in self.rows:
            seed = int.from_bytes(hashlib.sha256(f"{purpose}/{row}".encode()).digest()[:7], "little")
            drawn.append(draw(torch.Generator().manual_seed(seed)))
        return torch.stack(drawn).to(self.dtype)
