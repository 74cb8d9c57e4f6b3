"""The clock that every contender is measured with, and what each of its batches is checked for.

Runs in the peers' environment too: standard library and numpy only.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images, uint8 [n, R, R, 3], and labels [n]."""

_PROOF_EVERY = 8


class CheckError(Exception):
    """A batch is not what was asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a contender is told: one JSON object on its command line."""

    contender: str
    url: str
    """Of the dataset, in the form that the contender reads."""
    shards: list[str]
    """Its tars: paths or URLs."""
    extension: str
    """Of the images: jpg or png."""
    resolution: int
    num_samples: int
    batch_size: int
    num_images: int
    """More than any contender delivers while it is measured."""
    workers: int
    """Processes, threads or CPUs, as the contender counts."""
    warmup_sec: float
    window_sec: float

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """From its JSON."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))


class Check:
    """Shape and dtype of every batch; of one image in every eighth, that its decoded bytes add up to its label."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._seen = 0
        self.proven = 0

    def __call__(self, batch: Batch) -> int:
        """Images of the batch; raises CheckError."""
        image, label = batch
        spec = self._spec
        wanted = (spec.batch_size, spec.resolution, spec.resolution, 3)
        if image.shape != wanted or image.dtype != np.uint8 or not image.flags.c_contiguous:
            raise CheckError(f"{spec.contender}: a batch is {image.dtype} {image.shape}, not uint8 {wanted}")
        if label.shape != (spec.batch_size,):
            raise CheckError(f"{spec.contender}: labels are {label.shape}, not ({spec.batch_size},)")
        if self._seen % _PROOF_EVERY == 0:
            row = self._seen // _PROOF_EVERY % spec.batch_size
            if int(image[row].sum(dtype=np.uint8)) != int(label[row]):
                raise CheckError(f"{spec.contender}: an image does not add up to its label")
            self.proven += 1
        self._seen += 1
        return len(image)


def steady_rate(batches: Iterator[Batch | None], spec: Spec) -> dict[str, Any]:
    """Images a second over a window after a warm-up.

    None says that a pass over the data is done. From there the clock stands still until as many batches have come as
    loaders make ready ahead: a reader that stops between passes is not charged for it, since passes over larger data
    are longer.
    """
    check = Check(spec)
    _drain(batches, check, time.perf_counter() + spec.warmup_sec)
    images, seconds = 0, 0.0
    started = time.perf_counter()
    while seconds < spec.window_sec:
        batch = next(batches)
        if batch is None:
            for _ in range(2 * spec.workers):
                check(_some(next(batches)))
            started = time.perf_counter()
            continue
        images += check(batch)
        now = time.perf_counter()
        seconds += now - started
        started = now
    return {"img_per_sec": images / seconds, "images": images, "seconds": seconds, "proven": check.proven}


def _drain(batches: Iterator[Batch | None], check: Check, until_sec: float) -> None:
    """Take batches until a time, and at least one."""
    while True:
        batch = next(batches)
        if batch is not None:
            check(batch)
            if time.perf_counter() >= until_sec:
                return


def _some(batch: Batch | None) -> Batch:
    if batch is None:
        raise CheckError("a pass is shorter than the batches made ready between passes; use more data")
    return batch


def print_result(result: dict[str, Any]) -> None:
    """The last line of a contender's output."""
    print(json.dumps(result), flush=True)
