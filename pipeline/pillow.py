"""Images of every format and mode, by Pillow: slower than the fast paths of `images`.

Pillow is made strict where it is not: a file that is damaged, or whose pixels it would misread, is refused.
"""

import contextlib
import io
import logging
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

MAX_PIXELS = 64 * 1024**2
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Pillow's decoders that are written in Python: plain PPM, PPM of other than 255 or 65535 levels, run-length BMP. They
# take up to 2 µs a pixel, so that the largest image would take two minutes.
_SLOW_CODECS = ("ppm_plain", "ppm", "bmp_rle")
_MAX_SLOW_PIXELS = 2 * 1024**2
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
_EIGHT_BITS = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
_warning_filters = threading.Lock()
# What Pillow logs of a broken file is in the exception too; without a handler it would be printed for every such file.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode(data: bytes, channels: int) -> tuple[NDArray[np.uint8], frozenset[str]]:
    """Pixels and what had to be converted, as `images.decode` returns them; of its errors, any."""
    if data[:8] == _PNG_SIGNATURE:
        _check_png(data)
    with _strict_warnings():
        return _decode(data, channels)


def orientation(data: bytes) -> int:
    """The orientation that the EXIF or XMP data of an image gives, 1 … 8; nothing is decoded."""
    with _strict_warnings():
        return _orientation(_open(data))


@contextlib.contextmanager
def _strict_warnings() -> Iterator[None]:
    """Warnings are errors; one thread at a time, since the filters belong to the process."""
    with _warning_filters, warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _check_png(data: bytes) -> None:
    """Refuse a PNG that has a chunk with a wrong checksum, or no end: of image data, Pillow checks neither."""
    at, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end + 4 > len(data) or data[end : end + 4] != zlib.crc32(data[at + 4 : end]).to_bytes(4, "big"):
            raise ValueError(f"PNG chunk at byte {at} is damaged or cut")
        at = end + 4


def _decode(data: bytes, channels: int) -> tuple[NDArray[np.uint8], frozenset[str]]:
    image, rawmodes, orientation, converted = _loaded(data)
    if image.mode == "CMYK":
        converted.add("cmyk")
    if image.mode in ("P", "PA"):
        converted.add("palette")
    if any(_is_wide(rawmode) for rawmode in rawmodes) or image.mode.startswith("I"):
        converted.add("16bit")
        image = _eight_bits(data, image, rawmodes)
    base = _base_mode(image)
    if base.mode in ("LA", "RGBA"):
        converted.add("alpha")
        base = _on_white(base)
    flat = base.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(flat).reshape(flat.height, flat.width, channels)
    # Pillow turns a TIFF upright itself when it loads one.
    return upright(pixels, 1 if image.format == "TIFF" else orientation), frozenset(converted)


def _loaded(data: bytes) -> tuple[Image.Image, list[str], int, set[str]]:
    """Pillow's first frame, the rawmodes of its tiles, its orientation, and which of exif and animation it has."""
    image = _open(data)
    # Before load(), which empties the list; getexif() of a PNG loads.
    rawmodes = [_rawmode(tile) for tile in image.tile]
    orientation = _orientation(image)
    converted = {"exif"} if orientation != 1 else set()
    if image.format != "JPEG" and getattr(image, "is_animated", False):
        converted.add("animation")
    image.load()
    if image.format == "TIFF":
        _check_tiff(image)
    return image, rawmodes, orientation, converted


def _open(data: bytes) -> ImageFile.ImageFile:
    """Pillow's lazy image: the header is read, nothing is decoded."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    slow = any(tile.codec_name in _SLOW_CODECS for tile in image.tile)
    check_size(image.width, image.height, _MAX_SLOW_PIXELS if slow else MAX_PIXELS)
    return image


def check_size(width: int, height: int, most: int = MAX_PIXELS) -> None:
    """Refuse more pixels than are allowed, and none."""
    if width * height > most:
        raise ValueError(f"{width}×{height} pixels are more than the {most} allowed in such a file")
    if width < 1 or height < 1:
        raise ValueError(f"no pixels ({width}×{height})")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or it is none of the eight."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
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


def _is_wide(rawmode: str) -> bool:
    """Whether a sample has 16 bits; of BGR;16, in BMP, a whole pixel has."""
    return ";16" in rawmode and not rawmode.startswith("BGR")


def _check_tiff(image: ImageFile.ImageFile) -> None:
    """Refuse what Pillow takes for something else: of wide samples in separate planes it shows the wrong bytes."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 and len(bits) > 1 and max(bits) > 8:
        raise ValueError("TIFF with 16-bit samples in separate planes is not supported")


def _eight_bits(data: bytes, image: Image.Image, rawmodes: list[str]) -> Image.Image:
    """A 16-bit image scaled to 8 bits, value · 255 / 65535 rounded.

    Pillow keeps 16 bits for grey only; of colours it drops the lower byte, which is therefore read by a second pass.
    """
    if image.mode.startswith("I"):
        if image.mode == "I" and image.format != "PPM":
            raise ValueError("32-bit pixels have no known range")
        mode, values = "L", iter([_grey_values(image, rawmodes[0])])
    elif rawmodes[0] == "LA;16B":
        both = _reopened(data, {"LA;16B": "RGBA"})
        mode, values = "LA", _joined([(both, 0, both, 1), (both, 2, both, 3)])
    elif image.mode in _WIDE_MODES and image.format != "PPM":
        low = _reopened(data, {raw: raw[:-1] + _OTHER_BYTE[raw[-1]] for raw in rawmodes})
        mode, values = image.mode, _joined([(image, band, low, band) for band in range(len(image.getbands()))])
    else:
        raise ValueError(f"16-bit mode {image.mode} is not supported")
    return _scaled_bands(image, mode, values)


def _grey_values(image: Image.Image, rawmode: str) -> NDArray[np.uint16]:
    """Values from 0, black, to 65535: Pillow leaves 12 bits as they are, and TIFFs in which 0 is white."""
    values = np.asarray(image).astype(np.uint16)
    if rawmode == "I;12":
        values = values << np.uint16(4) | values >> np.uint16(8)
    tags = getattr(image, "tag_v2", {})
    return ~values if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else values


def _joined(pairs: list[tuple[Image.Image, int, Image.Image, int]]) -> Iterator[NDArray[np.uint16]]:
    """16-bit values, band by band, from the images and bands that hold their upper and lower bytes."""
    for upper, upper_band, lower, lower_band in pairs:
        high = np.asarray(upper.getchannel(upper_band)).astype(np.uint16)
        yield high << np.uint16(8) | np.asarray(lower.getchannel(lower_band))


def _scaled_bands(image: Image.Image, mode: str, values: Iterator[NDArray[np.uint16]]) -> Image.Image:
    """Bands of 16 bits as an image of 8; a PNG's transparent colour, which has 16 too, becomes an alpha band."""
    transparent = np.atleast_1d(image.info["transparency"]) if "transparency" in image.info else None
    opaque = np.zeros((image.height, image.width), dtype=bool)
    bands = []
    for number, band in enumerate(values):  # one at a time: a band of the largest image has 128 MiB
        bands.append(Image.fromarray(_EIGHT_BITS[band]))
        if transparent is not None:
            opaque |= band != transparent[number]
    if transparent is not None and mode in ("L", "RGB"):
        bands.append(Image.fromarray(opaque.astype(np.uint8) * np.uint8(255)))
        mode += "A"
    eight = Image.merge(mode, bands)
    eight.format = image.format
    return eight


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
