"""What the report's page shows as pictures: sections, each with a title and a text that says what to look for."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a gallery."""

    caption: str
    """What the reader is told under the picture."""
    alt: str
    """What the picture shows, for a reader who cannot see it."""
    png: bytes
    """The picture itself, a PNG file."""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """One section of pictures on the report's page."""

    title: str
    """The section's heading."""
    text: str
    """One or two sentences: what these pictures are, and what to look for in them."""
    pictures: tuple[Picture, ...]
    """The pictures, in the order they are shown."""
