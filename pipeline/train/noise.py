"""The step's random numbers: a row's own, by its place in the global sequence. No stream knows rank or batch."""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import philox


@dataclasses.dataclass(frozen=True)
class RowNoise:
    """`gan.noise.Noise` from (seed, attempt, purpose, position); a rollback counts the attempt up and draws anew."""

    seed: int
    attempt: int
    position: NDArray[np.int64]
    device: torch.device

    def normals(self, purpose: str, count: int) -> torch.Tensor:
        """N(0, 1), float32 [n, count]."""
        return self._sent(philox.normals(self._key(purpose), self.position, count))

    def uniforms(self, purpose: str, count: int) -> torch.Tensor:
        """U(0, 1) without its ends, float32 [n, count]."""
        return self._sent(philox.uniforms(self._key(purpose), self.position, count))

    def signs(self, purpose: str, count: int) -> torch.Tensor:
        """-1 or 1, float32 [n, count]."""
        return self._sent(philox.signs(self._key(purpose), self.position, count))

    def part(self, rows: slice) -> "RowNoise":
        """The same numbers of some of the rows."""
        return dataclasses.replace(self, position=self.position[rows])

    def _key(self, purpose: str) -> philox.Key:
        return philox.stream_key(self.seed, purpose, self.attempt)

    def _sent(self, numbers: NDArray[np.float32]) -> torch.Tensor:
        """To a GPU from pinned memory: anything else would wait for the kernels before."""
        here = torch.from_numpy(numbers)
        return here.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else here
