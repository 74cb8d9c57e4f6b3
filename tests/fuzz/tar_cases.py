"""Damaged tars, and what must hold for each: `tar.scan` refuses it, or lists what every tar reader finds in it."""

import bz2
import dataclasses
import functools
import gzip
import io
import lzma
import random
import re
import tarfile
from collections.abc import Callable, Iterable

import pyarrow as pa

from pipeline.dataset import tar
from pipeline.dataset.tar import TarError
from tests.fuzz import mutation, tar_corpus
from tests.fuzz.pool import Outcome
from tests.fuzz.tar_corpus import BLOCK, Archive

# Where the fields of a header lie.
_FIELDS = {"name": (0, 100), "size": (124, 136), "type": (156, 157), "magic": (257, 265), "prefix": (345, 500)}
# Numbers that Python's reader wants right and we do not look at: mode and owner, time, device.
_UNREAD = (range(100, 124), range(136, 148), range(329, 345))
_SIZES = (
    b"77777777777\0",
    b"-0000000001\0",
    b"0o000000010\0",
    b"0_000000010\0",
    b"+0000000010\0",
    b"0000000\x001234",
    b"            ",
    b"\0" * 12,
    b"9999999999 \0",
    b"\x80" + bytes(10) + b"\x05",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"\xff" * 11 + b"\x00",
    b"00000000001\0",
    b"00000001000\0",
    b"\t000000010\n\0",
)
_NAMES = (
    b"../up.png",
    b"a/../b.png",
    b"..",
    b"/abs.png",
    b"//abs.png",
    b"",
    b".",
    b"./00001.png",
    b"00001.png/",
    b"00001..png",
    b"x" * 100,
    b"\xff\xfe.png",
    b"a\0b.png",
    b"C:\\x.png",
    b"00001.PNG",
    b"00001.png",
    b"-rf",
    b"\n.png",
    "ｆ.png".encode(),
)
_TYPES = b"\0" + b"01234567xgLKSVMDNAX9 \xff"
# Why a tar is refused in which Python's reader sees no fault. It ends without a word at the first bad header or end
# mark, follows the last of several extension headers, reads of a damaged one what it can, and takes any name.
_STRICTER = (
    "goes on after its end-of-archive mark|two extension headers|header that no member follows|damaged pax header|"
    "damaged long name|sparse file|sets their path or size|link or a special file|name prefix in a format without|"
    "no tar header|negative size|more than|not UTF-8|absolute|appears twice|not together|two members with extension"
)
_MEMBER_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PACKERS = (gzip.compress, bz2.compress, lzma.compress, functools.partial(pa.compress, codec="zstd", asbytes=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """A damaged archive and what was done to it."""

    archive: Archive
    mutation: str
    data: bytes


def _header_field(rng: random.Random, archive: Archive) -> bytes:
    """A header says something else, its checksum right."""
    data, at = archive.data, rng.choice(tar_corpus.headers(archive.data))
    kind = rng.choice(("size", "size", "name", "type", "type", "prefix", "magic"))
    start, stop = _FIELDS[kind]
    choices = {"size": _SIZES, "name": _NAMES, "prefix": _NAMES, "magic": (b"ustar  \0", b"ustar\x0000", bytes(8))}
    value = bytes([rng.choice(_TYPES)]) if kind == "type" else rng.choice(choices[kind])
    if kind == "size" and rng.random() < 0.5:
        value = b"%011o\0" % rng.choice((0, 1, 511, 512, 513, 1024, 5000, len(data), 2**26, 2**26 + 1, 2**33 - 1))
    block = bytearray(data[at : at + BLOCK])
    block[start:stop] = value[: stop - start].ljust(stop - start, b"\0")
    return data[:at] + tar_corpus.with_checksum(bytes(block)) + data[at + BLOCK :]


def _checksums(rng: random.Random, archive: Archive) -> bytes:
    """A few bits of one header are others, its checksum right."""
    data, at = archive.data, rng.choice(tar_corpus.headers(archive.data))
    block = data[at : at + BLOCK]
    places = [place for place in range(BLOCK) if not any(place in unread for unread in _UNREAD)]
    for place in rng.choices(places, k=rng.randint(1, 3)):
        block = mutation.flipped(block, 8 * place + rng.randrange(8))
    return data[:at] + tar_corpus.with_checksum(block) + data[at + BLOCK :]


def _cut_block(rng: random.Random, archive: Archive) -> bytes:
    """The end is missing, at a block's end."""
    return archive.data[: BLOCK * rng.randrange(len(archive.data) // BLOCK)]


def _blocks(rng: random.Random, archive: Archive) -> bytes:
    """A run of blocks, often a whole member, is missing, comes twice, or lies elsewhere."""
    data = archive.data
    places = rng.choice((tar_corpus.headers(data), range(0, len(data) + 1, BLOCK)))
    start, stop, elsewhere = (rng.choice(places) for _ in range(3))
    start, stop = min(start, stop), max(start, stop)
    part, rest = data[start:stop], data[:start] + data[stop:]
    out = {
        "missing": rest,
        "twice": data[:stop] + data[start:],
        "elsewhere": rest[:elsewhere] + part + rest[elsewhere:],
    }
    return out[rng.choice(tuple(out))]


def _extension(rng: random.Random, archive: Archive) -> bytes:
    """Extension headers stand before a member: pax records right and wrong, long names, several in a row."""
    data, at = archive.data, rng.choice(tar_corpus.headers(archive.data))
    added = b"".join(_one_extension(rng) for _ in range(rng.choice((1, 1, 1, 2, 5))))
    return data[:at] + added + data[at:]


def _one_extension(rng: random.Random) -> bytes:
    kind = rng.choice((b"x", b"x", b"x", b"g", b"L", b"K"))
    if kind in (b"L", b"K"):
        body = rng.choice((b"y" * 150 + b".png\0", *_NAMES, b"z" * 300, b"w" * 70_000))
    else:
        body = b"".join(_record(rng) for _ in range(rng.randint(1, 3)))
    if rng.random() < 0.3 and body:
        body = mutation.ANYWHERE[rng.choice(("flip", "cut", "repeat", "overwrite"))](rng, body)
    size: int | bytes = len(body) if rng.random() < 0.9 else rng.choice(_SIZES)
    return tar_corpus.header(b"././@LongLink", size, kind) + tar_corpus.padded(body)


def _record(rng: random.Random) -> bytes:
    """A pax record; one in five has a wrong length."""
    keyword, values = rng.choice(
        (
            (b"path", _NAMES),
            (b"path", (b"v" * 200 + b".png",)),
            (b"size", (b"0", b"5", b"600", b"-1", b"1e3", b"9" * 30, b"", b"\xb2", b"0x10", b"1_0")),
            (b"mtime", (b"1.5", b"nan", b"")),
            (b"GNU.sparse.name", (b"sparse.png",)),
            (b"GNU.sparse.major", (b"1",)),
            (b"comment", (b"c" * 500,)),
            (b"", (b"",)),
        )
    )
    record = tar_corpus.pax_record(keyword, rng.choice(values))
    return record if rng.random() < 0.8 else rng.choice((b"", b"0", b"-3", b"999999", b"1" * 50, b"7")) + record[2:]


def _packed(rng: random.Random, archive: Archive) -> bytes:
    """Compressed, whole or cut."""
    packed: bytes = rng.choice(_PACKERS)(archive.data)
    return packed if rng.random() < 0.5 else mutation.cut(rng, packed)


def _joined(rng: random.Random, archive: Archive) -> bytes:
    """Two archives in one file; of the first, the end mark is there, half there or not."""
    other = rng.choice(tar_corpus.archives())
    return archive.data.rstrip(b"\0") + bytes(BLOCK * rng.randint(0, 3)) + other.data


def _interleaved(rng: random.Random, archive: Archive) -> bytes:
    """The members of an archive in another order, one perhaps twice."""
    members = tar_corpus.pieces(archive.data)
    rng.shuffle(members)
    return b"".join(members[: rng.randint(1, len(members))]) + rng.choice(members) + bytes(2 * BLOCK)


def _garbage(rng: random.Random, _: Archive) -> bytes:
    """Random bytes, with or without a header before them."""
    head = tar_corpus.header(b"00000.png", rng.choice(_SIZES), bytes([rng.choice(_TYPES)]))
    return rng.choice((b"", head, bytes(BLOCK))) + rng.randbytes(rng.randint(0, 3000))


_OWN = {
    "header-field": _header_field,
    "checksums": _checksums,
    "cut-block": _cut_block,
    "blocks": _blocks,
    "extension": _extension,
    "packed": _packed,
    "joined": _joined,
    "interleaved": _interleaved,
    "garbage": _garbage,
}


def make(seed: int, number: int) -> Case:
    """The case of a number."""
    rng = random.Random(f"{seed}/{number}")
    filled = [archive for archive in tar_corpus.archives() if archive.content]
    archive, donor = rng.choice(filled), rng.choice(filled)
    kind = rng.choice((*mutation.ANYWHERE, *mutation.WITH_DONOR, *_OWN, *("header-field", "extension", "checksums")))
    if kind in mutation.ANYWHERE:
        data = mutation.ANYWHERE[kind](rng, archive.data)
    elif kind in mutation.WITH_DONOR:
        data = mutation.WITH_DONOR[kind](rng, archive.data, donor.data)
    else:
        data = _OWN[kind](rng, archive)
    return Case(archive, kind, data)


def check(case: Case) -> Outcome:
    """What the pool calls: accepted, refused, or stricter, which is refused where Python's reader sees no fault."""
    theirs = listed_by_tarfile(case.data)
    members, refusal = listed(lambda: tar.scan(case.data, "fuzz.tar"))
    assert (members, refusal) == listed(lambda: tar.walk(_in_windows(case.data), len(case.data), "fuzz.tar"))
    if members is None:
        assert re.match(r"fuzz\.tar: [^\n]{1,400}$", refusal), refusal
        assert theirs is None or re.search(_STRICTER, refusal), refusal
        return Outcome(case.mutation, "refused" if theirs is None else "stricter")
    check_members(case.data, members)
    ours = listed_by_us(case.data)
    if case.mutation in ("cut", "cut-block"):
        assert ours == list(case.archive.content), f"{case.archive.name} cut at {len(case.data)} is taken for whole"
    if theirs is None:  # it may dislike a number that we do not read
        plain = _without_unread(case.data, members)
        ours, theirs = listed_by_us(plain), listed_by_tarfile(plain)
    assert ours == theirs, f"{case.archive.name}: {names(ours)} but tarfile has {names(theirs)}"
    return Outcome(case.mutation, "accepted")


def _in_windows(data: bytes) -> Callable[[int, int], bytes]:
    """Reads by windows that no block's end meets."""
    window = tar.Window(functools.partial(_part, data), len(data), window_bytes=2 * BLOCK - 1)

    def read(offset: int, size_bytes: int) -> bytes:
        got = window.read(offset, size_bytes)
        assert got == _part(data, offset, size_bytes)
        return got

    return read


def _part(data: bytes, offset: int, size_bytes: int) -> bytes:
    assert 0 <= offset <= offset + size_bytes <= len(data), "read beyond the end"
    return data[offset : offset + size_bytes]


def listed(scan: Callable[[], Iterable[tar.Member]]) -> tuple[list[tar.Member] | None, str]:
    """The members, or why there are none: what a scan says, or the grouping of what it found."""
    try:
        members = list(scan())
        samples = tar.group(members, "fuzz.tar")
    except TarError as error:
        return None, str(error)
    grouped = [member for sample in samples for member in sample.members.values()]
    assert grouped == [member for member in members if member in grouped]
    return members, ""


def _without_unread(data: bytes, members: list[tar.Member]) -> bytes:
    """The tar with zeros where headers, also those of tars within it, have numbers that we do not read."""
    starts = {member.offset - BLOCK for member in members}
    blocks = {at: bytearray(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)}
    for at, block in blocks.items():
        if at in starts or block[257:262] == b"ustar":
            for unread in _UNREAD:
                block[unread.start : unread.stop] = bytes(len(unread))
            block[:] = tar_corpus.with_checksum(bytes(block))
    return b"".join(blocks.values())


def listed_by_us(data: bytes) -> list[tuple[str, bytes]]:
    """Name and bytes of each file, as `tar.scan` finds them."""
    return [(one.name, data[one.offset : one.offset + one.size_bytes]) for one in tar.scan(data, "fuzz.tar")]


def names(members: list[tuple[str, bytes]] | None) -> list[str] | None:
    """For a message."""
    return None if members is None else [name for name, _ in members]


def check_members(data: bytes, members: list[tar.Member]) -> None:
    """Members lie in the buffer, in order and apart, and have names that may be joined to a folder's."""
    end = 0
    for member in members:
        assert member.offset >= end + BLOCK
        assert member.offset % BLOCK == 0
        assert 0 <= member.size_bytes <= tar.MAX_MEMBER_BYTES
        end = member.offset + member.size_bytes
        assert end <= len(data)
        parts = member.name.split("/")
        assert 0 < len(member.name) <= tar.MAX_NAME_CHARS
        assert parts[0]
        assert ".." not in parts
        assert "\0" not in member.name
    assert len({member.name for member in members}) == len(members)


def listed_by_tarfile(data: bytes) -> list[tuple[str, bytes]] | None:
    """Name and bytes of each file, by Python's reader; None if it finds a fault, an end too soon, or other than files.

    That reader ends without a word at a header it cannot read, so what it stopped at is looked at here.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            members = archive.getmembers()
            if not all(member.isdir() or member.type in _MEMBER_TYPES for member in members):
                return None
            if any(member.sparse is not None or (member.isdir() and member.size) for member in members):
                return None  # readers differ in what follows a folder that has a size
            end = archive.offset
            bodies = [(member.name, data[member.offset_data :][: member.size]) for member in members if member.isreg()]
    except (tarfile.TarError, OSError, ValueError, IndexError, OverflowError):
        return None
    whole = [len(body) for _, body in bodies] == [member.size for member in members if member.isreg()]
    return bodies if whole and data[end : end + 2 * BLOCK] == bytes(2 * BLOCK) else None
