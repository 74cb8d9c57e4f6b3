"""Files of a few kilobytes or megabytes that show the largest image allowed: what they may cost at most."""

import dataclasses
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import images
from pipeline.images import ImageError
from tests.fuzz.image_corpus import png_chunk, saved
from tests.fuzz.pool import Outcome

SIDE = 8192
_SLOW_SIDE = 1448  # of those that Pillow decodes in Python
assert SIDE**2 == images.MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class Case:
    """A large image's file."""

    name: str
    data: bytes


def _png(bits: int, colour_type: int, *, interlaced: bool = False) -> bytes:
    """Zeros, deflated row by row so that making them takes little memory."""
    row = 1 + SIDE * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type] // 8
    pack, rows = zlib.compressobj(1), SIDE * 17 // 8 if interlaced else SIDE  # Adam7 has more rows, shorter ones
    body = b"".join(pack.compress(bytes(row)) for _ in range(rows)) + pack.flush()
    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour_type, 0, 0, int(interlaced))
    palette = [(b"PLTE", bytes(range(255, -1, -1)) * 3), (b"tRNS", b"\x80")] if colour_type == 3 else []
    chunks = [(b"IHDR", header), *palette, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def _by_pillow(mode: str, image_format: str, **options: Any) -> bytes:
    return saved(Image.new(mode, (SIDE, SIDE)), image_format, **options)


def _many_scans() -> bytes:
    """A progressive JPEG whose last scan comes a thousand times: each costs a pass over all pixels."""
    data = saved(Image.new("L", (SIDE, SIDE)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + data[-2:]


def _run_length_bmp(side: int) -> bytes:
    """Rows of one pixel each, which the decoder fills up."""
    rows = b"\1\7\0\0" * side + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    palette = b"".join(bytes([0, 0, value, 0]) for value in range(256))
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + palette + rows


def _turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _by_pillow("RGB", "JPEG", exif=exif)


def _ppm(head: bytes, sample: bytes, bands: int = 1, side: int = 0) -> bytes:
    """The largest that is decoded; or, of a side of one's choice, what a header of it could claim."""
    side = side or _SLOW_SIDE
    return head % (side, side) + sample * (_SLOW_SIDE**2 * bands)


MAKERS: Mapping[str, Callable[[], bytes]] = {
    "png-ours": lambda: images.encode(np.zeros((SIDE, SIDE, 3), np.uint8), "png", 100),
    "png-1": lambda: _png(1, 0),
    "png-palette-alpha": lambda: _png(8, 3),
    "png-rgba": lambda: _png(8, 6),
    "png-16-grey": lambda: _png(16, 0),
    "png-16-rgb": lambda: _png(16, 2),
    "png-16-la": lambda: _png(16, 4),
    "png-16-rgba": lambda: _png(16, 6),
    "png-interlaced": lambda: _png(8, 2, interlaced=True),
    "jpeg": lambda: _by_pillow("RGB", "JPEG"),
    "jpeg-exif": _turned_jpeg,
    "jpeg-progressive": lambda: _by_pillow("RGB", "JPEG", progressive=True),
    "jpeg-cmyk": lambda: _by_pillow("CMYK", "JPEG"),
    "jpeg-many-scans": _many_scans,
    "gif": lambda: _by_pillow("L", "GIF"),
    "webp-lossless": lambda: _by_pillow("RGB", "WEBP", lossless=True, quality=0, method=0),
    "bmp-run-length": lambda: _run_length_bmp(_SLOW_SIDE),
    "bmp-run-length-too-large": lambda: _run_length_bmp(SIDE),
    "tiff-deflate": lambda: _by_pillow("RGBA", "TIFF", compression="tiff_adobe_deflate"),
    "tiff-lzw": lambda: _by_pillow("RGB", "TIFF", compression="tiff_lzw"),
    "tiff-group4": lambda: _by_pillow("1", "TIFF", compression="group4"),
    "tiff-16": lambda: saved(Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)), "TIFF", compression="tiff_lzw"),
    "ppm-plain-bits": lambda: _ppm(b"P1 %d %d ", b"1"),
    "ppm-plain-grey": lambda: _ppm(b"P2 %d %d 255 ", b"1 "),
    "ppm-raw-odd": lambda: _ppm(b"P6 %d %d 254 ", b"\0", 3),
    "ppm-raw-odd-too-large": lambda: _ppm(b"P6 %d %d 254 ", b"\0", 3, SIDE),
}


def make(_: int, number: int) -> Case:
    """The file of a number, 0 … len(MAKERS) − 1."""
    name = sorted(MAKERS)[number]
    return Case(name, MAKERS[name]())


def check(case: Case) -> Outcome:
    """What the pool calls; its bounds on time and memory are what is tested."""
    if case.name.endswith(("too-large", "many-scans")):
        with pytest.raises(ImageError, match=r"allowed in such a file|scans in a JPEG"):
            images.decode(case.data, channels=3)
        return Outcome(f"{case.name} {len(case.data)} bytes", "refused")
    pixels = images.decode(case.data, channels=3).pixels
    assert pixels.shape[2] == 3
    return Outcome(f"{case.name} {len(case.data)} bytes", "accepted")
