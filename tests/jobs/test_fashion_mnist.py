"""Where Fashion-MNIST is taken from, and that nothing but the known files is ever taken for it."""

import functools
import gzip
import hashlib
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import fashion_mnist
from jobs.fashion_mnist import SHA256, FashionMnistError

CONTENT = {name: name.encode() * 50 for name in SHA256}


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The four files are small ones, nothing is installed, and no network is to be had unless a test gives one."""
    pins = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", pins)
    monkeypatch.setattr(fashion_mnist, "INSTALLED", Path("/nowhere/fashion-mnist"))
    monkeypatch.setattr(fashion_mnist, "ADDRESS", "http://127.0.0.1:1")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def _write(folder: Path, packed: bool = True, **changed: bytes) -> Path:
    folder.mkdir(parents=True)
    for name, data in CONTENT.items():
        data = changed.get(name.split("-", 1)[0], data)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A real web server over a folder."""
    root = tmp_path / "www"
    handler = functools.partial(_Quiet, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}", root
        serving.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize("packed", [True, False])
def test_a_path_is_used_as_it_is(tmp_path: Path, packed: bool) -> None:
    folder = _write(tmp_path / "mine", packed)
    assert fashion_mnist.find(str(folder), tmp_path / "cache") == str(folder)
    assert not (tmp_path / "cache").exists()


def test_a_path_with_other_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FashionMnistError, match="has no t10k-images"):
        fashion_mnist.find(str(tmp_path), tmp_path / "cache")
    changed = _write(tmp_path / "changed", train=b"other")
    with pytest.raises(FashionMnistError, match="train-images-idx3-ubyte is not the known"):
        fashion_mnist.find(str(changed), tmp_path / "cache")
    cut = _write(tmp_path / "cut")
    packed = cut / "t10k-labels-idx1-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(FashionMnistError, match="cannot be read"):
        fashion_mnist.find(str(cut), tmp_path / "cache")


def test_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _write(tmp_path / "usr")
    monkeypatch.setattr(fashion_mnist, "INSTALLED", folder)
    assert fashion_mnist.find(None, tmp_path / "cache") == str(folder)


def test_address_then_cache_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Path]
) -> None:
    address, root = server
    _write(root)
    monkeypatch.setattr(fashion_mnist, "ADDRESS", address)
    found = Path(fashion_mnist.find(None, tmp_path / "cache"))
    assert {path.name: path.read_bytes() for path in found.iterdir()} == CONTENT
    assert os.listdir(tmp_path / "cache") == ["fashion-mnist"]
    monkeypatch.setattr(fashion_mnist, "ADDRESS", "http://127.0.0.1:1")
    assert fashion_mnist.find(None, tmp_path / "cache") == str(found)


def test_damaged_cache_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Path]
) -> None:
    address, root = server
    _write(root)
    monkeypatch.setattr(fashion_mnist, "ADDRESS", address)
    damaged = _write(tmp_path / "cache/fashion-mnist", packed=False, t10k=b"half")
    assert fashion_mnist.find(None, tmp_path / "cache") == str(damaged)
    assert (damaged / "t10k-images-idx3-ubyte").read_bytes() == CONTENT["t10k-images-idx3-ubyte"]


def test_a_lying_address_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, Path]
) -> None:
    address, root = server
    _write(root, train=b"something else")
    monkeypatch.setattr(fashion_mnist, "ADDRESS", address)
    with pytest.raises(FashionMnistError, match="is not the known"):
        fashion_mnist.find(None, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_failure_of_all_ways_is_one_line_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(FashionMnistError) as caught:
        fashion_mnist.find(None, tmp_path / "cache")
    text = str(caught.value)
    assert "\n" not in text
    assert "installed Debian package dataset-fashion-mnist: not installed" in text
    assert "downloaded: there is no apt-get on this machine" in text
    assert "http://127.0.0.1:1: <urlopen error" in text
    assert "name a folder" in text


def test_apt_complaint_and_private_lists(tmp_path: Path) -> None:
    """An apt that knows no package is asked again with lists of its own, and its last word is passed on."""
    apt = tmp_path / "bin/apt-get"
    apt.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "E: nothing known" >&2\nexit 100\n')
    apt.chmod(0o755)
    with pytest.raises(FashionMnistError, match="apt-get: E: nothing known"):
        fashion_mnist.find(None, tmp_path / "cache")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.rsplit(" ", 1)[1] for line in asked] == ["dataset-fashion-mnist", "update"]
    assert "Dir::State::Lists=" in asked[1]


def test_package_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "INSTALLED", Path("/usr/share/datasets/fashion-mnist"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    tree = tmp_path / "deb"
    _write(tree / "usr/share/datasets/fashion-mnist")
    (tree / "DEBIAN").mkdir()
    control = "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"
    (tree / "DEBIAN/control").write_text(control)
    package = tmp_path / "dataset-fashion-mnist_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(package)], check=True, capture_output=True)
    apt = tmp_path / "bin/apt-get"
    apt.write_text(f"#!/bin/sh\ncp {package} .\n")
    apt.chmod(0o755)
    monkeypatch.setattr(fashion_mnist, "_installed", lambda: (_ for _ in ()).throw(FashionMnistError("not installed")))
    found = Path(fashion_mnist.find(None, tmp_path / "cache"))
    assert found == tmp_path / "cache/fashion-mnist"
    assert sorted(os.listdir(found)) == sorted(CONTENT)
