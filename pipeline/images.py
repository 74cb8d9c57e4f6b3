"""Bytes <-> pixels: decode, resize, encode.

Pixels are uint8 [height, width, channels], channels 1 (grey) or 3 (RGB).
"""

import dataclasses
import functools
import io
import struct
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from pipeline import pillow, png
from pipeline.errors import InputError

Pixels = NDArray[np.uint8]
Fit = Literal["crop", "pad"]
ImageFormat = Literal["png", "jpeg", "webp"]

EXTENSIONS: Mapping[str, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
MAX_PIXELS = pillow.MAX_PIXELS
FORMATS = pillow.FORMATS

_MAX_PASSES, _MIN_SCAN_BYTES = 16, 10
_BAD_DATA = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Warning,
)


class ImageError(InputError):
    """Bytes that are no whole image of a known format, or one that is too large."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """An image, and what had to be converted on the way."""

    pixels: Pixels
    """uint8 [height, width, channels], upright."""
    converted: frozenset[str]
    """Of: exif, cmyk, palette, alpha, 16bit, animation."""


def decode(data: bytes, *, channels: int, buffer: Pixels | None = None) -> Decoded:
    """An image file's pixels, upright, 8 bits, alpha on white, first frame; channels 1 or 3.

    Grey is ITU-R 601 luma. A JPEG of the buffer's shape may be decoded in it, and then is the buffer. Raises ImageError
    for what is corrupt, cut, of another format than FORMATS, or larger than MAX_PIXELS (read from the header before
    anything is decoded). Of an animation, what lies behind the first frame is not looked at.
    """
    assert channels in (1, 3)
    try:
        if data[:3] == b"\xff\xd8\xff":
            fast = _decode_jpeg(data, channels, buffer)
            if fast is not None:
                return fast
        if (shape := png.shape(data)) and shape[2] == channels:
            pillow.check_size(shape[1], shape[0])
            if (pixels := png.decode(data, shape)) is not None:
                return Decoded(pixels, frozenset())
        return Decoded(*pillow.decode(data, channels))
    except UnidentifiedImageError as error:  # its own text holds a memory address, and logs must not vary
        raise ImageError(f"cannot decode: no whole image of a known format ({', '.join(FORMATS)})") from error
    except _BAD_DATA as error:
        raise ImageError(f"cannot decode: {' '.join(str(error).split()) or type(error).__name__}") from error


def decode_plain(files: Sequence[bytes | memoryview], out: Pixels) -> Sequence[int]:
    """Decode those files into `out`, uint8 [n, R, R, C], that are PNGs of this shape as `encode` writes them: together,
    which takes half the time. Returns the places of all others, for `decode_into`; their pixels may be anything.
    """
    if not png.shape(files[0]):  # one look for all: a dataset holds files of one kind
        return range(len(files))
    return png.decode_batch(files, out)


def decode_all(files: Sequence[bytes], channels: int) -> list[Pixels]:
    """The pixels of each file, as `decode` gives them; fast where all are PNGs of one shape as `encode` writes them."""
    shape = png.shape(files[0]) if files else None
    if shape is None or shape[2] != channels:
        return [decode(file, channels=channels).pixels for file in files]
    pillow.check_size(shape[1], shape[0])
    out = np.empty((len(files), *shape), np.uint8)
    found = list(out)
    for place in png.decode_batch(files, out):
        found[place] = decode(files[place], channels=channels).pixels
    return found


def decode_into(data: bytes, out: Pixels) -> None:
    """Decode an image into `out`, uint8 [R, R, C], the largest centred square scaled where its size is another.

    Raises ImageError as `decode` does; `out` may then hold anything.
    """
    pixels = decode(data, channels=out.shape[2], buffer=out).pixels
    if pixels is not out:
        out[:] = resize(pixels, out.shape[0], "crop")


def _decode_jpeg(data: bytes, channels: int, buffer: Pixels | None) -> Decoded | None:
    """The fast path; None for the colour spaces that libjpeg-turbo does not turn into RGB."""
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    pillow.check_size(width, height)
    _check_scans(data, width * height)
    if colorspace not in ("YCbCr", "Gray", "GRAY"):
        # Pillow decodes these, and fills in what is damaged without a word; this decoder is strict.
        simplejpeg.decode_jpeg(data, colorspace="CMYK" if colorspace in ("CMYK", "YCCK") else "RGB")
        return None
    head, orientation = _jpeg_head(data), 1
    if b"Exif\0\0" in head or b":Orientation" in head:  # the second: XMP
        orientation = pillow.orientation(data)
    space = "GRAY" if channels == 1 else "RGB"
    if buffer is not None and buffer.shape == (height, width, channels) and orientation == 1:
        simplejpeg.decode_jpeg(data, colorspace=space, buffer=buffer)
        return Decoded(buffer, frozenset())
    pixels = simplejpeg.decode_jpeg(data, colorspace=space)
    upright = pillow.upright(pixels.reshape(height, width, channels), orientation)
    return Decoded(upright, frozenset({"exif"} if orientation != 1 else ()))


def _jpeg_head(data: bytes) -> bytes:
    """What lies before the first scan, or all where that is not plain: searching 20 KB takes longer than walking."""
    at = 2
    while data[at : at + 1] == b"\xff" and len(data) > at + 4:
        if data[at + 1] == 0xDA:
            return data[:at]
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return data


def _check_scans(data: bytes, pixels: int) -> None:
    """Refuse a progressive JPEG with so many scans that they take longer than the largest image: each may have ten
    bytes, and takes a pass over all pixels.
    """
    most = _MAX_PASSES * MAX_PIXELS // pixels
    if len(data) > most * _MIN_SCAN_BYTES and data.count(b"\xff\xda") > most:
        raise ValueError(f"more than {most} scans in a JPEG of {pixels} pixels")


def resize(pixels: Pixels, resolution: int, fit: Fit) -> Pixels:
    """Pixels at resolution²; what has that size already is returned as it is.

    `crop`: the largest centred square, scaled. `pad`: the whole image, scaled down to fit but never up, centred on
    black, so that small pictures stay exact. Scaling is Lanczos whose support grows with the factor: down-scaling is
    low-pass filtered, so it does not alias, and is sharper than a box.
    """
    height, width, channels = pixels.shape
    if height == width == resolution:
        return pixels
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _scaled(pixels[top : top + side, left : left + side], resolution, resolution)
    longest = max(height, width, resolution)
    rows, columns = (max(1, round(length * resolution / longest)) for length in (height, width))
    out = np.zeros((resolution, resolution, channels), dtype=np.uint8)
    top, left = (resolution - rows) // 2, (resolution - columns) // 2
    out[top : top + rows, left : left + columns] = _scaled(pixels, rows, columns)
    return out


def _scaled(pixels: Pixels, rows: int, columns: int) -> Pixels:
    height, width, channels = pixels.shape
    if (height, width) == (rows, columns):
        return np.ascontiguousarray(pixels)
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if channels == 1 else pixels))
    scaled = image.resize((columns, rows), Image.Resampling.LANCZOS)
    return np.asarray(scaled).reshape(rows, columns, channels)


def encode(pixels: Pixels, image_format: ImageFormat, quality: int) -> bytes:
    """An image file's bytes; the same pixels give the same bytes with the same `encoder`.

    Quality is 1 … 100; PNG has none.
    """
    if image_format == "png":
        return png.encode(pixels)
    if image_format == "jpeg":
        grey = pixels.shape[2] == 1
        subsampling = "Gray" if grey else "444" if quality >= 90 else "420"
        space = "GRAY" if grey else "RGB"
        coded: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels), quality=quality, colorspace=space, colorsubsampling=subsampling
        )
        return coded
    sink = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(sink, "WEBP", quality=quality)
    return sink.getvalue()


@functools.cache
def encoder(image_format: ImageFormat) -> str:
    """Name and version of what `encode` uses: a plan holds it, since the bytes depend on it."""
    if image_format == "png":
        return f"png-up zlib-ng {version('zlib-ng')} level 1 runs"
    if image_format == "jpeg":
        return f"simplejpeg {version('simplejpeg')}"
    return f"pillow {version('pillow')} libwebp {features.version('webp')}"
