"""WebDataset tars: byte-deterministic writing, and a header scan that refuses what we would not write.

Nothing is ever extracted to disk. Only uncompressed regular members are accepted; the caps keep a hostile file from
costing more than its own size.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipeline.errors import InputError

BLOCK_BYTES = 512
MAX_MEMBER_BYTES = 64 * 1024**2
MAX_MEMBERS = 1_000_000
MAX_NAME_CHARS = 255
_MAX_EXTENSION_BYTES = 64 * 1024
_END = bytes(2 * BLOCK_BYTES)


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
    out = bytearray()
    for key, files in samples:
        for extension in sorted(files):
            data = files[extension]
            out += _header(f"{key}.{extension}", len(data))
            out += data
            out += bytes(-len(data) % BLOCK_BYTES)
    out += _END
    return bytes(out)


def _header(name: str, size_bytes: int) -> bytes:
    """A POSIX ustar header block."""
    raw = name.encode()
    assert len(raw) <= 100
    head = bytearray(BLOCK_BYTES)
    head[0 : len(raw)] = raw
    head[100:108] = b"0000644\0"
    head[108:124] = b"0000000\0" * 2
    head[124:136] = b"%011o\0" % size_bytes
    head[136:148] = b"%011o\0" % 0
    head[148:156] = b" " * 8
    head[156:157] = b"0"
    head[257:265] = b"ustar\x0000"
    head[329:345] = b"0000000\0" * 2
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def scan(data: bytes, where: str) -> list[Member]:
    """The regular members of a whole tar, in order.

    Raises TarError for a cut, a bad header, a link or device, a name that is absolute, holds `..` or is repeated,
    and for a member or count above the caps. `where` names the tar in the message.
    """
    members: list[Member] = []
    names: set[str] = set()
    for member in _members(memoryview(data), where):
        _check_name(member.name, where)
        if member.name in names:
            raise TarError(f"{where}: member {member.name!r} appears twice; write the shard again with unique names")
        if len(members) == MAX_MEMBERS:
            raise TarError(f"{where}: more than {MAX_MEMBERS} members; split the shard")
        names.add(member.name)
        members.append(member)
    return members


def _members(data: memoryview, where: str) -> Iterator[Member]:
    """Walk the header blocks; extension headers (pax path and size, GNU long name) apply to the next member."""
    offset, long_name, long_size = 0, None, None
    while True:
        block = bytes(data[offset : offset + BLOCK_BYTES])
        if len(block) < BLOCK_BYTES:
            raise TarError(f"{where}: truncated at byte {offset}: no end-of-archive mark; copy the file again")
        if not any(block):
            if bytes(data[offset : offset + 2 * BLOCK_BYTES]) != _END:
                raise TarError(f"{where}: truncated at byte {offset}: half an end-of-archive mark; copy the file again")
            return
        name, kind, size = _parse(block, offset, where)
        body = offset + BLOCK_BYTES
        size = long_size if long_size is not None and kind in b"0\0" else size
        _check_size(name, kind, size, len(data) - body, where)
        offset = body + size + (-size % BLOCK_BYTES)
        if kind == b"x":
            long_name, long_size = _pax(bytes(data[body : body + size]), where)
        elif kind == b"L":
            long_name = bytes(data[body : body + size]).rstrip(b"\0").decode("utf-8", "replace")
        elif kind in b"0\0":
            yield Member(long_name or name, body, size)
            long_name, long_size = None, None
        elif kind not in b"g5":
            raise TarError(f"{where}: {name!r} is a link or a special file (type {kind!r}); only plain files are read")


def _check_size(name: str, kind: bytes, size: int, left: int, where: str) -> None:
    cap = _MAX_EXTENSION_BYTES if kind in b"xgL" else MAX_MEMBER_BYTES
    if size > cap:
        raise TarError(f"{where}: member {name!r} has {size} bytes, more than the {cap} allowed")
    if size > left:
        raise TarError(f"{where}: truncated inside member {name!r}; copy the file again")


def _parse(block: bytes, offset: int, where: str) -> tuple[str, bytes, int]:
    """Name, type and size of a header block whose checksum holds."""
    try:
        stored = int(block[148:156].strip(b" \0") or b"-1", 8)
        size = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        stored, size = -1, 0
    if stored != sum(block) - sum(block[148:156]) + 8 * 32 or size < 0:
        raise TarError(f"{where}: no tar header at byte {offset}; is it an uncompressed, undamaged tar?")
    name = block[0:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    full = prefix + b"/" + name if prefix else name
    return full.decode("utf-8", "replace"), block[156:157], size


def _pax(body: bytes, where: str) -> tuple[str | None, int | None]:
    """The `path` and `size` records of a pax header, where present."""
    records: dict[bytes, bytes] = {}
    rest = body
    while rest:
        length, _, _ = rest.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(rest):
            raise TarError(f"{where}: damaged pax header; copy the file again")
        record, rest = rest[len(length) + 1 : int(length) - 1], rest[int(length) :]
        name, _, value = record.partition(b"=")
        records[name] = value
    path, size = records.get(b"path"), records.get(b"size")
    if size is not None and not size.isdigit():
        raise TarError(f"{where}: damaged pax header; copy the file again")
    return path.decode("utf-8", "replace") if path else None, int(size) if size else None


def _check_name(name: str, where: str) -> None:
    """Refuse a name that an extracting reader could be led astray by."""
    if not name or len(name) > MAX_NAME_CHARS or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise TarError(f"{where}: member name {name[:80]!r} is empty, too long, absolute or holds '..'")


def group(members: Sequence[Member], where: str) -> list[Sample]:
    """Members → samples, by the WebDataset rule: the key is the path up to the first dot of its last part.

    Raises TarError when the members of one key are not together or an extension repeats.
    """
    samples: list[Sample] = []
    seen: set[str] = set()
    files: dict[str, Member] = {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not samples or samples[-1].key != key:
            if key in seen:
                raise TarError(f"{where}: the members of key {key!r} are not together; sort the shard by name")
            seen.add(key)
            files = {}
            samples.append(Sample(key, files))
        if extension.lower() in files:
            raise TarError(f"{where}: key {key!r} has two members with extension {extension.lower()!r}")
        files[extension.lower()] = member
    return samples
