"""What storage does when the disk, the server or the network between them fails: the faults are real ones."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import RetryableError
from pipeline.storage import Entry, Put, StorageError, StorageUnavailableError, join
from tests.s3_proxy import Proxy, proxy
from tests.s3_server import free_ports

__all__ = ["proxy"]

# --- disk -------------------------------------------------------------------------------------------------------------

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
steps = [(0x20, 0, 0, 0), (0x15, 1, 0, calls[0]), (0x15, 0, 1, calls[1])]
steps += [(0x06, 0, 0, refuse), (0x06, 0, 0, 0x7FFF0000)]
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
        (storage.stat, inside),
        (storage.read, folder),
    ):
        with pytest.raises(StorageError, match=f"{name}: .*: a file is where a folder should be, or the reverse"):
            verb(name)


NO_PERMISSION = """
import os, sys
from pipeline import storage
storage.put(sys.argv[1] + "/object", b"x")
os.chmod(sys.argv[1] + "/object", 0)
os.chmod(sys.argv[1], 0o555)
if os.geteuid() == 0:
    os.seteuid(65534)
for verb in (storage.read, storage.delete, lambda url: storage.put(url, b""), lambda url: storage.put(url + "2", b"")):
    try:
        verb(sys.argv[1] + "/object")
    except storage.StorageError as error:
        print(error)
"""


def test_no_permission(tmp_path: Path) -> None:
    for folder in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        folder.chmod(0o755)
    command = [sys.executable, "-c", NO_PERMISSION, str(tmp_path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    tmp_path.chmod(0o755)
    assert len(lines) == 4
    assert all(f"{tmp_path}/object" in line and "no permission: change its owner or mode" in line for line in lines)


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


# --- S3 ---------------------------------------------------------------------------------------------------------------


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
