"""Count, mean and scatter of features, merged without the features themselves, and FID between two of them."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.jackknife import Estimate, error_of

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Of N features of F numbers."""

    count: int
    """N."""
    mean: Array
    """[F]."""
    scatter: Array
    """Σ (x - mean)(x - mean)ᵀ, [F, F]."""

    @property
    def covariance(self) -> Array:
        """Unbiased, [F, F]; needs two features."""
        assert self.count > 1
        return self.scatter / (self.count - 1)


def moments(features: NDArray[np.floating]) -> Moments:
    """Of features [N, F], N ≥ 1."""
    exact = features.astype(np.float64)
    mean = exact.mean(axis=0)
    apart = exact - mean
    return Moments(count=len(exact), mean=mean, scatter=apart.T @ apart)


def merged(parts: Sequence[Moments]) -> Moments:
    """Those of all features together (Chan, Golub, LeVeque 1979)."""
    whole = parts[0]
    for part in parts[1:]:
        whole = _joined(whole, part, 1)
    return whole


def without(whole: Moments, part: Moments) -> Moments:
    """Those of what is left when a part is taken out of the whole; something must be."""
    assert part.count < whole.count
    return _joined(whole, part, -1)


def _joined(one: Moments, other: Moments, sign: int) -> Moments:
    count = one.count + sign * other.count
    apart = other.mean - one.mean
    mean = one.mean + apart * (sign * other.count / count)
    between = np.outer(apart, apart) * (sign * one.count * other.count / count)
    return Moments(count=count, mean=mean, scatter=one.scatter + sign * other.scatter + between)


def fid(real: Moments, gen: Moments) -> float:
    """Fréchet distance of the normal distributions with these moments (Heusel et al. 2017, equation 6).

    |μ₁ - μ₂|² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½). The eigenvalues of Σ₁ Σ₂ are those of Lᵀ Σ₂ L with Σ₁ = L Lᵀ, which is
    symmetric: no root of a matrix is taken.
    """
    apart = real.mean - gen.mean
    root, covariance = _root(real.covariance), gen.covariance
    eigenvalues = np.linalg.eigvalsh(root.T @ covariance @ root)
    shared = np.sqrt(eigenvalues.clip(min=0.0)).sum()
    return float(apart @ apart + np.trace(real.covariance) + np.trace(covariance) - 2 * shared)


def _root(covariance: Array) -> Array:
    """L with L Lᵀ = covariance; by eigenvectors where it is singular, as with fewer features than their numbers."""
    try:
        return np.asarray(np.linalg.cholesky(covariance), np.float64)
    except np.linalg.LinAlgError:
        eigenvalues, vectors = np.linalg.eigh(covariance)
        return np.asarray(vectors * np.sqrt(eigenvalues.clip(min=0.0)))


def fid_of_groups(real: Sequence[Moments], gen: Sequence[Moments]) -> Estimate:
    """FID of all groups together, with its standard error: each group of either side is left out once."""
    all_real, all_gen = merged(real), merged(gen)
    errors = (
        error_of([fid(without(all_real, group), all_gen) for group in real]),
        error_of([fid(all_real, without(all_gen, group)) for group in gen]),
    )
    return Estimate(value=fid(all_real, all_gen), error=math.hypot(*errors))
