"""The trainer on Ray: TorchTrainer + DDP + the feed around the loop of one rank."""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.data import ExecutionOptions
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

from pipeline import storage
from pipeline.errors import InputError, RetryableError
from pipeline.stream.batches import Batch, rank_batches
from pipeline.stream.chunk import ChunkReader
from pipeline.stream.feed import NUM_RANKS, plan_dataset, rank_blocks
from pipeline.train import checkpoint, log, loop
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.loop import Outlets
from pipeline.train.ownership import OwnershipError
from pipeline.train.ranks import World
from pipeline.train.spec import RunSpec

FIRST_BATCH_SEC = 120.0
"""A run without a first batch after so long is stuck: our watchdog ends it and names what is short."""


class TrainError(RetryableError):
    """The run stopped; what it committed stands."""


class ResourceError(InputError):
    """The cluster cannot hold the workers asked for and still read data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """How many processes train, and with what."""

    num_workers: int = 1
    """Training processes; at most num_lanes. One a GPU."""
    use_gpu: bool = False
    """Train on GPUs, one a worker."""
    cpus_per_worker: float = 0.0
    """CPUs reserved for each; 0: one, or the fraction that leaves one CPU free to read data."""
    threads_per_worker: int = 0
    """Threads of torch in each; 0: the CPUs of the cluster shared among the workers."""
    decode_threads: int = 0
    """Threads that decode images beside each; 0: as many as torch's."""
    max_failures: int = 3
    """Restarts from the last checkpoint after a worker died, before the run fails; -1: no limit."""

    def __post_init__(self) -> None:
        if min(self.cpus_per_worker, self.threads_per_worker, self.decode_threads) < 0 or self.max_failures < -1:
            raise ResourceError("CPUs and threads of a worker must be at least 0, max_failures at least -1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """WorkersConfig worked out for a cluster."""

    count: int
    cpus: float
    threads: int
    decode_threads: int
    use_gpu: bool
    max_failures: int


def fit_workers(config: WorkersConfig, num_lanes: int, cluster: Mapping[str, float]) -> Workers:
    """What each worker gets of a cluster's resources ({"CPU": …, "GPU": …}); one CPU always stays free to read.

    Raises ResourceError where that cannot be: w workers that hold every CPU would wait for data for ever.
    """
    w, cpus, gpus = config.num_workers, cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    if not 1 <= w <= num_lanes:
        raise ResourceError(f"num_workers is {w}; it must lie between 1 and train.num_lanes = {num_lanes}")
    if config.use_gpu and gpus < w:
        raise ResourceError(f"{w} workers need a GPU each and the cluster has {gpus:g}; set --workers.use-gpu false")
    each = config.cpus_per_worker or min(1.0, int((cpus - 1) / w * 100) / 100)
    if each <= 0 or w * each > cpus - 1:
        raise ResourceError(
            f"{w} workers of {each:g} CPUs on {cpus:g} CPUs leave none to read data; "
            "set fewer --workers.num-workers or a smaller --workers.cpus-per-worker"
        )
    threads = config.threads_per_worker or max(1, int(cpus) // w)
    return Workers(
        count=w,
        cpus=each,
        threads=threads,
        decode_threads=config.decode_threads or threads,
        use_gpu=config.use_gpu,
        max_failures=config.max_failures,
    )


def fit(
    spec: RunSpec, reader: ChunkReader, workers: Workers, on_progress: Callable[[int, Mapping[str, Any]], None]
) -> None:
    """Train to the end of the run, through worker deaths. The caller owns the run (see `ownership`).

    `on_progress` hears cur_nimg and what to show, from a thread. Raises what a rank raised for the user, or
    TrainError.
    """
    board = ray.remote(num_cpus=0)(_Board).remote()
    filesystem, scratch = storage.arrow_filesystem(storage.join(spec.run_url, "scratch"))
    trainer = TorchTrainer(
        _rank_main,
        train_loop_config={"spec": spec, "reader": reader, "workers": workers, "board": board},
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=workers.use_gpu, resources_per_worker=_resources(workers)
        ),
        # Scratch of Ray Train: its own snapshot file can tear and stop the controller, so no two owners share a name.
        run_config=RunConfig(
            name=f"{spec.owner:06d}",
            storage_path=scratch,
            storage_filesystem=filesystem,
            # Without a limit a group that finds no room is asked for again for ever, without a word.
            failure_config=FailureConfig(max_failures=workers.max_failures, controller_failure_limit=1),
        ),
        datasets={"train": _DatasetFromLastCheckpoint(spec, reader, board)},
        dataset_config=Shares(),
    )
    with _Watcher(board, on_progress):
        try:
            _fit_in_thread(trainer)
        except ray.train.TrainingFailedError as error:
            raise ray.get(board.failure.remote()) or _plain(error, workers) from error


def _fit_in_thread(trainer: TorchTrainer) -> None:
    """`fit` off the main thread: on it, Ray Train takes SIGINT for good and leaves with exit code 0."""
    done: Future[None] = Future()

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=work, name="fit", daemon=True).start()
    done.result()


def _plain(error: ray.train.TrainingFailedError, workers: Workers) -> Exception:
    """What a rank or the controller died of, in one line."""
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, InputError):
        return _in_its_own_words(cause)
    if type(cause).__name__.startswith("WorkerGroupStartup"):
        free = ray.available_resources()
        return TrainError(
            f"{workers.count} workers of {_resources(workers)} found no room; free are CPU {free.get('CPU', 0):g} and "
            f"GPU {free.get('GPU', 0):g}; run again when the cluster has room"
        )
    failures = getattr(error, "worker_failures", None) or {0: cause or error}
    rank, cause = next(iter(failures.items()))
    last = str(cause).strip().splitlines()[-1:] or [type(cause).__name__]
    return TrainError(f"training stopped, worker {rank}: {last[0]}; run the same command again to go on")


def _resources(workers: Workers) -> dict[str, float]:
    return {"CPU": workers.cpus} | ({"GPU": 1} if workers.use_gpu else {})


class Shares(ray.train.DataConfig):
    """Ray Train's splitter with the order kept; its default would overwrite the context's execution options."""

    def __init__(self) -> None:
        super().__init__(execution_options=ExecutionOptions(preserve_order=True))

    def configure(
        self, datasets: Mapping[str, ray.data.Dataset], world_size: int, *args: Any, **more: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """A share for each rank, and word to the feed's segments of how many there are."""
        for dataset in datasets.values():
            dataset.context.set_config(NUM_RANKS, world_size)
        return super().configure(datasets, world_size, *args, **more)


class _DatasetFromLastCheckpoint:
    """What Ray Train calls in its controller at every start of a worker group: the plan from the last checkpoint on."""

    def __init__(self, spec: RunSpec, reader: ChunkReader, board: Any) -> None:
        self._spec, self._reader, self._board = spec, reader, board

    def __call__(self) -> ray.data.Dataset:
        spec, plan = self._spec, self._spec.plan
        skipped: list[str] = []
        start = checkpoint.latest_valid(spec.run_url, skipped.append)
        for reason in skipped:
            log.put_event(spec.run_url, spec.owner, "checkpoint_skipped", reason=reason)
        # Every rank starts from the checkpoint that the data starts from, even if a later one is committed meanwhile.
        ray.get(self._board.set_start.remote(start))
        first = spec.data_step(start.cur_nimg if start else 0)
        last = max(first, spec.data_step(spec.train.total_nimg))
        return plan_dataset(self._reader, plan.first_chunk(first), plan.num_chunks(first, last))


def _rank_main(settings: Mapping[str, Any]) -> None:
    """What each training process runs."""
    spec, workers, board = settings["spec"], settings["workers"], settings["board"]
    failure = ray.get(board.failure.remote())
    if failure is not None:
        raise failure  # a restart cannot mend it
    try:
        _train(spec, settings["reader"], workers, board)
    except (InputError, OwnershipError) as error:
        own = _in_its_own_words(error)
        if not isinstance(own, storage.StorageUnavailableError):  # which a restart may well mend
            ray.get(board.fail.remote(own))
        raise


def _in_its_own_words(error: Exception) -> Exception:
    """What a read task raised comes wrapped, with Ray's advice on retries below our line."""
    own = getattr(error, "cause", None) or error
    kind = type(own) if isinstance(own, InputError | RetryableError) else InputError
    return kind(str(own).strip().splitlines()[0])


def _train(spec: RunSpec, reader: ChunkReader, workers: Workers, board: Any) -> None:
    # OMP_NUM_THREADS is 1 inside a Ray worker.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS
    torch.set_num_threads(min(workers.threads, len(os.sched_getaffinity(0))))
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    world = World(rank=rank, size=size, device=ray.train.torch.get_device(), wrap=_wrap)

    def progress(cur_nimg: int, shown: Mapping[str, Any]) -> None:
        if rank == 0:
            board.tell.remote(
                cur_nimg, {name: shown[name] for name in ("img_per_sec", "data_wait_share") if name in shown}
            )

    start: Checkpoint | None = ray.get(board.start.remote())
    first = spec.data_step(start.cur_nimg if start else 0)
    blocks = rank_blocks(ray.train.get_dataset_shard("train"))
    batches = rank_batches(blocks, reader, first, rank, size, workers.decode_threads)
    with _Watchdog(board, workers) as watchdog:
        outlets = Outlets(progress=progress, report=lambda stats: ray.train.report(dict(stats)))
        loop.run(spec, world, start, watchdog.watch(batches), outlets)


def _wrap(network: nn.Module) -> nn.Module:
    """Device and DDP. Buffers are never sent at a forward pass: each rank keeps its own batch statistics."""
    wrapped: nn.Module = ray.train.torch.prepare_model(
        network, parallel_strategy_kwargs={"forward_sync_buffers": False}
    )
    return wrapped


class _Watchdog:
    """Ends a process whose first batch does not come: such a run would wait for ever without a word."""

    def __init__(self, board: Any, workers: Workers) -> None:
        self._board, self._workers = board, workers
        self._timer = threading.Timer(FIRST_BATCH_SEC, self._give_up)
        self._timer.daemon = True

    def __enter__(self) -> "_Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; asking for the first one sets the watchdog, its coming calls it off."""
        self._timer.start()
        for batch in batches:
            self._timer.cancel()
            yield batch

    def _give_up(self) -> None:
        free = ray.available_resources().get("CPU", 0)
        kind = ResourceError if free < 1 else TrainError
        error = kind(
            f"no first batch after {FIRST_BATCH_SEC:.0f} s: {self._workers.count} workers hold {self._workers.cpus:g} "
            f"CPUs each and {free:g} CPUs are free to read data; "
            + ("free some, or use fewer workers" if free < 1 else "storage may be slow: run the same command again")
        )
        ray.get(self._board.fail.remote(error))
        os._exit(1)


class _Board:
    """Where rank 0 writes how far it is and the driver reads it, and where a failure that no restart mends is kept."""

    def __init__(self) -> None:
        self._state: tuple[int, dict[str, Any]] | None = None
        self._start: Checkpoint | None = None
        self._failure: Exception | None = None

    def tell(self, cur_nimg: int, shown: dict[str, Any]) -> None:
        self._state = (cur_nimg, shown)

    def state(self) -> tuple[int, dict[str, Any]] | None:
        return self._state

    def set_start(self, start: Checkpoint | None) -> None:
        self._start = start

    def start(self) -> Checkpoint | None:
        return self._start

    def fail(self, error: Exception) -> None:
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        return self._failure


class _Watcher:
    """Passes what the board says on to the driver's progress bar, twice a second."""

    def __init__(self, board: Any, on_progress: Callable[[int, Mapping[str, Any]], None]) -> None:
        self._board, self._on_progress = board, on_progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pass_on()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._pass_on()

    def _pass_on(self) -> None:
        state = ray.get(self._board.state.remote())
        if state is not None:
            self._on_progress(*state)
