"""Where the numbers lie in image files: sizes, lengths, counts, kinds. Only ever used on whole files."""

import struct
from collections.abc import Callable, Iterator, Mapping

from tests.fuzz.image_corpus import png_chunk
from tests.fuzz.mutation import Field

_PNG_SIGNATURE_BYTES = 8


def png_chunks(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Offset, kind and body of each chunk; stops where the lengths no longer fit."""
    at = _PNG_SIGNATURE_BYTES
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            return
        yield at, data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def with_png_checksums(data: bytes) -> bytes:
    """The file with every chunk's checksum made right, as far as chunks follow each other."""
    out, end = data[:_PNG_SIGNATURE_BYTES], _PNG_SIGNATURE_BYTES
    for at, kind, body in png_chunks(data):
        out += png_chunk(kind, body)
        end = at + 12 + len(body)
    return out + data[end:]


def _png(data: bytes) -> Iterator[Field]:
    for at, kind, body in png_chunks(data):
        yield Field(at, 4, "big")
        if kind == b"IHDR":
            yield from (Field(at + 8, 4, "big"), Field(at + 12, 4, "big"))
            yield from (Field(at + 16 + place, 1) for place in range(5))
        elif kind in (b"acTL", b"fcTL"):
            yield from (Field(at + 8 + place, 4, "big") for place in range(0, len(body) - 3, 4))
        elif body:
            yield Field(at + 8, 1)


def _jpeg(data: bytes) -> Iterator[Field]:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        kind, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        yield from (Field(at + 1, 1), Field(at + 2, 2, "big"))
        if 0xC0 <= kind <= 0xC2:
            yield from (Field(at + 5, 2, "big"), Field(at + 7, 2, "big"))
        yield from (Field(at + 4 + place, 1) for place in range(min(size - 2, 20)))
        at += 2 + size
        if kind == 0xDA:
            at = _next_marker(data, at)


def _next_marker(data: bytes, at: int) -> int:
    """The end of a scan: the next marker that is neither a stuffed zero nor a restart."""
    while at < len(data) - 1 and not (data[at] == 0xFF and data[at + 1] and not 0xD0 <= data[at + 1] <= 0xD7):
        at += 1
    return at


def _webp(data: bytes) -> Iterator[Field]:
    yield Field(4, 4)
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        yield Field(at + 4, 4)
        body = at + 8
        if kind == b"VP8 ":
            yield from (Field(body, 3), Field(body + 6, 2), Field(body + 8, 2))
        elif kind == b"VP8L":
            yield from (Field(body, 1), Field(body + 1, 4))
        elif kind in (b"VP8X", b"ANMF"):
            yield from (Field(body + place, 3) for place in range(0, min(size, 16) - 2))
        at = body + (16 if kind == b"ANMF" else size + size % 2)


def _gif(data: bytes) -> Iterator[Field]:
    yield from (Field(6, 2), Field(8, 2), Field(10, 1))
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while data[at : at + 1] in (b"!", b","):
        if data[at] == ord(","):
            yield from (Field(at + place, 2) for place in (1, 3, 5, 7))
            yield Field(at + 9, 1)
            at += 10 + (3 << (data[at + 9] & 7) + 1 if data[at + 9] & 0x80 else 0)
            yield Field(at, 1)
            at += 1
        else:
            yield from (Field(at + place, 1) for place in (1, 3, 6))
            at += 2
        while data[at]:
            yield Field(at, 1)
            at += 1 + data[at]
        at += 1


def _bmp(_: bytes) -> Iterator[Field]:
    for offset, size in ((2, 4), (10, 4), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2), (30, 4), (34, 4), (46, 4)):
        yield Field(offset, size)


def _tiff(data: bytes) -> Iterator[Field]:
    mark, order = ("<", "little") if data[:2] == b"II" else (">", "big")
    big = data[2:4] in (b"+\0", b"\0+")
    word, pointer, entry = (8, "Q", 20) if big else (2, "I", 12)
    at = 8 if big else 4
    width = struct.calcsize(pointer)
    yield Field(at, width, order)
    start = struct.unpack_from(mark + pointer, data, at)[0]
    while start:
        yield Field(start, word, order)
        count = int.from_bytes(data[start : start + word], "little" if mark == "<" else "big")
        for at in range(start + word, start + word + count * entry, entry):
            yield from (Field(at, 2, order), Field(at + 2, 2, order), Field(at + 4, width, order))
            yield from (Field(at + 4 + width, width, order), Field(at + 4 + width, 2, order))
        end = start + word + count * entry
        yield Field(end, width, order)
        start = struct.unpack_from(mark + pointer, data, end)[0]


def _ppm(data: bytes) -> Iterator[Field]:
    """The digits of the header as numbers of one byte: a hostile number is then no digit, or another."""
    yield from (Field(place, 1) for place in range(min(len(data), 16)))


_FIELDS: Mapping[str, Callable[[bytes], Iterator[Field]]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
    "PPM": _ppm,
}


def fields(image_format: str, data: bytes) -> tuple[Field, ...]:
    """The numbers of a whole file."""
    return tuple(_FIELDS[image_format](data))
