"""Counter-based randomness: Philox4x32-10 words, and normals, integers and permutations made of them.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). It is ours, and golden-tested, so that no
library upgrade moves the order of the data or the noise of a sample. A value depends on (key, index, word) only:
never on how many values are asked for together.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Key(NamedTuple):
    """A 64-bit Philox key as two 32-bit words."""

    k0: int
    k1: int


def stream_key(seed: int, purpose: str, *ids: int) -> Key:
    """The key of one named stream: (seed, purpose, ids) hashed, so that streams never share words."""
    text = "/".join([str(seed), purpose, *map(str, ids)])
    digest = hashlib.sha256(text.encode()).digest()
    return Key(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))


def philox4x32(key: Key, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds over 32-bit counters held in uint64: [n, 4] → [n, 4]."""
    x0, x1, x2, x3 = (counters[:, i].copy() for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (
            (p1 >> _SHIFT) ^ x1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ x3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=1)


def words(key: Key, index: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """`count` words in [0, 2**32) for each index: [n] → [n, count]."""
    blocks = -(-count // 4)
    wide = np.asarray(index, dtype=np.uint64)
    counters = np.empty((len(wide), blocks, 4), dtype=np.uint64)
    counters[:, :, 0] = np.arange(blocks, dtype=np.uint64)
    counters[:, :, 1] = 0
    counters[:, :, 2] = (wide & _LOW)[:, None]
    counters[:, :, 3] = (wide >> _SHIFT)[:, None]
    return philox4x32(key, counters.reshape(-1, 4)).reshape(len(wide), -1)[:, :count]


def normals(key: Key, index: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """`count` standard normals for each index, float32 [n, count].

    Box and Muller in float64, rounded once to float32, so that a last-bit difference between two libraries' log or
    cos almost never survives.
    """
    pairs = -(-count // 2)
    raw = words(key, index, 2 * pairs).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((raw[:, 0::2] + 1.0) / 2.0**32))
    angle = raw[:, 1::2] * (2.0 * np.pi / 2.0**32)
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
    return both.reshape(len(raw), -1)[:, :count].astype(np.float32)


def uniforms(key: Key, index: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """`count` numbers in (0, 1) for each index, float32 [n, count]: odd multiples of 2**-24, so never 0 or 1."""
    return ((words(key, index, count) >> np.uint64(9)) * 2 + 1).astype(np.float32) * np.float32(2.0**-24)


def signs(key: Key, index: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """`count` times -1 or 1 for each index, float32 [n, count]: a bit each, lowest first."""
    raw = words(key, index, -(-count // 32)).astype("<u4")
    bits = np.unpackbits(raw.view(np.uint8), axis=1, bitorder="little")[:, :count]
    return bits.astype(np.float32) * 2 - 1


def integers(key: Key, index: NDArray[np.int64], bound: int) -> NDArray[np.int64]:
    """One integer in [0, bound) for each index, bound ≤ 2**31; the bias is below bound / 2**32."""
    assert 0 < bound <= 2**31
    return ((words(key, index, 1)[:, 0] * np.uint64(bound)) >> _SHIFT).astype(np.int64)


def below(key: Key, bound: int) -> int:
    """One integer in [0, bound) from 64 bits of the stream's first block."""
    first = words(key, np.zeros(1, dtype=np.int64), 2)[0]
    return ((int(first[0]) | int(first[1]) << 32) * bound) >> 64


def permutation(key: Key, size: int) -> NDArray[np.int64]:
    """A permutation of range(size): the order of 64-bit words, ties by index."""
    pair = words(key, np.arange(size, dtype=np.int64), 2)
    return np.argsort(pair[:, 0] | (pair[:, 1] << _SHIFT), kind="stable").astype(np.int64)
