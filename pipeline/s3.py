"""The S3 back end of `storage`, by boto3; imported by it alone."""

import base64
import email.utils
import functools
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3.session
from botocore import exceptions as boto
from botocore.config import Config

from pipeline.store import Entry, NotFoundError, Put, Stat, StorageError, StorageUnavailableError

CONNECT_SEC, READ_SEC = 5, 60
_MAX_OBJECT_BYTES = 5 * 10**9
_ATTEMPTS = 5  # of boto3, for one request
_ROUNDS, _ROUNDS_SEC, _PAUSE_SEC = 4, 120.0, 0.3  # ours above them; no round begins after _ROUNDS_SEC
_NO_ACCESS = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_RETRIED = {"ConditionalRequestConflict", "OperationAborted", "409", "PreconditionFailed", "412"}
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)
_BODY_LOST = (boto.ResponseStreamingError, boto.IncompleteReadError, boto.FlexibleChecksumError)
_NO_ANSWER = (boto.ConnectionError, boto.HTTPClientError, *_BODY_LOST)


class _Retries:
    """How often puts of this process were tried again."""

    def __init__(self) -> None:
        self._lock, self.count = threading.Lock(), 0

    def add(self, count: int) -> None:
        with self._lock:
            self.count += count


_retries = _Retries()


def put_retries() -> int:
    """How often puts of this process were tried again so far: by us, or within a request by boto3."""
    return _retries.count


def shared_client() -> Any:
    """The process's boto3 client."""
    # Made again when the environment has changed, and in a forked child, which must not share connections.
    return _new_client(os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@functools.lru_cache(maxsize=8)
def _new_client(_pid: int, _environment: tuple[tuple[str, str], ...]) -> Any:
    retries = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
    timeouts = {"connect_timeout": CONNECT_SEC, "read_timeout": READ_SEC}
    config = Config(**timeouts, retries=retries, s3={"addressing_style": "path"}, max_pool_connections=64)
    try:
        session = boto3.session.Session()
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        client = session.client("s3", region_name=region, config=config)
    except (boto.BotoCoreError, ValueError) as error:
        raise StorageError(f"S3 is not set up: {_line(error)}: correct the AWS_* environment") from error
    if "@" in client.meta.endpoint_url:  # every error names the endpoint
        raise StorageError(
            "AWS_ENDPOINT_URL has credentials in it: give http://host:port, and set AWS_ACCESS_KEY_ID etc."
        )
    return client


@dataclass(frozen=True)
class S3Store:
    """One object, or for `entries` one prefix, by boto3; each error becomes one line that names the endpoint."""

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
                    _count_tries(client.put_object(**request))
                    return Put.CREATED
                except boto.ClientError as error:
                    _count_tries(error.response)
                    found = self.stat() if _code(error) in ("PreconditionFailed", "412") else None
                    if found:  # written by someone, perhaps by us
                        return (
                            Put.SAME
                            if (found.sha256 or hashlib.sha256(self.read()).hexdigest()) == sha256.hexdigest()
                            else Put.OTHER
                        )
                    if _code(error) not in _RETRIED or not left:
                        raise
                except boto.HTTPClientError:  # sent, and no answer: unknown, so ask again
                    _retries.add(_ATTEMPTS - 1)
                    if not left or time.monotonic() > deadline_sec:
                        raise
                _retries.add(1)
                time.sleep(_PAUSE_SEC)
        raise AssertionError("a round returns or raises")

    def delete(self) -> None:
        with self._errors() as client:
            client.delete_object(Bucket=self.bucket, Key=self.key)

    @contextmanager
    def _errors(self) -> Iterator[Any]:
        """The client; what it raises becomes one line: what, where (with the endpoint), and what to do."""
        client = shared_client()
        where = f"{self.url} at {client.meta.endpoint_url}"
        try:
            yield client
        except boto.ClientError as error:
            raise _answer(error, where) from error
        except _NO_CREDENTIALS as error:
            raise StorageError(f"no credentials for {where} ({_line(error)}): set AWS_ACCESS_KEY_ID etc.") from error
        except _NO_ANSWER as error:
            tried = f"tried {_ATTEMPTS} times, {CONNECT_SEC} s to connect and {READ_SEC} s to answer"
            advice = "check AWS_ENDPOINT_URL and the network, then run again"
            raise StorageUnavailableError(f"no answer for {where} ({_line(error)}); {tried}: {advice}") from error
        except boto.BotoCoreError as error:
            raise StorageError(f"{where}: {_line(error)}: check the URL and the AWS_* environment") from error


def _count_tries(response: Any) -> None:
    _retries.add(int(response.get("ResponseMetadata", {}).get("RetryAttempts", 0)))


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _answer(error: Any, where: str) -> StorageError:
    code, status = _code(error), error.response["ResponseMetadata"]["HTTPStatusCode"]
    if code == "NoSuchBucket":
        return StorageError(f"no such bucket: {where}: create it, or correct the URL or AWS_ENDPOINT_URL")
    if code in _NO_ACCESS:
        advice = "check AWS_ACCESS_KEY_ID, its secret and rights, and whether they have expired"
        return StorageError(f"access refused ({code}) to {where}: {advice}")
    if status == 404:
        return NotFoundError(f"{where} does not exist: check the URL")
    if code in _RETRIED or status in (500, 502, 503, 504):
        return StorageUnavailableError(f"{where} answers {code} after {_ATTEMPTS} attempts: run again later")
    return StorageError(f"{where} refused ({_line(error)}): check the URL, AWS_REGION and the store")
