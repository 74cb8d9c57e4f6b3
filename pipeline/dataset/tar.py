"""WebDataset tars: byte-deterministic writing, and a header scan that refuses what we would not write.

Nothing is ever extracted to disk. Only uncompressed regular members are accepted; the caps keep a hostile file from
costing more than its own size.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pipeline.errors import InputError

BLOCK_BYTES = 512
MAX_MEMBER_BYTES = 64 * 1024**2
MAX_MEMBERS = 1_000_000
MAX_NAME_CHARS = 255
_MAX_EXTENSION_BYTES = 64 * 1024
_MAX_PADDING_BYTES = 1024**2  # zeros after the last member: tar pads to 10 KB unless told otherwise
_MAX_DIGITS = 20
END_BYTES = 2 * BLOCK_BYTES
_END = bytes(END_BYTES)
_PLAIN, _EXTENSIONS = (b"0", b"\0"), (b"x", b"g", b"L")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
}


class TarError(InputError):
    """A tar that is truncated, altered, or holds what a shard may not hold."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One regular file in a tar: where its bytes lie."""

    name: str
    offset: int
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """The members that share a key: extension (lower case, no dot) → member."""

    key: str
    members: Mapping[str, Member]


def build(samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """A tar of (key, {extension: bytes}); equal samples give equal bytes.

    Members are sorted by name within a sample, samples keep their order; mtime 0, mode 0644, owner 0.
    """
    pieces: list[bytes] = []
    for key, files in samples:
        for extension in sorted(files):
            data = files[extension]
            pieces += (_header(f"{key}.{extension}", len(data)), data, bytes(-len(data) % BLOCK_BYTES))
    return b"".join([*pieces, _END])


def _blank_header() -> bytes:
    """A POSIX ustar header block without name and size, and with spaces for the checksum."""
    head = bytearray(BLOCK_BYTES)
    head[100:108] = b"0000644\0"
    head[108:124] = b"0000000\0" * 2
    head[136:148] = b"%011o\0" % 0
    head[148:156] = b" " * 8
    head[156:157] = b"0"
    head[257:265] = b"ustar\x0000"
    head[329:345] = b"0000000\0" * 2
    return bytes(head)


_BLANK = _blank_header()
_BLANK_SUM = sum(_BLANK)


def _header(name: str, size_bytes: int) -> bytes:
    raw, size = name.encode(), b"%011o" % size_bytes
    assert len(raw) <= 100
    checksum = b"%06o\0 " % (_BLANK_SUM + sum(raw) + sum(size))
    return raw + _BLANK[len(raw) : 124] + size + _BLANK[135:148] + checksum + _BLANK[156:]


def _checksum(block: bytes) -> int:
    """The sum of a block's bytes. Most are zero, and Python adds one at a time."""
    return sum(block.translate(None, b"\0"))


def scan(data: bytes, where: str) -> list[Member]:
    """The regular members of a whole tar, in order; raises TarError as `walk` does."""
    view = memoryview(data)
    return list(walk(lambda offset, size: bytes(view[offset : offset + size]), len(data), where))


def walk(read: Callable[[int, int], bytes], size_bytes: int, where: str) -> Iterator[Member]:
    """The regular members of a tar of `size_bytes`, in order; `read(offset, size)` fetches exactly so many bytes of it.

    Headers alone are read, and the end. Raises TarError for a cut, a bad header, a link or device, a sparse file, a
    name that is absolute, not UTF-8, holds `..` or is repeated, for a member or count above the caps, and for anything
    after the end. `where` names the tar in the message.
    """
    names: set[str] = set()
    for member in _members(read, size_bytes, where):
        _check_name(member.name, where)
        if member.name in names:
            raise TarError(f"{where}: member {member.name!r} appears twice; write the shard again with unique names")
        if len(names) == MAX_MEMBERS:
            raise TarError(f"{where}: more than {MAX_MEMBERS} members; split the shard")
        names.add(member.name)
        yield member


class Window:
    """Reads a stored tar for `walk`: a window at a time, so that small members cost no request each, and never the
    bytes of a member longer than the window.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size_bytes: int, window_bytes: int = 1024**2) -> None:
        self._fetch, self._size_bytes, self._window_bytes = fetch, size_bytes, window_bytes
        self._start, self._held = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`, which must lie within the tar."""
        if not self._start <= offset <= offset + size <= self._start + len(self._held):
            wanted = max(size, min(self._window_bytes, self._size_bytes - offset))
            self._start, self._held = offset, self._fetch(offset, wanted)
        return self._held[offset - self._start : offset - self._start + size]


@dataclasses.dataclass(frozen=True, slots=True)
class _Extension:
    """What extension headers say of the member after them."""

    name: str | None = None
    size_bytes: int | None = None


def _members(read: Callable[[int, int], bytes], size_bytes: int, where: str) -> Iterator[Member]:
    """Walk the header blocks; extension headers (pax path and size, GNU long name) apply to the next member."""
    offset, extension, kind = 0, None, b""
    while True:
        if offset + BLOCK_BYTES > size_bytes:
            _refuse_compressed(b"" if offset else read(0, size_bytes), where)
            raise TarError(f"{where}: truncated at byte {offset}: no end-of-archive mark; copy the file again")
        block = read(offset, BLOCK_BYTES)
        if not any(block):
            _check_end(read, offset, size_bytes, kind in _EXTENSIONS, where)
            return
        name, kind, size = _parse(block, offset, where)
        if kind in _PLAIN and extension is not None:
            name = name if extension.name is None else extension.name
            size = size if extension.size_bytes is None else extension.size_bytes
        body = offset + BLOCK_BYTES
        _check_size(name, kind, size, size_bytes - body, where)
        offset = body + size + (-size % BLOCK_BYTES)
        if kind in _EXTENSIONS:
            extension = _extension(kind, read(body, size), extension, where)
        elif kind in _PLAIN:
            yield Member(name, body, size)
            extension = None
        elif kind == b"5" and not size:
            extension = None
        else:
            what = f"{name!r} is a link or a special file (type {kind.decode('latin-1')!r})"
            raise TarError(f"{where}: {what}; only plain files are read")


def _check_end(read: Callable[[int, int], bytes], offset: int, size_bytes: int, unfinished: bool, where: str) -> None:
    """Two zero blocks, and zeros to the end: what follows would be lost without a word."""
    left = size_bytes - offset
    if unfinished:
        raise TarError(f"{where}: ends with an extension header that no member follows; copy the file again")
    if left < len(_END):
        raise TarError(f"{where}: truncated at byte {offset}: half an end-of-archive mark; copy the file again")
    if left > _MAX_PADDING_BYTES or any(read(offset, left)):
        raise TarError(f"{where}: goes on after its end-of-archive mark at byte {offset}; is it several tars in one?")


def _check_size(name: str, kind: bytes, size: int, left: int, where: str) -> None:
    cap = _MAX_EXTENSION_BYTES if kind in _EXTENSIONS else MAX_MEMBER_BYTES
    if size > cap:
        raise TarError(f"{where}: member {name[:80]!r} has {size} bytes, more than the {cap} allowed")
    if size > left:
        raise TarError(f"{where}: truncated inside member {name[:80]!r}; copy the file again")


def _parse(block: bytes, offset: int, where: str) -> tuple[str, bytes, int]:
    """Name, type and size of a header block whose checksum holds."""
    stored, size = _number(block[148:156]), _number(block[124:136])
    if stored != _checksum(block) - sum(block[148:156]) + 8 * 32 or size is None:
        _refuse_compressed(b"" if offset else block, where)
        raise TarError(f"{where}: no tar header at byte {offset}; is it an undamaged tar?")
    if size < 0:
        raise TarError(f"{where}: a member of negative size at byte {offset}; write the shard again")
    name = block[0:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0]
    if prefix and block[257:263] != b"ustar\0":
        # Readers differ in whether this is a part of the name.
        raise TarError(f"{where}: the header at byte {offset} has a name prefix in a format without; write it as pax")
    return _text(prefix + b"/" + name if prefix else name, where), block[156:157], size


def _refuse_compressed(head: bytes, where: str) -> None:
    """Say so of what is no tar because it is compressed."""
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise TarError(f"{where}: is compressed ({name}), and shards are read in place; unpack it")


def _number(field: bytes) -> int | None:
    """A header's number: octal digits, or binary where the first bit is set (GNU); None if it is neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.split(b"\0", 1)[0].strip(b" ")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _extension(kind: bytes, body: bytes, pending: _Extension | None, where: str) -> _Extension | None:
    """What is said of the next member once this extension header is read; `pending` is what was before.

    Raises TarError where it is damaged or says what only some readers follow.
    """
    if pending is not None and kind != b"g":
        raise TarError(f"{where}: two extension headers for one member; write the shard again")
    if kind == b"L":
        if not body.endswith(b"\0"):  # readers differ: some go on to the first zero
            raise TarError(f"{where}: damaged long name; copy the file again")
        return _Extension(name=_text(body.rstrip(b"\0"), where))
    records = _pax(body, where)
    if any(name.startswith(b"GNU.sparse.") for name in records):
        raise TarError(f"{where}: holds a sparse file; write the shard again without --sparse")
    path, size = records.get(b"path"), records.get(b"size")
    if path == b"" or (size is not None and not (size.isdigit() and len(size) <= _MAX_DIGITS)):
        raise TarError(f"{where}: damaged pax header; copy the file again")
    if kind == b"g":
        if path or size:
            raise TarError(f"{where}: a header for all members sets their path or size; write the shard again")
        return pending
    return _Extension(name=_text(path, where) if path else None, size_bytes=int(size) if size else None)


def _pax(body: bytes, where: str) -> dict[bytes, bytes]:
    """The records of a pax header: each "length name=value\\n"."""
    records: dict[bytes, bytes] = {}
    rest = body
    while rest:
        digits, _, _ = rest[: _MAX_DIGITS + 1].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        name, equals, value = rest[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if length > len(rest) or not name or not equals or rest[length - 1 : length] != b"\n":
            raise TarError(f"{where}: damaged pax header; copy the file again")
        records[name] = value
        rest = rest[length:]
    return records


def _text(name: bytes, where: str) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise TarError(f"{where}: member name {name[:80]!r} is not UTF-8; write the shard again") from error


def _check_name(name: str, where: str) -> None:
    """Refuse a name that an extracting reader could be led astray by."""
    bad = not name or len(name) > MAX_NAME_CHARS or "\0" in name or name.startswith("/") or name.endswith("/")
    if bad or ".." in name.split("/"):
        raise TarError(f"{where}: member name {name[:80]!r} is empty, too long, absolute, a folder's or holds '..'")


def group(members: Sequence[Member], where: str) -> list[Sample]:
    """Members → samples, by the WebDataset rule: the key is the path up to the first dot of its last part.

    A name that begins with a dot or has none belongs to no sample. Raises TarError when the members of one key are not
    together or an extension repeats.
    """
    samples: list[Sample] = []
    seen: set[str] = set()
    files: dict[str, Member] = {}
    for member in members:
        key, extension = split_name(member.name)
        if not extension:
            continue
        if not samples or samples[-1].key != key:
            if key in seen:
                raise TarError(f"{where}: the members of key {key!r} are not together; sort the shard by name")
            seen.add(key)
            files = {}
            samples.append(Sample(key, files))
        if extension in files:
            raise TarError(f"{where}: key {key!r} has two members with extension {extension!r}")
        files[extension] = member
    return samples


def split_name(name: str) -> tuple[str, str]:
    """A member's key and its extension in lower case; without extension where it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""
