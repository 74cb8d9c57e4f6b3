"""Damaged image files, and what must hold for each: `images.decode` refuses it, or gives whole pixels."""

import dataclasses
import functools
import random
import re
import struct

import numpy as np
import simplejpeg

from pipeline import images
from pipeline.images import ImageError, Pixels
from tests.fuzz import image_corpus, image_fields, mutation
from tests.fuzz.image_corpus import File
from tests.fuzz.pool import Outcome

_MAGIC = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    b"RIFF\xff\xff\0\0WEBPVP8 ",
    b"RIFF\xff\xff\0\0WEBPVP8L",
    b"RIFF\xff\xff\0\0WEBPVP8X",
    b"GIF89a",
    b"BM",
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
    b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0",
    b"P6 ",
    b"P3 9 9 255 ",
    b"P5\n20 20\n65535\n",
    b"",
)
EXPECTED_NOISE = r"[\w.]+: .*"
"""libtiff prints its errors before it returns them, and Pillow cannot stop it."""
_KINDS = ("exif", "cmyk", "palette", "alpha", "16bit", "animation")


@dataclasses.dataclass(frozen=True)
class Case:
    """A damaged file and what was done to it."""

    file: File
    donor: File
    mutation: str
    data: bytes
    channels: int


def _field(rng: random.Random, file: File) -> bytes:
    return mutation.hostile_number(rng, file.data, rng.choice(image_fields.fields(file.image_format, file.data)))


def _fields(rng: random.Random, file: File) -> bytes:
    """Several numbers at once, so that a size and what follows from it may agree."""
    data = file.data
    for field in rng.choices(image_fields.fields(file.image_format, file.data), k=rng.randint(2, 4)):
        data = mutation.hostile_number(rng, data, field)
    return data


def _parts(rng: random.Random, file: File) -> bytes:
    """What lies between two fields is missing, repeated or elsewhere: chunks, segments, directory entries."""
    places = sorted({field.offset for field in image_fields.fields(file.image_format, file.data)} | {len(file.data)})
    start, stop, elsewhere = (rng.choice(places) for _ in range(3))
    start, stop = min(start, stop), max(start, stop)
    part, rest = file.data[start:stop], file.data[:start] + file.data[stop:]
    kind = rng.choice(("missing", "repeated", "elsewhere"))
    if kind == "missing":
        return rest
    return file.data[:stop] + file.data[start:] if kind == "repeated" else rest[:elsewhere] + part + rest[elsewhere:]


def _checksums(rng: random.Random, file: File) -> bytes:
    """A PNG damaged in any way, its checksums made right again, so that the damage reaches the decoder."""
    if file.image_format != "PNG":
        return _fields(rng, file)
    kind = rng.choice(("field", "fields", "flip", "flip-many", "overwrite"))
    if kind in ("field", "fields"):
        return image_fields.with_png_checksums((_field if kind == "field" else _fields)(rng, file))
    return image_fields.with_png_checksums(mutation.ANYWHERE[kind](rng, file.data))


def _garbage(rng: random.Random, _: File) -> bytes:
    """Random bytes behind the first bytes of a format."""
    return rng.choice(_MAGIC) + rng.randbytes(rng.randint(0, 600))


def _bomb(rng: random.Random, file: File) -> bytes:
    """Both sides of the image huge, as the header says; the checksum right."""
    data, sides = bytearray(file.data), rng.choice(((60_000, 60_000), (65_535, 65_535), (16_000, 16_000), (9000, 9000)))
    if file.image_format == "PNG":
        data[16:24] = struct.pack(">II", *sides)
        return image_fields.with_png_checksums(bytes(data))
    if file.image_format == "JPEG":
        frame = re.search(rb"\xff[\xc0\xc2]\0[\x0b\x11\x14]\x08", data)
        assert frame
        data[frame.end() : frame.end() + 4] = struct.pack(">HH", *sides)
    elif file.image_format == "GIF":
        data[6:10] = struct.pack("<HH", *sides)
    elif file.image_format == "BMP":
        data[18:26] = struct.pack("<II", *sides)
    elif file.image_format == "PPM":
        return re.sub(rb"17 12", b"%d %d" % sides, file.data, count=1)
    else:
        return _bomb_of_riff_or_tiff(file, sides)
    return bytes(data)


def _bomb_of_riff_or_tiff(file: File, sides: tuple[int, int]) -> bytes:
    data = bytearray(file.data)
    fields = image_fields.fields(file.image_format, file.data)
    if file.image_format == "WEBP":
        at = {b"VP8 ": 26, b"VP8L": 21, b"VP8X": 24}[file.data[12:16]]
        width, height = (min(side, 16_383) for side in sides)
        packed = {26: struct.pack("<HH", width, height), 21: struct.pack("<I", width | height << 14)}
        packed[24] = sides[0].to_bytes(3, "little") + sides[1].to_bytes(3, "little")
        data[at : at + len(packed[at])] = packed[at]
        return bytes(data)
    for field in fields[2:12]:
        order = "<" if field.order == "little" else ">"
        tag = struct.unpack_from(f"{order}H", file.data, field.offset)[0]
        if field.size_bytes == 2 and tag in (256, 257):
            struct.pack_into(f"{order}HHII", data, field.offset, tag, 4, 1, sides[tag - 256])
    return bytes(data)


def make(seed: int, number: int) -> Case:
    """The case of a number."""
    rng = random.Random(f"{seed}/{number}")
    corpus = image_corpus.files()
    file, donor, channels = rng.choice(corpus), rng.choice(corpus), rng.choice((1, 3))
    own = {"field": _field, "fields": _fields, "parts": _parts, "checksums": _checksums, "garbage": _garbage}
    own["bomb"] = _bomb
    kind = rng.choice((*mutation.ANYWHERE, *mutation.WITH_DONOR, *own, "joined"))
    if kind in mutation.ANYWHERE:
        data = mutation.ANYWHERE[kind](rng, file.data)
    elif kind in mutation.WITH_DONOR:
        data = mutation.WITH_DONOR[kind](rng, file.data, donor.data)
    else:
        data = file.data + donor.data if kind == "joined" else own[kind](rng, file)
    return Case(file, donor, kind, data, channels)


@functools.cache
def whole(name: str, channels: int) -> Pixels:
    """The pixels of the undamaged file."""
    (data,) = (file.data for file in image_corpus.files() if file.name == name)
    return images.decode(data, channels=channels).pixels


def check(case: Case) -> Outcome:
    """What the pool calls."""
    return Outcome(case.file.image_format, "accepted" if accepted(case) else "refused")


def accepted(case: Case) -> bool:
    """Whether `decode` takes the file; asserts what must hold then."""
    try:
        decoded = images.decode(case.data, channels=case.channels)
    except ImageError:
        return False
    assert case.mutation != "bomb"
    pixels = decoded.pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (case.channels,)
    assert 1 <= pixels.shape[0] * pixels.shape[1] <= images.MAX_PIXELS
    assert pixels.flags.c_contiguous
    assert decoded.converted <= set(_KINDS)
    into = images.decode(case.data, channels=case.channels, buffer=np.empty_like(pixels))
    assert np.array_equal(into.pixels, pixels)
    if case.mutation == "cut":
        assert _shows_the_same(case, pixels), f"{case.file.name} cut at {len(case.data)} shows other pixels"
    if case.data[:8] == b"\x89PNG\r\n\x1a\n" and case.mutation not in ("checksums", "bomb"):
        assert np.array_equal(pixels, whole(case.file.name, case.channels)), f"{case.file.name} shows other pixels"
    if case.data[:3] == b"\xff\xd8\xff":
        _check_jpeg(case.data)
    return True


def _shows_the_same(case: Case, pixels: Pixels) -> bool:
    """A cut file is taken only if what is missing shows nothing: a later frame, padding, an end mark.

    Of plain PPM, which is text, the last digits may be missing.
    """
    good = whole(case.file.name, case.channels)
    if case.file.name.startswith("ppm-plain") and len(case.data) >= len(case.file.data) - 3:
        return pixels.shape == good.shape and np.array_equal(pixels.ravel()[:-3], good.ravel()[:-3])
    return np.array_equal(pixels, good)


def _check_jpeg(data: bytes) -> None:
    """What libjpeg would only warn of is refused, in whatever colours."""
    space = simplejpeg.decode_jpeg_header(data)[2]
    simplejpeg.decode_jpeg(data, colorspace={"CMYK": "CMYK", "YCCK": "CMYK"}.get(space, "RGB"), strict=True)
