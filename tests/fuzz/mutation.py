"""Seeded damage to bytes of any kind: each function takes a generator and returns other bytes."""

import dataclasses
import random
from collections.abc import Callable, Mapping

HOSTILE = (0, 1, 2, 3, 4, 7, 8, 16, 60_000, 2**15, 2**16 - 1, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
"""Numbers that break what computes with lengths."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A number in a file: where it lies and how it is written."""

    offset: int
    size_bytes: int
    order: str = "little"


def flip(rng: random.Random, data: bytes) -> bytes:
    """One bit is another."""
    return flipped(data, rng.randrange(8 * len(data)))


def flipped(data: bytes, bit: int) -> bytes:
    """The bytes with a bit, counted from the first byte on, inverted."""
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def flip_many(rng: random.Random, data: bytes) -> bytes:
    """Two to sixty-four bits are others, in half the cases all of them among the first 100 bytes."""
    end = min(len(data), 100) if rng.random() < 0.5 else len(data)
    for _ in range(2 ** rng.randint(1, 6)):
        data = flipped(data, rng.randrange(8 * end))
    return data


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """A run of bytes is random, zero or 255."""
    start, stop = run_of(rng, data)
    fill = rng.choice((rng.randbytes(stop - start), bytes(stop - start), b"\xff" * (stop - start)))
    return data[:start] + fill + data[stop:]


def cut(rng: random.Random, data: bytes) -> bytes:
    """The end is missing, in a quarter of the cases one of the last 64 bytes only."""
    low = max(0, len(data) - 64) if rng.random() < 0.25 else 0
    return data[: rng.randrange(low, len(data))]


def remove(rng: random.Random, data: bytes) -> bytes:
    """A run of bytes is missing."""
    start, stop = run_of(rng, data)
    return data[:start] + data[stop:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """A run of bytes comes twice."""
    start, stop = run_of(rng, data)
    return data[:stop] + data[start:]


def swap(rng: random.Random, data: bytes) -> bytes:
    """Two neighbouring runs of bytes have changed places."""
    start, middle, stop = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:start] + data[middle:stop] + data[start:middle] + data[stop:]


def run_of(rng: random.Random, data: bytes) -> tuple[int, int]:
    """Start and stop of a run of 1 … 256 bytes, short runs as likely as long ones."""
    length = min(len(data), rng.randint(1, 2 ** rng.randint(0, 8)))
    start = rng.randrange(len(data) - length + 1)
    return start, start + length


def splice(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """The head of one file and the tail of another."""
    return data[: rng.randint(1, len(data))] + donor[rng.randrange(len(donor)) :]


def insert(rng: random.Random, data: bytes, donor: bytes) -> bytes:
    """A run of another file in the middle of this one."""
    start, stop = run_of(rng, donor)
    place = rng.randint(1, len(data))
    return data[:place] + donor[start:stop] + data[place:]


def hostile_number(rng: random.Random, data: bytes, field: Field) -> bytes:
    """The number of a field is a huge, small or nearly right one."""
    stop = field.offset + field.size_bytes
    order = "little" if field.order == "little" else "big"
    now = int.from_bytes(data[field.offset : stop], order)
    near = (now - 1, now + 1, 2 * now, now // 2, now ^ 0x80, rng.getrandbits(8 * field.size_bytes))
    value = rng.choice((rng.choice(HOSTILE), rng.choice(near))) % 256**field.size_bytes
    return data[: field.offset] + value.to_bytes(field.size_bytes, order) + data[stop:]


ANYWHERE: Mapping[str, Callable[[random.Random, bytes], bytes]] = {
    "flip": flip,
    "flip-many": flip_many,
    "overwrite": overwrite,
    "cut": cut,
    "remove": remove,
    "repeat": repeat,
    "swap": swap,
}
WITH_DONOR: Mapping[str, Callable[[random.Random, bytes, bytes], bytes]] = {"splice": splice, "insert": insert}
