"""Hostile images: every one of them is refused or decoded to whole pixels, at a bounded cost, and none with a crash."""

import pytest

from pipeline import images
from pipeline.images import ImageError
from tests.fuzz import image_cases, image_corpus, large_images, pool
from tests.fuzz.image_cases import Case
from tests.fuzz.image_corpus import File
from tests.fuzz.mutation import flipped


@pytest.mark.parametrize("file", image_corpus.files(), ids=lambda file: file.name)
def test_the_undamaged_files_are_decoded(file: File) -> None:
    for channels in (1, 3):
        pixels = images.decode(file.data, channels=channels).pixels
        assert pixels.shape[2] == channels
        assert pixels.std() > 1


def _run(count: int, capsys: pytest.CaptureFixture[str], processes: int = 2) -> pool.Report:
    report = pool.run("tests.fuzz.image_cases", count, processes)
    if count > 1000:
        with capsys.disabled():
            print(f"\n{report.table()}")
    assert not report.failures, "\n\n".join(report.failures[:5])
    assert report.cases == count
    assert min(report.verdicts()[verdict] for verdict in ("accepted", "refused")) > count / 10
    return report


def test_a_few_hundred_damaged_files(capsys: pytest.CaptureFixture[str]) -> None:
    _run(400, capsys, processes=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damaged_files(capsys: pytest.CaptureFixture[str]) -> None:
    report = _run(30_000, capsys)
    for image_format in images.FORMATS:
        for verdict in ("accepted", "refused"):
            assert report.outcomes[pool.Outcome(image_format, verdict)] > 100


@pytest.mark.slow
@pytest.mark.parametrize("image_format", images.FORMATS)
def test_every_cut_near_the_ends_of_every_file(image_format: str) -> None:
    """A cut file is refused, or what is missing of it shows nothing."""
    for file in (file for file in image_corpus.files() if file.image_format == image_format):
        size = len(file.data)
        cuts = {*range(min(64, size)), *range(max(0, size - 64), size), *range(0, size, 1 + size // 100)}
        taken = [at for at in sorted(cuts) if image_cases.accepted(Case(file, file, "cut", file.data[:at], 3))]
        assert len(taken) < len(cuts)
        if image_format in ("PNG", "JPEG", "WEBP"):
            assert taken == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_largest_images_have_a_bounded_cost(capsys: pytest.CaptureFixture[str]) -> None:
    report = pool.run("tests.fuzz.large_images", len(large_images.MAKERS))
    with capsys.disabled():
        print(f"\n{report.table()}")
    assert not report.failures, "\n\n".join(report.failures[:5])
    assert report.cases == len(large_images.MAKERS)


@pytest.mark.parametrize("name", ["png-ours-rgb", "png-pillow-LA", "png-16-grey", "png-apng", "png-many-idat"])
def test_a_flipped_bit_never_passes_a_checksum(name: str) -> None:
    (data,) = (file.data for file in image_corpus.files() if file.name == name)
    for bit in range(0, 8 * len(data), 8 * len(data) // 500):
        with pytest.raises(ImageError):
            images.decode(flipped(data, bit), channels=3)
