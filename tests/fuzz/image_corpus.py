"""Small real files of every format and mode that `images.decode` reads, made when asked for.

Pillow writes most of them; what it cannot write (16-bit colour, interlaced PNG, run-length BMP, tiled and planar TIFF,
plain PPM) is written here.
"""

import dataclasses
import functools
import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import images

_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_TIFF_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "zstd", "lzma")


@dataclasses.dataclass(frozen=True)
class File:
    """A whole, valid image file."""

    name: str
    """What it is, e.g. "png-interlaced"; unique in the corpus."""
    image_format: str
    """As in `images.FORMATS`."""
    data: bytes


def smooth(height: int, width: int, seed: int = 0) -> images.Pixels:
    """A colour picture that compresses about as photographs do."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    grain = np.random.default_rng(seed).integers(0, 12, (height, width, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height))) // 2 + grain


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    """The file that Pillow writes."""
    sink = io.BytesIO()
    image.save(sink, image_format, **options)
    return sink.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: NDArray[np.generic], colour_type: int, *, interlaced: bool = False) -> bytes:
    """A PNG of uint8 or uint16 [H, W, bands] with filter None."""
    height, width = values.shape[:2]
    bits = 8 * values.dtype.itemsize
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, int(interlaced))
    passes = [values[top::down, left::right] for top, left, down, right in _ADAM7] if interlaced else [values]
    order = values.dtype.newbyteorder(">")
    rows = b"".join(b"\0" + row.astype(order).tobytes() for one in passes if one.size for row in one)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def tiff(
    values: NDArray[np.generic],
    *,
    tile: int = 0,
    planar: bool = False,
    order: str = "<",
    changed: Mapping[int, tuple[int, list[int]]] = MappingProxyType({}),
) -> bytes:
    """An uncompressed TIFF of uint8 or uint16 [H, W, bands]: one strip or square tiles, bands together or apart.

    `changed` are directory entries that say something else: tag → (type, values).
    """
    height, width, bands = values.shape
    ordered = values.astype(values.dtype.newbyteorder(order))
    planes = np.split(ordered, bands, axis=2) if planar else [ordered]
    pieces = [piece for plane in planes for piece in _pieces(plane, tile)]
    sizes = [len(piece) for piece in pieces]
    offsets = [8 + sum(sizes[:number]) for number in range(len(sizes))]
    entries = {256: (4, [width]), 257: (4, [height]), 258: (3, [8 * values.dtype.itemsize] * bands), 259: (3, [1])}
    entries |= {262: (3, [2 if bands >= 3 else 1]), 277: (3, [bands]), 284: (3, [1 + planar])}
    if tile:
        entries |= {322: (4, [tile]), 323: (4, [tile]), 324: (4, offsets), 325: (4, sizes)}
    else:
        entries |= {273: (4, offsets), 278: (4, [height]), 279: (4, sizes)}
    entries |= changed
    body = b"".join(pieces)
    body += bytes(len(body) % 2)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(body))
    return head + body + _directory(entries, 8 + len(body), order)


def _pieces(plane: NDArray[np.generic], tile: int) -> Iterator[bytes]:
    """The strip, or the tiles filled up with zeros."""
    height, width, bands = plane.shape
    if not tile:
        yield plane.tobytes()
        return
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            piece = np.zeros((tile, tile, bands), plane.dtype)
            part = plane[top : top + tile, left : left + tile]
            piece[: part.shape[0], : part.shape[1]] = part
            yield piece.tobytes()


def _directory(entries: dict[int, tuple[int, list[int]]], start: int, order: str) -> bytes:
    """A TIFF directory: tag → (type, values); 3 is SHORT, 4 is LONG."""
    place = start + 2 + 12 * len(entries) + 4
    table, beyond = struct.pack(f"{order}H", len(entries)), b""
    for tag in sorted(entries):
        kind, values = entries[tag]
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        table += struct.pack(f"{order}HHI", tag, kind, len(values))
        if len(packed) > 4:
            table += struct.pack(f"{order}I", place + len(beyond))
            beyond += packed + bytes(len(packed) % 2)
        else:
            table += packed.ljust(4, b"\0")
    return table + bytes(4) + beyond


def twelve_bit_tiff(values: NDArray[np.uint16]) -> bytes:
    """A grey TIFF of values below 4096, two in three bytes; an even width."""
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2).astype(np.uint8)
    return tiff(packed.reshape(len(values), -1, 1), changed={256: (4, [values.shape[1]]), 258: (3, [12])})


def bitfield_bmp(values: NDArray[np.uint16]) -> bytes:
    """A BMP of 16-bit pixels [H, W]: 5 bits of red, 6 of green, 5 of blue; an even width."""
    height, width = values.shape
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 3, values.nbytes, 0, 0, 0, 0)
    head += struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    start = 14 + len(head)
    return (
        b"BM" + struct.pack("<IHHI", start + values.nbytes, 0, 0, start) + head + values[::-1].astype("<u2").tobytes()
    )


def run_length_bmp(indices: images.Pixels) -> bytes:
    """An 8-bit BMP with run-length coding; indices [H, W] into a palette of reds."""
    height, width = indices.shape
    rows = b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in indices[::-1].tolist())
    rows += b"\0\1"
    palette = b"".join(bytes([0, 0, value, 0]) for value in range(256))
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + head + palette + rows


def _pngs() -> Iterator[tuple[str, bytes]]:
    pixels = smooth(30, 41)
    picture = Image.fromarray(pixels)
    yield "ours-rgb", images.encode(pixels, "png", 100)
    yield "ours-grey", images.encode(pixels[:, :, :1], "png", 100)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"pillow-{mode}", saved(picture.convert(mode), "PNG")
    indexed = picture.quantize(16)
    yield "trns-palette", saved(indexed, "PNG", transparency=indexed.getpixel((0, 0)))
    yield "trns-grey", saved(picture.convert("L"), "PNG", transparency=40)
    yield "trns-rgb", saved(picture, "PNG", transparency=(40, 40, 40))
    wide = pixels.astype(np.uint16) * 257
    yield "16-grey", saved(Image.fromarray(wide[:, :, 0]), "PNG")
    yield "16-rgb", png(wide, 2)
    yield "16-la", png(wide[:, :, :2], 4)
    yield "16-rgba", png(np.concatenate([wide, wide[:, :, :1]], axis=2), 6)
    yield "interlaced-rgb", png(pixels, 2, interlaced=True)
    yield "interlaced-16", png(wide[:, :, :1], 0, interlaced=True)
    yield "apng", saved(picture, "PNG", save_all=True, append_images=[picture.rotate(90 * n) for n in (1, 2)])
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "exif-6", saved(picture, "PNG", exif=exif)
    yield "many-idat", _in_many_chunks(saved(Image.fromarray(smooth(90, 120)), "PNG"))


def _in_many_chunks(data: bytes) -> bytes:
    """The same PNG with its IDAT in chunks of 1000 bytes."""
    start = data.index(b"IDAT") - 4
    size = int.from_bytes(data[start : start + 4], "big")
    body = data[start + 8 : start + 8 + size]
    parts = [png_chunk(b"IDAT", body[at : at + 1000]) for at in range(0, size, 1000)]
    return data[:start] + b"".join(parts) + data[start + 12 + size :]


def _jpegs() -> Iterator[tuple[str, bytes]]:
    pixels = smooth(60, 83)
    picture = Image.fromarray(pixels)
    yield "ours-rgb", images.encode(pixels, "jpeg", 92)
    yield "ours-420", images.encode(pixels, "jpeg", 75)
    yield "ours-grey", images.encode(pixels[:, :, :1], "jpeg", 92)
    yield "progressive", saved(picture, "JPEG", progressive=True)
    yield "progressive-grey", saved(picture.convert("L"), "JPEG", progressive=True)
    yield "restarts", saved(picture, "JPEG", restart_marker_rows=1)
    yield "cmyk", saved(picture.convert("CMYK"), "JPEG")
    yield "cmyk-progressive", saved(picture.convert("CMYK"), "JPEG", progressive=True)
    yield "rgb", saved(picture, "JPEG", keep_rgb=True)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"exif-{orientation}", saved(picture, "JPEG", exif=exif)
    yield "comment", saved(picture, "JPEG", comment=b"a \xff\xd9 comment", dpi=(72, 72))


def _webps() -> Iterator[tuple[str, bytes]]:
    picture = Image.fromarray(smooth(40, 55))
    others = [picture.rotate(90 * n) for n in (1, 2)]
    alpha = picture.convert("RGBA")
    alpha.putalpha(picture.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "lossy", saved(picture, "WEBP", quality=80)
    yield "lossless", saved(picture, "WEBP", lossless=True)
    yield "lossy-alpha", saved(alpha, "WEBP", quality=80)
    yield "lossless-alpha", saved(alpha, "WEBP", lossless=True)
    yield "animated", saved(picture, "WEBP", save_all=True, append_images=others)
    yield "animated-lossless", saved(picture, "WEBP", save_all=True, append_images=others, lossless=True)
    yield "exif-6", saved(picture, "WEBP", exif=exif)


def _gifs() -> Iterator[tuple[str, bytes]]:
    picture = Image.fromarray(smooth(40, 55))
    others = [picture.rotate(90 * n) for n in (1, 2)]
    yield "colour", saved(picture, "GIF", interlace=0)
    yield "interlaced", saved(picture, "GIF", interlace=1)
    yield "grey", saved(picture.convert("L"), "GIF")
    yield "two-colours", saved(picture.convert("1"), "GIF")
    yield "transparent", saved(picture.quantize(32), "GIF", transparency=3)
    yield "animated", saved(picture, "GIF", save_all=True, append_images=others, disposal=2, comment=b"c" * 300)


def _bmps() -> Iterator[tuple[str, bytes]]:
    picture = Image.fromarray(smooth(20, 31))
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield mode.lower(), saved(picture.convert(mode), "BMP")
    yield "bitfields", bitfield_bmp(np.asarray(picture).astype(np.uint16)[:, :30, 0] * 257)
    yield "run-length", run_length_bmp(np.asarray(picture)[:, :, 0])


def _tiffs() -> Iterator[tuple[str, bytes]]:
    pixels = smooth(30, 41)
    picture = Image.fromarray(pixels)
    for compression in _TIFF_COMPRESSIONS:
        yield compression, saved(picture, "TIFF", compression=None if compression == "raw" else compression)
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield compression, saved(picture.convert("1"), "TIFF", compression=compression)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"):
        yield mode.lower(), saved(picture.convert(mode), "TIFF")
    yield "pages", saved(picture, "TIFF", save_all=True, append_images=[picture.rotate(180)], compression="tiff_lzw")
    wide = pixels.astype(np.uint16) * 257
    yield "16-grey", saved(Image.fromarray(wide[:, :, 0]), "TIFF")
    yield "16-grey-lzw", saved(Image.fromarray(wide[:, :, 0]), "TIFF", compression="tiff_lzw")
    yield "16-white-is-zero", tiff(~wide[:, :, :1], changed={262: (3, [0])})
    yield "12-grey", twelve_bit_tiff(wide[:, :40, 0] >> 4)
    yield "16-rgb", tiff(wide)
    yield "16-rgb-big-endian", tiff(wide, order=">")
    yield "planar", tiff(pixels, planar=True)
    yield "tiled", tiff(pixels, tile=16)
    yield "tiled-planar-big-endian", tiff(pixels, tile=16, planar=True, order=">")
    yield "big", saved(picture, "TIFF", big_tiff=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "exif-6", saved(picture, "TIFF", exif=exif)
    yield "strips", saved(Image.fromarray(smooth(90, 120)), "TIFF", compression="tiff_lzw", strip_size=2000)


def _ppms() -> Iterator[tuple[str, bytes]]:
    pixels = smooth(12, 17)
    picture = Image.fromarray(pixels)
    for mode in ("1", "L", "RGB"):
        yield f"raw-{mode.lower()}", saved(picture.convert(mode), "PPM")
    yield "raw-16", saved(Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257), "PPM")
    yield "raw-1023", b"P6 17 12 1023\n" + (pixels.astype(">u2") * 4).tobytes()
    yield "plain-bits", b"P1\n# c\n17 12\n" + _text(pixels[:, :, 0] & 1)
    yield "plain-grey", b"P2 17 12 255\n" + _text(pixels[:, :, 0])
    yield "plain-rgb", b"P3\n17 12\n255\n" + _text(pixels)


def _text(values: NDArray[np.uint8]) -> bytes:
    """Numbers as plain PPM has them, lines below 70 characters."""
    flat = values.reshape(-1, 17)
    return b"\n".join(b" ".join(b"%d" % value for value in line) for line in flat.tolist()) + b"\n"


@functools.cache
def files() -> tuple[File, ...]:
    """The corpus, in the same order with the same bytes at every call."""
    makers = {"PNG": _pngs, "JPEG": _jpegs, "WEBP": _webps, "GIF": _gifs, "BMP": _bmps, "TIFF": _tiffs, "PPM": _ppms}
    return tuple(
        File(f"{image_format.lower()}-{name}", image_format, data)
        for image_format, maker in makers.items()
        for name, data in maker()
    )
