"""What makes images in one process: networks on a device, and threads that encode beside them."""

import collections
import ctypes
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline import images
from pipeline.gan.pixels import to_network
from pipeline.gan.sample import sample
from pipeline.generate.plan import GeneratePlan
from pipeline.images import Pixels

KEY_DIGITS = 9
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_AHEAD = 1  # micro-batches of pixels that wait for an encoder

Sample = tuple[str, Mapping[str, bytes]]
"""Key, and extension → bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factory:
    """Makes the samples of a plan. Several threads may use it: the networks run for one at a time."""

    plan: GeneratePlan
    G: nn.Module
    D: nn.Module
    device: torch.device
    encoders: Executor
    num_encoders: int
    busy: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Held while a network runs."""
    making: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Held while a shard is made: two at once would end together, and nobody works while both are stored."""

    def samples(self, micro_batches: Sequence[NDArray[np.int64]]) -> Iterator[Sample]:
        """Samples in order, by the numbers of their micro-batches. While one is encoded the next is made."""
        waiting: collections.deque[list[Future[list[Sample]]]] = collections.deque()
        for seeds in micro_batches:
            waiting.append(self._encode(seeds))
            if len(waiting) > _AHEAD:
                yield from _results(waiting.popleft())
        while waiting:
            yield from _results(waiting.popleft())

    def _encode(self, seeds: NDArray[np.int64]) -> list[Future[list[Sample]]]:
        labels = self.plan.labels(seeds)
        pixels = self.pixels(seeds, labels)
        pieces = np.array_split(np.arange(len(seeds)), min(self.num_encoders, len(seeds)))
        return [
            self.encoders.submit(_encoded, self.plan, seeds[piece], pixels[piece], labels[piece]) for piece in pieces
        ]

    def pixels(self, seeds: NDArray[np.int64], labels: NDArray[np.int64]) -> Pixels:
        """The images of one micro-batch, uint8 [n, R, R, C]. With rejection, of each the first attempt that D likes
        well enough, else the best: a function of the micro-batch still, since what is tried again follows from it.
        """
        made = self.make(self.plan.noise(seeds), labels)
        if self.plan.reject_below is None:
            return made
        scores = self.scores(made, labels)
        for attempt in range(1, self.plan.config.max_tries):
            low = np.flatnonzero(scores < self.plan.reject_below)
            if not len(low):
                break
            again = self.make(self.plan.noise(seeds[low], attempt), labels[low])
            found = self.scores(again, labels[low])
            better = found > scores[low]
            made[low[better]], scores[low[better]] = again[better], found[better]
        return made

    def make(self, z: NDArray[np.float32], labels: NDArray[np.int64]) -> Pixels:
        """z float32 [n, Z], label [n] → uint8 [n, R, R, C], in one pass."""
        with self.busy:
            on_device = (torch.from_numpy(array).to(self.device) for array in (z, labels))
            made: Pixels = sample(self.G, *on_device, precision=self.plan.config.precision).cpu().numpy()
        return made

    @torch.no_grad()
    def scores(self, pixels: Pixels, labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """D's logits of images, uint8 [n, R, R, C], in the plan's micro-batches: float32 [n]."""
        assert not self.D.training
        logits, size = [], self.plan.config.micro_batch
        for start in range(0, len(pixels), size):
            image, label = (torch.from_numpy(array[start : start + size]) for array in (pixels, labels))
            with self.busy:
                logits.append(self.D(to_network(image, self.device), label.to(self.device)).float().cpu().numpy())
        return np.concatenate(logits)


def open_factory(plan: GeneratePlan, G: nn.Module, D: nn.Module, device: torch.device, num_encoders: int) -> Factory:
    """Networks in eval mode → a factory that makes a plan's samples on `device`, with so many threads that encode."""
    torch.set_num_threads(1)  # in the plan: the sum order of a kernel depends on it
    G, D = G.to(device), D.to(device)
    if plan.config.compile:
        G.compile()
    pool = ThreadPoolExecutor(num_encoders, thread_name_prefix="encode")
    return Factory(plan=plan, G=G, D=D, device=device, encoders=pool, num_encoders=num_encoders)


def keep_freed_memory() -> None:
    """Tell glibc so, for this process. It gives blocks of a network's size back to the kernel after each micro-batch,
    and takes new ones, zeroed: 25,000 page faults a second, an eighth of the images.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, size_bytes in ((_M_MMAP_THRESHOLD, 32 * 1024**2), (_M_TRIM_THRESHOLD, 256 * 1024**2)):
            assert libc.mallopt(parameter, size_bytes)


def reject_below(factory: Factory, on_progress: Callable[[int], None]) -> float:
    """The score that the plan's `reject_share` of images falls below: D's logits of the pilot, counted off.
    `on_progress` hears how many more images were made.
    """
    z, labels = factory.plan.pilot()
    size, scores = factory.plan.config.micro_batch, []
    for start in range(0, len(z), size):
        part = slice(start, start + size)
        scores.append(factory.scores(factory.make(z[part], labels[part]), labels[part]))
        on_progress(len(scores[-1]))
    ordered = np.sort(np.concatenate(scores))
    return float(ordered[int(len(ordered) * factory.plan.config.reject_share)])


def key_of(seed: int) -> str:
    """The key of image i: its number, nine digits or more."""
    return f"{seed:0{KEY_DIGITS}d}"


def _encoded(plan: GeneratePlan, seeds: NDArray[np.int64], pixels: Pixels, labels: NDArray[np.int64]) -> list[Sample]:
    rows = zip(seeds.tolist(), pixels, labels.tolist(), strict=True)
    return [(key_of(seed), _files(plan, image, label)) for seed, image, label in rows]


def _files(plan: GeneratePlan, image: Pixels, label: int) -> Mapping[str, bytes]:
    config = plan.config
    encoded = images.encode(image, config.image_format, config.quality)
    files = {images.EXTENSIONS[config.image_format]: encoded}
    return files | {"cls": str(label).encode()} if plan.classes else files


def _results(pieces: list[Future[list[Sample]]]) -> Iterator[Sample]:
    for piece in pieces:
        yield from piece.result()
