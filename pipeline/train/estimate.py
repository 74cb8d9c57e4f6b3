"""What a run will take, from a few of its iterations done here. Nothing is stored."""

import contextlib
import dataclasses
import itertools
import os
import resource
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.errors import InputError
from pipeline.gan import precision
from pipeline.gan import step as gan_step
from pipeline.gan.pixels import to_network
from pipeline.gan.step import Rows
from pipeline.stream.batches import rank_batches
from pipeline.stream.chunk import ChunkReader
from pipeline.train.device import OnDevice, on_device, set_up
from pipeline.train.noise import RowNoise
from pipeline.train.ranks import World, networks
from pipeline.train.spec import RunSpec
from pipeline.train.workers import Workers

_WARM_UPS = 2
"""Iterations first, in which memory is taken and kernels are chosen."""
_ADA_P = 0.5
"""What it will be nobody knows; any value above 0 takes as long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What was measured of rank 0."""

    steps: int
    """Iterations that were timed."""
    sec_per_step: float
    """Of an iteration, without the adding up of gradients over ranks."""
    peak_bytes: int
    """Of memory: the GPU's, or on the CPU all that this process ever had."""
    read_bytes_per_sample: float
    """From storage."""

    def hours(self, num_images: int, batch_size: int) -> float:
        """Time for so many images seen."""
        return num_images / batch_size * self.sec_per_step / 3600


def probe(
    spec: RunSpec,
    reader: ChunkReader,
    workers: Workers,
    device: torch.device,
    num_ranks: int,
    *,
    steps: int = 20,
    limit_sec: float = 60.0,
) -> Estimate:
    """Do some iterations of a run as rank 0 of so many does them, with its batches, from the start.

    No further one begins after `limit_sec`. Sets what a rank sets of its process: threads, arithmetic.
    Raises InputError where a GPU's memory does not do; what reading raises.
    """
    torch.set_num_threads(min(workers.threads(num_ranks), len(os.sched_getaffinity(0))))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask of cuBLAS
    set_up(spec.train.deterministic)
    read: list[tuple[int, int]] = []
    blocks, threads = _blocks(reader, num_ranks, read), workers.decode_threads(num_ranks)
    try:
        with contextlib.closing(rank_batches(blocks, reader, 0, 0, num_ranks, threads)) as batches:
            iterations = _iterations(spec, on_device(batches, device), device, num_ranks)
            done, elapsed_sec = _time(iterations, steps, limit_sec, device, spec.step.compile)
    except torch.OutOfMemoryError as error:
        raise InputError("a worker's share of a batch does not fit its GPU; set --step.micro-batch lower") from error
    size_bytes, samples = map(sum, zip(*read, strict=True))
    return Estimate(
        steps=done,
        sec_per_step=elapsed_sec / done,
        peak_bytes=_peak_bytes(device),
        read_bytes_per_sample=size_bytes / samples,
    )


def _blocks(reader: ChunkReader, num_ranks: int, read: list[tuple[int, int]]) -> Iterator[pa.Table]:
    """The chunks that rank 0 is dealt; `read` is told the bytes and the samples of each."""
    for number in itertools.count(0, num_ranks):
        table = reader.read(number)
        read.append((pc.sum(pc.binary_length(table["data"])).as_py(), len(table)))
        yield reader.decoded(table) if reader.in_tasks else table


def _iterations(spec: RunSpec, batches: Iterator[OnDevice], device: torch.device, num_ranks: int) -> Iterator[None]:
    """Makes ready what an iteration needs, then does one each time; what is learnt is of no use."""
    nets = networks(spec, World(rank=0, size=1, device=device, wrap=lambda network: network.to(device)))
    config = dataclasses.replace(spec.step, precision=precision.supported(spec.step.precision, device))
    # Of the end of the run: at its start augmentation may be off, and most of a run is past its burn-in.
    clock, size = spec.train.total_nimg, spec.plan.batch_size
    values = gan_step.now(config, clock, _ADA_P)
    batches = itertools.chain([next(batches)], batches)
    while True:
        yield
        rows = [_rows(spec, next(batches), device) for _ in range(config.real_batches)]
        gan_step.iterate(nets, rows, config, values, scale=num_ranks / size)
        gan_step.update_ema(nets, clock, size, values.ema_half_life_kimg, config.ema_ramp)


def _rows(spec: RunSpec, drawn: OnDevice, device: torch.device) -> Rows:
    batch, image, label = drawn
    noise = RowNoise(spec.train.seed, 1, batch.position, device)
    return Rows(real_img=to_network(image, device), label=label, noise=noise)


def _time(
    iterations: Iterator[None], steps: int, limit_sec: float, device: torch.device, compiles: bool
) -> tuple[int, float]:
    """How many were timed, and how long they took together. The first ones count only where there is no time for more,
    unless most of theirs went into compiling.
    """
    next(iterations)
    warm = _run(iterations, _WARM_UPS, limit_sec, device)
    left_sec = limit_sec if compiles else limit_sec - warm[1]
    return _run(iterations, steps, left_sec, device) if left_sec > 0 else warm


def _run(iterations: Iterator[None], count: int, limit_sec: float, device: torch.device) -> tuple[int, float]:
    """One iteration, and more up to `count` while there is time: how many, and how long they took."""
    started, done = time.perf_counter(), 0
    while not done or (done < count and time.perf_counter() - started < limit_sec):
        next(iterations)
        done += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done, time.perf_counter() - started


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
