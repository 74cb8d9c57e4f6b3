"""How fast an iteration is, against the same mathematics written the plain way: `python -m pipeline.gan.bench`.

Needs torch alone. Sides take turns, in rounds, so that what else happens on the machine meets both; a figure is the
median of its rounds. The last line is JSON.
"""

import argparse
import copy
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipeline.gan import precision, presets, step
from pipeline.gan.bench_plain import PlainTrainer
from pipeline.gan.networks.build import ImageShape, build
from pipeline.gan.presets import Recipe
from pipeline.gan.step import Networks, Rows

_PEAK_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "A10G": 70.0}
"""Dense, without sparsity; NVIDIA's data sheets."""

_SHAPES: Mapping[str, tuple[int, int, int]] = {
    "dcgan": (64, 3, 0),
    "sngan": (32, 3, 10),
    "r3gan-tiny": (32, 3, 10),
    "r3gan-cifar10": (32, 3, 10),
    "r3gan-ffhq64": (64, 3, 0),
    "r3gan-ffhq256": (256, 3, 0),
    "r3gan-imagenet32": (32, 3, 1000),
    "r3gan-imagenet64": (64, 3, 1000),
}
"""Resolution, channels, classes that a preset is measured with."""
CPU_PRESETS = ("dcgan", "sngan", "r3gan-tiny")
_SIDES = ("ours", "ours, finite differences", "ours, compiled", "ours, finite differences, compiled")
_CUDA_PRESETS = ("dcgan", "sngan", "r3gan-cifar10", "r3gan-ffhq256")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One way of doing an iteration, ready to be timed."""

    name: str
    iterate: Callable[[], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of a side."""

    img_per_sec: float
    memory_bytes: int
    """Peak on a GPU, with the weights of the sides that wait; 0 on a CPU."""


@dataclasses.dataclass(frozen=True)
class _TorchNoise:
    """`Noise` from torch's own generator: nothing here needs to be repeatable."""

    rows: int
    device: torch.device

    def normals(self, _: str, count: int) -> torch.Tensor:
        return torch.randn(self.rows, count, device=self.device)

    def uniforms(self, _: str, count: int) -> torch.Tensor:
        return torch.rand(self.rows, count, device=self.device).clamp(1e-6, 1 - 1e-6)

    def signs(self, _: str, count: int) -> torch.Tensor:
        return torch.randint(0, 2, (self.rows, count), device=self.device) * 2.0 - 1

    def part(self, rows: slice) -> "_TorchNoise":
        return _TorchNoise(len(range(self.rows)[rows]), self.device)


def networks(recipe: Recipe, shape: ImageShape, device: torch.device) -> Networks:
    """Networks of a recipe as one process trains them."""
    G, D = (network.to(device) for network in build(recipe.network, shape, seed=0))
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    D_judge = step.compile_networks(G, D, recipe.step)
    G_opt, D_opt = step.optimisers(G, D, recipe.step)
    return Networks(G=G, D=D, G_ema=G_ema, G_trained=G, D_trained=D, D_judge=D_judge, G_opt=G_opt, D_opt=D_opt)


def our_side(name: str, recipe: Recipe, shape: ImageShape, batch_size: int, device: torch.device) -> Side:
    """`step.iterate` and the moving average, on images that lie in memory."""
    used = precision.supported(recipe.step.precision, device)
    config, nets = dataclasses.replace(recipe.step, precision=used), networks(recipe, shape, device)
    rows = _rows(shape, batch_size, device)

    def iterate() -> None:
        torch.backends.cudnn.allow_tf32 = False  # as training has it
        values = step.now(config, 0, 0.0)
        step.iterate(nets, [rows] * config.real_batches, config, values, scale=1 / batch_size)
        step.update_ema(nets, 10**9, batch_size, 10.0, config.ema_ramp)

    return Side(name=name, iterate=iterate)


def plain_side(recipe: Recipe, shape: ImageShape, batch_size: int, device: torch.device) -> Side:
    """The same mathematics as a tutorial would have it."""
    G, D = build(recipe.network, shape, seed=0)
    trainer = PlainTrainer(G, D, recipe.step, device)
    rows = _rows(shape, batch_size, device)
    image = rows.real_img.contiguous()

    def iterate() -> None:
        torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, which a tutorial leaves alone
        trainer.iterate(image, rows.label)

    return Side(name="plain", iterate=iterate)


def _rows(shape: ImageShape, batch_size: int, device: torch.device) -> Rows:
    image = torch.rand(batch_size, shape.channels, shape.resolution, shape.resolution, device=device) * 2 - 1
    label = torch.randint(0, max(1, shape.num_classes), (batch_size,), device=device)
    channels_last = image.contiguous(memory_format=torch.channels_last)
    return Rows(real_img=channels_last, label=label, noise=_TorchNoise(batch_size, device))


def measure(
    sides: list[Side],
    batch_size: int,
    device: torch.device,
    rounds: int,
    window_sec: float,
    say: Callable[[str], None],
) -> dict[str, list[Result]]:
    """Images a second of each side, a result a round; says each as it comes."""
    found: dict[str, list[Result]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            started = time.perf_counter()
            if number == 0:
                _warm_up(side, device)
            ready = time.perf_counter() - started
            found[side.name].append(_window(side, batch_size, device, window_sec))
            rate = found[side.name][-1].img_per_sec
            say(f"  round {number + 1} of {rounds}: {side.name} {rate:,.1f} img/s, ready in {ready:.1f} s")
    return found


def _warm_up(side: Side, device: torch.device) -> None:
    for _ in range(2):
        side.iterate()
    _finish(device)


def _window(side: Side, batch_size: int, device: torch.device, window_sec: float) -> Result:
    """Whole iterations until the window is over, the first one not counted."""
    side.iterate()
    _finish(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    count, started = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - started < window_sec:
        side.iterate()
        count += 1
        if count % 8 == 0:
            _finish(device)  # so that the clock sees what was done, not what was asked for
    _finish(device)
    elapsed = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Result(img_per_sec=count * batch_size / elapsed, memory_bytes=memory)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_per_image(recipe: Recipe, shape: ImageShape, batch_size: int, device: torch.device) -> float:
    """Multiplications and additions of convolutions and matrix products in an iteration, by an image of the batch."""
    eager = dataclasses.replace(recipe, step=dataclasses.replace(recipe.step, compile=False))
    side = our_side("count", eager, shape, batch_size, device)
    with _Flops() as counter:
        side.iterate()
    return counter.total / batch_size


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up by PyTorch's own formulas. Its FlopCounterMode refuses a gradient of a gradient."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.total += _of_convolution_backward(args[0], args[2], args[-1])
        elif count := flop_registry.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def _of_convolution_backward(g: torch.Tensor, w: torch.Tensor, output_mask: Sequence[bool]) -> int:
    """As many as forward for each of image and weight. PyTorch's formula takes a weight's groups for one."""
    return sum(output_mask[:2]) * 2 * g.numel() * w[0].numel()


def _variants(recipe: Recipe, device: torch.device) -> Iterator[tuple[str, Recipe]]:
    """Our step as it stands, by finite differences, and both compiled on a GPU."""
    changes: list[tuple[str, dict[str, object]]] = [("ours", {})]
    if recipe.step.differentiates_d_twice and recipe.step.penalty != "wgan_gp":
        changes.append(("ours, finite differences", {"penalty_method": "finite_difference"}))
    if device.type == "cuda":
        changes += [(f"{name}, compiled", change | {"compile": True}) for name, change in list(changes)]
    for name, change in changes:
        yield name, dataclasses.replace(recipe, step=dataclasses.replace(recipe.step, **change))  # type: ignore[arg-type]


def bench_preset(
    name: str,
    device: torch.device,
    *,
    batch_size: int,
    rounds: int,
    window_sec: float,
    only: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Measure one preset; returns its ratios to the plain version. `only`: these of our sides; empty: all."""
    recipe = presets.RECIPES[name]
    resolution, channels, classes = _SHAPES[name]
    shape = ImageShape(resolution=resolution, channels=channels, num_classes=classes)
    batch_size = batch_size or recipe.batch_size
    sides = [plain_side(recipe, shape, batch_size, device)]
    for one, varied in _variants(recipe, device):
        if not only or one in only:
            sides.append(our_side(one, varied, shape, batch_size, device))
    flops = flops_per_image(recipe, shape, batch_size, device)
    say(f"{name}: {shape.resolution}² × {shape.channels}, batch {batch_size}, {flops / 1e9:.2f} GFLOP an image")
    found = measure(sides, batch_size, device, rounds, window_sec, say)
    rates = {one: statistics.median(result.img_per_sec for result in results) for one, results in found.items()}
    for one, rate in rates.items():
        tflops, peak = rate * flops / 1e12, _peak(device)
        share = f"{tflops / peak:6.1%} of peak" if peak and one.startswith("ours") else ""
        memory = f"{found[one][-1].memory_bytes / 2**30:6.1f} GiB" if device.type == "cuda" else ""
        # By the operations of the exact step: finite differences do fewer.
        counted = f"{tflops:8.3f} TFLOP/s {share}" if "finite" not in one else ""
        say(f"  {one:36} {rate:10,.1f} img/s {rate / rates['plain']:6.2f} × plain {memory} {counted}".rstrip())
    keys = {"ours": f"{name}_vs_plain", "ours, finite differences": f"{name}_finite_difference_vs_plain"}
    keys |= {f"{one}, compiled": f"{key}_compiled" for one, key in list(keys.items())}
    return {
        keys[one]: statistics.median(
            ours.img_per_sec / plain.img_per_sec for ours, plain in zip(results, found["plain"], strict=True)
        )
        for one, results in found.items()
        if one != "plain"
    }


def _peak(device: torch.device) -> float:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for word, peak in _PEAK_BF16_TFLOPS.items() if word in name), 0.0)


def main(arguments: list[str]) -> None:
    """Measure the presets of a device and print a table, then JSON."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.gan.bench", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", action="append", choices=sorted(_SHAPES), help="measure this one; may be repeated")
    parser.add_argument("--side", action="append", choices=_SIDES, help="of our sides, this one; may be repeated")
    parser.add_argument("--batch-size", type=int, default=0, help="instead of the preset's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--window-sec", type=float, default=10.0, help="of each side in each round")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    say = functools.partial(print, flush=True)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    say(f"{kind}, torch {torch.__version__}, our step in {precision.supported('bf16', device)}")
    ratios: dict[str, float] = {}
    for name in options.preset or (_CUDA_PRESETS if device.type == "cuda" else CPU_PRESETS):
        ratios |= bench_preset(
            name,
            device,
            batch_size=options.batch_size,
            rounds=options.rounds,
            window_sec=options.window_sec,
            only=options.side or (),
            say=say,
        )
    say(json.dumps({"bench": "train", "ratios": {key: round(value, 3) for key, value in ratios.items()}}))


if __name__ == "__main__":
    main(sys.argv[1:])
