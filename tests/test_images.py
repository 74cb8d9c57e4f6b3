"""Decoding every kind of file to upright 8-bit pixels, resizing without aliasing."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline import images
from pipeline.images import ImageError, Pixels
from tests.fuzz.image_corpus import (
    bitfield_bmp,
    files,
    png,
    png_chunk,
    saved,
    smooth,
    tiff,
    twelve_bit_tiff,
)


def _noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]))


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossy_formats_come_back_close(image_format: images.ImageFormat, channels: int) -> None:
    smooth = images.resize(_noise(4, 4, channels), 64, "crop")
    data = images.encode(smooth, image_format, 95)
    back = images.decode(data, channels=channels).pixels
    assert np.abs(back.astype(int) - smooth).mean() < 4
    assert len(images.encode(smooth, image_format, 30)) < len(data)
    assert images.encode(smooth, image_format, 95) == data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_exif_orientation_is_applied(orientation: int, image_format: str, channels: int) -> None:
    picture = Image.fromarray(images.resize(_noise(3, 3), 16, "crop")[:10])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {"quality": 100} if image_format == "JPEG" else {}
    data = saved(picture, image_format, exif=exif, **options)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L" if channels == 1 else "RGB"))
    decoded = images.decode(data, channels=channels)
    assert decoded.pixels.shape == (*wanted.shape[:2], channels)
    # libjpeg-turbo's chroma up-sampling is not Pillow's; a wrong turn differs by far more.
    assert np.abs(decoded.pixels.reshape(wanted.shape).astype(int) - wanted).max() <= (
        8 if image_format == "JPEG" else 0
    )
    assert decoded.converted == ({"exif"} if orientation > 1 else frozenset())


@pytest.mark.parametrize(("colour_type", "bands"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_scaled_not_cut(colour_type: int, bands: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, bands), dtype=np.uint16)
    if bands in (2, 4):
        values[:, :, -1] = 65535
    channels = 1 if bands < 3 else 3
    decoded = images.decode(png(values, colour_type), channels=channels)
    wanted = np.round(values[:, :, :channels] * (255 / 65535)).astype(np.uint8)
    assert np.array_equal(decoded.pixels, wanted)
    assert decoded.converted == {"16bit", "alpha"} if bands in (2, 4) else decoded.converted == {"16bit"}


@pytest.mark.parametrize("image_format", ["TIFF", "PPM"])
def test_sixteen_bit_grey_of_other_formats(image_format: str) -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    decoded = images.decode(saved(Image.fromarray(values), image_format), channels=1)
    assert np.array_equal(decoded.pixels[:, :, 0], np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert decoded.converted == {"16bit"}


def test_sixteen_bits_of_tiff() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 8, 3), dtype=np.uint16)
    wanted = np.round(values * (255 / 65535)).astype(np.uint8)
    for order in "<>":
        for tile in (0, 16):
            decoded = images.decode(tiff(values, order=order, tile=tile), channels=3)
            assert np.array_equal(decoded.pixels, wanted)
            assert decoded.converted == {"16bit"}
    inverted = tiff(~values[:, :, :1], changed={262: (3, [0])})  # 0 is white
    assert np.array_equal(images.decode(inverted, channels=1).pixels, wanted[:, :, :1])
    twelve = twelve_bit_tiff(values[:, :, 0] >> 4)
    assert np.abs(images.decode(twelve, channels=1).pixels[:, :, 0].astype(int) - wanted[:, :, 0]).max() <= 1
    with pytest.raises(ImageError, match="separate planes"):
        images.decode(tiff(values, planar=True), channels=3)


def test_pixels_of_sixteen_bits_in_bmp() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 8), dtype=np.uint16)
    decoded = images.decode(bitfield_bmp(values), channels=3)
    wanted = np.stack([(values >> 11) / 31, (values >> 5 & 63) / 63, (values & 31) / 31], axis=2) * 255
    assert np.abs(decoded.pixels - wanted).max() < 1
    assert decoded.converted == frozenset()


def test_alpha_lies_on_white() -> None:
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = (200, 0, 0, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    decoded = images.decode(saved(Image.fromarray(rgba), "PNG"), channels=3)
    assert decoded.pixels.tolist() == [[[200, 0, 0], [127, 127, 127]], [[255, 255, 255], [255, 255, 255]]]
    assert decoded.converted == {"alpha"}
    grey = images.decode(saved(Image.fromarray(rgba).convert("LA"), "PNG"), channels=1)
    assert grey.pixels[:, :, 0].tolist() == [[60, 127], [255, 255]]


def test_palette_cmyk_and_transparent_palette() -> None:
    picture = Image.fromarray(_noise(8, 8))
    indexed = picture.quantize(16)
    wanted = np.asarray(indexed.convert("RGB"))
    decoded = images.decode(saved(indexed, "PNG"), channels=3)
    assert np.array_equal(decoded.pixels, wanted)
    assert decoded.converted == {"palette"}
    see_through = images.decode(saved(indexed, "PNG", transparency=indexed.getpixel((0, 0))), channels=3)
    assert see_through.pixels[0, 0].tolist() == [255, 255, 255]
    assert see_through.converted == {"palette", "alpha"}
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for image_format in ("JPEG", "TIFF"):
        red = images.decode(saved(cmyk, image_format), channels=3)
        assert np.abs(red.pixels.astype(int) - [255, 0, 0]).max() <= 3
        assert red.converted == {"cmyk"}


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = saved(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    decoded = images.decode(data, channels=3)
    assert (decoded.pixels == [255, 0, 0]).all()
    assert "animation" in decoded.converted


def _modes_and_formats() -> dict[tuple[str, str], bytes]:
    """A file of each mode in each format that has it."""
    files = {}
    picture = Image.fromarray(images.resize(_noise(3, 3), 16, "crop"))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        for image_format in ("PNG", "TIFF", "JPEG", "BMP", "GIF", "WEBP", "PPM"):
            try:
                files[mode, image_format] = saved(picture.convert(mode), image_format)
            except (OSError, KeyError, ValueError):
                continue
    return files


_MODES = _modes_and_formats()


@pytest.mark.parametrize(("mode", "image_format"), _MODES)
def test_every_mode_in_every_format(mode: str, image_format: str) -> None:
    data = _MODES[mode, image_format]
    for channels in (1, 3):
        decoded = images.decode(data, channels=channels)
        assert decoded.pixels.shape == (16, 16, channels)
        wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").convert("L" if channels == 1 else "RGB"))
        assert np.abs(decoded.pixels.reshape(wanted.shape).astype(int) - wanted).mean() < 3


def test_grey_is_601_luma() -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    assert images.decode(images.encode(colours, "png", 95), channels=1).pixels.ravel().tolist() == [76, 150, 29]


def test_other_formats_and_huge_headers_are_refused() -> None:
    huge = bytearray(images.encode(_noise(1, 1), "png", 95))
    huge[16:24] = struct.pack(">II", 70_000, 70_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    large_gif = b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + bytes(20)
    for data in (b"", b"not an image", bytes(huge), large_gif, saved(Image.new("L", (9, 9)), "ICO")):
        with pytest.raises(ImageError, match=r"^cannot decode: (?!.*0x)"):
            images.decode(data, channels=3)
    jpeg = bytearray(images.encode(_noise(8, 8), "jpeg", 90))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(ImageError, match="are more than"):
        images.decode(bytes(jpeg), channels=3)


def _samples() -> dict[str, bytes]:
    picture = Image.fromarray(images.resize(_noise(5, 5), 48, "crop"))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {name: saved(picture, name) for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")}
    files["CMYK"] = saved(picture.convert("CMYK"), "JPEG")
    files["EXIF"] = saved(picture, "JPEG", exif=exif)
    files["LZW"] = saved(picture, "TIFF", compression="tiff_lzw")
    files["PNG16"] = png(_noise(9, 9).astype(np.uint16) * 257, 2)
    return files


_SAMPLES = _samples()


edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(_SAMPLES)), st.none() | st.floats(0, 1), edits, st.sampled_from([1.0, 0.02]))
def test_damage_raises_image_error_and_nothing_else(
    name: str, cut: float | None, edits: list[tuple[float, int]], part: float
) -> None:
    """Edits fall anywhere, or in the first fiftieth, where the header is."""
    data = bytearray(_SAMPLES[name])
    for where, value in edits:
        data[int(where * part * (len(data) - 1))] = value
    with contextlib.suppress(ImageError):
        images.decode(bytes(data if cut is None else data[: int(cut * len(data))]), channels=3)


@pytest.mark.parametrize("name", sorted(_SAMPLES))
def test_any_cut_or_changed_byte_of_the_header(name: str) -> None:
    data = _SAMPLES[name]
    for at in range(min(len(data), 160)):
        with pytest.raises(ImageError):
            images.decode(data[:at], channels=3)
        for value in (0, 255, data[at] ^ 1):
            with contextlib.suppress(ImageError):
                images.decode(data[:at] + bytes([value]) + data[at + 1 :], channels=3)


@pytest.mark.parametrize("name", sorted(_SAMPLES))
def test_a_cut_file_is_never_taken_for_whole(name: str) -> None:
    with pytest.raises(ImageError):
        images.decode(_SAMPLES[name][: len(_SAMPLES[name]) * 6 // 10], channels=3)


def _hostile() -> list[tuple[type[BaseException], bytes]]:
    """What Pillow raises, each with an input that makes them."""
    whole = {file.name: file.data for file in files()}
    signature, end = whole["png-pillow-L"][:8], png_chunk(b"IEND", b"")
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
    huge = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0))
    broken = png_chunk(b"IDAT", b"\x78\x9c" + b"\xff" * 20)
    gif = whole["gif-animated"]
    second = gif.rindex(b"!\xf9", 0, gif.rindex(b"!\xf9"))
    grey = np.frombuffer(struct.pack("<IIQ", 2, 1, 0), np.uint8).reshape(4, 4, 1)
    return [
        (OSError, whole["bmp-rgb"][:-100]),
        (SyntaxError, signature + header + png_chunk(b"IDAT", b"") + png_chunk(b"\1\2\3\4", b"") + end),
        (ValueError, tiff(grey, changed={256: (4, [40_000]), 257: (4, [2000])})),
        (TypeError, _retold(tiff(grey), 273, "<HII", 5, 1, 8)),  # the strip's offset: a fraction
        (IndexError, gif[: second + 1]),  # within the next frame's header
        (OverflowError, _retold(whole["tiff-big"], 273, "<HQQ", 16, 1, 2**63)),
        (struct.error, gif[: second + 11]),
        (OSError, signature + header + broken + end),
        (Image.DecompressionBombError, signature + huge + broken + end),
        (UserWarning, _retold(tiff(grey), 273, "<HI", 4, 10**6)),
        (UnidentifiedImageError, b"GIF89a"),
    ]


def _retold(data: bytes, tag: int, layout: str, *entry: int) -> bytes:
    """A TIFF whose directory says something else from a tag's type on."""
    at = data.index(struct.pack("<HH", tag, 4)) + 2
    return data[:at] + struct.pack(layout, *entry) + data[at + struct.calcsize(layout) :]


@pytest.mark.parametrize(("raised", "data"), _hostile(), ids=lambda value: getattr(value, "__name__", ""))
def test_whatever_a_decoder_raises_is_an_image_error(raised: type[BaseException], data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^cannot decode: ") as caught:
        images.decode(data, channels=1)
    assert type(caught.value.__cause__) is raised


def test_a_damaged_jpeg_is_refused_in_every_colour_space() -> None:
    """libjpeg only warns, and fills in: Pillow would show it."""
    picture = Image.fromarray(smooth(60, 83))
    for mode, options in (("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"keep_rgb": True})):
        data = saved(picture.convert(mode), "JPEG", **options)
        middle = data.index(b"\xff\xda") + 300
        damaged = data[:middle] + b"\xff\xd9" + data[middle + 2 :]
        assert Image.open(io.BytesIO(damaged)).convert("RGB").size == (83, 60)
        with pytest.raises(ImageError, match="JPEG data"):
            images.decode(damaged, channels=3)


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    data = saved(Image.new("L", (1024, 1024)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    many = data[:last] + data[last:-2] * 1100 + data[-2:]
    assert images.decode(data, channels=1).pixels.shape == (1024, 1024, 1)
    with pytest.raises(ImageError, match="scans"):
        images.decode(many, channels=1)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_fine_checkerboard_becomes_flat_grey(fit: images.Fit, resolution: int) -> None:
    rows, columns = np.indices((512, 512))
    board = (((rows + columns) % 2) * 255).astype(np.uint8)[:, :, None]
    small = images.resize(board, resolution, fit)
    assert small.shape == (resolution, resolution, 1)
    assert np.abs(small.astype(int) - 127).max() <= 2


@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([1, 3]), st.sampled_from(["crop", "pad"]))
def test_resize_gives_the_size(height: int, width: int, channels: int, fit: images.Fit) -> None:
    assert images.resize(_noise(height, width, channels), 32, fit).shape == (32, 32, channels)


def test_fits() -> None:
    exact = _noise(32, 32)
    assert np.array_equal(images.resize(exact, 32, "crop"), exact)
    garment = _noise(28, 28, 1)
    padded = images.resize(garment, 32, "pad")
    assert np.array_equal(padded[2:30, 2:30], garment)
    assert padded.sum() == garment.sum()
    wide = np.zeros((32, 96, 3), dtype=np.uint8)
    wide[:, 32:64] = 200
    assert (images.resize(wide, 32, "crop") == 200).all()
    whole = images.resize(wide, 32, "pad")
    assert not whole[:10].any()
    assert (whole[12:20, 13:19] > 190).all()


def test_encoder_names_its_version() -> None:
    assert [images.encoder(f).split()[0] for f in ("png", "jpeg", "webp")] == ["png-up", "simplejpeg", "pillow"]


@given(st.lists(st.sampled_from(["ours", "pillow", "jpeg", "large"]), min_size=1, max_size=5), st.sampled_from([1, 3]))
def test_decoded_together_or_one_by_one(kinds: list[str], channels: int) -> None:
    files = []
    for seed, kind in enumerate(kinds):
        side = 12 if kind == "large" else 8
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, channels), np.uint8)
        if kind == "pillow":
            sink = io.BytesIO()
            Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(sink, "PNG")
            files.append(sink.getvalue())
        else:
            files.append(images.encode(pixels, "jpeg" if kind == "jpeg" else "png", 90))
    together = images.decode_all(files, channels)
    assert len(together) == len(files)
    for file, found in zip(files, together, strict=True):
        assert np.array_equal(found, images.decode(file, channels=channels).pixels)
