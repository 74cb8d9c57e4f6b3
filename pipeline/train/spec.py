"""What a run is: its length, its intervals, and all that each rank needs to know of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.config import ConfigError, to_dict
from pipeline.gan.networks.build import ImageShape, NetworkConfig
from pipeline.gan.step import StepConfig
from pipeline.stream.order import OrderPlan

MONITOR_LAG = 2
"""Checkpoints that the monitor needs: a collapse is seen when the last one may have it already."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how often, and in what order."""

    total_kimg: float = 1000.0
    """Length of the run in thousand images seen."""
    batch_size: int = 64
    """B, images of the global batch of one iteration."""
    num_lanes: int = 8
    """L, slices of the batch; the largest number of workers. Must divide the batch size."""
    seed: int = 0
    """Seed of the weights, the order of the data and the noise."""
    init_from: str = ""
    """URL of a snapshot, or of a run (then its last one), whose weights a new run begins with; empty: new weights."""
    tick_kimg: float = 20.0
    """Statistics, a sample grid and a progress line each so many thousand images."""
    checkpoint_kimg: float = 100.0
    """A checkpoint each so many thousand images; rounded up to whole ticks."""
    num_to_keep: int = 5
    """Checkpoints kept, at least two; older ones are deleted."""
    snapshot_kimg: float = 0.0
    """A snapshot each so many thousand images, rounded up to whole ticks, besides that of the end; 0: that alone."""
    fid_samples: int = 2000
    """Images whose FID, by a small classifier's features, is told of each snapshot where snapshot_kimg is above 0: a
    number to compare the snapshots of a run by, of which the newest and the best are kept. 0: none is, and all are
    kept."""
    max_replaced_fraction: float = 0.01
    """Stop when a larger share of the samples of a tick cannot be read."""
    storage_timeout_sec: float = 600.0
    """An object store that cannot be reached is tried again for so many seconds, then the run ends (exit 1)."""
    record_positions: bool = False
    """Write which samples each rank took, and where in the order: a file a tick under positions/."""
    deterministic: bool = False
    """Refuse operations that are not deterministic, and leave no checkpoint out however long one takes to write; slower
    on GPU."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_lanes < 1 or self.batch_size % self.num_lanes:
            raise ConfigError(f"batch_size {self.batch_size} is not a multiple of num_lanes {self.num_lanes}")
        for name in ("total_kimg", "tick_kimg", "checkpoint_kimg", "storage_timeout_sec"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**63 or not 0 <= self.max_replaced_fraction <= 1:
            raise ConfigError("seed must be a 64-bit integer, and max_replaced_fraction must lie in [0, 1]")
        if self.num_to_keep < MONITOR_LAG:
            raise ConfigError(
                f"num_to_keep must be at least {MONITOR_LAG} so that a run can go back, not {self.num_to_keep}"
            )
        if self.snapshot_kimg < 0 or self.fid_samples < 0 or self.fid_samples == 1:
            raise ConfigError("snapshot_kimg must be at least 0, and fid_samples 0 or at least 2")

    def iterations(self, kimg: float) -> int:
        """Whole iterations that see at least so many thousand images."""
        return max(1, -(-round(kimg * 1000) // self.batch_size))

    def whole_ticks(self, kimg: float) -> int:
        """Images of the fewest whole ticks that see at least so many thousand."""
        wanted = self.iterations(kimg) * self.batch_size
        return -(-wanted // self.tick_nimg) * self.tick_nimg

    @property
    def tick_nimg(self) -> int:
        """Images of a tick."""
        return self.iterations(self.tick_kimg) * self.batch_size

    @property
    def total_nimg(self) -> int:
        """`cur_nimg` at the end of the run."""
        return self.iterations(self.total_kimg) * self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSpec:
    """All that a rank needs to know of its run."""

    run_url: str
    owner: int
    plan: OrderPlan
    dataset_digest: str
    shape: ImageShape
    classes: tuple[str, ...]
    network: NetworkConfig
    step: StepConfig
    train: TrainConfig
    lineage: Mapping[str, Any]
    """Of what comes out. A fine-tuned run's has the digest of the snapshot that it began with, as `init_from`."""
    init_from: str = ""
    """URL of that snapshot; read where there is no checkpoint to go on from."""
    class_counts: tuple[int, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What a resuming run must share: the meaning of the clock, the shapes of the tensors, where they began."""
        began = {"init_from": self.lineage["init_from"]} if "init_from" in self.lineage else {}
        return began | {
            "seed": self.train.seed,
            "batch_size": self.plan.batch_size,
            "num_lanes": self.plan.num_lanes,
            "chunk_size": self.plan.chunk_size,
            "runs_per_chunk": self.plan.runs_per_chunk,
            "real_batches": self.step.real_batches,
            "dataset_digest": self.dataset_digest,
            "network": to_dict(self.network),
        }

    def data_step(self, cur_nimg: int) -> int:
        """The next data step: the whole data cursor is `cur_nimg`."""
        return self.step.real_batches * cur_nimg // self.plan.batch_size
