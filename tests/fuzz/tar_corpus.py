"""Small tars by every writer whose shards are met: ours, Python's in its three formats, the webdataset library's."""

import dataclasses
import functools
import io
import tarfile
from collections.abc import Iterator, Sequence

import webdataset

from pipeline.dataset import tar

BLOCK = tar.BLOCK_BYTES


@dataclasses.dataclass(frozen=True)
class Archive:
    """A whole tar that `tar.scan` takes, and what it holds."""

    name: str
    data: bytes
    content: tuple[tuple[str, bytes], ...]
    """Name and bytes of each regular member, in order."""


def _samples(count: int, folder: str = "") -> list[tuple[str, bytes]]:
    """Names and bodies; lengths lie on both sides of a block's end."""
    lengths = (0, 511, 512, 513)
    out = []
    for number in range(count):
        out.append((f"{folder}{number:05d}.cls", b"%d" % (number % 2)))
        out.append((f"{folder}{number:05d}.png", bytes([65 + number]) * lengths[number % len(lengths)]))
    return out


def python_tar(
    members: Sequence[tuple[str, bytes]], form: int, *, mtime: float = 1.5, pax: dict[str, str] | None = None
) -> bytes:
    """A tar by Python's writer; a name that ends in a slash is a folder."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form, pax_headers=pax or {}) as out:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime  # type: ignore[assignment]
            info.size, info.type = len(body), tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            out.addfile(info, io.BytesIO(body))
    return sink.getvalue()


def _webdataset_tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with webdataset.TarWriter(sink) as out:
        for at in range(0, len(members), 2):
            (label_name, label), (_, image) = members[at : at + 2]
            out.write({"__key__": label_name.removesuffix(".cls"), "cls": label, "png": image})
    return sink.getvalue()


def _made() -> Iterator[tuple[str, bytes, list[tuple[str, bytes]]]]:
    plain = _samples(4)
    yield (
        "ours",
        tar.build([(f"{n:05d}", {"cls": plain[2 * n][1], "png": plain[2 * n + 1][1]}) for n in range(4)]),
        plain,
    )
    yield "ours-empty", tar.build([]), []
    forms = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    for name, form in forms.items():
        split = _samples(3, "folder/" * 20)  # fits name and prefix
        long = _samples(3, "x" * 120 + "/")
        yield f"{name}-plain", python_tar(plain, form), plain
        yield f"{name}-prefix", python_tar(split, form), split
        if name != "ustar":
            yield f"{name}-long", python_tar(long, form), long
            yield f"{name}-accents", python_tar(_samples(2, "é" * 60 + "/"), form), _samples(2, "é" * 60 + "/")
        folders = [("a/", b""), *_samples(2, "a/"), ("b/", b""), *_samples(2, "b/")]
        yield f"{name}-folders", python_tar(folders, form), [one for one in folders if not one[0].endswith("/")]
    yield "pax-global", python_tar(plain, tarfile.PAX_FORMAT, pax={"comment": "made by hand"}), plain
    nested = [("00000.tar", python_tar(plain, tarfile.GNU_FORMAT)), ("00001.tar", tar.build([]))]
    yield "nested", python_tar(nested, tarfile.GNU_FORMAT), nested
    yield "webdataset", _webdataset_tar(plain), plain


@functools.cache
def archives() -> tuple[Archive, ...]:
    """The corpus, in the same order with the same bytes at every call."""
    return tuple(Archive(name, data, tuple(content)) for name, data, content in _made())


def headers(data: bytes) -> tuple[int, ...]:
    """The offsets of the header blocks of a whole tar, extension headers among them."""
    lengths = [len(piece) for piece in pieces(data)]
    return tuple(sum(lengths[:number]) for number in range(len(lengths)))


def pieces(data: bytes) -> list[bytes]:
    """Each header block of a whole tar with what belongs to it."""
    at, found = 0, []
    while any(data[at : at + BLOCK]):
        size = int(data[at + 124 : at + 136].strip(b" \0") or b"0", 8)
        found.append(data[at : at + BLOCK + size + -size % BLOCK])
        at += len(found[-1])
    return found


def header(name: bytes, size: bytes | int, kind: bytes = b"0") -> bytes:
    """A header block of one's choice, its checksum right."""
    block = bytearray(BLOCK)
    block[: min(len(name), 100)] = name[:100]
    block[100:108] = b"0000644\0"
    block[124:136] = (b"%011o\0" % size if isinstance(size, int) else size)[:12].ljust(12, b"\0")
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    return with_checksum(bytes(block))


def with_checksum(block: bytes) -> bytes:
    """A header block with its checksum made right."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def padded(body: bytes) -> bytes:
    """The body filled up to whole blocks."""
    return body + bytes(-len(body) % BLOCK)


def pax_record(keyword: bytes, value: bytes) -> bytes:
    """A record of a pax header, its length right."""
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest
