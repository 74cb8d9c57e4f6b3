"""GAN losses from logits. Each returns the sum over the rows given: the caller scales it to a global mean.

x is a real image and G(z) a generated one; where D(x) = sigmoid(logit) is the probability that x is real,
log D = −softplus(−logit) and log(1 − D) = −softplus(logit): nothing overflows.

| name | D minimises | G minimises | source |
|---|---|---|---|
| minimax | −log D(x) − log(1 − D(G(z))) | log(1 − D(G(z))) | Goodfellow et al. 2014, eq. 1 |
| non_saturating | the same | −log D(G(z)), whose gradient does not vanish while D wins | the same, section 3 |
| hinge | max(0, 1 − D(x)) + max(0, 1 + D(G(z))), D a logit | −D(G(z)) | Miyato et al. 2018, eq. 16, 17 |
| least_squares | ½ (D(x) − 1)² + ½ D(G(z))² | ½ (D(G(z)) − 1)² | Mao et al. 2017, eq. 9 |
| wasserstein | D(G(z)) − D(x), D a critic with a penalty on its slope | −D(G(z)) | Arjovsky et al. 2017, eq. 2, 3 |
| relativistic | softplus(D(G(z)) − D(x)), paired by row | softplus(D(x) − D(G(z))) | Huang et al. 2024, eq. 2 |
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch.nn.functional import relu, softplus

LossName = Literal["minimax", "non_saturating", "hinge", "least_squares", "wasserstein", "relativistic"]
SeparateLossName = Literal["minimax", "non_saturating", "hinge", "least_squares", "wasserstein"]
"""Those whose G never sees a real image."""


def _cross_entropy(real_logits: torch.Tensor, gen_logits: torch.Tensor) -> torch.Tensor:
    return softplus(-real_logits) + softplus(gen_logits)


_D: Mapping[LossName, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "minimax": _cross_entropy,
    "non_saturating": _cross_entropy,
    "hinge": lambda real, gen: relu(1 - real) + relu(1 + gen),
    "least_squares": lambda real, gen: ((real - 1).square() + gen.square()) / 2,
    "wasserstein": lambda real, gen: gen - real,
    "relativistic": lambda real, gen: softplus(gen - real),
}
_G: Mapping[SeparateLossName, Callable[[torch.Tensor], torch.Tensor]] = {
    "minimax": lambda gen: -softplus(gen),
    "non_saturating": lambda gen: softplus(-gen),
    "hinge": torch.neg,
    "least_squares": lambda gen: (gen - 1).square() / 2,
    "wasserstein": torch.neg,
}


def d_loss(name: LossName, real_logits: torch.Tensor, gen_logits: torch.Tensor) -> torch.Tensor:
    """What D minimises. Logits [N] of as many real as generated images → scalar."""
    return _D[name](real_logits, gen_logits).sum()


def g_loss(name: SeparateLossName, gen_logits: torch.Tensor) -> torch.Tensor:
    """What G minimises, of losses that need no real image. Logits [N] → scalar."""
    return _G[name](gen_logits).sum()


def relativistic_g_loss(real_logits: torch.Tensor, gen_logits: torch.Tensor) -> torch.Tensor:
    """What G minimises in `relativistic`, D's with the two exchanged. Logits [N], paired by row → scalar."""
    return _D["relativistic"](gen_logits, real_logits).sum()
