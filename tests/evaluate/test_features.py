"""Networks that others trained: the published structure, the published names, and a clear refusal of anything else.

The golden numbers were confirmed with the same weights and images by other implementations: Inception by torch-fidelity
0.4.0, DINOv2 by transformers 5.23.0.
"""

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipeline.config import ConfigError, field_docs
from pipeline.evaluate import features
from pipeline.evaluate.dinov2 import DinoV2, positions
from pipeline.evaluate.features import FeaturesConfig, FeaturesError, digest, load
from pipeline.evaluate.inception import FILES, Inception
from pipeline.evaluate.weights import State, fitted, state_dict
from pipeline.images import Pixels

PUBLISHED = {  # weights without buffers
    "inception": (Inception, 23_850_960),
    "ViT-S": (functools.partial(DinoV2, 384), 22_056_576),
    "ViT-B": (functools.partial(DinoV2, 768), 86_580_480),
    "ViT-L": (functools.partial(DinoV2, 1024), 304_368_640),
}


def noise(shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """In [-1, 1), by integers alone, so that no library moves it."""
    words = np.arange(math.prod(shape), dtype=np.uint32) + np.uint32((seed * 0x9E3779B9) & 0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> np.uint32(shift))) * np.uint32(factor)
    return ((words ^ (words >> np.uint32(16))) / 2.0**31 - 1.0).reshape(shape)


def filled(build: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """Weights for the network: all different, and such that what passes through neither grows nor dies."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in sorted(build().state_dict().items())}
    names = (name for name in shapes if not name.endswith("num_batches_tracked"))
    return {name: _filled(name, shapes[name], seed) for seed, name in enumerate(names)}


def _filled(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    found = noise(shape, seed)
    if name.endswith(("_embed", "_token")):
        found *= 0.02
    elif name.startswith("patch_embed"):
        found *= 0.001
    elif name.endswith("gamma"):
        found = 0.01 + 0.005 * found
    elif len(shape) > 1:
        found *= math.sqrt(6.0 / math.prod(shape[1:]))
    elif name.endswith(("bias", "mean")):
        found *= 0.1
    else:
        found = 1.0 + 0.5 * found
    return torch.from_numpy(found.astype(np.float32))


def images(count: int, side: int, channels: int = 3) -> Pixels:
    """Slopes with grain, uint8 [count, side, side, channels]."""
    n, y, x, c = np.ogrid[:count, :side, :side, :channels]
    slopes = 100.0 + 90.0 * np.sin((y * (n + 1) + 2 * x + 40 * c) / 37.0)
    return (slopes + 30.0 * noise(slopes.shape, 7)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of weights for each network, as its publishers write them."""
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    for name, build in (("inception", Inception), ("dinov2", functools.partial(DinoV2, 384))):
        found[name] = folder / f"{name}.pth"
        torch.save(filled(build), found[name])
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_weights_as_published(name: str) -> None:
    build, wanted = PUBLISHED[name]
    with torch.device("meta"):
        network = build()
    assert sum(weight.numel() for weight in network.parameters()) == wanted


@pytest.mark.parametrize(
    ("name", "side", "width", "first", "mean", "deviation"),
    [
        ("inception", 299, 2048, (6.654081, 0.081096, 0.770824, 5.603666), 2.848756, 4.013716),
        ("dinov2", 224, 384, (-0.549322, -0.219662, -0.242257, -0.016916), 0.0198924, 1.028107),
    ],
)
def test_golden(
    files: dict[str, Path], name: str, side: int, width: int, first: tuple[float, ...], mean: float, deviation: float
) -> None:
    found = load(FeaturesConfig(network=name, weights=str(files[name])))(images(2, side))  # type: ignore[arg-type]
    assert found.shape == (2, width)
    assert found.dtype == np.float32
    assert found[1, 5 :: width // 4] == pytest.approx(first, abs=1e-4)
    assert found.mean() == pytest.approx(mean, abs=1e-4)
    assert found.std() == pytest.approx(deviation, abs=1e-4)


def test_nothing_is_trained(files: dict[str, Path]) -> None:
    network = load(FeaturesConfig(network="dinov2", weights=str(files["dinov2"]))).args[0]  # type: ignore[attr-defined]
    assert not network.training
    assert not any(weight.requires_grad or weight.is_meta for weight in network.state_dict(keep_vars=True).values())


@pytest.mark.parametrize(("side", "to"), [(32, 299), (299, 224), (600, 299), (40, 40)])
def test_resizing_is_pillows_which_is_right(side: int, to: int) -> None:
    """Pillow's bicubic filter has no aliases, and is what clean-fid uses."""
    pixels = images(2, side)
    pixels[0, : side // 2] = 255  # an edge, at which the filter goes above 255
    found = features.resized(pixels, to).permute(0, 2, 3, 1).numpy()
    for image, channel in np.ndindex(2, 3):
        plane = Image.fromarray(pixels[image, :, :, channel].astype(np.float32))
        wanted = np.asarray(plane.resize((to, to), Image.Resampling.BICUBIC)).clip(0, 255)
        assert np.abs(found[image, :, :, channel] - wanted).max() < 1e-2


def test_one_channel_is_repeated() -> None:
    grey = images(2, 32, 1)
    grey.flags.writeable = False  # as Ray hands arrays over
    assert torch.equal(features.resized(grey, 50), features.resized(grey.repeat(3, axis=3), 50))


def test_positions_by_the_published_formula() -> None:
    """Keys' cubic with a = -0.75, by hand: patch i of 16 lies at (i + 0.5) · 37 / 16.1 - 0.5 of 37."""
    published = noise((1, 1 + 37 * 37, 3), 1)
    grid = published[0, 1:].reshape(37, 37, 3)
    matrix = np.zeros((16, 37))
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            d, a = abs(at - tap), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(tap, 0), 36)] += near if d <= 1 else far
    wanted = np.einsum("iy,jx,yxf->ijf", matrix, matrix, grid).reshape(256, 3)
    found = positions(torch.from_numpy(published), 16)[0].numpy()
    assert np.abs(found[1:] - wanted).max() < 1e-9
    assert np.array_equal(found[0], published[0, 0])
    assert np.array_equal(positions(torch.from_numpy(published), 37).numpy(), published)


def test_each_format_of_weights(tmp_path: Path) -> None:
    wanted = {"weight": torch.from_numpy(noise((3, 2), 1)).to(torch.float32), "bias": torch.zeros(3)}
    torch.save(wanted, tmp_path / "weights.pth")
    torch.save(wanted, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({name: value.double() for name, value in wanted.items()}, tmp_path / "double.pth")
    save_file(wanted, tmp_path / "weights.safetensors")
    for url in map(str, tmp_path.iterdir()):
        found = fitted(lambda: nn.Linear(2, 3), state_dict(url), url, "a layer").state_dict()
        assert all(
            torch.equal(found[name], value) and found[name].dtype == torch.float32 for name, value in wanted.items()
        )


def test_inception_from_the_cache(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = FeaturesConfig(network="inception")
    for ask in (digest, load):
        with pytest.raises(
            FeaturesError, match=rf"{tmp_path}/hub/checkpoints: neither pt_inception.* nor .*; give the"
        ):
            ask(config)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    os.link(files["inception"], tmp_path / "hub" / "checkpoints" / FILES[1])
    given = FeaturesConfig(network="inception", weights=str(files["inception"]))
    assert digest(config) == digest(given) == hashlib.sha256(files["inception"].read_bytes()).hexdigest()
    assert np.array_equal(load(config)(images(1, 20)), load(given)(images(1, 20)))


def test_digest_of_nothing() -> None:
    assert digest(FeaturesConfig()) == ""
    for ask in (digest, load):
        with pytest.raises(FeaturesError, match="/nowhere: no such file of weights; give the path"):
            ask(FeaturesConfig(network="exported", weights="/nowhere"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "a.pth"}, "network is domain; name the network"),
        ({"network": "dinov2"}, "network dinov2 needs weights"),
        ({"network": "exported"}, "network exported needs weights"),
        ({"network": "inception", "resolution": 64}, "resolution is of exported modules; inception has its own"),
        ({"network": "exported", "weights": "a.pt2", "resolution": -1}, "resolution must be at least 0, not -1"),
    ],
)
def test_configurations_that_make_no_sense(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeaturesConfig(**fields)  # type: ignore[arg-type]


def test_each_field_says_what_it_is() -> None:
    assert field_docs(FeaturesConfig).keys() == {"network", "weights", "resolution"}


def _torchvisions(state: State) -> dict[str, torch.Tensor]:
    return {
        **state,
        "fc.weight": torch.zeros(1000, 2048),
        "fc.bias": torch.zeros(1000),
        "AuxLogits.fc.bias": torch.zeros(1),
    }


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        (
            "inception",
            _torchvisions,
            r"not weights of the Inception of FID \(pt_inception.*: fc.weight is \[1000, 2048\], not \[1008, 2048\]; "
            r"fc.bias is \[1000\], not \[1008\]; AuxLogits.fc.bias is one too many; give such",
        ),
        (
            "inception",
            lambda _: {"model": torch.zeros(1)},
            "Conv2d_1a_3x3.conv.weight is missing; .* and 470 more; give",
        ),
        ("inception", lambda state: {"model": dict(state)}, "holds more than tensors by name; save"),
        ("inception", lambda state: list(state.values()), "holds more than tensors by name; save"),
        (
            "dinov2",
            lambda state: {**state, "register_tokens": torch.zeros(1, 4, 384)},
            "register_tokens is one too many",
        ),
        (
            "dinov2",
            lambda _: {"cls_token": torch.zeros(1, 1, 1536)},
            "its cls_token has width 1536; give dinov2_vits14",
        ),
        ("dinov2", lambda _: {"a": torch.zeros(1)}, "cls_token is missing; give dinov2_vits14"),
    ],
)
def test_weights_that_do_not_fit(
    files: dict[str, Path], tmp_path: Path, network: str, change: Callable[[State], object], message: str
) -> None:
    torch.save(change(torch.load(files[network])), tmp_path / "other.pth")
    with pytest.raises(FeaturesError, match=f"^{tmp_path}/other.pth: .*{message}"):
        load(FeaturesConfig(network=network, weights=str(tmp_path / "other.pth")))  # type: ignore[arg-type]


class _Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["TRAP"],)


def test_nothing_in_a_file_of_weights_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    torch.save({"cls_token": _Trap()}, tmp_path / "trap.pth")
    with pytest.raises(FeaturesError, match=r"neither safetensors nor tensors that torch\.save wrote"):
        load(FeaturesConfig(network="dinov2", weights=str(tmp_path / "trap.pth")))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", b"\x10\0\0\0\0\0\0\0{not json", b"\x80\x02."])
@pytest.mark.parametrize("network", ["inception", "dinov2", "exported"])
def test_files_that_are_something_else(tmp_path: Path, network: str, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(FeaturesError, match=f"^{tmp_path}/file: (neither safetensors nor|no module that)"):
        load(FeaturesConfig(network=network, weights=str(tmp_path / "file")))  # type: ignore[arg-type]


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 5)
        self.load_state_dict(
            {name: torch.from_numpy(noise(tuple(one.shape), 3)) for name, one in self.state_dict().items()}
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.conv(image).relu().mean(dim=(2, 3)))
        return found


def scripted(module: nn.Module, url: Path, side: int = 32) -> FeaturesConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, torch.zeros(2, 3, side, side)), url)
    return FeaturesConfig(network="exported", weights=str(url))


def graph(module: nn.Module, url: Path, *, dynamic: bool) -> FeaturesConfig:
    shapes = {"image": {0: torch.export.Dim("count")}} if dynamic else None
    torch.export.save(torch.export.export(module, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=shapes), url)
    return FeaturesConfig(network="exported", weights=str(url))


@pytest.mark.parametrize("write", [scripted, functools.partial(graph, dynamic=True)])
@pytest.mark.parametrize("channels", [1, 3])
def test_exported_modules(tmp_path: Path, write: Callable[[nn.Module, Path], FeaturesConfig], channels: int) -> None:
    """33 images: 16, 16 and one alone."""
    module, pixels = _Small(), images(33, 32, channels)
    config = write(module, tmp_path / "module")
    assert digest(config) == hashlib.sha256((tmp_path / "module").read_bytes()).hexdigest()
    found = load(config)(pixels)
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) / 127.5 - 1
    assert found.shape == (33, 5)
    assert found == pytest.approx(module(image).detach().numpy(), abs=1e-5)
    larger = load(FeaturesConfig(network="exported", weights=config.weights, resolution=32))(images(2, 80, channels))
    image = features.resized(images(2, 80, channels), 32) / 127.5 - 1
    assert larger == pytest.approx(module(image).detach().numpy(), abs=1e-5)


class _Other(nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self._change = change

    def forward(self, image: torch.Tensor) -> object:
        return self._change(image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image, r"returns \[3, 3, 32, 32\] for 3 images, not \[3, F\]"),
        (lambda image: (image[:, 0, 0], image[:, 1, 0]), "returns a tuple for 3 images"),
        (lambda image: image[0, 0], r"returns \[32, 32\] for 3 images"),
        (lambda image: (image[:, 0, 0] - 2).sqrt(), "gives features that are infinite or not numbers"),
    ],
)
def test_modules_that_give_no_features(tmp_path: Path, change: Callable[[torch.Tensor], object], message: str) -> None:
    describe = load(scripted(_Other(change), tmp_path / "module"))
    with pytest.raises(FeaturesError, match=f"^{tmp_path}/module: {message}"):
        describe(images(3, 32))


def test_modules_for_other_images(tmp_path: Path) -> None:
    small = load(scripted(_Other(lambda image: image.flatten(1) @ torch.ones(48, 2)), tmp_path / "small", side=4))
    with pytest.raises(
        FeaturesError, match=r"small: does not run on float32 \[3, 3, 32, 32\] \(.*48.*\); export it for"
    ):
        small(images(3, 32))
    fixed = load(graph(_Small(), tmp_path / "fixed", dynamic=False))
    with pytest.raises(FeaturesError, match=r"fixed: does not run on float32 \[3, 3, 32, 32\] \(.*\); .*dynamic first"):
        fixed(images(3, 32))


def test_a_state_dict_is_no_module(files: dict[str, Path]) -> None:
    with pytest.raises(FeaturesError, match=r"no module that .* \(neither a graph nor code is in it"):
        load(FeaturesConfig(network="exported", weights=str(files["dinov2"])))


class _AsNvidias(nn.Module):
    def forward(self, image: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return image.mean(dim=(2, 3)) if return_features else image.mean(dim=(1, 2))


def test_nvidias_inception_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(_AsNvidias()), tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(FeaturesError, match=r"05.pt: gives features only if called with return_features.*; use the"):
        load(FeaturesConfig(network="exported", weights=str(tmp_path / "inception-2015-12-05.pt")))
