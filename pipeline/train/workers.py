"""The processes that train: how many, with what of a cluster, and what is left to read data."""

import dataclasses
from collections.abc import Mapping

from pipeline.errors import InputError

_PARTS_OF_A_CPU = 64
"""Shares are whole parts of this: Ray's elastic policy divides by them, and 0.1 goes into 1 nine times."""


class ResourceError(InputError):
    """The cluster cannot hold the workers asked for and still read data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """How many processes train, and with what."""

    num_workers: tuple[int, ...] = (1,)
    """Training processes, at most num_lanes, one a GPU; or two numbers, the fewest and the most: then the run grows and
    shrinks with the cluster."""
    use_gpu: bool = False
    """Train on GPUs, one a worker."""
    cpus_per_worker: float = 0.0
    """CPUs reserved for each; 0: one, or the fraction that leaves one CPU free to read data."""
    threads_per_worker: int = 0
    """Threads of torch in each; 0: the CPUs of the cluster shared among the workers."""
    decode_threads: int = 0
    """Threads that decode images beside each; 0: as many as torch's."""
    max_failures: int = 3
    """Restarts without a new checkpoint in between, before the run fails; -1: no limit."""
    resize_sec: float = 60.0
    """How often, in seconds, a run of two numbers of workers looks whether the cluster has room for more."""
    first_batch_sec: float = 120.0
    """A run without its first batch after so many seconds is ended, with the reason."""
    stalled_sec: float = 900.0
    """So is one without another batch, or without the end of an iteration, for so many seconds."""
    no_room_sec: float = 600.0
    """So is one whose workers find no room in the cluster for so many seconds."""

    def __post_init__(self) -> None:
        if min(self.cpus_per_worker, self.threads_per_worker, self.decode_threads) < 0 or self.max_failures < -1:
            raise ResourceError("CPUs and threads of a worker must be at least 0, max_failures at least -1")
        if min(self.resize_sec, self.first_batch_sec, self.stalled_sec, self.no_room_sec) <= 0:
            raise ResourceError("resize_sec, first_batch_sec, stalled_sec and no_room_sec must be above 0")
        if len(self.num_workers) not in (1, 2) or not 1 <= self.num_workers[0] <= self.num_workers[-1]:
            raise ResourceError(f"num_workers is {self.num_workers}; give one number, or the fewest and the most: 2,8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """WorkersConfig worked out for a cluster."""

    config: WorkersConfig
    cpus: float
    """Of each."""
    cluster_cpus: int
    count: int
    """How many, or how many at most."""
    fewest: int = 0
    """How many at least, of an elastic run; 0: always `count`."""

    @property
    def elastic(self) -> bool:
        """Whether their number follows the cluster."""
        return self.fewest > 0

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves for each."""
        return {"CPU": self.cpus} | ({"GPU": 1} if self.config.use_gpu else {})

    def threads(self, num_ranks: int) -> int:
        """Threads of torch in each of so many. A run whose bits are to be those of another has equally many."""
        return self.config.threads_per_worker or max(1, self.cluster_cpus // num_ranks)

    def decode_threads(self, num_ranks: int) -> int:
        """Threads that decode beside each of so many."""
        return self.config.decode_threads or self.threads(num_ranks)


def fit_workers(config: WorkersConfig, num_lanes: int, cluster: Mapping[str, float]) -> Workers:
    """What each worker gets of a cluster's resources ({"CPU": …, "GPU": …}); one CPU always stays free to read.

    Raises ResourceError where that cannot be: workers that hold every CPU would wait for data for ever.
    """
    fewest, most = config.num_workers[0], config.num_workers[-1]
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    if most > num_lanes:
        raise ResourceError(f"num_workers is {most}; it must lie between 1 and train.num_lanes = {num_lanes}")
    if config.use_gpu and gpus < fewest:
        raise ResourceError(f"{fewest} workers need a GPU each, the cluster has {gpus:g}; set --workers.use-gpu false")
    each = config.cpus_per_worker or min(1.0, int((cpus - 1) / fewest * _PARTS_OF_A_CPU) / _PARTS_OF_A_CPU)
    if each <= 0 or fewest * each > cpus - 1:
        raise ResourceError(
            f"{fewest} workers of {each:g} CPUs on {cpus:g} CPUs leave none to read data; "
            "set fewer --workers.num-workers or a smaller --workers.cpus-per-worker"
        )
    elastic = fewest if fewest < most else 0
    return Workers(config=config, cpus=each, cluster_cpus=int(cpus), count=most, fewest=elastic)
