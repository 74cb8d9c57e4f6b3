"""Where the step's random numbers come from: the caller decides, a row keeps its own whatever batch it is in."""

from typing import Protocol

import torch


class Noise(Protocol):
    """Random numbers of some rows. Equal purposes give equal numbers; each is on the rows' device."""

    def normals(self, purpose: str, count: int, /) -> torch.Tensor:
        """N(0, 1), float32 [n, count]."""

    def uniforms(self, purpose: str, count: int, /) -> torch.Tensor:
        """U(0, 1) without its ends, float32 [n, count]."""

    def signs(self, purpose: str, count: int, /) -> torch.Tensor:
        """-1 or 1, float32 [n, count]."""

    def part(self, rows: slice) -> "Noise":
        """The same numbers of some of the rows."""
