"""Hostile tars: every one of them is refused, or read as Python's own reader reads it; none with a crash."""

import pytest

from pipeline.dataset import tar
from pipeline.dataset.tar import TarError
from tests.fuzz import pool, tar_cases, tar_corpus
from tests.fuzz.tar_corpus import BLOCK, Archive, header, padded

_archives = pytest.mark.parametrize("archive", tar_corpus.archives(), ids=lambda archive: archive.name)


@_archives
def test_the_undamaged_tars_are_read_as_python_reads_them(archive: Archive) -> None:
    assert tar_cases.listed_by_us(archive.data) == list(archive.content) == tar_cases.listed_by_tarfile(archive.data)


@_archives
def test_every_cut_is_detected(archive: Archive) -> None:
    """But for cuts of the zeros that follow a whole end mark."""
    whole = sum(map(len, tar_corpus.pieces(archive.data))) + 2 * BLOCK
    for boundary in range(0, len(archive.data) + 1, BLOCK):
        for cut in range(max(0, boundary - 1), min(boundary + 2, len(archive.data))):
            if cut < whole:
                with pytest.raises(TarError):
                    tar.scan(archive.data[:cut], "x.tar")
            else:
                assert tar_cases.listed_by_us(archive.data[:cut]) == list(archive.content)


_MEMBER = header(b"plain.png", 0)


@pytest.mark.parametrize(
    "data",
    [
        header(b"long", 1, b"L") + padded(b"other.png\0") + _MEMBER,  # a name that goes on behind its end
        header(b"pax", 4, b"x") + padded(b"4 =\n") + _MEMBER,  # some readers stop here, and miss what follows
        header(b"pax", 8, b"x") + padded(b"8 path=\n") + _MEMBER,  # no name, or the header's own
        _MEMBER + header(b"pax", 12, b"g") + padded(b"12 comment=\n"),  # cut behind a header for all members
    ],
    ids=["long-name", "no-keyword", "empty-path", "global-last"],
)
def test_what_readers_understand_differently_is_refused(data: bytes) -> None:
    with pytest.raises(TarError):
        tar.scan(data + bytes(2 * BLOCK), "x.tar")


def test_a_few_hundred_damaged_tars(capsys: pytest.CaptureFixture[str]) -> None:
    _run(300, capsys, processes=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damaged_tars(capsys: pytest.CaptureFixture[str]) -> None:
    _run(8_000, capsys)


def _run(count: int, capsys: pytest.CaptureFixture[str], processes: int = 2) -> None:
    report = pool.run("tests.fuzz.tar_cases", count, processes)
    if count > 1000:
        with capsys.disabled():
            print(f"\n{report.table()}")
    assert not report.failures, "\n\n".join(report.failures[:5])
    assert report.cases == count
    verdicts = report.verdicts()
    assert min(verdicts[verdict] for verdict in ("accepted", "refused", "stricter")) > count / 20
    assert verdicts["refused"] > count / 4
