"""Tars: what we write every tool reads, and what we would not write is refused."""

import bz2
import gzip
import io
import itertools
import lzma
import tarfile
from collections.abc import Callable, Iterable, Mapping

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset import tar
from pipeline.dataset.tar import TarError

SAMPLES = [("000000000", {"png": b"p" * 700, "cls": b"3"}), ("000000001", {"png": b"", "cls": b"0"})]


END = bytes(1024)


def foreign(
    *members: tuple[str, bytes],
    kind: bytes = tarfile.REGTYPE,
    fmt: int = tarfile.PAX_FORMAT,
    pax: Mapping[str, str] | None = None,
) -> bytes:
    """A tar by Python's own writer, with fractional times as the webdataset library writes them."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=fmt) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.mtime = len(data), kind, 1.5
            info.linkname = "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.pax_headers = dict(pax or {})
            out.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def header(
    name: bytes, kind: bytes, size: bytes = b"00000000000\0", magic: bytes = b"ustar\x0000", prefix: bytes = b""
) -> bytes:
    """A header block with a checksum that holds, whatever else it says."""
    block = bytearray(512)
    for start, field in ((0, name), (124, size), (156, kind), (257, magic), (345, prefix)):
        block[start : start + len(field)] = field
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def pax_blocks(record: bytes, name: bytes, kind: bytes = b"x") -> list[bytes]:
    """A pax header with one record, its body, and an empty member."""
    body = record + bytes(-len(record) % 512)
    return [header(b"pax", kind, b"%011o\0" % len(record)), body, header(name, b"0"), END]


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
        (foreign(("a.png", b""), kind=tarfile.CONTTYPE), "special file"),
        (foreign(("a.png", b""), kind=tarfile.GNUTYPE_SPARSE), "special file"),
        (foreign(("a.png", b"hidden"), kind=tarfile.DIRTYPE), "special file"),
        (foreign(("a.png", b"1"), pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), "sparse"),
        (foreign(("a" * 300 + ".png", b"")), "too long"),
        (foreign(("a.png", b""), pax={"comment": "c" * 70_000}), "more than"),
        (b"".join(pax_blocks(b"size=700\n", b"a.png")), "damaged pax header"),
        (b"".join(pax_blocks(b"xx path=b\n", b"a.png")), "damaged pax header"),
        (b"".join(pax_blocks(b"15 size=" + b"9" * 6 + b"\n", b"a.png")), "truncated inside"),
        (b"".join(pax_blocks(b"1" * 5000 + b" path=x\n", b"a.png")), "damaged pax header"),
        (b"".join(pax_blocks(b"5012 size=" + b"9" * 5001 + b"\n", b"a.png")), "damaged pax header"),
        (b"".join(pax_blocks(b"11 path=b\xff\n", b"a.png")), "not UTF-8"),
        (b"".join(pax_blocks(b"10 path=b\n", b"a.png", kind=b"g")), "for all members"),
        (b"".join([*pax_blocks(b"10 path=b\n", b"")[:2], *pax_blocks(b"10 path=c\n", b"a.png")]), "two ext"),
        (b"".join([*pax_blocks(b"10 path=b\n", b"")[:2], END]), "no member follows"),
        (header(b"a\xff.png", b"0") + END, "not UTF-8"),
        (header(b"folder/", b"0") + END, "a folder's"),
        (header(b"a.png", b"0", size=b"-0000000001\0") + END, "no tar header"),
        (header(b"a.png", b"0", size=b"0000000_100\0") + END, "no tar header"),
        (header(b"a.png", b"0", size=b"\xff" * 12) + END, "negative size"),
        (header(b"a.png", b"0", size=b"\x80" + b"\0" * 6 + b"\1" * 5) + END, "more than"),
        (header(b"a.png", b"0", magic=b"ustar  \0", prefix=b"up") + END, "name prefix"),
        (tar.build(SAMPLES)[:-512] + header(b"b.png", b"0") + END, "goes on after"),
        (tar.build(SAMPLES) + tar.build(SAMPLES), "goes on after"),
        (tar.build(SAMPLES) + bytes(2**21), "goes on after"),
        (gzip.compress(tar.build(SAMPLES), 0), "gzip"),
        (bz2.compress(tar.build(SAMPLES)), "bzip2"),
        (lzma.compress(tar.build(SAMPLES)), "xz"),
        (pa.compress(tar.build(SAMPLES), codec="zstd", asbytes=True), "zstd"),
        (b"PK\3\4" + bytes(600), "undamaged tar"),
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


def test_sizes_may_be_binary_and_padding_longer() -> None:
    data = header(b"a.png", b"0", size=b"\x80" + (3).to_bytes(11, "big")) + b"abc".ljust(512, b"\0") + bytes(10240)
    assert tar.scan(data, "x") == [tar.Member("a.png", 512, 3)]


def test_what_a_folder_is_called_is_not_the_next_file() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as out:
        folder = tarfile.TarInfo("f" * 150)
        folder.type = tarfile.DIRTYPE
        out.addfile(folder)
        out.addfile(tarfile.TarInfo("a.png"))
    assert [member.name for member in tar.scan(sink.getvalue(), "x")] == ["a.png"]


names = st.text("abcdef./é", min_size=1, max_size=130).filter(lambda n: "\0" not in n)
files = st.lists(st.tuples(names, st.binary(max_size=3000)), max_size=6, unique_by=lambda file: file[0])


def outcome(members: Callable[[], Iterable[tar.Member]]) -> list[tar.Member] | str:
    try:
        return list(members())
    except TarError as error:
        return str(error)


@given(files, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.integers(1, 5000), st.data())
def test_windows_see_what_a_whole_scan_sees(
    members: list[tuple[str, bytes]], fmt: int, window_bytes: int, data: st.DataObject
) -> None:
    """Of whole tars, and of cut and altered ones; what is asked for lies within the tar and is little more than it."""
    stored = bytearray(foreign(*members, fmt=fmt))
    if data.draw(st.booleans(), label="altered"):
        del stored[data.draw(st.integers(0, len(stored))) :]
        for place in data.draw(st.lists(st.integers(0, max(0, len(stored) - 1)), max_size=3)) if stored else []:
            stored[place] ^= 1 << data.draw(st.integers(0, 7))
    asked: list[tuple[int, int]] = []

    def fetch(offset: int, size: int) -> bytes:
        asked.append((offset, size))
        return bytes(stored[offset : offset + size])

    window = tar.Window(fetch, len(stored), window_bytes)
    assert outcome(lambda: tar.walk(window.read, len(stored), "x")) == outcome(lambda: tar.scan(bytes(stored), "x"))
    assert all(0 <= offset <= offset + size <= len(stored) for offset, size in asked)
    assert all(later[0] >= earlier[0] for earlier, later in itertools.pairwise(asked))


@pytest.mark.parametrize(("size", "share"), [(3 * 2**20, 0.36), (2**19, 1.1), (20_000, 1.01)])
def test_long_members_are_passed_over(size: int, share: float) -> None:
    data = tar.build((f"{i:09d}", {"jpg": bytes(size), "cls": b"1"}) for i in range(40 * 2**20 // size))
    asked: list[int] = []

    def fetch(offset: int, wanted: int) -> bytes:
        asked.append(wanted)
        return data[offset : offset + wanted]

    assert list(tar.walk(tar.Window(fetch, len(data)).read, len(data), "x")) == tar.scan(data, "x")
    assert sum(asked) < share * len(data)
    assert len(asked) < 60


def test_hidden_files_and_such_without_extension_belong_to_no_sample() -> None:
    members = [tar.Member(name, 0, 0) for name in ("README", "d/.hidden.png", "d/a.png", "._a.png", "d/a.cls", "b.png")]
    assert [(s.key, sorted(s.members)) for s in tar.group(members, "x")] == [("d/a", ["cls", "png"]), ("b", ["png"])]


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
