"""The training loop of one rank. Knows torch and storage; knows nothing of Ray."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline import philox, snapshot, storage
from pipeline.errors import InputError
from pipeline.gan import augment, precision
from pipeline.gan import step as gan_step
from pipeline.gan.pixels import to_network
from pipeline.gan.sample import sample
from pipeline.gan.step import Rows
from pipeline.snapshot import SnapshotConfig, Taken
from pipeline.stream.batches import Batch
from pipeline.train import checkpoint, finetune, log, ownership
from pipeline.train.checkpoint import Checkpoint, State
from pipeline.train.device import OnDevice, on_device, set_up
from pipeline.train.noise import RowNoise
from pipeline.train.ranks import World, average_buffers, has_batch_statistics, networks, sum_over_ranks
from pipeline.train.spec import RunSpec

_GRID_COLUMNS = 10
_GRID_ROWS_UNLABELLED = 10
_GRID_ROWS_MAX = 20
_QUARANTINED_SHOWN = 100
_SHOWN_SEC = 0.2
_ASKS_SEC, _ASKS_FIRST = 5.0, 20
"""Word of preemption is asked for each so many seconds; in the first tick each so many iterations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlets:
    """Where a rank says how it goes; only rank 0's are heard."""

    progress: Callable[[int, Mapping[str, Any]], None]
    """cur_nimg and what to show beside it, up to five times a second."""
    report: Callable[[Mapping[str, float]], None]
    """The statistics of a tick; called by every rank."""
    preempted: Callable[[], bool] = lambda: False
    """Whether a machine of this run is about to be taken away; asked by every rank at the same iterations."""


def run(spec: RunSpec, world: World, start: Checkpoint | None, batches: Iterator[Batch], outlets: Outlets) -> None:
    """Train from `start` (None: from nothing) to the end of the run. Every rank calls it with its own batches."""
    set_up(spec.train.deterministic)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as writer:
        trainer = _Trainer(spec, world, start, writer)
        try:
            trainer.train(batches, outlets)
        except storage.StorageUnavailableError:
            writer.shutdown(wait=False, cancel_futures=True)  # each would wait as long again
            raise
        finally:
            trainer.stop.set()  # so that a write does not go on waiting for its store


class _Trainer:
    """The state of a rank between iterations: networks, clock, sums of the current tick."""

    def __init__(self, spec: RunSpec, world: World, start: Checkpoint | None, writer: ThreadPoolExecutor) -> None:
        self.spec, self.world, self.writer = spec, world, writer
        self.step = dataclasses.replace(spec.step, precision=precision.supported(spec.step.precision, world.device))
        self.nets = networks(spec, world)
        self.cur_nimg, self.tick, self.attempt, self.augment_p = 0, 0, 1, spec.step.augment.p[0]
        self.lr_factor, self.gamma_factor = 1.0, 1.0
        self.passed_over: tuple[int, ...] = ()
        self.writes: list[Future[None]] = []
        self.stop = threading.Event()
        if start is not None:
            self._restore(checkpoint.load(spec.run_url, start), start)
        elif spec.init_from:
            self._inherit()
        if self.step.precision != spec.step.precision and world.rank == 0:
            self._event("precision", wanted=spec.step.precision, used=self.step.precision, reason="not in hardware")
        self.started_nimg = self.cur_nimg
        self.sums: dict[str, torch.Tensor] = {}
        self.replaced: list[str] = []
        self.taken: list[NDArray[np.int64]] = []
        self.wait_sec, self.checkpoint_sec = 0.0, 0.0
        self.tick_start, self.tick_nimg = time.perf_counter(), self.cur_nimg
        self.pending: dict[str, Future[None]] = {}
        self.preempted, self.asks_every = False, _ASKS_FIRST

    def _inherit(self) -> None:
        inherited = finetune.begin(self.nets, self.spec)
        if self.world.rank == 0:
            self._event("initialised", **dataclasses.asdict(inherited))

    def _restore(self, state: State, start: Checkpoint) -> None:
        checkpoint.refuse_other(state.config, self.spec.identity, self.spec.run_url)
        for name in checkpoint.TENSOR_STATES:
            getattr(self.nets, name).load_state_dict(state.tensors[name])
        self.cur_nimg, self.tick = int(state.progress["cur_nimg"]), int(state.progress["tick"])
        control = {"lr_factor": 1.0, "gamma_factor": 1.0, **state.control}
        self.attempt, self.augment_p = int(control["attempt"]), float(control["augment_p"])
        self.lr_factor, self.gamma_factor = float(control["lr_factor"]), float(control["gamma_factor"])
        self.passed_over = start.passed_over
        assert self.cur_nimg == start.cur_nimg
        if self.world.rank == 0:
            before = state.progress["world_size"]
            differs = before != self.world.size and has_batch_statistics(self.nets.G, self.nets.D)
            note = {"note": "batch statistics are local to a rank: results change"} if differs else {}
            sizes = {"world_size": self.world.size, "world_size_before": before}
            self._event("resumed", checkpoint=start.number, attempt=self.attempt, **sizes, **note)

    def train(self, batches: Iterator[Batch], outlets: Outlets) -> None:
        """Iterate to the end, with a tick at each of its multiples, and leave a checkpoint and a snapshot."""
        train = self.spec.train
        checkpoint_every = train.whole_ticks(train.checkpoint_kimg)
        snapshot_every = train.whole_ticks(train.snapshot_kimg or train.total_kimg)
        staged, shown = on_device(batches, self.world.device), 0.0
        while self.cur_nimg < train.total_nimg:
            self._iterate(staged)
            if time.perf_counter() - shown > _SHOWN_SEC:
                shown = time.perf_counter()
                outlets.progress(self.cur_nimg, self._rates())
            finished = self.cur_nimg == train.total_nimg
            if self.cur_nimg % train.tick_nimg == 0 or finished:
                self._tick(outlets)
            if self.cur_nimg % snapshot_every == 0 and not finished:
                average_buffers(self.nets.D, self.world)
                self._snapshot(at_end=False)
            if self.cur_nimg % checkpoint_every == 0 or finished or self._preempted(outlets):
                self._record_positions()  # a checkpoint before a machine goes lies within a tick
                self._checkpoint(wait=finished)
        self._snapshot(at_end=True)
        if self.world.rank == 0:
            outlets.progress(self.cur_nimg, {})
        self._raise_what_writing_met(wait=True)

    def _preempted(self, outlets: Outlets) -> bool:
        """Whether word has just come that a machine will be taken away. All ranks ask together, each few seconds."""
        if self.cur_nimg // self.spec.plan.batch_size % self.asks_every:
            return False
        # Word reaches ranks at different moments, and all must go on with the same exchange among them.
        told = {"told": torch.tensor(float(outlets.preempted()))}
        before, self.preempted = self.preempted, sum_over_ranks(told, self.world)["told"] > 0
        if not self.preempted or before:
            return False
        if self.world.rank == 0:
            self._event("preempted")
        return True

    def _iterate(self, batches: Iterator[OnDevice]) -> None:
        config, size = self.step, self.spec.plan.batch_size
        rows = [self._rows(batches, number) for number in range(config.real_batches)]
        values = self._now()
        stats = gan_step.iterate(self.nets, rows, config, values, scale=self.world.size / size)
        average_buffers(self.nets.G, self.world)
        self.cur_nimg += size
        gan_step.update_ema(self.nets, self.cur_nimg, size, values.ema_half_life_kimg, config.ema_ramp)
        for name, value in stats.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _now(self) -> gan_step.Now:
        """What the schedules say, times the monitor's factors."""
        values = gan_step.now(self.step, self.cur_nimg, self.augment_p)
        return dataclasses.replace(
            values,
            g_lr=values.g_lr * self.lr_factor,
            d_lr=values.d_lr * self.lr_factor,
            gamma=values.gamma * self.gamma_factor,
        )

    def _rows(self, batches: Iterator[OnDevice], number: int) -> Rows:
        """This rank's rows of batch `number` of the iteration."""
        asked = time.perf_counter()
        batch, image, label = next(batches)
        self.wait_sec += time.perf_counter() - asked
        assert batch.step == self.spec.data_step(self.cur_nimg) + number
        self.replaced += batch.replaced
        if self.spec.train.record_positions:
            self.taken.append(np.stack([batch.position, batch.sample]))
        noise = RowNoise(self.spec.train.seed, self.attempt, batch.position, self.world.device)
        return Rows(real_img=to_network(image, self.world.device), label=label, noise=noise)

    def _rates(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.tick_start
        return {
            "img_per_sec": (self.cur_nimg - self.tick_nimg) / elapsed,
            "data_wait_share": self.wait_sec / elapsed,
        }

    def _tick(self, outlets: Outlets) -> None:
        self._raise_what_writing_met(wait=False)
        self.tick += 1
        config, seen = self.step, self.cur_nimg - self.tick_nimg
        replaced, elapsed_sec = float(len(self.replaced)), time.perf_counter() - self.tick_start
        own = {"replaced": torch.tensor(replaced), "elapsed_sec": torch.tensor(elapsed_sec)}
        means = sum_over_ranks({**self.sums, **own}, self.world)
        stats = {name: value / seen for name, value in means.items()}
        stats |= {"cur_nimg": self.cur_nimg, "tick": self.tick, "checkpoint_sec": self.checkpoint_sec}
        stats["elapsed_sec"] = means["elapsed_sec"] / self.world.size  # the same on every rank
        self.asks_every = max(1, round(_ASKS_SEC * seen / stats["elapsed_sec"] / self.spec.plan.batch_size))
        stats |= self._rates() | dataclasses.asdict(self._now())
        stats["replaced"] /= config.real_batches
        if config.augment.mode == "adaptive":
            self.augment_p = augment.adapted(self.augment_p, stats["real_sign"], seen, config.augment)
        if self.replaced:
            self._event("quarantined", count=len(self.replaced), samples=self.replaced[:_QUARANTINED_SHOWN])
        if self.world.rank == 0:
            self._write(ownership.check, self.spec.run_url, self.spec.owner)
            self._write(log.put_stats, self.spec.run_url, self.attempt, self.tick, stats)
            self._write(log.put_grid, self.spec.run_url, self.attempt, self.cur_nimg, self._grid(), _GRID_COLUMNS)
            outlets.progress(self.cur_nimg, stats)
        self._record_positions()
        outlets.report(stats)
        if stats["replaced"] > self.spec.train.max_replaced_fraction:
            raise InputError(
                f"{stats['replaced']:.1%} of the samples since the last tick could not be read (see the events of the "
                "run); prepare the dataset again, or raise train.max_replaced_fraction"
            )
        self.sums, self.wait_sec, self.checkpoint_sec, self.replaced = {}, 0.0, 0.0, []
        self.tick_nimg, self.tick_start = self.cur_nimg, time.perf_counter()

    def _record_positions(self) -> None:
        """Hand what was taken since the last record to the background writer."""
        if self.taken:
            taken = pa.table(list(np.concatenate(self.taken, axis=1)), names=["position", "sample"])
            place = (self.world.rank, self.world.size)
            self._write(log.put_positions, self.spec.run_url, self.started_nimg, self.cur_nimg, place, taken)
        self.taken = []

    def _grid(self) -> NDArray[np.uint8]:
        """Samples of G_ema from noise that stays the same all through the run: a row a class."""
        classes = min(_GRID_ROWS_MAX, self.spec.shape.num_classes)
        rows = classes or _GRID_ROWS_UNLABELLED
        key = philox.stream_key(self.spec.train.seed, "z/grid")
        z = torch.from_numpy(philox.normals(key, np.arange(rows * _GRID_COLUMNS), self.spec.network.z_dim))
        label = (
            torch.arange(rows).repeat_interleave(_GRID_COLUMNS) if classes else torch.zeros(len(z), dtype=torch.int64)
        )
        device = self.world.device
        return sample(self.nets.G_ema, z.to(device), label.to(device), precision=self.step.precision).cpu().numpy()

    def _checkpoint(self, *, wait: bool) -> None:
        """Hand a copy of the state to the background writer; a tick never waits for the bucket, only the end does.

        While the one before is still being written this one is left out, and said to be; one for which a machine's end
        is the reason never is.
        """
        started = time.perf_counter()
        average_buffers(self.nets.D, self.world)
        if self.world.rank != 0:
            return
        must = wait or self.preempted or self.spec.train.deterministic
        if self._left_out("checkpoint", must=must):
            return
        self.pending["checkpoint"] = self._write(_save_checkpoint, self.spec, self._state(), self.passed_over)
        self.checkpoint_sec += time.perf_counter() - started
        if wait:
            self._raise_what_writing_met(wait=True)

    def _left_out(self, kind: str, *, must: bool) -> bool:
        """Whether this one is left out, and said to be: it need not be written, and the one before still is."""
        left_out = kind in self.pending and not self.pending[kind].done() and not must
        if left_out:
            self._event(f"{kind}_left_out", reason="the one before is still being written")
        return left_out

    def _write(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        """Call it in the background; one thread, so that writes keep their order. While the store is not to be reached
        it is called again: a checkpoint may then be committed twice, which harms nobody.
        """
        call = functools.partial(function, *arguments)
        timeout_sec = self.spec.train.storage_timeout_sec
        self.writes.append(self.writer.submit(storage.patiently, call, timeout_sec, self.stop))
        return self.writes[-1]

    def _raise_what_writing_met(self, *, wait: bool) -> None:
        """Raise the first error of the writes that are done, or of all."""
        done = [write for write in self.writes if wait or write.done()]
        self.writes = [write for write in self.writes if write not in done]
        for write in done:
            write.result()

    def _state(self) -> State:
        tensors = {name: checkpoint.to_cpu(getattr(self.nets, name).state_dict()) for name in checkpoint.TENSOR_STATES}
        progress = {
            "cur_nimg": self.cur_nimg,
            "tick": self.tick,
            "world_size": self.world.size,
            "torch_threads": torch.get_num_threads(),
            "torch_version": torch.__version__,
        }
        factors = {"lr_factor": self.lr_factor, "gamma_factor": self.gamma_factor}
        control = {"attempt": self.attempt, "augment_p": self.augment_p, **factors}
        return State(tensors=tensors, control=control, progress=progress, config=self.spec.identity)

    def _snapshot(self, *, at_end: bool) -> None:
        """Hand copies of G_ema and D to the background writer, or leave them out, as with a checkpoint."""
        spec = self.spec
        if self.world.rank != 0 or self._left_out("snapshot", must=at_end or spec.train.deterministic):
            return
        config = SnapshotConfig(
            network=spec.network,
            shape=spec.shape,
            classes=spec.classes,
            cur_nimg=self.cur_nimg,
            precision=self.step.precision,
            lineage=spec.lineage,
            class_counts=spec.class_counts,
        )
        states = {name: checkpoint.to_cpu(getattr(self.nets, name).state_dict()) for name in ("G_ema", "D")}
        self.pending["snapshot"] = self._write(_save_snapshot, spec, config, states, self.attempt, at_end)

    def _event(self, kind: str, **fields: Any) -> None:
        put_event = functools.partial(log.put_event, kind=kind, cur_nimg=self.cur_nimg, **fields)
        self._write(put_event, self.spec.run_url, self.spec.owner)


def _save_checkpoint(spec: RunSpec, state: State, passed_over: Collection[int]) -> None:
    """What the background writer does with a state."""
    started, cur_nimg = time.perf_counter(), state.progress["cur_nimg"]
    number = checkpoint.save(spec.run_url, state, spec.owner)
    ownership.check(spec.run_url, spec.owner)  # a former owner deletes nothing either
    checkpoint.prune(spec.run_url, spec.train.num_to_keep, passed_over)
    elapsed_sec = round(time.perf_counter() - started, 3)
    log.put_event(spec.run_url, spec.owner, "checkpoint", number=number, cur_nimg=cur_nimg, write_sec=elapsed_sec)


def _save_snapshot(
    spec: RunSpec, config: SnapshotConfig, states: Mapping[str, Mapping[str, torch.Tensor]], attempt: int, at_end: bool
) -> None:
    """What it does with the networks' weights: nothing where a run that was resumed has come by before."""
    if not at_end and snapshot.was_taken(spec.run_url, attempt, config.cur_nimg):
        return
    ownership.check(spec.run_url, spec.owner)
    url = snapshot.save_states(spec.run_url, config, states)
    if spec.train.snapshot_kimg:
        name = url.rpartition("/")[2]
        taken = Taken(attempt=attempt, cur_nimg=config.cur_nimg, name=name)
        snapshot.note_taken(spec.run_url, taken)
        if at_end:
            snapshot.note_end(spec.run_url, taken)
    kind = "finished" if at_end else "snapshot"
    log.put_event(spec.run_url, spec.owner, kind, cur_nimg=config.cur_nimg, snapshot=url)
