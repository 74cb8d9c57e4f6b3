"""Objects in a bucket or a folder: the only module that opens a URL.

A URL is a local path (or ``file:///path``) or ``s3://bucket/prefix``. An object is absent or complete, never partial:
its bytes are built first and published by one atomic operation. S3 is configured by the standard AWS environment
(``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_ENDPOINT_URL``, ``AWS_REGION``, ...) and by nothing else.
"""

import base64
import email.utils
import enum
import errno
import functools
import hashlib
import io
import os
import re
import secrets
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import boto3.session
from botocore import exceptions as boto
from botocore.config import Config
from pyarrow import fs

from pipeline.errors import InputError, RetryableError

_MAX_OBJECT_BYTES = 5 * 10**9
_BUFFER_BYTES = 1 << 20
_TEMP_PREFIX = ".tmp-"
_ATTEMPTS, _CONNECT_SEC, _READ_SEC = 5, 5, 60  # of boto3, for one request
_ROUNDS, _ROUNDS_SEC, _PAUSE_SEC = 4, 120.0, 0.3  # ours above them; no round begins after _ROUNDS_SEC
_NO_ACCESS = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_RETRIED = {"ConditionalRequestConflict", "OperationAborted", "409", "PreconditionFailed", "412"}
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)
_BODY_LOST = (boto.ResponseStreamingError, boto.IncompleteReadError, boto.FlexibleChecksumError)
_NO_ANSWER = (boto.ConnectionError, boto.HTTPClientError, *_BODY_LOST)
_NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_PERMISSION = "no permission: change its owner or mode, or choose another path"
_WRONG_KIND = "a file is where a folder should be, or the reverse: remove it or choose another path"
_DISK_FULL = "disk full: free space, or choose a folder on another disk"
_LOCAL_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _DISK_FULL)
_LOCAL_ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_PERMISSION)
_LOCAL_ADVICE |= dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), _WRONG_KIND)


class StorageError(InputError):
    """Storage refused what was asked: the message says what, where, and what to do."""


class NotFoundError(StorageError):
    """The object does not exist."""


class StorageUnavailableError(StorageError, RetryableError):
    """The endpoint was down or timed out after bounded retries; retryable too, since it may be up again later."""


@dataclass(frozen=True, kw_only=True)
class Stat:
    """What a store knows of one object without reading it."""

    size_bytes: int
    sha256: str | None
    """Hex digest from the object's metadata; None on local disk and for objects that others wrote."""
    age_sec: float
    """Seconds since it was written by the store's own clock (S3: whole seconds), never negative."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One object of a listing; `name` is relative to the listed URL, with ``/``."""

    name: str
    size_bytes: int


class Put(enum.Enum):
    """What `put_if_absent` found: SAME has an equal digest (perhaps our own, its answer lost), OTHER has not."""

    CREATED = "created"
    SAME = "same"
    OTHER = "other"


def resolve(url: str) -> str:
    """The absolute local path, or the S3 URL without trailing or doubled slashes. Idempotent.

    Raises StorageError for an empty URL, another scheme, or an S3 URL without a bucket or with ``.`` or ``..`` in it.
    """
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


def join(url: str, *parts: str) -> str:
    """The URL of what lies under `url`. Raises StorageError for a part that is empty, absolute or has ``..`` in it."""
    for part in parts:
        if "\0" in part or {"", ".", ".."} & set(part.split("/")):
            raise StorageError(f"{part!r} is not a name under {url}: names are relative, without '', '.' or '..'")
    return "/".join([url.rstrip("/"), *parts])


def read(url: str) -> bytes:
    """The whole object. Raises NotFoundError, StorageError."""
    return _store(url).read()


def read_range(url: str, offset: int, size: int) -> bytes:
    """Exactly `size` bytes from `offset`. Raises NotFoundError, and StorageError if the object ends before."""
    assert offset >= 0 <= size
    data = _store(url).read(offset, size) if size else b""
    if len(data) != size:
        wanted = f"{size} bytes wanted at offset {offset}, {len(data)} found"
        raise StorageError(f"{url} is truncated: {wanted}; write it again or restore it")
    return data


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
    shown = (entry for entry in _store(url).entries() if not os.path.basename(entry.name).startswith(_TEMP_PREFIX))
    # Stores differ in whether 'a/b' comes before 'a-b': sorted here, in memory.
    return iter(sorted(shown, key=lambda entry: os.fsencode(entry.name)))


def put(url: str, data: bytes) -> None:
    """Write or atomically replace the object: for heartbeats and derived copies only. Raises StorageError."""
    _store(url).put(data, replace=True)


def put_if_absent(url: str, data: bytes) -> Put:
    """Write the object unless one holds the name: of any number of writers exactly one gets CREATED.

    Raises StorageError; after StorageUnavailableError it may have been written, and the same call again settles it.
    """
    return _store(url).put(data, replace=False)


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
    options = {"region": _client().meta.region_name, "connect_timeout": _CONNECT_SEC, "request_timeout": _READ_SEC}
    endpoint = urllib.parse.urlsplit(_client().meta.endpoint_url)
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


class _Store(Protocol):
    """A back end, bound to one object or, for `entries`, to one prefix. `read` returns what there is of the range."""

    def read(self, offset: int = 0, size: int = -1) -> bytes: ...
    def stat(self) -> Stat | None: ...
    def entries(self) -> Iterator[Entry]: ...
    def put(self, data: bytes, *, replace: bool) -> Put: ...
    def delete(self) -> None: ...


def _store(url: str) -> _Store:
    resolved = resolve(url)
    if resolved.startswith("s3://"):
        return _S3Store(resolved, *resolved.removeprefix("s3://").partition("/")[::2])
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
            if item.is_file() and not item.name.startswith(_TEMP_PREFIX):
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


def _client() -> Any:
    # Made again when the environment has changed, and in a forked child, which must not share connections.
    return _new_client(os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@functools.lru_cache(maxsize=8)
def _new_client(_pid: int, _environment: tuple[tuple[str, str], ...]) -> Any:
    retries = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
    timeouts = {"connect_timeout": _CONNECT_SEC, "read_timeout": _READ_SEC}
    config = Config(**timeouts, retries=retries, s3={"addressing_style": "path"}, max_pool_connections=64)
    try:
        session = boto3.session.Session()
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        return session.client("s3", region_name=region, config=config)
    except (boto.BotoCoreError, ValueError) as error:
        raise StorageError(f"S3 is not set up: {_line(error)}: correct the AWS_* environment") from error


@dataclass(frozen=True)
class _S3Store:
    url: str
    bucket: str
    key: str

    def read(self, offset: int = 0, size: int = -1) -> bytes:
        options = {"Range": f"bytes={offset}-{offset + size - 1}"} if size > 0 else {}
        with self._errors() as client:
            for left in reversed(range(_ROUNDS)):
                try:
                    return bytes(client.get_object(Bucket=self.bucket, Key=self.key, **options)["Body"].read())
                except boto.ClientError as error:
                    if _code(error) not in ("InvalidRange", "416"):
                        raise
                    break
                except _BODY_LOST:
                    if not left:
                        raise
                time.sleep(_PAUSE_SEC)
        return b""

    def stat(self) -> Stat | None:
        with self._errors() as client:
            try:
                head = client.head_object(Bucket=self.bucket, Key=self.key)
            except boto.ClientError as error:
                if _code(error) not in ("404", "NoSuchKey", "NotFound"):
                    raise
                client.list_objects_v2(Bucket=self.bucket, Prefix=self.key, MaxKeys=1)  # raises if there is no bucket
                return None
        now = email.utils.parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        age_sec = max(0.0, (now - head["LastModified"]).total_seconds())
        return Stat(size_bytes=head["ContentLength"], sha256=head["Metadata"].get("sha256"), age_sec=age_sec)

    def entries(self) -> Iterator[Entry]:
        prefix = f"{self.key}/" if self.key else ""
        with self._errors() as client:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):  # consoles make empty objects for folders
                        yield Entry(name=item["Key"].removeprefix(prefix), size_bytes=item["Size"])

    def put(self, data: bytes, *, replace: bool) -> Put:
        if len(data) > _MAX_OBJECT_BYTES:
            raise StorageError(f"{self.url} would be {len(data)} bytes, the most is 5 GB: choose smaller shards")
        sha256 = hashlib.sha256(data)
        request = {"Bucket": self.bucket, "Key": self.key, "Body": data, "Metadata": {"sha256": sha256.hexdigest()}}
        request["ChecksumSHA256"] = base64.b64encode(sha256.digest()).decode()
        request |= {} if replace else {"IfNoneMatch": "*"}
        deadline_sec = time.monotonic() + _ROUNDS_SEC
        with self._errors() as client:
            for left in reversed(range(_ROUNDS)):
                try:
                    client.put_object(**request)
                    return Put.CREATED
                except boto.ClientError as error:
                    found = self.stat() if _code(error) in ("PreconditionFailed", "412") else None
                    if found:  # written by someone, perhaps by us
                        return Put.SAME if (found.sha256 or digest(self.url)) == sha256.hexdigest() else Put.OTHER
                    if _code(error) not in _RETRIED or not left:
                        raise
                except boto.HTTPClientError:  # sent, and no answer: unknown, so ask again
                    if not left or time.monotonic() > deadline_sec:
                        raise
                time.sleep(_PAUSE_SEC)
        raise AssertionError("a round returns or raises")

    def delete(self) -> None:
        with self._errors() as client:
            client.delete_object(Bucket=self.bucket, Key=self.key)

    @contextmanager
    def _errors(self) -> Iterator[Any]:
        """The client; what it raises becomes one line: what, where (with the endpoint), and what to do."""
        client = _client()
        where = f"{self.url} at {client.meta.endpoint_url}"
        try:
            yield client
        except boto.ClientError as error:
            raise _answer(error, where) from error
        except _NO_CREDENTIALS as error:
            raise StorageError(f"no credentials for {where} ({_line(error)}): set AWS_ACCESS_KEY_ID etc.") from error
        except _NO_ANSWER as error:
            tried = f"tried {_ATTEMPTS} times, {_CONNECT_SEC} s to connect and {_READ_SEC} s to answer"
            advice = "check AWS_ENDPOINT_URL and the network, then run again"
            raise StorageUnavailableError(f"no answer for {where} ({_line(error)}); {tried}: {advice}") from error
        except boto.BotoCoreError as error:
            raise StorageError(f"{where}: {_line(error)}: check the URL and the AWS_* environment") from error


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _answer(error: Any, where: str) -> StorageError:
    code, status = _code(error), error.response["ResponseMetadata"]["HTTPStatusCode"]
    if code == "NoSuchBucket":
        return StorageError(f"no such bucket: {where}: create it, or correct the URL or AWS_ENDPOINT_URL")
    if code in _NO_ACCESS:
        return StorageError(f"access refused ({code}) to {where}: check AWS_ACCESS_KEY_ID, its secret and its rights")
    if status == 404:
        return NotFoundError(f"{where} does not exist: check the URL")
    if code in _RETRIED or status in (500, 502, 503, 504):
        return StorageUnavailableError(f"{where} answers {code} after {_ATTEMPTS} attempts: run again later")
    return StorageError(f"{where} refused ({_line(error)}): check the URL, AWS_REGION and the store")
