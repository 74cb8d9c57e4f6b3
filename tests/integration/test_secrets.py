"""No secret in what is printed, logged or stored; a verb's Ray listens on loopback, for its token alone."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs import cli, train
from pipeline import images, storage
from pipeline.errors import InputError
from tests.s3_server import S3Server, run_s3_server
from tests.small import shape_image

SMALL = ["--network.z-dim", "8", "--network.base-width", "8", "--train.total-kimg", "0.1", "--train.batch-size", "16"]
SMALL += ["--train.num-lanes", "2"]
FEW = ["--num-samples", "40", "--classifier-steps", "5", "--utility-steps", "0"]
LISTEN = "0A"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}  # of IPv4, mapped, of IPv6


@dataclass(kw_only=True)
class World:
    """A bucket, a home and a folder for temporary files of their own, and secrets that can be searched for."""

    folder: Path
    server: S3Server
    ray_token: str
    canaries: dict[str, str]
    said: list[str] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """What a verb runs in."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
        places = {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.ray_token, "RAY_TMPDIR": str(self.folder / "ray")}
        return kept | self.server.environment() | places | token

    def run(self, *words: str, **changed: str) -> int:
        """The exit code of a verb, and what it printed is kept."""
        environment = self.environment() | changed
        command = [sys.executable, "-m", f"jobs.{words[0]}", *words[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        self.said.append(f"$ {words[0]}\n{done.stdout}{done.stderr}")
        return done.returncode

    def leaks(self) -> list[str]:
        """Which canary stands where: in what was printed, in files, in objects."""
        found = [
            f"{name} in what {text.splitlines()[0]} printed" for text in self.said for name in _in(self, text.encode())
        ]
        for name in ("home", "tmp", "ray"):
            paths = [path for path in (self.folder / name).rglob("*") if path.is_file() and not path.is_symlink()]
            found += [f"{which} in {path}" for path in paths for which in _in(self, path.read_bytes())]
        bucket = f"s3://{self.server.bucket}"
        for entry in storage.list_entries(bucket):
            found += [f"{which} in {entry.name}" for which in _in(self, storage.read(storage.join(bucket, entry.name)))]
        return found


def _in(world: World, data: bytes) -> list[str]:
    return [name for name, canary in world.canaries.items() if canary.encode() in data]


@pytest.fixture
def world() -> Iterator[World]:
    """Unused but for three images. Its path is short: Ray's sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="gs-", dir="/tmp"))
    s3_secret, ray_token = secrets.token_hex(20), secrets.token_hex(32)
    canaries = {"S3 secret": s3_secret, "Ray token": ray_token}
    canaries |= {"wrong S3 secret": secrets.token_hex(20), "session token": secrets.token_hex(24)}
    for name in ("home", "tmp", "ray", "s3"):
        (folder / name).mkdir()
    with run_s3_server(folder / "s3", s3_secret) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield World(folder=folder, server=server, ray_token=ray_token, canaries=canaries)
    shutil.rmtree(folder)


def _photos(folder: Path) -> Path:
    for split, count in (("train", 100), ("test", 60)):
        for number in range(count):
            path = folder / split / ("circle", "square")[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(images.encode(shape_image(number + len(split), number % 2, 16), "png", 100))
    return folder


def _failing(world: World) -> None:
    """Commands that are refused, each with a secret at hand that its message could hold."""
    wrong, session = world.canaries["wrong S3 secret"], world.canaries["session token"]
    url = f"s3://{world.server.bucket}/nothing"
    host = world.server.endpoint_url.removeprefix("http://")
    assert world.run("verify", "--dataset", url, "--verbose", AWS_SECRET_ACCESS_KEY=wrong) == 2
    assert world.run("verify", "--dataset", url, AWS_SESSION_TOKEN=session) == 2
    assert world.run("verify", "--dataset", url, AWS_ENDPOINT_URL=f"http://key:{wrong}@{host}") == 2
    assert world.run("verify", "--dataset", f"s3://key:{wrong}@bucket/x", "--verbose") == 2


@pytest.mark.timeout(240)
def test_what_is_refused_names_no_secret(world: World) -> None:
    _failing(world)
    assert world.leaks() == []


@pytest.mark.parametrize("text", ["s3://key:{}@bucket/x", "s3://key:a/{}@bucket", "https://key:{}@host/x"])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_configuration_with_credentials_is_neither_shown_nor_used(
    text: str, more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What stands before @ may hold slashes: secret keys do.
    canary = secrets.token_hex(20)
    words = ["--dataset", text.format(canary), "--out", str(tmp_path / "run"), *more]
    assert cli.run_verb(train.VERB, words) == cli.EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert "credentials in a URL are refused" in said.err
    assert canary not in said.out + said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://key:se/cret@bucket", "ftp://key:secret@host/x"])
def test_credentials_in_a_url_are_refused_without_a_word_of_them(url: str) -> None:
    with pytest.raises(InputError, match="credentials in a URL are refused") as caught:
        storage.resolve(url)
    assert "key" not in str(caught.value).replace("AWS_ACCESS_KEY_ID", "")
    assert storage.resolve("s3://bucket/a@b:c") == "s3://bucket/a@b:c"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_no_secret_in_what_the_verbs_print_log_or_store(world: World) -> None:
    base = f"s3://{world.server.bucket}"
    data, run, gen = f"{base}/data", f"{base}/run", f"{base}/gen"
    photos = ["--source", str(_photos(world.folder / "photos"))]
    commands: list[Sequence[str]] = [
        ("prepare", *photos, "--out", data, "--resolution", "16", "--channels", "1"),
        ("train", "--dataset", data, "--out", run, *SMALL),
        ("generate", "--snapshot", run, "--out", gen, "--num-images", "60", "--shard-size", "30"),
        ("evaluate", "--real", data, "--synthetic", gen, "--out", f"{base}/report", *FEW),
        ("verify", "--dataset", gen),
    ]
    for words in commands:
        assert world.run(*words, "--verbose") in (0, 3), world.said[-1]  # a gate may say no to so small a run
    _failing(world)
    names = [entry.name for entry in storage.list_entries(base)]
    assert {name.partition("/")[0] for name in names} >= {"data", "run", "gen", "report"}
    assert list((world.folder / "ray").rglob("raylet.out"))  # Ray's logs were among what is searched
    assert list((world.folder / "tmp").rglob("train-*.log"))
    assert world.leaks() == []


_HOLD = """
import time
from jobs.ray_session import start_ray
from jobs.terminal import Terminal
import ray
start_ray(Terminal("verify"))
ray.get(ray.remote(lambda: 1).remote())
print(ray.get_runtime_context().gcs_address, flush=True)
time.sleep(600)
"""
_CLIENT = """
import sys, traceback, ray
from ray._private import services
services.resolve_ip_for_localhost = lambda host: host  # Ray would look for it at the machine's outward address
try:
    ray.init(address=sys.argv[1], configure_logging=False)
except Exception:  # at times what refuses the token is only the cause of a cause
    if "AuthenticationError" not in traceback.format_exc():
        raise
    sys.exit(7)
"""


def _listening(pids: set[int]) -> set[str]:
    """Hexadecimal addresses that sockets of these processes listen on, as Linux writes them."""
    of_inode = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in (line.split() for line in Path(table).read_text().splitlines()[1:]):
            if row[3] == LISTEN:
                of_inode[f"socket:[{row[9]}]"] = row[1].partition(":")[0]
    held = {link for pid in pids for link in _links(pid)}
    return {of_inode[link] for link in held & set(of_inode)}


def _links(pid: int) -> Iterator[str]:
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            yield os.readlink(path)
    except OSError:
        return  # the process ended, or closed a file meanwhile


def _group(pid: int) -> set[int]:
    """The process and all its descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
    group = {pid}
    while more := {child for child, parent in parents.items() if parent in group} - group:
        group |= more
    return group


@pytest.fixture
def held(world: World) -> Iterator[tuple[str, int]]:
    """Address and process of a Ray that was started as a verb starts it."""
    command = [sys.executable, "-c", _HOLD]
    with subprocess.Popen(command, env=world.environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.mark.timeout(240)
def test_a_local_ray_listens_on_loopback_and_wants_its_token(world: World, held: tuple[str, int]) -> None:
    address, pid = held
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    found = _listening(_group(pid))
    assert found
    assert found <= LOOPBACK
    nobody = {name: value for name, value in world.environment().items() if not name.startswith("RAY_AUTH_")}
    stranger = world.environment() | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with ThreadPoolExecutor() as pool:  # Ray asks for 15 s before it takes no for an answer
        codes = list(
            pool.map(lambda environment: _connect(address, environment), (world.environment(), stranger, nobody))
        )
    assert codes == [0, 7, 7]


def _connect(address: str, environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", _CLIENT, address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode in (0, 7), done.stderr
    return done.returncode
