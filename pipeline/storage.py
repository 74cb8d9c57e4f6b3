"""Objects in a bucket or a folder: the only module that opens a URL.

A URL is a local path (or ``file:///path``) or ``s3://bucket/prefix``. An object is absent or complete, never partial:
its bytes are built first and published by one atomic operation. S3 is configured by the standard AWS environment
(``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``, ``AWS_REGION``, ...) and by nothing else.
"""

import errno
import functools
import hashlib
import io
import os
import re
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pyarrow import fs

from pipeline import s3
from pipeline.store import Entry, NotFoundError, Put, Stat, StorageError, StorageUnavailableError, Store

__all__ = ["Entry", "NotFoundError", "Put", "Stat", "StorageError", "StorageUnavailableError"]

T = TypeVar("T")
_BUFFER_BYTES = 1 << 20
_FIRST_PAUSE_SEC, _LONGEST_PAUSE_SEC = 0.5, 10.0
_TEMP_PREFIX = ".tmp-"
_NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_PERMISSION = "no permission: change its owner or mode, or choose another path"
_WRONG_KIND = "a file is where a folder should be, or the reverse: remove it or choose another path"
_DISK_FULL = "disk full: free space, or choose a folder on another disk"
_LOCAL_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _DISK_FULL)
_LOCAL_ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_PERMISSION)
_LOCAL_ADVICE |= dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), _WRONG_KIND)


def resolve(url: str) -> str:
    """The absolute local path, or the S3 URL without trailing or doubled slashes. Idempotent.

    Raises StorageError for an empty URL, another scheme, credentials in it, or an S3 URL without a bucket or with ``.``
    or ``..`` in it.
    """
    refuse_credentials(url)
    scheme, separator, rest = url.partition("://")
    parts = [part for part in rest.split("/") if part]
    if not url.strip() or "\0" in url:
        raise StorageError(f"{url!r} is not a storage URL: give a local path or s3://bucket/prefix")
    if separator and scheme.lower() == "s3" and parts and not {".", ".."} & set(parts):
        return "s3://" + "/".join(parts)
    if separator and scheme.lower() == "file" and rest.startswith("/"):
        return os.path.abspath("/" + urllib.parse.unquote(rest).lstrip("/"))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|(?i:s3|file):", url):
        raise StorageError(f"{url!r} is neither a local path, file:///path nor s3://bucket/prefix: give one of these")
    return os.path.abspath(os.path.expanduser(url))


def refuse_credentials(url: str) -> None:
    """Raise StorageError where the place of the host or bucket has ``:`` or ``@``, without a word of what stands there.

    URLs are printed, logged and stored. A secret key may have slashes, so that what follows the first one says nothing.
    """
    scheme, separator, rest = url.partition("://")
    place = rest.partition("/")[0]
    if separator and ("@" in place or (":" in place and scheme.lower() == "s3")):
        raise StorageError("credentials in a URL are refused: give s3://bucket/prefix, and set AWS_ACCESS_KEY_ID etc.")


def join(url: str, *parts: str) -> str:
    """The URL of what lies under `url`. Raises StorageError for a part that is empty, absolute or has ``..`` in it."""
    for part in parts:
        if "\0" in part or {"", ".", ".."} & set(part.split("/")):
            raise StorageError(f"{part!r} is not a name under {url}: names are relative, without '', '.' or '..'")
    return "/".join([url.rstrip("/"), *parts])


def patiently(call: Callable[[], T], timeout_sec: float, stop: threading.Event | None = None) -> T:
    """What `call` returns. While its store is not to be reached it is called again, for so many seconds or until `stop`
    is set; then the StorageUnavailableError of the last call is raised.
    """
    stop, deadline_sec, pause_sec = stop or threading.Event(), time.monotonic() + timeout_sec, _FIRST_PAUSE_SEC
    while True:
        try:
            return call()
        except StorageUnavailableError:
            left_sec = deadline_sec - time.monotonic()
            if left_sec <= 0 or stop.wait(min(pause_sec, left_sec)):
                raise
            pause_sec = min(2 * pause_sec, _LONGEST_PAUSE_SEC)


def read(url: str) -> bytes:
    """The whole object. Raises NotFoundError, StorageError."""
    return _store(url).read()


def read_range(url: str, offset: int, size: int) -> bytes:
    """Exactly `size` bytes from `offset`. Raises NotFoundError, and StorageError if the object ends before."""
    assert offset >= 0 <= size
    data = _store(url).read(offset, size) if size else b""
    _refuse_short(url, offset, size, len(data))
    return data


def read_into(url: str, offset: int, out: memoryview) -> None:
    """Fill `out`, of bytes, from `offset`, as `read_range` reads. Raises NotFoundError, StorageError."""
    resolved = resolve(url)
    if resolved.startswith("s3://"):
        out[:] = read_range(resolved, offset, len(out))
        return
    with _local_errors(resolved), open(resolved, "rb", buffering=0) as file:
        file.seek(offset)
        found = 0
        while found < len(out) and (count := file.readinto(out[found:])):
            found += count
    _refuse_short(url, offset, len(out), found)


def stat(url: str) -> Stat | None:
    """Size, age and, if known without reading, digest of the object; None if it does not exist. Raises StorageError."""
    return _store(url).stat()


def digest(url: str) -> str:
    """Hex sha256 of the stored bytes: from the metadata on S3, hashed again on local disk. Raises NotFoundError."""
    found = stat(url)
    if found and found.sha256:
        return found.sha256
    with open_seekable(url) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_entries(url: str) -> Iterator[Entry]:
    """All objects under `url`, at any depth, in UTF-8 order of names, temporary ones left out. Raises StorageError."""
    # Stores differ in whether 'a/b' comes before 'a-b': sorted here, in memory.
    shown = (entry for entry in _store(url).entries() if not _is_temporary(entry))
    return iter(sorted(shown, key=lambda entry: os.fsencode(entry.name)))


def list_temporary(url: str) -> list[Entry]:
    """What writers under `url` have begun, or had begun when they died. Raises StorageError."""
    return [entry for entry in _store(url).entries() if _is_temporary(entry)]


def _is_temporary(entry: Entry) -> bool:
    return os.path.basename(entry.name).startswith(_TEMP_PREFIX)


def _refuse_short(url: str, offset: int, wanted: int, found: int) -> None:
    if found != wanted:
        what = f"{wanted} bytes wanted at offset {offset}, {found} found"
        raise StorageError(f"{url} is truncated: {what}; write it again or restore it")


def put(url: str, data: bytes) -> None:
    """Write or atomically replace the object: for heartbeats and derived copies only. Raises StorageError."""
    _store(url).put(data, replace=True)


def put_if_absent(url: str, data: bytes) -> Put:
    """Write the object unless one holds the name: of any number of writers exactly one gets CREATED.

    Raises StorageError; after StorageUnavailableError it may have been written, and the same call again settles it.
    """
    return _store(url).put(data, replace=False)


def put_retries() -> int:
    """How often this process had to try a put again so far; a local disk never has."""
    return s3.put_retries()


def delete(url: str) -> None:
    """Remove the object; an absent one is fine. Raises StorageError."""
    _store(url).delete()


@functools.lru_cache(maxsize=1024)
def probe(url: str) -> None:
    """Make sure that the store at `url` honours put_if_absent; asked once per destination and process.

    Raises StorageError, with the reason, for a store that ignores If-None-Match and for a mount without hard links.
    """
    name = join(resolve(url), f"{_TEMP_PREFIX}probe-{secrets.token_hex(8)}")
    put_if_absent(name, b"first")
    try:
        second = put_if_absent(name, b"second")
    finally:
        delete(name)
    if second is not Put.OTHER:
        raise StorageError(
            f"{url}: this store ignores If-None-Match, so writers could overwrite each other: use another"
        )


def arrow_filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system and the path in it (no scheme), for Ray's own storage and bulk reads."""
    resolved = resolve(url)
    if not resolved.startswith("s3://"):
        return fs.LocalFileSystem(), resolved
    # Keys are left to the SDK's own chain: they must not travel in a pickled file system, and they may expire.
    options = {
        "region": s3.shared_client().meta.region_name,
        "connect_timeout": s3.CONNECT_SEC,
        "request_timeout": s3.READ_SEC,
    }
    endpoint = urllib.parse.urlsplit(s3.shared_client().meta.endpoint_url)
    if not endpoint.netloc.endswith(".amazonaws.com"):
        options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    return fs.S3FileSystem(**options), resolved.removeprefix("s3://")


def open_seekable(url: str) -> io.BufferedReader:
    """The object as a file for random access (zip archives). Raises NotFoundError, StorageError."""
    resolved = resolve(url)
    if resolved.startswith("s3://"):
        return io.BufferedReader(_RangeReader(resolved), _BUFFER_BYTES)
    with _local_errors(resolved):
        return open(resolved, "rb")


class _RangeReader(io.RawIOBase):
    def __init__(self, url: str) -> None:
        found = stat(url)
        if found is None:
            raise NotFoundError(f"{url} does not exist: check the URL")
        self._url, self._size_bytes, self._offset = url, found.size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + (0, self._offset, self._size_bytes)[whence]
        return self._offset

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self._size_bytes - self._offset))
        buffer[:size] = read_range(self._url, self._offset, size)
        self._offset += size
        return size


def _store(url: str) -> Store:
    resolved = resolve(url)
    if resolved.startswith("s3://"):
        return s3.S3Store(resolved, *resolved.removeprefix("s3://").partition("/")[::2])
    return _LocalStore(resolved)


@dataclass(frozen=True)
class _LocalStore:
    path: str

    def read(self, offset: int = 0, size: int = -1) -> bytes:
        with _local_errors(self.path), open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def stat(self) -> Stat | None:
        with _local_errors(self.path), suppress(FileNotFoundError):
            found = os.stat(self.path)
            if not os.path.isdir(self.path):
                return Stat(size_bytes=found.st_size, sha256=None, age_sec=max(0.0, time.time() - found.st_mtime))
        return None

    def entries(self) -> Iterator[Entry]:
        with _local_errors(self.path):
            if os.path.isdir(self.path):
                yield from _walk(self.path, "", frozenset())

    def put(self, data: bytes, *, replace: bool) -> Put:
        with _local_errors(self.path):
            if not replace and os.path.lexists(self.path):  # resuming: do not write a gigabyte to learn it
                return self._compare(data)
            with _temp_file(self.path, data) as temp:
                if replace:
                    os.replace(temp, self.path)
                    return Put.CREATED
                try:
                    os.link(temp, self.path)
                except FileExistsError:  # perhaps by us: network file systems lose answers; then the inode is ours
                    return Put.CREATED if os.path.samefile(temp, self.path) else self._compare(data)
                except OSError as error:
                    if error.errno not in _NO_LINK:
                        raise
                    reason = f"this mount makes no hard links ({error.strerror}), so writers could overwrite each other"
                    raise StorageError(f"{self.path}: {reason}: choose another file system, or S3") from error
        return Put.CREATED

    def delete(self) -> None:
        with _local_errors(self.path), suppress(FileNotFoundError):
            os.unlink(self.path)

    def _compare(self, data: bytes) -> Put:
        with open(self.path, "rb") as file:
            same = os.fstat(file.fileno()).st_size == len(data)
            same = same and hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(data).digest()
        _sync_folder(os.path.dirname(self.path))  # its writer may have died before doing so
        return Put.SAME if same else Put.OTHER


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
    """Files under `folder`, through links too, except back into a folder that we are in."""
    here = (os.stat(folder).st_dev, os.stat(folder).st_ino)
    with os.scandir(folder) as items:
        for item in items:
            if item.is_file():
                with suppress(FileNotFoundError):  # removed while we list
                    yield Entry(name=prefix + item.name, size_bytes=item.stat().st_size)
            elif item.is_dir() and here not in above:
                yield from _walk(item.path, f"{prefix}{item.name}/", above | {here})


@contextmanager
def _temp_file(path: str, data: bytes) -> Iterator[str]:
    """A file beside `path` with `data` on disk, to be given its name; whatever happens but a kill, it is removed."""
    folder = os.path.dirname(path)
    _make_folder(folder)
    temp = os.path.join(folder, _TEMP_PREFIX + secrets.token_hex(8))
    try:
        with open(temp, "xb", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        yield temp
        _sync_folder(folder)
    finally:
        if os.path.lexists(temp):
            os.unlink(temp)


def _make_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        _make_folder(os.path.dirname(folder))
        os.makedirs(folder, exist_ok=True)
        _sync_folder(os.path.dirname(folder))


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _local_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = NotFoundError if isinstance(error, FileNotFoundError) else StorageError
        raise kind(f"{path}: {error.strerror}: {_LOCAL_ADVICE.get(error.errno or 0, 'check the path')}") from error
