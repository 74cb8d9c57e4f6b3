"""What the names of files say where images lie: which are images, which folders are splits, what is hidden."""

from collections.abc import Mapping

SPLITS: Mapping[str, str] = {"train": "train", "test": "test", "val": "val", "validation": "val"}
"""Folder, in lower case → the split that it is."""
IMAGE_EXTENSIONS = frozenset(
    ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
)


def is_hidden(name: str) -> bool:
    """Whether a path has a part that starts with a dot, or is what macOS puts into archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
