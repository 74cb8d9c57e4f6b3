"""A small residual classifier: its features measure a domain, and its accuracy says what images are worth."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from pipeline import philox
from pipeline.gan.precision import autocast, supported
from pipeline.images import Pixels

VERSION = 1
"""Of network and training: another one gives other features."""
FEATURES = 128
_WIDTHS = (16, 32, 64, FEATURES)
_BATCH = 128
_LEARNING_RATE, _WEIGHT_DECAY, _SMOOTHING = 3e-3, 1e-2, 0.05
_WARM_UP_SHARE = 0.1
_AT_ONCE = 1000
_LARGEST_SIDE = 64
"""Larger images are averaged down to it: what a class is shows at that size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How it is trained. Part of what features are named by: a change makes other features."""

    steps: int = 2000
    """Steps of 128 images."""
    seed: int = 0
    """Of its weights and of the order of images."""
    flip: bool = False
    """Show each image mirrored or not, by chance."""


class Classifier(nn.Module):
    """uint8 NHWC [0, 255] → logits [N, K], by four stages of one residual block, each at half the size."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        widths = (channels, *_WIDTHS)
        self.blocks = nn.ModuleList(_Block(*pair) for pair in itertools.pairwise(widths))
        self.last = nn.Linear(FEATURES, num_classes)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 NHWC → float32 [N, FEATURES], what the last layer sees."""
        image = pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
        image = image.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            image = block(image)
        return image.mean(dim=(2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.features(pixels))
        return logits


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(before, after, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for _ in range(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.norms[0](self.first(image)))
        # Every second pixel by hand: with a stride, oneDNN's kernel for AVX2 writes past its memory where an image has
        # fewer than 8 channels (https://github.com/uxlfoundation/oneDNN/issues/6035).
        return functional.relu(self.norms[1](self.second(inner)) + self.skip(image[:, :, ::2, ::2]))


def reduced(pixels: Pixels) -> Pixels:
    """uint8 [N, R, R, C] averaged down to 64² where it is larger: a classifier's input."""
    if pixels.shape[1] <= _LARGEST_SIDE:
        return pixels
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32)
    mean = functional.adaptive_avg_pool2d(image, _LARGEST_SIDE)
    return np.ascontiguousarray(mean.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def rotated(pixels: Pixels) -> tuple[Pixels, NDArray[np.int64]]:
    """Images uint8 [N, R, R, C] turned by none to three right angles by chance, and by how many: what a classifier
    learns from images without classes (Gidaris et al. 2018).
    """
    turned = pixels.copy()
    turns = philox.integers(philox.stream_key(0, "evaluate/turns"), np.arange(len(pixels)), 4)
    for count in (1, 2, 3):
        turned[turns == count] = np.rot90(pixels[turns == count], count, axes=(1, 2))
    return turned, turns


def train_classifier(
    pixels: Pixels,
    labels: NDArray[np.int64],
    num_classes: int,
    recipe: Recipe,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Classifier:
    """From images uint8 [N, R, R, C] and their labels [N]. The same on every run with the same torch and hardware.
    `on_progress` hears of each step.

    One thread, bf16 where the hardware has it: 4,000 images of 32² a second, fp32 2,700, with two threads 2,100.
    """
    precision = supported("bf16", torch.device("cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = Classifier(pixels.shape[3], num_classes)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decayed = [weight for weight in network.parameters() if weight.ndim > 1]
    others = [weight for weight in network.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_rate, steps=recipe.steps))
    with _one_thread():
        for step, rows in enumerate(_batches(len(pixels), recipe)):
            image = torch.from_numpy(pixels[rows])
            if recipe.flip:
                mirrored = torch.from_numpy(_halves(recipe.seed, step, len(rows)))
                image = torch.where(mirrored[:, None, None, None], image.flip(2), image)
            with autocast(precision, image.device):
                logits = network(image)
            loss = functional.cross_entropy(logits.float(), torch.from_numpy(labels[rows]), label_smoothing=_SMOOTHING)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            rate.step()
            on_progress(step + 1)
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def encode(network: Classifier) -> bytes:
    """Its weights as safetensors."""
    return bytes(safetensors.torch.save({name: value.contiguous() for name, value in network.state_dict().items()}))


def decode(data: bytes, channels: int, num_classes: int) -> Classifier:
    """A trained classifier from its bytes. Raises SafetensorError or RuntimeError for what is none."""
    network = Classifier(channels, num_classes)
    network.load_state_dict(safetensors.torch.load(data))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval().requires_grad_(False)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up in a straight line, then down to nothing along a cosine."""
    warm_up = max(1.0, _WARM_UP_SHARE * steps)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1.0, steps - warm_up))


def _batches(count: int, recipe: Recipe) -> Iterator[NDArray[np.int64]]:
    """The rows of each step: epoch after epoch, each in an order of its own."""
    left, epoch = np.empty(0, np.int64), 0
    for _ in range(recipe.steps):
        while len(left) < _BATCH:
            order = philox.permutation(philox.stream_key(recipe.seed, "evaluate/order", epoch), count)
            left, epoch = np.concatenate([left, order]), epoch + 1
        yield left[:_BATCH]
        left = left[_BATCH:]


def _halves(seed: int, step: int, count: int) -> NDArray[np.bool_]:
    key = philox.stream_key(seed, "evaluate/flip")
    return philox.uniforms(key, np.arange(step * count, (step + 1) * count), 1)[:, 0] < 0.5


def predicted(network: Classifier, pixels: Pixels) -> NDArray[np.int64]:
    """The class of each image, [N]."""
    starts = range(0, len(pixels), _AT_ONCE)
    parts = [network(torch.tensor(pixels[start : start + _AT_ONCE])).argmax(dim=1) for start in starts]
    return torch.cat(parts).numpy()
