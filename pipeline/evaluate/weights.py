"""Weights that others published: read as tensors and nothing else, and checked against the network they are for."""

import io
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from pipeline import storage
from pipeline.errors import InputError

Network = TypeVar("Network", bound=nn.Module)
State = Mapping[str, torch.Tensor]

_COUNTER = "num_batches_tracked"
_SHOWN = 3


class FeaturesError(InputError):
    """Weights that are missing or do not fit, or a module that gives no features."""


def read(url: str) -> bytes:
    """The whole file. Raises FeaturesError where there is none, and StorageError."""
    try:
        return storage.read(url)
    except storage.NotFoundError as error:
        raise _missing(url) from error


def digest(url: str) -> str:
    """Hex sha256 of the file. Raises FeaturesError where there is none, and StorageError."""
    try:
        return storage.digest(url)
    except storage.NotFoundError as error:
        raise _missing(url) from error


def _missing(url: str) -> FeaturesError:
    return FeaturesError(f"{url}: no such file of weights; give the path or s3:// URL of one (nothing is downloaded)")


def state_dict(url: str) -> State:
    """Tensors by name, on the CPU, from safetensors or from what `torch.save` wrote: its content says which. Nothing in
    the file is run. Raises FeaturesError, also for a file that is neither, and StorageError.
    """
    data = read(url)
    try:
        if data[8:9] == b"{":  # safetensors: the size of a header, then the header, in JSON
            found = load_safetensors(data)
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a parser raises for bytes that are none of its own
        what = "neither safetensors nor tensors that torch.save wrote"
        raise FeaturesError(
            f"{url}: {what} ({type(error).__name__}); save network.state_dict() and give that"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(one, torch.Tensor) for one in found.values()):
        raise FeaturesError(f"{url}: holds more than tensors by name; save network.state_dict() alone and give that")
    return found


def fitted(build: Callable[[], Network], state: State, url: str, what: str) -> Network:
    """The network that `build` makes, with these weights as float32, in eval mode, without gradients. `what` names it
    and its file in messages. Raises FeaturesError, with the first names that do not fit.
    """
    with torch.device("meta"):  # no time is spent on weights that are replaced
        network = build()
    wanted = _shapes(network.state_dict())
    found = _shapes(state)
    problems = [
        f"{name} is {found[name]}, not {shape}" if name in found else f"{name} is missing"
        for name, shape in wanted.items()
        if found.get(name) != shape
    ]
    problems += [f"{name} is one too many" for name in found if name not in wanted]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise FeaturesError(f"{url}: not weights of {what}: {'; '.join(problems[:_SHOWN])}{more}; give such a file")
    # Without its counter, which counts training steps, batch normalisation takes 0.
    network.load_state_dict({name: state[name].to(torch.float32) for name in wanted}, assign=True)
    return network.eval().requires_grad_(False)


def _shapes(state: State) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items() if not name.endswith(_COUNTER)}
