"""Where Fashion-MNIST comes from: 70,000 real photographs of garments, 28², 10 classes (Xiao et al. 2017, MIT).

A folder that is named, else the Debian package `dataset-fashion-mnist` (installed, or downloaded and unpacked without
root), else the authors' address. The decompressed files are checked against pinned digests in every case.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.errors import InputError

SHA256: Mapping[str, str] = {
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
"""Of the decompressed files: Debian packed them again."""
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_MAX_BYTES = 64 * 1024**2  # more than any of the files, decompressed
_APT_UPDATE_SEC = 120
_APT_DOWNLOAD_SEC = 180
_SOCKET_SEC = 20


class FashionMnistError(InputError):
    """The four files could not be had, or are not the ones that are known."""


def find(path: str | None, cache_dir: str | Path) -> str:
    """A folder with the four checked IDX files (gzipped or not).

    `path` is looked at alone when given; else the cache, the installed package, a downloaded package, the authors'
    address, in this order; what is downloaded is left in `cache_dir`. Raises FashionMnistError.
    """
    if path is not None:
        _check(Path(path))
        return path
    cache = Path(cache_dir) / "fashion-mnist"
    if _is_good(cache):
        return str(cache)
    failures = []
    ways: Mapping[str, Callable[[], str]] = {
        f"the installed Debian package {PACKAGE}": _installed,
        f"the Debian package {PACKAGE}, downloaded": lambda: _fetched(cache, _from_debian),
        ADDRESS: lambda: _fetched(cache, _from_address),
    }
    for name, way in ways.items():
        try:
            return way()
        except (FashionMnistError, OSError, subprocess.SubprocessError) as error:
            failures.append(f"{name}: {' '.join(str(error).split())[:200]}")
    raise FashionMnistError(
        f"no Fashion-MNIST: {'; '.join(failures)}. Install the package, or name a folder with {', '.join(SHA256)} "
        "(gzipped or not) as the source"
    )


def _check(folder: Path) -> None:
    """Raises FashionMnistError unless the folder holds the four files, unchanged."""
    for name, wanted in SHA256.items():
        if hashlib.sha256(_content(folder, name)).hexdigest() != wanted:
            raise FashionMnistError(f"{folder / name} is not the known Fashion-MNIST file; fetch it again")


def _content(folder: Path, name: str) -> bytes:
    """A file's decompressed bytes, the plain file before the gzipped one."""
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        if plain.exists():
            return plain.read_bytes()
        with gzip.open(packed) as file:
            return file.read(_MAX_BYTES)
    except FileNotFoundError as error:
        raise FashionMnistError(f"{folder} has no {name}.gz") from error
    except (OSError, EOFError, zlib.error) as error:
        raise FashionMnistError(f"{packed} cannot be read ({error})") from error


def _is_good(folder: Path) -> bool:
    try:
        _check(folder)
    except FashionMnistError:
        return False
    return True


def _installed() -> str:
    if not INSTALLED.is_dir():
        raise FashionMnistError("not installed")
    _check(INSTALLED)
    return str(INSTALLED)


def _fetched(cache: Path, fetch: Callable[[Path], Path]) -> str:
    """Fetch into a folder of its own, check, then rename: a kill leaves nothing that is taken for whole."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fashion-mnist-", dir=cache.parent) as scratch:
        found = fetch(Path(scratch))
        _check(found)
        whole = Path(scratch) / "whole"
        whole.mkdir()
        for name in SHA256:
            (whole / name).write_bytes(_content(found, name))
        if cache.exists() and not _is_good(cache):
            shutil.rmtree(cache)
        if not cache.exists():
            whole.rename(cache)
    return str(cache)


def _from_debian(scratch: Path) -> Path:
    """Download and unpack the package as any user; lists of its own where the system has none."""
    try:
        _apt(scratch, _APT_DOWNLOAD_SEC, "download", PACKAGE)
    except FashionMnistError:
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (scratch / folder).mkdir(parents=True)
        _apt(scratch, _APT_UPDATE_SEC, *_private(scratch), "update")
        _apt(scratch, _APT_DOWNLOAD_SEC, *_private(scratch), "download", PACKAGE)
    package = next(scratch.glob(f"{PACKAGE}_*.deb"), None)
    if package is None:
        raise FashionMnistError("apt-get download left no package")
    _command(scratch, _APT_DOWNLOAD_SEC, "dpkg-deb", "-x", str(package), str(scratch / "unpacked"))
    return scratch / "unpacked" / INSTALLED.relative_to("/")


def _private(scratch: Path) -> list[str]:
    """Options that keep apt's state inside `scratch`."""
    places = {"Dir::State": "state", "Dir::State::Lists": "state/lists", "Dir::Cache": "cache"}
    return [word for name, folder in places.items() for word in ("-o", f"{name}={scratch / folder}")]


def _apt(scratch: Path, timeout_sec: int, *words: str) -> None:
    # Root's apt downloads as the user _apt, who may not enter `scratch`.
    bounds = (
        "-o",
        f"Acquire::http::Timeout={_SOCKET_SEC}",
        "-o",
        "Acquire::Retries=1",
        "-o",
        "APT::Sandbox::User=root",
    )
    _command(scratch, timeout_sec, "apt-get", "-q", *bounds, *words)


def _command(folder: Path, timeout_sec: int, *words: str) -> None:
    """Run a command in a folder; raises FashionMnistError with the last line of what it complained of."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_sec,
            check=False,
        )
    except FileNotFoundError as error:
        raise FashionMnistError(f"there is no {words[0]} on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise FashionMnistError(f"{words[0]} took more than {timeout_sec} s") from error
    if done.returncode:
        complaint = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise FashionMnistError(f"{words[0]}: {complaint[-1]}")


def _from_address(scratch: Path) -> Path:
    folder = scratch / "fetched"
    folder.mkdir()
    for name in SHA256:
        with urllib.request.urlopen(f"{ADDRESS}/{name}.gz", timeout=_SOCKET_SEC) as answer:
            (folder / f"{name}.gz").write_bytes(answer.read(_MAX_BYTES))
    return folder
