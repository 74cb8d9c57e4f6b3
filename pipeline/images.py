"""Bytes <-> pixels: decode, resize, encode.

Pixels are uint8 [height, width, channels], channels 1 (grey) or 3 (RGB).
"""

import dataclasses
import functools
import io
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Literal, cast

import numpy as np
import simplejpeg
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from pipeline.errors import InputError

Pixels = NDArray[np.uint8]
Fit = Literal["crop", "pad"]
ImageFormat = Literal["png", "jpeg", "webp"]

EXTENSIONS: Mapping[str, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
MAX_PIXELS = 64 * 1024**2
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# On Up-filtered rows (garments at 32², textured colour at 256²) level 3 is no smaller and 8 to 26 % slower, and
# level 0 is 36 to 68 % larger.
_DEFLATE_LEVEL = 1
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_WIDE_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "CMYK")
# The rawmode that reads the other byte of each 16-bit value, by the last letter of the one that Pillow chose.
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_TO_BASE = {
    "1": "L",
    "P": "RGB",
    "PA": "RGBA",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "RGBX": "RGB",
    "RGBa": "RGBA",
    "La": "LA",
}
_BAD_DATA = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    cast(type[Exception], isal_zlib.error),
    Image.DecompressionBombError,
    Warning,
)
_warning_filters = threading.Lock()


class ImageError(InputError):
    """Bytes that are no whole image of a known format, or one that is too large."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """An image, and what had to be converted on the way."""

    pixels: Pixels
    """uint8 [height, width, channels], upright."""
    converted: frozenset[str]
    """Of: exif, cmyk, palette, alpha, 16bit, animation."""


def decode(data: bytes, *, channels: int) -> Decoded:
    """An image file's pixels, upright, 8 bits, alpha on white, first frame; channels 1 or 3.

    Grey is ITU-R 601 luma. Raises ImageError for what is corrupt, cut, of another format than FORMATS, or larger than
    MAX_PIXELS (read from the header before anything is decoded).
    """
    assert channels in (1, 3)
    try:
        if data[:3] == b"\xff\xd8\xff":
            fast = _decode_jpeg(data, channels)
            if fast is not None:
                return fast
        pixels = _decode_plain_png(data, channels)
        if pixels is not None:
            return Decoded(pixels, frozenset())
        with _warning_filters, warnings.catch_warnings():
            warnings.simplefilter("error")
            return _decode_any(data, channels)
    except UnidentifiedImageError as error:  # its own text holds a memory address, and logs must not vary
        raise ImageError(f"cannot decode: no whole image of a known format ({', '.join(FORMATS)})") from error
    except _BAD_DATA as error:
        raise ImageError(f"cannot decode: {' '.join(str(error).split()) or type(error).__name__}") from error


def _decode_jpeg(data: bytes, channels: int) -> Decoded | None:
    """The fast path; None for the colour spaces that libjpeg-turbo does not turn into RGB."""
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    if colorspace not in ("YCbCr", "Gray", "GRAY"):
        return None
    orientation = 1
    if b"Exif\0\0" in data or b":Orientation" in data:  # the second: XMP
        with _warning_filters, warnings.catch_warnings():
            warnings.simplefilter("error")
            orientation = _orientation(_open(data))
    pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY" if channels == 1 else "RGB")
    upright = _upright(pixels.reshape(height, width, channels), orientation)
    return Decoded(upright, frozenset({"exif"} if orientation != 1 else ()))


def _decode_plain_png(data: bytes, channels: int) -> Pixels | None:
    """The fast path for what `_encode_png` writes, five times Pillow's speed at 32²; None for every other PNG, and for
    one that is damaged.
    """
    if data[:16] != _PNG_SIGNATURE + b"\0\0\0\rIHDR" or data[24:29] != bytes([8, 2 * (channels == 3), 0, 0, 0]):
        return None
    width, height, idat_bytes = *struct.unpack(">II", data[16:24]), int.from_bytes(data[33:37], "big")
    body = data[41 : 41 + idat_bytes]
    chunks = ((b"IHDR", data[16:29]), (b"IDAT", body), (b"IEND", b""))
    if len(data) != 57 + idat_bytes or data[8:] != b"".join(_png_chunk(*chunk) for chunk in chunks):
        return None
    _check_size(width, height)
    row_bytes = 1 + width * channels
    raw = isal_zlib.decompressobj().decompress(body, max_length=height * row_bytes + 1)
    if len(raw) != height * row_bytes:
        return None
    rows = np.frombuffer(raw, np.uint8).reshape(height, row_bytes)
    if (rows[:, 0] != 2).any():
        return None
    return np.add.accumulate(rows[:, 1:], axis=0, dtype=np.uint8).reshape(height, width, channels)


def _decode_any(data: bytes, channels: int) -> Decoded:
    """Every format and mode, by Pillow."""
    image: Image.Image
    image = opened = _open(data)
    # Before load(), which empties the list; getexif() of a PNG loads.
    rawmodes = [_rawmode(tile) for tile in opened.tile]
    orientation = _orientation(image)
    converted = {"exif"} if orientation != 1 else set()
    if image.format != "JPEG" and getattr(image, "is_animated", False):
        converted.add("animation")
    image.load()
    if image.mode == "CMYK":
        converted.add("cmyk")
    if image.mode in ("P", "PA"):
        converted.add("palette")
    if any(";16" in rawmode for rawmode in rawmodes) or image.mode.startswith("I"):
        converted.add("16bit")
        image = _eight_bits(data, image, rawmodes)
    base = _base_mode(image)
    if base.mode in ("LA", "RGBA"):
        converted.add("alpha")
        base = _on_white(base)
    flat = base.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(flat).reshape(flat.height, flat.width, channels)
    # Pillow turns a TIFF upright itself when it loads one.
    return Decoded(_upright(pixels, 1 if image.format == "TIFF" else orientation), frozenset(converted))


def _open(data: bytes) -> ImageFile.ImageFile:
    """Pillow's lazy image: the header is read, nothing is decoded."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.width, image.height)
    return image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels are more than the {MAX_PIXELS} allowed")
    if width < 1 or height < 1:
        raise ValueError(f"no pixels ({width}×{height})")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or it is none of the eight."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation: 2 3 4 mirror and turn, 5 … 8 swap the axes as well."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _rawmode(tile: object) -> str:
    """How the bytes of a Pillow tile are packed, e.g. RGB;16B; empty where the plugin does not say."""
    args = getattr(tile, "args", None)
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _eight_bits(data: bytes, image: Image.Image, rawmodes: list[str]) -> Image.Image:
    """A 16-bit image scaled to 8 bits, value · 255 / 65535 rounded.

    Pillow keeps 16 bits for grey only; of colours it drops the lower byte, which is therefore read by a second pass.
    """
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        if image.mode == "I" and image.format != "PPM":
            raise ValueError("32-bit pixels have no known range")
        values = np.asarray(image).astype(np.uint32)[:, :, None]
        mode = "L"
    elif rawmodes[0] == "LA;16B":
        values = _joined(np.asarray(_reopened(data, {"LA;16B": "RGBA"})), [0, 2], [1, 3])
        mode = "LA"
    elif image.mode in _WIDE_MODES and image.format != "PPM":
        low = np.asarray(_reopened(data, {raw: raw[:-1] + _OTHER_BYTE[raw[-1]] for raw in rawmodes}))
        bands = low.shape[2]
        pair = np.concatenate([np.asarray(image), low], axis=2)
        values = _joined(pair, list(range(bands)), list(range(bands, 2 * bands)))
        mode = image.mode
    else:
        raise ValueError(f"16-bit mode {image.mode} is not supported")
    scaled = ((values * 255 + 32767) // 65535).astype(np.uint8)
    if transparent is not None and mode in ("L", "RGB"):
        opaque = (values != np.atleast_1d(np.asarray(transparent))).any(axis=2, keepdims=True)
        scaled = np.concatenate([scaled, (opaque * 255).astype(np.uint8)], axis=2)
        mode += "A"
    eight = Image.frombytes(mode, image.size, np.ascontiguousarray(scaled).tobytes())
    eight.format = image.format
    return eight


def _joined(data: Pixels, high: list[int], low: list[int]) -> NDArray[np.uint32]:
    """16-bit values from the bands that hold their bytes."""
    return data[:, :, high].astype(np.uint32) << np.uint32(8) | data[:, :, low]


def _reopened(data: bytes, rawmodes: Mapping[str, str]) -> Image.Image:
    """The image decoded once more, its bytes read as other rawmodes."""
    image = _open(data)
    for number, tile in enumerate(image.tile):
        changed = rawmodes[_rawmode(tile)]
        args = (changed, *tile.args[1:]) if isinstance(tile.args, tuple) else changed
        image.tile[number] = tile._replace(args=args)
    image.load()
    return image


def _base_mode(image: Image.Image) -> Image.Image:
    """Any 8-bit mode → L, LA, RGB or RGBA."""
    transparent = "transparency" in image.info
    mode = _TO_BASE.get(image.mode, image.mode)
    if transparent and mode in ("L", "RGB"):
        mode += "A"
    if mode not in ("L", "LA", "RGB", "RGBA"):
        raise ValueError(f"pixel mode {image.mode} is not supported")
    return image if mode == image.mode else image.convert(mode)


def _on_white(image: Image.Image) -> Image.Image:
    """LA or RGBA → L or RGB over white."""
    opaque = image.mode[:-1]
    white = Image.new(opaque, image.size, "white")
    white.paste(image.convert(opaque), mask=image.getchannel("A"))
    white.format = image.format
    return white


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
        return _encode_png(pixels)
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


def _encode_png(pixels: Pixels) -> bytes:
    """Grey or RGB PNG: filter Up on every row, one IDAT."""
    height, width, channels = pixels.shape
    flat = pixels.reshape(height, width * channels)
    rows = np.empty((height, 1 + width * channels), dtype=np.uint8)
    rows[:, 0] = 2
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    body: bytes = isal_zlib.compress(rows, _DEFLATE_LEVEL)
    return _PNG_SIGNATURE + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", body) + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    crc: int = isal_zlib.crc32(body, isal_zlib.crc32(kind))
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


@functools.cache
def encoder(image_format: ImageFormat) -> str:
    """Name and version of what `encode` uses: a plan holds it, since the bytes depend on it."""
    if image_format == "png":
        return f"png-up isal {version('isal')} level {_DEFLATE_LEVEL}"
    if image_format == "jpeg":
        return f"simplejpeg {version('simplejpeg')}"
    return f"pillow {version('pillow')} libwebp {features.version('webp')}"
