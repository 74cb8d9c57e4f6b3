"""One thing at a time, in a process of its own: `python -m tests.benchmarks.generate.alone`.

Warms up, says `ready`, waits for a line, works for so many seconds and prints images a second. What is not asked for is
not in the time: encoders get pixels that the network made before.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline import images, snapshot
from pipeline.gan.sample import sample
from pipeline.generate.factory import keep_freed_memory
from pipeline.images import Pixels

KINDS = ("forward", "encode", "pillow", "forward_and_encode", "known_way")
OF_OURS = ("forward", "encode", "forward_and_encode")
"""What ours is measured by: it runs with the allocator's settings that a worker of ours has."""


def main(arguments: list[str]) -> None:
    """Print `ready`, then the rate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--snapshot", required=True)
    parser.add_argument("--image-format", choices=["png", "jpeg"], required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--window-sec", type=float, required=True)
    parser.add_argument("--core", type=int, help="stay on this one")
    options = parser.parse_args(arguments)
    if options.kind in OF_OURS:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    with tempfile.TemporaryDirectory() as folder:
        make = _maker(options, Path(folder))
        for _ in range(2):
            make()
        print("ready", flush=True)
        sys.stdin.readline()
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < options.window_sec:
            count += make()
        print(count / (time.perf_counter() - started), flush=True)


def _maker(options: argparse.Namespace, folder: Path) -> Callable[[], int]:
    """What is repeated: makes some images, and says how many."""
    G, size, image_format = snapshot.load(options.snapshot).G_ema, options.micro_batch, options.image_format
    generator, seeds = torch.Generator().manual_seed(0), itertools.count()
    label = torch.zeros(size, dtype=torch.int64)

    def forward() -> Pixels:
        z = torch.randn(size, G.z_dim, generator=generator)  # type: ignore[call-overload]
        return sample(G, z, label, precision=options.precision).numpy()

    def encode(pixels: Pixels) -> int:
        return len([images.encode(image, image_format, 95) for image in pixels])

    def known_way() -> int:
        """As the published trainers' scripts do it: a seed, a forward pass, a file."""
        seed = next(seeds)
        z = torch.from_numpy(np.random.RandomState(seed).randn(1, G.z_dim).astype(np.float32))  # type: ignore[call-overload]
        pixels = sample(G, z, label[:1], precision=options.precision).numpy()[0]
        extension = "png" if image_format == "png" else "jpg"
        Image.fromarray(pixels, "RGB").save(folder / f"seed{seed:04d}.{extension}", **_PILLOW[image_format])
        return 1

    def pillow(pixels: Pixels) -> int:
        for image in pixels:
            Image.fromarray(image, "RGB").save(folder / "one", image_format.upper(), **_PILLOW[image_format])
        return len(pixels)

    held = forward()
    return {
        "forward": lambda: len(forward()),
        "encode": lambda: encode(held),
        "pillow": lambda: pillow(held),
        "forward_and_encode": lambda: encode(forward()),
        "known_way": known_way,
    }[options.kind]


_PILLOW = {"png": {}, "jpeg": {"quality": 95, "subsampling": 0}}
"""PNG as Pillow writes it unasked; JPEG as we do."""

if __name__ == "__main__":
    main(sys.argv[1:])
