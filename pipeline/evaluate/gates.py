"""What an evaluation must show for the synthetic images to be let through."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from pipeline.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Limits; 0: no such gate."""

    max_fid: float = 0.0
    """FID against the reference, at most."""
    max_kid: float = 0.0
    """KID, at most."""
    min_precision: float = 0.0
    """Precision, at least."""
    min_recall: float = 0.0
    """Recall, at least."""
    min_density: float = 0.0
    """Density, at least."""
    min_coverage: float = 0.0
    """Coverage, at least."""
    min_utility: float = 0.5
    """What synthetic images teach a classifier about real ones, at least so much of what real ones teach it: accuracy,
    the mean over classes, counted from that of guessing."""
    min_copies_p_value: float = 0.001
    """Probability, at least, that so many synthetic images lie so near to training images if they lie as held-out ones
    do."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"{field.name} must be at least 0, not {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """One limit, and what was found."""

    name: str
    value: float
    limit: float
    at: Literal["most", "least"]
    passed: bool


def judge(config: GateConfig, found: Mapping[str, float]) -> tuple[Gate, ...]:
    """The gates that have a limit and whose number was found, by name: `max_fid` judges `fid`. Raises ConfigError for a
    limit that was set, and whose number was not found.
    """
    gates = []
    for field in dataclasses.fields(config):
        side, _, name = field.name.partition("_")
        limit = float(getattr(config, field.name))
        if limit and name not in found and limit != field.default:
            raise ConfigError(f"gates.{field.name} is set, and there is no {name} here to judge; leave it out")
        if limit and name in found:
            passed = found[name] <= limit if side == "max" else found[name] >= limit
            at: Literal["most", "least"] = "most" if side == "max" else "least"
            gates.append(Gate(name=name, value=found[name], limit=limit, at=at, passed=passed))
    return tuple(gates)
