"""Tars: what we write every tool reads, and what we would not write is refused."""

import gzip
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset import tar
from pipeline.dataset.tar import TarError

SAMPLES = [("000000000", {"png": b"p" * 700, "cls": b"3"}), ("000000001", {"png": b"", "cls": b"0"})]


def foreign(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, fmt: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar by Python's own writer, with fractional times as the webdataset library writes them."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=fmt) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.mtime = len(data), kind, 1.5
            info.linkname = "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            out.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@given(st.lists(st.binary(max_size=2000), max_size=5))
def test_what_we_build_python_reads_and_we_scan(bodies: list[bytes]) -> None:
    data = tar.build((f"{i:09d}", {"bin": body}) for i, body in enumerate(bodies))
    with tarfile.open(fileobj=io.BytesIO(data)) as read:
        assert [read.extractfile(member).read() for member in read] == bodies  # type: ignore[union-attr]
    assert [data[m.offset : m.offset + m.size_bytes] for m in tar.scan(data, "x.tar")] == bodies


def test_bytes_are_deterministic_and_members_sorted() -> None:
    data = tar.build(SAMPLES)
    again = tar.build([(key, dict(reversed(files.items()))) for key, files in SAMPLES])
    assert data == again
    with tarfile.open(fileobj=io.BytesIO(data)) as read:
        members = read.getmembers()
    names = [member.name for member in members]
    assert names == ["000000000.cls", "000000000.png", "000000001.cls", "000000001.png"]
    assert {(m.mtime, m.mode, m.uid, m.gid, m.uname) for m in members} == {(0, 0o644, 0, 0, "")}


def test_a_cut_at_every_boundary_is_detected() -> None:
    data = tar.build(SAMPLES)
    for cut in range(0, len(data), 512):
        with pytest.raises(TarError, match=r"truncated|no end"):
            tar.scan(data[:cut], "x.tar")


def test_an_altered_header_is_detected() -> None:
    data = bytearray(tar.build(SAMPLES))
    data[3] ^= 1
    with pytest.raises(TarError, match="no tar header at byte 0"):
        tar.scan(bytes(data), "x.tar")


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_foreign_tars_with_long_names_are_read(fmt: int) -> None:
    name = "folder/" + "n" * 150 + ".png"
    data = foreign((name, b"abc"), ("b.png", b"d"), fmt=fmt)
    assert [(m.name, data[m.offset : m.offset + m.size_bytes]) for m in tar.scan(data, "x")] == [
        (name, b"abc"),
        ("b.png", b"d"),
    ]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (foreign(("../up.png", b"")), "'..'"),
        (foreign(("/abs.png", b"")), "absolute"),
        (foreign(("a.png", b"1"), ("a.png", b"2")), "twice"),
        (foreign(("a.png", b""), kind=tarfile.SYMTYPE), "link"),
        (foreign(("a.png", b""), kind=tarfile.LNKTYPE), "link"),
        (foreign(("a.png", b""), kind=tarfile.FIFOTYPE), "special file"),
        (gzip.compress(tar.build(SAMPLES), 0), "uncompressed"),
        (b"", "truncated"),
    ],
)
def test_what_a_shard_may_not_hold_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(TarError, match=why):
        tar.scan(data, "x.tar")


def test_a_member_that_claims_to_be_huge_costs_nothing() -> None:
    head = bytearray(tar.build([("a", {"png": b""})])[:512])
    head[124:136] = b"77777777777\0"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    with pytest.raises(TarError, match="more than"):
        tar.scan(bytes(head) + bytes(2048), "x.tar")


def test_samples_are_grouped_by_the_webdataset_rule() -> None:
    members = [tar.Member(name, 0, 0) for name in ("d.x/a.seg.png", "d.x/a.CLS", "b.png")]
    samples = tar.group(members, "x")
    assert [(s.key, sorted(s.members)) for s in samples] == [("d.x/a", ["cls", "seg.png"]), ("b", ["png"])]


@pytest.mark.parametrize(
    ("names", "why"), [(["a.png", "b.png", "a.cls"], "not together"), (["a.png", "a.PNG"], "two members")]
)
def test_mixed_up_keys_are_refused(names: list[str], why: str) -> None:
    with pytest.raises(TarError, match=why):
        tar.group([tar.Member(name, 0, 0) for name in names], "x")
