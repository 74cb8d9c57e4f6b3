"""A tree of image files, in a folder or a zip: split folders, then class folders, or neither."""

import errno
import functools
import lzma
import weakref
import zipfile
import zlib
from collections.abc import Mapping, Sequence

from pipeline import storage
from pipeline.dataset.names import IMAGE_EXTENSIONS, SPLITS, is_hidden
from pipeline.prepare.listing import Item, ItemError, Kind, Source, SourceError, finish, refuse_mixture

_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def scan_tree(kind: Kind, url: str, sizes: Mapping[str, int], class_names: Sequence[str]) -> Source:
    """A tree of image files: split folders, then class folders, or neither; `sizes` are bytes by name.

    Raises SourceError, LabelError.
    """
    visible = [name for name in sizes if not is_hidden(name)]
    pictures = [name for name in visible if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    if not pictures:
        raise SourceError(f"source {url} holds no images; known extensions: {', '.join(sorted(IMAGE_EXTENSIONS))}")
    places = _places(url, pictures)
    items = [Item(split, name, label, name, 0, sizes[name]) for name, (split, label) in places.items()]
    return finish(kind, url, items, class_names, ignored=len(visible) - len(pictures))


def _places(url: str, names: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Name → (split, class); raises SourceError where some files have one and some have none."""
    wrap = _wrapping_folders(names)
    places: dict[str, tuple[str, str | None]] = {}
    with_split = []
    for name in names:
        folders = name.split("/")[wrap:-1]
        split = SPLITS.get(folders[0].lower()) if folders else None
        with_split.append(split is not None)
        rest = folders[1:] if split else folders
        places[name] = (split or "train", rest[0] if rest else None)
    refuse_mixture(url, names, with_split, "below a split folder (train, test, val)")
    refuse_mixture(url, names, [label is not None for _, label in places.values()], "in a class folder")
    return places


def _wrapping_folders(names: Sequence[str]) -> int:
    """Leading folders that all names share above their split or class folder, as in cats-1.0/train/tabby/1.png."""
    paths = [name.split("/") for name in names]
    wrap = 0
    while all(len(path) > wrap + 2 for path in paths) and len({path[wrap] for path in paths}) == 1:
        if paths[0][wrap].lower() in SPLITS:
            break
        wrap += 1
    return wrap


def scan_zip(url: str, class_names: Sequence[str]) -> Source:
    """A zip of such a tree. Raises SourceError, LabelError, StorageError."""
    infos = [info for info in _zip(url).infolist() if not info.is_dir()]
    for info in infos:
        if {"", ".", ".."} & set(info.filename.split("/")) or "\\" in info.filename:
            raise SourceError(f"source {url} holds a member named {info.filename[:80]!r}, which leaves the archive")
    infos = [info for info in infos if not is_hidden(info.filename)]
    sizes = {info.filename: info.file_size for info in infos}
    if len(sizes) != len(infos):
        raise SourceError(f"source {url} holds two members of one name; pack it again")
    for info in infos:
        if info.flag_bits & 1:
            raise SourceError(f"source {url} is encrypted ({info.filename}); unpack it and name the folder")
        if info.compress_type not in _ZIP_METHODS:
            raise SourceError(f"source {url} uses compression {info.compress_type} ({info.filename}); pack it again")
    if not sizes:
        raise SourceError(f"source {url} is an empty archive")
    return scan_tree("zip", url, sizes, class_names)


@functools.lru_cache(maxsize=2)
def _zip(url: str) -> zipfile.ZipFile:
    """The open archive, one a process; its file is closed when it leaves the cache."""
    file = storage.open_seekable(url)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        file.close()
        raise SourceError(f"source {url} is no readable zip ({error}); copy it again") from error
    weakref.finalize(archive, file.close)
    return archive


def read_member(url: str, name: str) -> bytes:
    """A member of a zip, unpacked. Raises ItemError, SourceError."""
    try:
        return _zip(url).read(name)
    except OSError as error:
        # bz2 raises it without a number, and a place before the file's start gives EINVAL; the rest is the disk's.
        if error.errno not in (None, errno.EINVAL):
            raise SourceError(f"source {url} cannot be read: {error.strerror}; check the disk, run again") from error
        raise ItemError(f"cannot unpack: {error}") from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, NotImplementedError) as error:
        raise ItemError(f"cannot unpack: {error}") from error
    except KeyError as error:
        raise SourceError(f"source {url} lost its member {name}; leave the source alone") from error
