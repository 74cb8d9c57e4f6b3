"""Any module that torch exported, as a network whose features are compared."""

import functools
import io
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from pipeline.evaluate import weights
from pipeline.evaluate.weights import FeaturesError

Module = Callable[[torch.Tensor], torch.Tensor]

_OWN_ARGUMENT = "return_features"


def load(url: str) -> Module:
    """float32 [N, 3, R, R] in [-1, 1] → float32 [N, F], by what `torch.export.save` or `torch.jit.save` wrote: its
    content says which. A module is a program, and torch unpickles parts of it: give only one whose maker you trust.

    NVIDIA's inception-2015-12-05.pt, though TorchScript, is refused: it wants [0, 255], resizes by itself, and returns
    probabilities unless it is called with return_features. `inception` is the same network.

    Raises FeaturesError, StorageError. The module raises FeaturesError if it does not run on such images, or returns
    anything else.
    """
    data = weights.read(url)
    try:
        module = _read(data)
    except Exception as error:  # whatever torch raises for a file that it cannot read
        what = f"no module that torch.export.save or torch.jit.save wrote ({_reason(error)})"
        raise FeaturesError(f"{url}: {what}; export it again with torch {torch.__version__}") from error
    forward: Any = module.forward
    if hasattr(forward, "schema") and any(one.name == _OWN_ARGUMENT for one in forward.schema.arguments):
        raise FeaturesError(
            f"{url}: gives features only if called with {_OWN_ARGUMENT}, as NVIDIA's Inception does; use the network "
            "inception, with weights of pytorch-fid or torch-fidelity"
        )
    return functools.partial(_features, module, url)


def _read(data: bytes) -> torch.nn.Module:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    if any(name.endswith("/archive_format") for name in names):
        return torch.export.load(io.BytesIO(data)).module()
    if not any("/code/" in name for name in names):
        raise ValueError("neither a graph nor code is in it: a state dict is no module")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the format, which is still read
        module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
    return module.eval()


def _features(module: torch.nn.Module, url: str, image: torch.Tensor) -> torch.Tensor:
    try:
        found = module(image)
    except Exception as error:  # whatever the module raises
        wanted = f"float32 {list(image.shape)}"
        advice = "export it for such images, and for any number of them (a dynamic first dimension)"
        raise FeaturesError(f"{url}: does not run on {wanted} ({_reason(error)}); {advice}") from error
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(image):
        shown = list(found.shape) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise FeaturesError(
            f"{url}: returns {shown} for {len(image)} images, not [{len(image)}, F]; export one that returns features"
        )
    return found.to(torch.float32)


def _reason(error: Exception) -> str:
    """The last line of what torch says: TorchScript says first where, then what."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
