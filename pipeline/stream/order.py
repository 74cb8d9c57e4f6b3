"""The order plan: which sample is where in which batch, as arithmetic. Pure, no I/O.

N samples in index order are cut into chunks of C consecutive ones; chunk n belongs to lane n mod L and group n div L;
data step t takes B/L samples from each lane, so a group serves k = C·L/B steps. The content of a batch depends on
(seed, N, B, L, C, m) and t alone: never on world size, cluster size or timing. DESIGN.md, "The order plan".
"""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from pipeline import philox


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderPlan:
    """The order of one run; equal plans give equal batches."""

    num_samples: int
    """N, samples of the split, in index order."""
    seed: int
    """Seed of every permutation."""
    batch_size: int
    """B, samples of the global batch."""
    num_lanes: int
    """L, slices of the batch; the largest world size. Divides B."""
    steps_per_group: int
    """k, data steps served by one group of L chunks."""
    runs_per_chunk: int = 1
    """m, runs of C/m consecutive samples in a chunk: more than one where the index is less well mixed. Divides C."""

    def __post_init__(self) -> None:
        assert self.num_samples > 0
        assert self.steps_per_group > 0
        assert self.batch_size % self.num_lanes == 0
        assert self.chunk_size % self.runs_per_chunk == 0

    @property
    def lane_size(self) -> int:
        """B/L, samples that one lane gives to one batch."""
        return self.batch_size // self.num_lanes

    @property
    def chunk_size(self) -> int:
        """C = k·B/L, samples of one chunk."""
        return self.steps_per_group * self.lane_size

    @property
    def chunks_per_epoch(self) -> int:
        """M = max(1, N div C)."""
        return max(1, self.num_samples // self.chunk_size)

    def chunk(self, n: int) -> NDArray[np.int64]:
        """The sample numbers of chunk n in the order they are served: int64 [C]."""
        epoch, place = divmod(n, self.chunks_per_epoch)
        rotation, runs = _epoch(self.seed, epoch, self.num_samples, self.chunks_per_epoch * self.runs_per_chunk)
        own = runs[place * self.runs_per_chunk : (place + 1) * self.runs_per_chunk]
        length = self.chunk_size // self.runs_per_chunk
        samples = (rotation + own[:, None] * length + np.arange(length)).ravel()
        within = philox.permutation(philox.stream_key(self.seed, "chunk", n), self.chunk_size)
        return samples[within] % self.num_samples

    def batch(self, step: int) -> NDArray[np.int64]:
        """The sample numbers of the global batch of data step t: int64 [B], lane after lane."""
        group, part = divmod(step, self.steps_per_group)
        rows = slice(part * self.lane_size, (part + 1) * self.lane_size)
        return np.concatenate([self.chunk(n)[rows] for n in self.group_chunks(group)])

    def group_chunks(self, group: int) -> range:
        """The chunk numbers of a group, lane after lane."""
        return range(group * self.num_lanes, (group + 1) * self.num_lanes)

    def first_chunk(self, step: int) -> int:
        """n0, where a plan that starts with data step t begins: the first chunk of its group."""
        return (step // self.steps_per_group) * self.num_lanes

    def num_chunks(self, first_step: int, last_step: int) -> int:
        """Chunks from the group of `first_step` to that of `last_step`, and a margin of one group."""
        groups = last_step // self.steps_per_group - first_step // self.steps_per_group + 1
        return (groups + 1) * self.num_lanes


def rank_lanes(plan: OrderPlan, group: int, first_chunk: int, rank: int, world_size: int) -> list[int]:
    """The lanes of a group that reach a rank: chunk n goes to rank (n − n0) mod w, for any w ≤ L."""
    assert first_chunk % plan.num_lanes == 0
    assert 0 <= rank < world_size <= plan.num_lanes
    return [n % plan.num_lanes for n in plan.group_chunks(group) if (n - first_chunk) % world_size == rank]


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_samples: int, num_runs: int) -> tuple[int, NDArray[np.int64]]:
    """The epoch's rotation in [0, N) and its permutation of M·m runs."""
    rotation = philox.below(philox.stream_key(seed, "rotation", epoch), num_samples)
    return rotation, philox.permutation(philox.stream_key(seed, "epoch", epoch), num_runs)
