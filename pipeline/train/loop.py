"""The training loop of one rank. Knows torch and storage; knows nothing of Ray."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline import philox, snapshot
from pipeline.errors import InputError
from pipeline.gan import augment, precision
from pipeline.gan import step as gan_step
from pipeline.gan.pixels import to_network
from pipeline.gan.sample import sample
from pipeline.gan.step import Rows
from pipeline.stream.batches import Batch
from pipeline.train import checkpoint, log, ownership
from pipeline.train.checkpoint import Checkpoint, State
from pipeline.train.device import OnDevice, on_device, set_up
from pipeline.train.noise import RowNoise
from pipeline.train.ranks import World, average_buffers, networks, sum_over_ranks
from pipeline.train.spec import RunSpec

_GRID_COLUMNS = 10
_GRID_ROWS_UNLABELLED = 10
_GRID_ROWS_MAX = 20
_QUARANTINED_SHOWN = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlets:
    """Where a rank says how it goes; only rank 0's are heard."""

    progress: Callable[[int, Mapping[str, Any]], None]
    """cur_nimg and what to show beside it, at least once a second."""
    report: Callable[[Mapping[str, float]], None]
    """The statistics of a tick; called by every rank."""


def run(spec: RunSpec, world: World, start: Checkpoint | None, batches: Iterator[Batch], outlets: Outlets) -> None:
    """Train from `start` (None: from nothing) to the end of the run. Every rank calls it with its own batches."""
    set_up(spec.train.deterministic)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as writer:
        _Trainer(spec, world, start, writer).train(batches, outlets)


class _Trainer:
    """The state of a rank between iterations: networks, clock, sums of the current tick."""

    def __init__(self, spec: RunSpec, world: World, start: Checkpoint | None, writer: ThreadPoolExecutor) -> None:
        self.spec, self.world, self.writer = spec, world, writer
        self.step = dataclasses.replace(spec.step, precision=precision.supported(spec.step.precision, world.device))
        self.nets = networks(spec, world)
        self.cur_nimg, self.tick, self.attempt, self.augment_p = 0, 0, 1, spec.step.augment.p[0]
        self.writes: list[Future[None]] = []
        if start is not None:
            self._restore(checkpoint.load(spec.run_url, start.number), start)
        if self.step.precision != spec.step.precision and world.rank == 0:
            self._event("precision", wanted=spec.step.precision, used=self.step.precision, reason="not in hardware")
        self.started_nimg = self.cur_nimg
        self.sums: dict[str, torch.Tensor] = {}
        self.replaced: list[str] = []
        self.taken: list[NDArray[np.int64]] = []
        self.wait_sec, self.tick_start, self.tick_nimg = 0.0, time.perf_counter(), self.cur_nimg
        self.pending: Future[None] | None = None

    def _restore(self, state: State, start: Checkpoint) -> None:
        checkpoint.refuse_other(state.config, self.spec.identity, self.spec.run_url)
        for name in checkpoint.TENSOR_STATES:
            getattr(self.nets, name).load_state_dict(state.tensors[name])
        self.cur_nimg, self.tick = int(state.progress["cur_nimg"]), int(state.progress["tick"])
        self.attempt, self.augment_p = int(state.control["attempt"]), float(state.control["augment_p"])
        assert self.cur_nimg == start.cur_nimg
        if self.world.rank == 0:
            before = state.progress["world_size"]
            note = {"note": "batch statistics are local to a rank: results change"} if before != self.world.size else {}
            self._event(
                "resumed", checkpoint=start.number, world_size=self.world.size, world_size_before=before, **note
            )

    def train(self, batches: Iterator[Batch], outlets: Outlets) -> None:
        """Iterate to the end, with a tick at each of its multiples, and leave a checkpoint and a snapshot."""
        train = self.spec.train
        tick_every = train.iterations(train.tick_kimg) * train.batch_size
        checkpoint_every = -(-train.iterations(train.checkpoint_kimg) * train.batch_size // tick_every) * tick_every
        staged, shown = on_device(batches, self.world.device), 0.0
        while self.cur_nimg < train.total_nimg:
            self._iterate(staged)
            if time.perf_counter() - shown > 1.0:
                shown = time.perf_counter()
                outlets.progress(self.cur_nimg, self._rates())
            finished = self.cur_nimg == train.total_nimg
            if self.cur_nimg % tick_every == 0 or finished:
                self._tick(outlets)
            if self.cur_nimg % checkpoint_every == 0 or finished:
                self._checkpoint(wait=finished)
        if self.world.rank == 0:
            self._snapshot()
            outlets.progress(self.cur_nimg, {})
        self._raise_what_writing_met(wait=True)

    def _iterate(self, batches: Iterator[OnDevice]) -> None:
        config, size = self.step, self.spec.plan.batch_size
        rows = [self._rows(batches, number) for number in range(config.real_batches)]
        values = gan_step.now(config, self.cur_nimg, self.augment_p)
        stats = gan_step.iterate(self.nets, rows, config, values, scale=self.world.size / size)
        average_buffers(self.nets.G, self.world)
        self.cur_nimg += size
        gan_step.update_ema(self.nets, self.cur_nimg, size, values.ema_half_life_kimg, config.ema_ramp)
        for name, value in stats.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

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
        means = sum_over_ranks({**self.sums, "replaced": torch.tensor(float(len(self.replaced)))}, self.world)
        stats = {name: value / seen for name, value in means.items()}
        stats |= {"cur_nimg": self.cur_nimg, "tick": self.tick, "elapsed_sec": time.perf_counter() - self.tick_start}
        stats |= self._rates() | dataclasses.asdict(gan_step.now(config, self.cur_nimg, self.augment_p))
        stats["replaced"] /= config.real_batches
        if config.augment.mode == "adaptive":
            self.augment_p = augment.adapted(self.augment_p, stats["real_sign"], seen, config.augment)
        if self.replaced:
            self._event("quarantined", count=len(self.replaced), samples=self.replaced[:_QUARANTINED_SHOWN])
        if self.world.rank == 0:
            self._write(log.put_stats, self.spec.run_url, self.attempt, self.tick, stats)
            self._write(log.put_grid, self.spec.run_url, self.attempt, self.cur_nimg, self._grid(), _GRID_COLUMNS)
            outlets.progress(self.cur_nimg, stats)
        if self.taken:
            taken = pa.table(list(np.concatenate(self.taken, axis=1)), names=["position", "sample"])
            place = (self.world.rank, self.world.size)
            self._write(log.put_positions, self.spec.run_url, self.started_nimg, self.cur_nimg, place, taken)
        outlets.report(stats)
        if stats["replaced"] > self.spec.train.max_replaced_fraction:
            raise InputError(
                f"{stats['replaced']:.1%} of the samples since the last tick could not be read (see the events of the "
                "run); prepare the dataset again, or raise train.max_replaced_fraction"
            )
        self.sums, self.wait_sec, self.replaced, self.taken = {}, 0.0, [], []
        self.tick_nimg, self.tick_start = self.cur_nimg, time.perf_counter()

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

        While the one before is still being written this one is left out, and said to be.
        """
        average_buffers(self.nets.D, self.world)
        if self.world.rank != 0:
            return
        if self.pending is not None and not self.pending.done() and not wait:
            self._event("checkpoint_left_out", reason="the one before is still being written")
            return
        self.pending = self._write(_save_checkpoint, self.spec, self._state())
        if wait:
            self._raise_what_writing_met(wait=True)

    def _write(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        """Call it in the background; one thread, so that writes keep their order."""
        self.writes.append(self.writer.submit(function, *arguments))
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
        control = {"attempt": self.attempt, "augment_p": self.augment_p}
        return State(tensors=tensors, control=control, progress=progress, config=self.spec.identity)

    def _snapshot(self) -> None:
        spec = self.spec
        config = snapshot.SnapshotConfig(
            network=spec.network,
            shape=spec.shape,
            classes=spec.classes,
            cur_nimg=self.cur_nimg,
            precision=self.step.precision,
            lineage=spec.lineage,
            class_counts=spec.class_counts,
        )
        ownership.check(spec.run_url, spec.owner)
        url = snapshot.save(spec.run_url, config, self.nets.G_ema, self.nets.D)
        self._event("finished", snapshot=url)

    def _event(self, kind: str, **fields: Any) -> None:
        put_event = functools.partial(log.put_event, kind=kind, cur_nimg=self.cur_nimg, **fields)
        self._write(put_event, self.spec.run_url, self.spec.owner)


def _save_checkpoint(spec: RunSpec, state: State) -> None:
    """What the background writer does with a state."""
    started, cur_nimg = time.perf_counter(), state.progress["cur_nimg"]
    number = checkpoint.save(spec.run_url, state, spec.owner)
    checkpoint.prune(spec.run_url, spec.train.num_to_keep)
    elapsed_sec = round(time.perf_counter() - started, 3)
    log.put_event(spec.run_url, spec.owner, "checkpoint", number=number, cur_nimg=cur_nimg, write_sec=elapsed_sec)
