"""Our PNG: exact, readable by every decoder, and its fast path takes it and nothing else."""

import io
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from isal import isal_zlib
from PIL import Image

from pipeline import images, pillow, png
from pipeline.images import Pixels
from tests.fuzz.image_corpus import files, png_chunk, smooth

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]))


@given(hnp.arrays(np.uint8, shapes))
def test_it_is_read_back_by_pillow_and_by_us(pixels: Pixels) -> None:
    data = images.encode(pixels, "png", 95)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == ("L" if pixels.shape[2] == 1 else "RGB")
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    assert np.array_equal(pillow.decode(data, pixels.shape[2])[0], pixels)
    assert png.shape(data) == pixels.shape
    fast = png.decode(data, pixels.shape)
    assert fast is not None
    assert np.array_equal(fast, pixels)
    assert np.array_equal(images.decode(data, channels=pixels.shape[2]).pixels, pixels)
    assert images.encode(pixels, "png", 1) == data


_ENCODE_IN_A_THREAD = """
import hashlib, threading
import numpy as np
from pipeline import png

def encode():
    chance = np.random.default_rng(0)
    steps = [chance.integers(-1, 2, (side, side, 1 + 2 * (side % 16 == 8))) for side in [16] * 200 + [24] * 50 + [200]]
    files = [png.encode((step.cumsum(0) * 9 % 256).astype(np.uint8)) for step in steps]
    print(hashlib.sha256(b"".join(files)).hexdigest())

thread = threading.Thread(target=encode)
thread.start()
thread.join()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_process_makes_the_same_bytes() -> None:
    """Address-space layout is drawn anew for each of 400 processes; ISA-L's deflate failed here one time in sixty."""

    def encode_elsewhere(_: int) -> str:
        command = [sys.executable, "-c", _ENCODE_IN_A_THREAD]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(4) as pool:
        digests = set(pool.map(encode_elsewhere, range(400)))
    assert len(digests) == 1


@given(hnp.arrays(np.uint8, shapes), st.data())
def test_a_flipped_bit_or_a_cut_never_takes_the_fast_path(pixels: Pixels, data: st.DataObject) -> None:
    coded = png.encode(pixels)
    place, bit = data.draw(st.integers(0, len(coded) - 1)), data.draw(st.integers(0, 7))
    damaged = coded[:place] + bytes([coded[place] ^ 1 << bit]) + coded[place + 1 :]
    for wrong in (damaged, coded[:place], coded[:place] + coded[place + 1 :], coded + b"\0"):
        assert png.decode(wrong, pixels.shape) is None


@given(hnp.arrays(np.uint8, shapes))
def test_another_shape_never_takes_the_fast_path(pixels: Pixels) -> None:
    height, width, channels = pixels.shape
    coded = png.encode(pixels)
    for shape in ((height, width, 4 - channels), (height + 1, width, channels), (height, width + 1, channels)):
        assert png.decode(coded, shape) is None


def _with_body(body: bytes) -> bytes:
    """A PNG of 4² grey pixels whose IDAT is this, with the sums right."""
    whole = png.encode(np.zeros((4, 4, 1), np.uint8))
    return whole[:33] + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "raw",
    [bytes([0, 1, 2, 3, 4] * 4), bytes([2, 1, 2, 3, 4] * 3 + [1, 1, 2, 3, 4]), bytes([2] * 19), bytes([2] * 21)],
    ids=["filter none", "one row of another filter", "a byte short", "a byte too many"],
)
def test_rows_that_are_not_ours_do_not_take_the_fast_path(raw: bytes) -> None:
    assert png.decode(_with_body(isal_zlib.compress(bytes([2, 1, 2, 3, 4] * 4))), (4, 4, 1)) is not None
    assert png.decode(_with_body(isal_zlib.compress(raw)), (4, 4, 1)) is None


def test_a_bomb_is_not_inflated() -> None:
    """Within a second and little memory: at most a byte more than the pixels is asked for."""
    bomb = _with_body(isal_zlib.compress(bytes(2**28)))
    assert png.decode(bomb, (4, 4, 1)) is None


def test_deflate_that_is_none_is_left_to_the_general_decoder() -> None:
    assert png.decode(_with_body(b"\x78\x9c" + b"\xff" * 20), (4, 4, 1)) is None


def test_deflate_without_its_sum_or_with_another_is_left_to_the_general_decoder() -> None:
    body = isal_zlib.compress(bytes([2, 1, 2, 3, 4] * 4))
    assert png.decode(_with_body(body), (4, 4, 1)) is not None
    for wrong in (body[:-4], body[:-1], body[:-1] + bytes([body[-1] ^ 1])):
        assert png.decode(_with_body(wrong), (4, 4, 1)) is None


def test_a_header_of_no_shape() -> None:
    for data in (b"", b"\x89PNG", *(file.data for file in files() if not file.name.startswith("png"))):
        assert png.shape(data) is None
    whole = png.encode(np.zeros((4, 4, 1), np.uint8))
    assert png.shape(whole[:16] + struct.pack(">II", 5, 4) + whole[24:]) is None  # its sum is that of 4 × 4


@pytest.mark.parametrize("resolution", [32, 256])
def test_a_batch_says_which_files_it_left(resolution: int) -> None:
    """More of them than are inflated at once, at 256² a file at a time."""
    drawn = [smooth(resolution, resolution) + np.uint8(i) for i in range(200 if resolution == 32 else 7)]
    coded = [png.encode(one) for one in drawn]
    coded[2], coded[5] = images.encode(drawn[2], "jpeg", 90), b""
    out = np.zeros((len(drawn), resolution, resolution, 3), np.uint8)
    assert png.decode_batch(map(memoryview, coded), out) == [2, 5]
    kept = [i for i in range(len(drawn)) if i not in (2, 5)]
    assert np.array_equal(out[kept], np.stack([drawn[i] for i in kept]))
