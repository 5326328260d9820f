"""The size of a picture without its pixels, and which frame that size tells.

Boxes refer either to the pixels as stored or to the picture as a viewer shows it, turned as its
EXIF note says (see ``ivt_env.data.pictures``). A stated height and width tells the two apart only
where they have different shapes: not for a picture turned by half, mirrored, or square.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

from PIL import Image

from ivt_env.data.checked import BadRowError
from ivt_env.data.pictures import MAX_PIXELS

_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Header:
    """What a picture file says of itself."""

    stored: tuple[int, int]
    """(height, width) of the pixels as stored."""
    orientation: int
    """EXIF: 1 is upright, 2 to 8 are mirrored or turned."""

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) as a viewer shows it."""
        return (self.stored[1], self.stored[0]) if self.orientation in _QUARTER_TURNS else self.stored

    def fits(self, size: tuple[int, int]) -> bool:
        """Whether the picture has this (height, width), as stored or upright."""
        return size in (self.stored, self.upright)

    @property
    def frame_is_unclear(self) -> bool:
        """Whether the stored and the upright picture differ, and have the same height and width."""
        return self.orientation in (2, 3, 4) or (self.orientation in _QUARTER_TURNS and len(set(self.stored)) == 1)


def read_header(source: str | os.PathLike[str] | bytes, where: str) -> Header:
    """Size and orientation of a picture.

    Only the header is read; a PNG without an EXIF block is decoded, as the block may come last.

    Args:
        source: path of the file, or its bytes.
        where: how an error names the picture.

    Raises:
        BadRowError: for a picture that is absent, no picture, or larger than ``MAX_PIXELS``.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadRowError(
                    f"{where}: picture refused because it is too large ({width}x{height} pixels; the limit is "
                    f"{MAX_PIXELS} pixels); scale it down, and its boxes with it where they are in pixels"
                )
            if image.format == "PNG" and "exif" not in image.info:
                image.load()
            return Header((height, width), _orientation(image))
    except BadRowError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadRowError(f"{where}: no such picture; check the path, or put the picture there") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRowError(
            f"{where}: picture refused because it is too large ({error}; the limit is {MAX_PIXELS} pixels); "
            "scale it down, and its boxes with it where they are in pixels"
        ) from error
    except Exception as error:  # a decoder given broken bytes raises nearly anything
        raise BadRowError(
            f"{where}: not a picture that can be read ({type(error).__name__}: {error}); "
            "the file is cut off, damaged or of an unknown format: fetch or export it again"
        ) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block; read_picture takes the pixels as stored then, and says so
        return 1
