"""What every store answers and raises: the vocabulary shared by `storage` and its back ends."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import InputError, RetryableError


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


class Store(Protocol):
    """A back end, bound to one object or, for `entries`, to one prefix. `read` returns what there is of the range."""

    def read(self, offset: int = 0, size: int = -1) -> bytes: ...
    def stat(self) -> Stat | None: ...
    def entries(self) -> Iterator[Entry]: ...
    def put(self, data: bytes, *, replace: bool) -> Put: ...
    def delete(self) -> None: ...
