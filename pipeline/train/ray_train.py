"""The trainer on Ray: TorchTrainer + DDP + the feed around the loop of one rank."""

import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
import ray.train.torch
import torch
from ray.data import ExecutionOptions
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RestartingState
from ray.train.v2.api.exceptions import PreemptionError
from torch import nn

from pipeline import storage
from pipeline.errors import InputError, RetryableError
from pipeline.ray_metrics import RunMetrics
from pipeline.stream.batches import rank_batches
from pipeline.stream.chunk import ChunkReader
from pipeline.stream.feed import NUM_RANKS, plan_dataset, rank_blocks
from pipeline.train import checkpoint, log, loop
from pipeline.train.checkpoint import Checkpoint, DamagedCheckpointError
from pipeline.train.loop import Outlets
from pipeline.train.ownership import OwnershipError
from pipeline.train.ranks import World
from pipeline.train.ray_board import open_board
from pipeline.train.ray_elastic import ElasticTrainer
from pipeline.train.ray_fid import Fids
from pipeline.train.spec import RunSpec
from pipeline.train.watchdog import Watchdog
from pipeline.train.workers import ResourceError, Workers

_LOOK_SEC, _SAY_NO_ROOM_SEC = 0.5, 30.0
_NO_LIMIT = -1


class TrainError(RetryableError):
    """The run stopped; what it committed stands."""


def fit(
    spec: RunSpec,
    reader: ChunkReader,
    workers: Workers,
    on_progress: Callable[[int, Mapping[str, Any]], None],
    on_wait: Callable[[str], None] = lambda _: None,
) -> None:
    """Train to the end of the run, through worker deaths. The caller owns the run (see `ownership`).

    `on_progress` hears cur_nimg and what to show, `on_wait` that workers find no room, or that FIDs will be missing.
    Raises what a rank raised for the user, or TrainError.
    """
    seen = log.read_stats(spec.run_url)
    board = open_board(int(seen[-1]["cur_nimg"]) if seen else 0)
    fids = Fids(spec, reader.index)
    done = _in_thread(_trainer(spec, reader, workers, board).fit)
    try:
        _follow(done, board, workers, fids, _told(spec, on_progress), on_wait)
    except ray.train.TrainingFailedError as error:
        raise ray.get(board.failure.remote()) or _plain(error) from error
    finally:
        fids.stop()


def _told(
    spec: RunSpec, on_progress: Callable[[int, Mapping[str, Any]], None]
) -> Callable[[int, Mapping[str, Any]], None]:
    """`on_progress`, which tells Prometheus as well: the driver hears of a run whose ranks are stuck, too."""
    metrics = RunMetrics(spec.run_url)
    metrics.set("ganymede_total_nimg", spec.train.total_nimg)

    def heard(cur_nimg: int, shown: Mapping[str, Any]) -> None:
        metrics.set("ganymede_cur_nimg", cur_nimg)
        if "fid" in shown:
            metrics.set("ganymede_fid", shown["fid"])
        on_progress(cur_nimg, shown)

    return heard


def _trainer(spec: RunSpec, reader: ChunkReader, workers: Workers, board: Any) -> TorchTrainer:
    filesystem, scratch = storage.arrow_filesystem(storage.join(spec.run_url, "scratch"))
    kind = ElasticTrainer if workers.elastic else TorchTrainer
    return kind(
        _rank_main,
        train_loop_config={"spec": spec, "reader": reader, "workers": workers, "board": board},
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=(workers.fewest, workers.count) if workers.elastic else workers.count,
            use_gpu=workers.config.use_gpu,
            resources_per_worker=workers.resources,
            elastic_resize_monitor_interval_s=workers.config.resize_sec,
        ),
        # Scratch of Ray Train: its own snapshot file can tear and stop the controller, so no two owners share a name.
        run_config=RunConfig(
            name=f"{spec.owner:06d}",
            storage_path=scratch,
            storage_filesystem=filesystem,
            # Ray counts over the whole run, so a long one would end by its fourth death: we count, and watch for room.
            failure_config=FailureConfig(max_failures=_NO_LIMIT, controller_failure_limit=_NO_LIMIT),
            callbacks=[_TellsOfFailures(board)],
        ),
        datasets={"train": _DatasetFromLastCheckpoint(spec, reader, workers, board)},
        dataset_config=Shares(),
    )


def _in_thread(work: Callable[[], Any]) -> Future[None]:
    """`fit` off the main thread: on it, Ray Train takes SIGINT for good and leaves with exit code 0."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return done


def _follow(
    done: Future[None],
    board: Any,
    workers: Workers,
    fids: Fids,
    on_progress: Callable[[int, Mapping[str, Any]], None],
    on_wait: Callable[[str], None],
) -> None:
    """Wait for the end, then for FIDs, and pass on what the board and they say.

    Raises TrainError where no rank is heard for too long.
    """
    said = False
    while not concurrent.futures.wait([done], timeout=_LOOK_SEC).done:
        cur_nimg, shown, silent_sec = ray.get(board.state.remote())
        on_progress(cur_nimg, {**shown, **fids.look()})
        if silent_sec < _SAY_NO_ROOM_SEC:
            said = False
        elif silent_sec > workers.config.no_room_sec:
            raise TrainError(f"{_no_room(workers)}; run again when the cluster has room")
        elif not said:
            said = True
            on_wait(f"{_no_room(workers)}; waits for it up to {workers.config.no_room_sec:.0f} s")
    done.result()
    cur_nimg, shown, _ = ray.get(board.state.remote())
    on_progress(cur_nimg, shown)
    fids.wait(functools.partial(on_progress, cur_nimg), on_wait)


def _no_room(workers: Workers) -> str:
    free = ray.available_resources()
    return (
        f"{workers.fewest or workers.count} workers of {workers.resources} found no room; "
        f"free are CPU {free.get('CPU', 0):g} and GPU {free.get('GPU', 0):g}"
    )


def _plain(error: ray.train.TrainingFailedError) -> Exception:
    """What a rank or the controller died of, in one line."""
    cause = getattr(error, "controller_failure", None)
    if isinstance(cause, InputError | RetryableError):
        return _final(_in_its_own_words(cause))
    failures = getattr(error, "worker_failures", None) or {0: cause or error}
    rank, cause = next(iter(failures.items()))
    return TrainError(f"training stopped, worker {rank}: {_last_line(cause)}; run the same command again to go on")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


class _TellsOfFailures(ControllerCallback):
    """In Ray Train's controller: tells the board of each group that a death ended, in its start or later.

    One that was preempted, or that found no room, does not count.
    """

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:  # noqa: ARG002 - Ray's
        if not isinstance(current_state, RestartingState | ReschedulingState):
            return
        error = current_state.training_failed_error
        cause = getattr(error, "controller_failure", None)
        if not isinstance(error, PreemptionError) and not isinstance(cause, WorkerGroupStartupTimeoutError):
            causes = getattr(error, "worker_failures", None) or {0: cause or error}
            rank, cause = next(iter(causes.items()))
            ray.get(self._board.failed.remote(f"worker {rank}: {_last_line(cause)}"))


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
    """What Ray Train calls in its controller at every start of a worker group: the plan from the last checkpoint on.

    What it raises ends the run.
    """

    def __init__(self, spec: RunSpec, reader: ChunkReader, workers: Workers, board: Any) -> None:
        self._spec, self._reader, self._workers, self._board = spec, reader, workers, board

    def __call__(self) -> ray.data.Dataset:
        spec, plan = self._spec, self._spec.plan
        failure = ray.get(self._board.failure.remote())
        if failure is not None:
            raise failure  # no restart mends it
        start = storage.patiently(self._start, spec.train.storage_timeout_sec)
        # Every rank starts from the checkpoint that the data starts from, even if a later one is committed meanwhile.
        lost_nimg, failures, reason = ray.get(self._board.begin.remote(start))
        if reason:
            self._note_restart(start, lost_nimg // plan.batch_size, reason)
        if 0 <= self._workers.config.max_failures < failures:
            raise TrainError(f"{failures} failures without a new checkpoint, the last of {reason}; see the Ray logs")
        first = spec.data_step(start.cur_nimg if start else 0)
        last = max(first, spec.data_step(spec.train.total_nimg))
        return plan_dataset(self._reader, plan.first_chunk(first), plan.num_chunks(first, last))

    def _start(self) -> Checkpoint | None:
        spec, skipped = self._spec, list[str]()
        start = checkpoint.latest_valid(spec.run_url, skipped.append, ray.get(self._board.damaged.remote()))
        for why in skipped:
            log.put_event(spec.run_url, spec.owner, "checkpoint_skipped", reason=why)
        return start

    def _note_restart(self, start: Checkpoint | None, wasted_steps: int, reason: str) -> None:
        put_event = functools.partial(
            log.put_event,
            kind="restarted",
            checkpoint=start.number if start else None,
            wasted_steps=wasted_steps,
            reason=reason,
        )
        call = functools.partial(put_event, self._spec.run_url, self._spec.owner)
        storage.patiently(call, self._spec.train.storage_timeout_sec)


def wasted_steps(run_url: str) -> int:
    """Steps of a run that were executed more often than needed, over all its drivers: those that a death, a change of
    size or a preemption undid. What a driver's own death undid is known to the last tick.
    """
    return sum(event["wasted_steps"] for event in log.read_events(run_url) if event["event"] == "restarted")


def _rank_main(settings: Mapping[str, Any]) -> None:
    """What each training process runs."""
    spec, workers, board = settings["spec"], settings["workers"], settings["board"]
    try:
        _train(spec, settings["reader"], workers, board)
    except (InputError, OwnershipError) as error:
        ray.get(board.fail.remote(_final(_in_its_own_words(error))))
        raise


def _in_its_own_words(error: Exception) -> Exception:
    """What a read task raised comes wrapped, with Ray's advice on retries below our line."""
    own = getattr(error, "cause", None) or error
    kind = type(own) if isinstance(own, InputError | RetryableError) else InputError
    return kind(str(own).strip().splitlines()[0])


def _final(error: Exception) -> Exception:
    """The error that ends the run: a store that stayed away is worth another try, though its text is for the user."""
    if isinstance(error, storage.StorageUnavailableError):
        return TrainError(f"{error}; what was committed stands: run the same command again to go on")
    return error


def _train(spec: RunSpec, reader: ChunkReader, workers: Workers, board: Any) -> None:
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    # OMP_NUM_THREADS is 1 inside a Ray worker.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS
    torch.set_num_threads(min(workers.threads(size), len(os.sched_getaffinity(0))))
    world = World(rank=rank, size=size, device=ray.train.torch.get_device(), wrap=_wrap)
    start: Checkpoint | None = ray.get(board.start.remote())
    first = spec.data_step(start.cur_nimg if start else 0)
    metrics = RunMetrics(spec.run_url)
    blocks = _counted(rank_blocks(ray.train.get_dataset_shard("train")), metrics)
    batches = rank_batches(blocks, reader, first, rank, size, workers.decode_threads(size))
    with Watchdog(workers.config, functools.partial(_give_up, board, workers), board.alive.remote) as watchdog:
        try:
            loop.run(spec, world, start, watchdog.watch(batches), _outlets(spec, board, rank, start, metrics))
        except DamagedCheckpointError:
            assert start is not None
            ray.get(board.note_damaged.remote(start.number))
            raise


def _counted(blocks: Iterator[pa.Table], metrics: RunMetrics) -> Iterator[pa.Table]:
    """The same chunks; their bytes are counted."""
    for block in blocks:
        metrics.add("ganymede_read_bytes", pc.sum(pc.binary_length(block["data"])).as_py())
        yield block


def _outlets(spec: RunSpec, board: Any, rank: int, start: Checkpoint | None, metrics: RunMetrics) -> Outlets:
    told_nimg = start.cur_nimg if start else 0

    def progress(cur_nimg: int, shown: Mapping[str, Any]) -> None:
        if rank == 0:
            board.tell.remote(
                cur_nimg, {name: shown[name] for name in ("img_per_sec", "data_wait_share") if name in shown}
            )

    def report(stats: Mapping[str, float]) -> None:
        nonlocal told_nimg
        metrics.put_retries()
        if rank == 0:
            seen_nimg, told_nimg = int(stats["cur_nimg"]) - told_nimg, int(stats["cur_nimg"])
            metrics.tick(stats, seen_nimg, spec.plan.batch_size, spec.step.real_batches)
        ray.train.report(dict(stats))

    return Outlets(
        progress=progress,
        report=report,
        # Not `ray.train.get_preemption_info`: once there is word its ranks no longer wait for each other's, as ours do.
        preempted=lambda: get_train_context().preemption_context.preemption_info is not None,
    )


def _wrap(network: nn.Module) -> nn.Module:
    """Device and DDP. Buffers are never sent at a forward pass: each rank keeps its own batch statistics."""
    wrapped: nn.Module = ray.train.torch.prepare_model(
        network, parallel_strategy_kwargs={"forward_sync_buffers": False}
    )
    return wrapped


def _give_up(board: Any, workers: Workers, awaited: str, limit_sec: float) -> None:
    """End this process, and with it the run: what it waits for does not come."""
    free = ray.available_resources().get("CPU", 0)
    starved = "batch" in awaited and free < 1
    why = "free some, or use fewer workers" if starved else "storage or a worker may be stuck: run the command again"
    error = (ResourceError if starved else TrainError)(
        f"no {awaited} after {limit_sec:g} s: {workers.count} workers hold {workers.cpus:g} CPUs each "
        f"and {free:g} CPUs are free to read data; {why}"
    )
    ray.get(board.fail.remote(error))
    os._exit(1)
