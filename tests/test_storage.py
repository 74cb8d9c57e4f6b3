"""The storage contract, the same suite against a local folder and a real S3 server, and the faults of each."""

import hashlib
import http.client
import http.server
import json
import os
import random
import shutil
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
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import RetryableError
from pipeline.storage import Entry, Put, StorageError, StorageUnavailableError, join
from tests.s3_server import S3Server, free_ports

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


def test_listing_of_ten_thousand(url: str) -> None:
    names = [f"{number % 7}/{number:06d}" for number in range(10_000)]
    root = Path(url)
    if url.startswith("s3:"):
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: storage.put(join(url, name), b"x"), names))
    else:  # as another tool would have written them: our own would sync each one
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")
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
        writer.communicate()


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
    for round_ in range(8):
        name = join(url, f"other-{round_}")
        results = put_from_all(writers, name, list(range(WRITERS)))
        assert outcomes(results) == {"CREATED": 1, "SAME": 0, "OTHER": WRITERS - 1}
        assert storage.read(name) == bytes([results.index("CREATED")]) * 200_000
        results = put_from_all(writers, join(url, f"same-{round_}"), [7] * WRITERS)
        assert outcomes(results) == {"CREATED": 1, "SAME": WRITERS - 1, "OTHER": 0}
    assert len(list(storage.list_entries(url))) == 16


def test_one_of_sixteen_threads_creates(url: str) -> None:
    barrier = threading.Barrier(WRITERS)

    def write(name: str, data: bytes) -> str:
        barrier.wait()
        return storage.put_if_absent(join(url, name), data).name

    with ThreadPoolExecutor(WRITERS) as pool:
        for round_ in range(8):
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
    while killed_sec is None or time.monotonic() < killed_sec + 0.2:
        found = storage.stat(name)
        assert found is None or found.size_bytes == size_bytes, "a reader saw half an object"
        if killed_sec is None and time.monotonic() >= deadline_sec:
            writer.kill()
            killed_sec = time.monotonic()
    writer.communicate()
    there = storage.stat(name) is not None
    assert not there or sha256(storage.read(name)) == complete
    assert storage.put_if_absent(name, bytes(size_bytes)) is (Put.SAME if there else Put.CREATED)
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
    kills = 5 if url.startswith("s3:") else 12
    there = [kill_once(join(url, f"{i}"), size_bytes, delays.uniform(0, typical_sec)) for i in range(kills)]
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
    assert start(FORK, s3).wait(timeout=60) == 0
    assert len(list(storage.list_entries(s3))) == 41


# --- faults of a disk -------------------------------------------------------------------------------------------------

FULL = """
import json, os, sys
from pipeline import storage
folder = sys.argv[1]
if sys.argv[2:] == ["limit"]:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
storage.put(folder + "/small", b"small")
messages = []
for verb, name in ((storage.put_if_absent, "big"), (storage.put, "small"), (storage.put_if_absent, "new/big")):
    try:
        verb(folder + "/" + name, os.urandom(1_000_000))
    except storage.StorageError as error:
        messages.append(str(error))
left = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]
print(json.dumps([messages, left, storage.read(folder + "/small").decode()]))
"""


def test_disk_full(tmp_path: Path) -> None:
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=300k tmpfs "$0" && exec "$@"', str(tmp_path)]
    can_mount = bool(shutil.which("unshare")) and subprocess.run([*mount, "true"], capture_output=True).returncode == 0
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    command = mount + command if can_mount else [*command, "limit"]
    messages, left, small = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(messages[0])
    assert len(messages) == 3
    assert all("disk full: free space" in message and str(tmp_path) in message for message in messages)
    assert left == [str(tmp_path / "small")]
    assert small == "small"


# The kernel refuses link(2) and linkat(2) to this process, as a file system without hard links does.
NO_LINKS = """
import ctypes, errno, os, platform, struct, sys
from pipeline import storage
calls = {"x86_64": (86, 265), "aarch64": (37, 37)}[platform.machine()]
refuse = 0x00050000 | errno.EPERM
steps = [(0x20, 0, 0, 0), (0x15, 1, 0, calls[0]), (0x15, 0, 1, calls[1]), (0x06, 0, 0, refuse), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0, os.strerror(ctypes.get_errno())
try:
    storage.probe(sys.argv[1])
except storage.StorageError as error:
    print(error)
print(os.listdir(sys.argv[1]))
"""


def test_mount_without_hard_links(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", NO_LINKS, str(tmp_path)], check=True, capture_output=True, text=True)
    message, left = run.stdout.splitlines()
    assert "this mount makes no hard links" in message
    assert "choose another file system" in message
    assert left == "[]"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder").mkdir()
    inside, folder = str(tmp_path / "file" / "x"), str(tmp_path / "folder")
    for verb, name in (
        (lambda url: storage.put(url, b""), inside),
        (lambda url: storage.put_if_absent(url, b""), inside),
        (lambda url: storage.put(url, b""), folder),
        (lambda url: storage.put_if_absent(url, b""), folder),
        (storage.read, inside),
        (storage.read, folder),
    ):
        with pytest.raises(StorageError, match=f"{name}: .*: a file is where a folder should be, or the reverse"):
            verb(name)


def test_no_permission() -> None:
    # Not even root may write here.
    with pytest.raises(StorageError, match=r"/proc/1/x|/sys/x"):
        storage.put("/proc/1/x", b"")


def test_listing_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_bytes(b"12")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "class").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "back").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "broken").symlink_to(tmp_path / "nowhere")
    listed = list(storage.list_entries(str(tmp_path / "store")))
    assert Entry(name="class/x", size_bytes=2) in listed
    assert len(listed) <= 2


# --- faults of S3 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", r"access refused"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", r"access refused"),
        ("AWS_ACCESS_KEY_ID", None, "no credentials"),
        ("AWS_ENDPOINT_URL", "not a url", "S3 is not set up"),
        ("AWS_PROFILE", "nonesuch", "S3 is not set up"),
    ],
)
def test_wrong_settings(s3: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, says: str) -> None:
    storage.put(join(s3, "object"), b"x")
    if value is None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    else:
        monkeypatch.setenv(variable, value)
    for verb in (storage.read, storage.stat, storage.delete, storage.list_entries, storage.probe):
        with pytest.raises(StorageError, match=says) as caught:
            verb(join(s3, "object"))
        check_message(str(caught.value), os.environ["AWS_ENDPOINT_URL"] if value is None else "")


def check_message(message: str, *wanted: str) -> None:
    """One line that names what it should, and never the secret."""
    assert "\n" not in message
    assert all(part in message for part in wanted), message
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret") not in message


@pytest.mark.usefixtures("s3")
def test_bucket_missing() -> None:
    for verb in (storage.read, storage.stat, storage.list_entries, storage.probe, storage.digest):
        with pytest.raises(StorageError, match="no such bucket: s3://nonesuch/x") as caught:
            verb("s3://nonesuch/x")
        check_message(str(caught.value), os.environ["AWS_ENDPOINT_URL"], "create it")


def test_endpoint_down(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    start_sec = time.monotonic()
    with pytest.raises(StorageUnavailableError) as caught:
        storage.put_if_absent(join(s3, "object"), b"x")
    assert time.monotonic() - start_sec < 30
    assert isinstance(caught.value, RetryableError)
    check_message(str(caught.value), join(s3, "object"), endpoint, "tried 5 times")


def test_too_large_for_one_put(s3: str) -> None:
    class Large(bytes):
        def __len__(self) -> int:
            return 5 * 10**9 + 1

    with pytest.raises(StorageError, match="choose smaller shards"):
        storage.put_if_absent(join(s3, "object"), Large())


class Proxy(http.server.BaseHTTPRequestHandler):
    """In front of the real server: signs again and passes on, except for the faults it is told to make."""

    protocol_version = "HTTP/1.1"
    target: S3Server
    faults: list[str]
    """Faults still to come, one a request that they fit; `strip` stays."""
    seen: list[str]

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        conditional = "If-None-Match" in self.headers
        self.seen.append(f"{self.command} {conditional}")
        fault = self.faults[0] if self.faults and (conditional or self.faults[0] == "cut") else ""
        if fault == "conflict":
            self.faults.pop(0)
            self.answer(409, b"<Error><Code>ConditionalRequestConflict</Code><Message>race</Message></Error>", [])
            return
        status, answer, headers = self.forward(body, keep_condition=fault != "strip")
        self.close_connection = fault in ("lose", "cut") and bool(self.faults.pop(0))
        if fault != "lose":
            self.answer(status, answer, headers, sent_bytes=len(answer) // 2 if fault == "cut" else None)

    do_GET = do_PUT = do_HEAD = do_DELETE = handle_request  # noqa: N815

    def forward(self, body: bytes, keep_condition: bool) -> tuple[int, bytes, list[tuple[str, str]]]:
        dropped = {"host", "authorization", "x-amz-date", "x-amz-content-sha256", "expect", "connection"}
        dropped |= set() if keep_condition else {"if-none-match"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        request = AWSRequest(self.command, self.target.endpoint_url + self.path, headers, body)
        keys = Credentials(self.target.access_key, self.target.secret_key)
        S3SigV4Auth(keys, "s3", "us-east-1").add_auth(request)
        connection = http.client.HTTPConnection(urlsplit(self.target.endpoint_url).netloc)
        connection.request(self.command, self.path, body, dict(request.headers.items()))
        response = connection.getresponse()
        answer = (response.status, response.read(), response.getheaders())
        connection.close()
        return answer

    def answer(self, status: int, body: bytes, headers: list[tuple[str, str]], sent_bytes: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = [value for name, value in headers if name.lower() == "content-length"]
        self.send_header("Content-Length", length[0] if length and self.command == "HEAD" else str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent_bytes])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def proxy(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Proxy]]:
    """The proxy's settings; AWS_ENDPOINT_URL leads to it."""
    handler = type("ProxyOfTest", (Proxy,), {"target": s3_server, "faults": [], "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_store_that_ignores_the_condition_is_refused(s3: str, proxy: type[Proxy]) -> None:
    storage.probe(s3)  # the proxy alone does no harm
    proxy.faults.append("strip")
    with pytest.raises(StorageError, match="this store ignores If-None-Match"):
        storage.probe(join(s3, "destination"))
    asked = len(proxy.seen)
    with pytest.raises(StorageError, match="this store ignores If-None-Match"):
        storage.probe(join(s3, "destination"))
    assert len(proxy.seen) > asked  # a refusal is not remembered as leave
    proxy.faults.clear()
    assert list(storage.list_entries(s3)) == []


def test_probe_asks_once(s3: str, proxy: type[Proxy]) -> None:
    storage.probe(s3)
    asked = len(proxy.seen)
    storage.probe(s3)
    assert len(proxy.seen) == asked


def test_conflict_is_asked_again(s3: str, proxy: type[Proxy]) -> None:
    proxy.faults.append("conflict")
    assert storage.put_if_absent(join(s3, "object"), b"data") is Put.CREATED
    assert proxy.seen == ["PUT True", "PUT True"]
    proxy.faults.extend(["conflict"] * 20)
    with pytest.raises(StorageUnavailableError, match="run again later"):
        storage.put_if_absent(join(s3, "object-2"), b"data")


def test_lost_answer_to_a_commit(s3: str, proxy: type[Proxy]) -> None:
    proxy.faults.append("lose")
    assert storage.put_if_absent(join(s3, "object"), b"data") is Put.SAME
    assert proxy.faults == []
    assert storage.read(join(s3, "object")) == b"data"
    proxy.faults.append("lose")
    assert storage.put_if_absent(join(s3, "object"), b"other") is Put.OTHER
    assert storage.read(join(s3, "object")) == b"data"


@pytest.mark.slow
def test_lost_answers_beyond_what_boto3_retries(s3: str, proxy: type[Proxy]) -> None:
    proxy.faults.extend(["lose"] * 6)
    assert storage.put_if_absent(join(s3, "object"), b"data") is Put.SAME
    assert proxy.seen[:7] == ["PUT True"] * 7


def test_body_cut_short_is_read_again(s3: str, proxy: type[Proxy]) -> None:
    data = random.Random(3).randbytes(1_000_000)
    storage.put(join(s3, "object"), data)
    proxy.faults.append("cut")
    assert storage.read(join(s3, "object")) == data
    proxy.faults.append("cut")
    assert storage.read_range(join(s3, "object"), 10, 500_000) == data[10:500_010]
    proxy.faults.extend(["cut"] * 10)
    with pytest.raises(StorageUnavailableError):
        storage.read(join(s3, "object"))
