"""The storage contract, the same suite against a local folder and a real S3 server, and the faults of each."""

import hashlib
import http.client
import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.storage import Entry, Put, StorageError, join
from tests.s3_server import S3Server

NAMES = st.text(min_size=1).filter(lambda name: not set(name) & {"/", "\0"} and name not in (".", ".."))
WRITERS = 16


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to store objects, once on disk and once on S3."""
    found: str = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3")
    return found


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def start(script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A Python process of ours that talks in lines."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], **pipes, **options)


# --- names ------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["s3://bucket", "S3://bucket//a/", "/data/x", "relative/y", "file:///data"]), st.lists(NAMES))
def test_resolve_is_idempotent_and_goes_with_join(base: str, names: list[str]) -> None:
    resolved = storage.resolve(base)
    assert storage.resolve(resolved) == resolved
    assert storage.resolve(join(resolved, *names)) == join(resolved, *names)
    assert join(join(resolved, *names), "last") == join(resolved, *names, "last")


def test_resolve_normalises() -> None:
    assert storage.resolve("S3://bucket//a/b/") == "s3://bucket/a/b"
    assert storage.resolve("x/../y") == str(Path.cwd() / "y")
    assert storage.resolve("file:///data/a%20b/") == "/data/a b"
    assert storage.resolve("~/data") == str(Path.home() / "data")


@pytest.mark.parametrize(
    "wrong", ["", "  ", "s3://", "s3:///", "s3:/bucket/x", "s3://b/../c", "gs://b/x", "file://host/x", "file:x", "a\0b"]
)
def test_resolve_refuses(wrong: str) -> None:
    with pytest.raises(StorageError, match="give"):
        storage.resolve(wrong)


@pytest.mark.parametrize("wrong", ["", ".", "..", "/etc/passwd", "a/../../b", "a//b", "a/", "a\0"])
def test_join_refuses_what_leaves_the_place(wrong: str) -> None:
    with pytest.raises(StorageError, match="not a name under /data"):
        join("/data", "ok", wrong)


# --- the contract, on both --------------------------------------------------------------------------------------------


def test_write_read_stat_delete(url: str) -> None:
    name = join(url, "deep/er", "object.bin")
    data = random.Random(1).randbytes(300_000)
    assert storage.stat(name) is None
    assert storage.put_if_absent(name, data) is Put.CREATED
    assert storage.put_if_absent(name, data) is Put.SAME
    assert storage.put_if_absent(name, data[1:]) is Put.OTHER
    assert storage.put_if_absent(name, b"x" + data[1:]) is Put.OTHER
    assert storage.read(name) == data
    assert storage.digest(name) == sha256(data)
    found = storage.stat(name)
    assert found is not None
    assert (found.size_bytes, found.sha256) == (len(data), sha256(data) if url.startswith("s3:") else None)
    storage.delete(name)
    storage.delete(name)
    assert storage.stat(name) is None
    assert storage.put_if_absent(name, b"") is Put.CREATED
    assert storage.read(name) == b""


def test_put_replaces(url: str) -> None:
    for data in (b"one", b"", b"three"):
        storage.put(join(url, "heartbeat"), data)
        assert storage.read(join(url, "heartbeat")) == data
        assert storage.digest(join(url, "heartbeat")) == sha256(data)


def test_ranges_are_exact_or_an_error(url: str) -> None:
    name = join(url, "object")
    storage.put(name, b"0123456789")
    assert storage.read_range(name, 0, 10) == b"0123456789"
    assert storage.read_range(name, 3, 4) == b"3456"
    assert storage.read_range(name, 9, 1) == b"9"
    assert storage.read_range(name, 10, 0) == b""
    for offset, size in ((0, 11), (9, 2), (10, 1), (1000, 5)):
        with pytest.raises(StorageError, match=r"object is truncated: .* found"):
            storage.read_range(name, offset, size)
        with pytest.raises(StorageError, match=r"object is truncated: .* found"):
            storage.read_into(name, offset, memoryview(bytearray(size)))
    out = bytearray(b"........")
    storage.read_into(name, 3, memoryview(out)[2:6])
    assert out == b"..3456.."
    with pytest.raises(storage.NotFoundError, match="absent"):
        storage.read_into(join(url, "absent"), 0, memoryview(out))


def test_absent_objects(url: str) -> None:
    storage.put(join(url, "there"), b"x")
    absent = join(url, "absent")
    assert storage.stat(absent) is None
    assert list(storage.list_entries(absent)) == []
    for verb in (storage.read, storage.digest, storage.open_seekable, lambda name: storage.read_range(name, 0, 1)):
        with pytest.raises(storage.NotFoundError, match=absent):
            verb(absent)


def test_age_is_by_the_stores_clock(url: str) -> None:
    storage.put(join(url, "heartbeat"), b"1")
    time.sleep(2.1)
    aged = storage.stat(join(url, "heartbeat"))
    storage.put(join(url, "heartbeat"), b"2")
    fresh = storage.stat(join(url, "heartbeat"))
    assert aged is not None
    assert fresh is not None
    assert 1.0 <= aged.age_sec <= 5.0
    assert 0.0 <= fresh.age_sec <= 1.0


def test_names_with_anything_in_them(url: str) -> None:
    names = [
        "a b",
        "ü/日本語",
        "plus+and%20percent",
        "q?x=1&y#z",
        "é",
        "e\u0301",
        "'\"<>",
        "a-b",
        "a/b",
        "a0",
        "😀.tar",
    ]
    for name in names:
        assert storage.put_if_absent(join(url, name), name.encode()) is Put.CREATED
    listed = list(storage.list_entries(url))
    assert listed == [Entry(name=n, size_bytes=len(n.encode())) for n in sorted(names, key=str.encode)]
    assert [storage.read(join(url, entry.name)) for entry in listed] == [entry.name.encode() for entry in listed]
    assert [entry.name for entry in storage.list_entries(join(url, "a"))] == ["b"]


def fill_s3(server: S3Server, prefix: str, names: list[str]) -> None:
    """Put one byte under each name by the server's own interface, twenty times faster than by S3."""
    connection = http.client.HTTPConnection(urlsplit(server.filer_url).netloc)
    for name in names:
        path = f"/buckets/{server.bucket}{prefix}/{name}"
        connection.request("PUT", path, b"x", {"Content-Type": "application/octet-stream"})
        response = connection.getresponse()
        response.read()
        assert response.status == 201
    connection.close()


def test_listing_of_ten_thousand(url: str, request: pytest.FixtureRequest) -> None:
    names = [f"{number % 7}/{number:06d}" for number in range(10_000)]
    if url.startswith("s3:"):
        fill_s3(request.getfixturevalue("s3_server"), urlsplit(url).path, names)
    else:  # as another tool would have written them: our own would sync each one
        for name in names:
            (Path(url) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(url) / name).write_bytes(b"x")
    start_sec = time.monotonic()
    assert list(storage.list_entries(url)) == [Entry(name=name, size_bytes=1) for name in sorted(names)]
    print(f"listed in {time.monotonic() - start_sec:.2f} s")


def test_random_access(url: str) -> None:
    name = join(url, "images.zip")
    data = random.Random(2).randbytes(3_000_000)
    archive = Path(os.environ["HOME"]) / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("first", data)
        file.writestr("second", b"small")
    storage.put(name, archive.read_bytes())
    with storage.open_seekable(name) as stored, zipfile.ZipFile(stored) as file:
        assert file.read("second") == b"small"
        assert file.read("first") == data


def test_arrow_filesystem(url: str) -> None:
    storage.put(join(url, "x y/part"), b"arrow")
    filesystem, path = storage.arrow_filesystem(join(url, "x y/part"))
    with filesystem.open_input_file(path) as file:
        assert file.read() == b"arrow"


def test_probe_leaves_nothing_to_see(url: str) -> None:
    storage.probe(url)
    storage.put_if_absent(join(url, ".tmp-left-by-a-kill"), b"half")
    assert list(storage.list_entries(url)) == []


# --- races and kills --------------------------------------------------------------------------------------------------

WRITER = """
import json, sys
from pipeline import storage
print("ready", flush=True)
for line in sys.stdin:
    url, seed_byte, size = json.loads(line)
    print(storage.put_if_absent(url, bytes([seed_byte]) * size).name, flush=True)
"""


@pytest.fixture(scope="module")
def writers(s3_env: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that each put what they are told to, all at once."""
    crew = [start(WRITER, env=os.environ | s3_env) for _ in range(WRITERS)]
    for writer in crew:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    yield crew
    for writer in crew:
        writer.kill()
        writer.communicate()


def rounds(url: str) -> int:
    return 1 if url.startswith("s3:") else 10  # SeaweedFS lets losers of a race wait for whole seconds


def outcomes(results: list[str]) -> dict[str, int]:
    return {name: results.count(name) for name in ("CREATED", "SAME", "OTHER")}


def put_from_all(writers: list[subprocess.Popen[str]], name: str, contents: list[int]) -> list[str]:
    for writer, content in zip(writers, contents, strict=True):
        assert writer.stdin is not None
        writer.stdin.write(json.dumps([name, content, 200_000]) + "\n")
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.flush()
    return [writer.stdout.readline().strip() for writer in writers if writer.stdout is not None]


def test_one_of_sixteen_processes_creates(url: str, writers: list[subprocess.Popen[str]]) -> None:
    for round_ in range(rounds(url)):
        name = join(url, f"other-{round_}")
        results = put_from_all(writers, name, list(range(WRITERS)))
        assert outcomes(results) == {"CREATED": 1, "SAME": 0, "OTHER": WRITERS - 1}
        assert storage.read(name) == bytes([results.index("CREATED")]) * 200_000
        results = put_from_all(writers, join(url, f"same-{round_}"), [7] * WRITERS)
        assert outcomes(results) == {"CREATED": 1, "SAME": WRITERS - 1, "OTHER": 0}


def test_one_of_sixteen_threads_creates(url: str) -> None:
    barrier = threading.Barrier(WRITERS)

    def write(name: str, data: bytes) -> str:
        barrier.wait()
        return storage.put_if_absent(join(url, name), data).name

    with ThreadPoolExecutor(WRITERS) as pool:
        for round_ in range(rounds(url)):
            results = list(pool.map(lambda i: write(f"other-{round_}", bytes([i]) * 1000), range(WRITERS)))  # noqa: B023
            assert outcomes(results) == {"CREATED": 1, "SAME": 0, "OTHER": WRITERS - 1}
            assert storage.read(join(url, f"other-{round_}")) == bytes([results.index("CREATED")]) * 1000
            results = list(pool.map(lambda _: write(f"same-{round_}", b"same"), range(WRITERS)))  # noqa: B023
            assert outcomes(results) == {"CREATED": 1, "SAME": WRITERS - 1, "OTHER": 0}


def kill_once(name: str, size_bytes: int, delay_sec: float) -> bool:
    """Start a put of `size_bytes` zeros, kill it after `delay_sec`, watching all the while; was the object there?"""
    complete = sha256(bytes(size_bytes))
    writer = start(WRITER)
    assert writer.stdin is not None
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    writer.stdin.write(json.dumps([name, 0, size_bytes]) + "\n")
    writer.stdin.flush()
    deadline_sec = time.monotonic() + delay_sec
    killed_sec = None
    while killed_sec is None or time.monotonic() < killed_sec + 0.1:
        found = storage.stat(name)
        assert found is None or found.size_bytes == size_bytes, "a reader saw half an object"
        if killed_sec is None and time.monotonic() >= deadline_sec:
            writer.kill()
            killed_sec = time.monotonic()
    writer.communicate()
    there = storage.stat(name) is not None
    assert not there or sha256(storage.read(name)) == complete
    # SAME even where it was not there: a server that had all of the request may carry it out after its sender died.
    assert storage.put_if_absent(name, bytes(size_bytes)) in ((Put.SAME,) if there else (Put.CREATED, Put.SAME))
    assert sha256(storage.read(name)) == storage.digest(name) == complete
    return there


def test_absent_or_complete_when_killed(url: str) -> None:
    size_bytes = 32 << 20
    start_sec = time.monotonic()
    storage.put_if_absent(join(url, "undisturbed"), bytes(size_bytes))
    typical_sec = time.monotonic() - start_sec
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}, one put {typical_sec:.3f} s")
    delays = random.Random(seed)
    kills = 4 if url.startswith("s3:") else 10
    there = [kill_once(join(url, f"{i}"), size_bytes, delays.uniform(0, 1.3 * typical_sec)) for i in range(kills)]
    print(f"{there.count(False)} of {kills} kills came before the commit")
    assert [entry.name for entry in storage.list_entries(url)] == sorted(["undisturbed", *map(str, range(kills))])


FORK = """
import os, sys
from pipeline import storage
url = sys.argv[1]
storage.put(storage.join(url, "parent"), b"1")
child = os.fork()
for number in range(20):
    storage.put(storage.join(url, f"{bool(child)}-{number}"), str(number).encode())
    assert storage.read(storage.join(url, f"{bool(child)}-{number}")) == str(number).encode()
if not child:
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


def test_connections_are_not_shared_with_a_fork(s3: str) -> None:
    subprocess.run([sys.executable, "-c", FORK, s3], check=True, timeout=60)
    assert len(list(storage.list_entries(s3))) == 41
