"""GAN losses from logits. Each returns the sum over the rows given: the caller scales it to a global mean.

D(x) = sigmoid(logit) is the probability that x is real, so log D = −softplus(−logit) and log(1 − D) = −softplus(logit):
nothing overflows. Goodfellow et al., "Generative adversarial nets" (NeurIPS 2014).
"""

from typing import Literal

import torch
from torch.nn.functional import softplus

LossName = Literal["minimax", "non_saturating"]


def d_loss(real_logits: torch.Tensor, gen_logits: torch.Tensor) -> torch.Tensor:
    """What D minimises: −Σ log D(x) − Σ log(1 − D(G(z))), eq. 1 with its sign turned. Logits [N] → scalar."""
    return softplus(-real_logits).sum() + softplus(gen_logits).sum()


def g_loss(name: LossName, gen_logits: torch.Tensor) -> torch.Tensor:
    """What G minimises. Logits [N] → scalar.

    minimax: Σ log(1 − D(G(z))), eq. 1. non_saturating: −Σ log D(G(z)), section 3, whose gradient does not vanish
    while D wins.
    """
    if name == "minimax":
        return -softplus(gen_logits).sum()
    return softplus(-gen_logits).sum()
