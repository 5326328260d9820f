"""Reading one image file: any common format to RGB, or an error that says what is wrong with it.

Which frame a box refers to. A camera stores pixels in one orientation and may add a note (EXIF, in JPEG,
PNG, WebP, TIFF and AVIF) "show me rotated". A viewer shows the rotated image, and boxes drawn in a
viewer refer to that; ``read_image(file, where)`` gives that frame. The boxes of COCO (and so of RefCOCO,
RefCOCO+ and RefCOCOg) refer to the pixels as stored, and COCO states the width and height they refer to.
``read_image(file, where, size=(height, width))`` takes the stated size as authoritative: the pixels as
stored if they have it, else the rotated image if that has it, else an error. A box is thus never read in
a frame of another shape. ``Header`` alone knows the two frames; sizes, checks and pixels all come from it.

A stated size tells the frames apart only where they have different shapes: not for an image turned by half,
mirrored, or square.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ivt_env.data.checked import BadRowError, short
from ivt_env.data.sample import DataError, ImageArray

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: as RGB this one takes 192 MB."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STORED = _UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""The way back from the upright image."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Header:
    """What an image file says of itself: its two frames."""

    stored: tuple[int, int]
    """(height, width) of the pixels as stored."""
    orientation: int = 1
    """EXIF: 1 is upright, 2 to 8 are mirrored or turned, 5 to 8 by a quarter."""

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) as a viewer shows it."""
        return (self.stored[1], self.stored[0]) if self.orientation >= 5 else self.stored

    def misfit(self, size: tuple[int, int]) -> str | None:
        """Why boxes would be wrong that refer to an image of this (height, width); None where it has that size."""
        if size in (self.stored, self.upright):
            return None
        return (
            f"the image is {self.stored[1]} wide and {self.stored[0]} high, its annotation says {size[1]} wide and "
            f"{size[0]} high, so its boxes would be wrong; put the original file in its place (not resized, cropped or "
            "rotated), or correct the annotation"
        )

    @property
    def unclear(self) -> str | None:
        """What is wrong where the stored and the upright image differ, and have the same height and width."""
        if self.orientation == 1 or self.stored != self.upright:
            return None
        return (
            f"its EXIF note says to show it turned or mirrored (orientation {self.orientation}), with the same height "
            "and width, so it is unclear which of the two its boxes refer to; turn the pixels themselves (for example "
            "with ImageMagick's `mogrify -auto-orient`)"
        )


def read_header(source: str | os.PathLike[str] | bytes, where: str) -> Header:
    """Size and orientation of an image; BadRowError for what ``read_image`` refuses without looking at the pixels.

    Only the header is read; a PNG without an EXIF block is decoded, as the block may come last.
    """
    try:
        with _opened(source, where) as (_, header):
            return header
    except DataError as error:
        raise BadRowError(str(error)) from error


class Headers:
    """The headers of images below some folders, each read once; one that cannot be read is a BadRowError each time."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Nothing is read yet."""
        self.folders = folders
        self.missing: list[str] = []
        self._held: dict[str, tuple[Path, Header] | str] = {}

    def of(self, image: str) -> tuple[Path, Header]:
        """The file of an image, in the first folder that holds it, and its header."""
        if image not in self._held:
            try:
                self._held[image] = self._read(image)
            except BadRowError as error:
                self._held[image] = str(error)
        found = self._held[image]
        if isinstance(found, str):
            raise BadRowError(found)
        return found

    def remedy(self) -> str | None:
        """What to do about images that are not there; None where all are."""
        if not self.missing:
            return None
        return (
            f"{len(self.missing)} of {len(self._held)} images are not in {' or '.join(map(str, self.folders))} (the "
            f"first: {self.missing[0]}): put them there, or name the folder that holds them (--images)"
        )

    def _read(self, image: str) -> tuple[Path, Header]:
        try:
            path = next((folder / image for folder in self.folders if (folder / image).is_file()), None)
        except OSError as error:  # a name that is too long, a folder that must not be read
            raise BadRowError(f"image {short(image)}: cannot be looked for ({error.strerror}); correct it") from error
        if path is None:
            self.missing.append(image)
            places = " or ".join(str(folder / image) for folder in self.folders)
            raise BadRowError(f"image {image!r}: no such image, {places}; put it there or correct the path")
        return path, read_header(path, str(path))


def read_image(source: str | os.PathLike[str] | bytes, where: str, size: tuple[int, int] | None = None) -> ImageArray:
    """Decode an image to RGB, uint8 (height, width, 3); the first frame, where the file holds several.

    Grayscale, palette, CMYK and 16-bit images are converted; transparency is laid on white.

    Args:
        source: path of the file, or its bytes.
        where: how an error names the image (its path, or the row of the file that holds it).
        size: annotated (height, width) in pixels. Without it the EXIF rotation is applied; with it
            the frame that has this size is taken, the pixels as stored first (see the module).

    Raises:
        DataError: for an image that is absent, broken, larger than ``MAX_PIXELS``, of floating point, or of another
            size than the annotated one.
    """
    with _opened(source, where) as (image, header):
        image.load()
        pixels = np.array(_to_rgb(image, where), dtype=np.uint8)  # (H, W, 3)
        is_upright = image.format == "TIFF"  # Pillow turns these alone while it decodes
    size = None if size is None else (size[0], size[1])
    if size is not None and (why := header.misfit(size)):
        raise DataError(f"{where}: {why}")
    wanted = size is None or size != header.stored  # whether the boxes refer to the upright image
    if header.orientation == 1 or wanted == is_upright:
        return pixels
    turn = (_UPRIGHT if wanted else _STORED)[header.orientation]
    return np.array(Image.fromarray(pixels).transpose(turn), dtype=np.uint8)


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str] | bytes, where: str) -> Iterator[tuple[Image.Image, Header]]:
    """The opened image and its header; what decoding raises becomes a DataError."""
    too_large = f"the limit is {MAX_PIXELS} pixels); scale it down, and its boxes with it where they are in pixels"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{where}: image refused because it is too large ({width}x{height} pixels; {too_large}")
            if image.format == "PNG" and "exif" not in image.info:
                image.load()
            yield image, _header(image, where)
    except DataError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{where}: no such image; check the path, or put the image there") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{where}: image refused because it is too large ({error}; {too_large}") from error
    except Exception as error:  # a decoder given broken bytes raises nearly anything
        raise DataError(
            f"{where}: not a whole image that can be read ({type(error).__name__}: {error}); "
            "the file is cut off, damaged or of an unknown format: fetch or export it again"
        ) from error


def _header(image: Image.Image, where: str) -> Header:
    """Both frames of an opened image, before its pixels are decoded."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow may have turned the size already
        width, height = int(image.tag_v2[256]), int(image.tag_v2[257])  # type: ignore[attr-defined]
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # a damaged EXIF block raises nearly anything; the pixels are whole
        _log.warning("%s: EXIF block unreadable (%s); the pixels are taken as stored", where, error)
        orientation = 1
    return Header((height, width), orientation if orientation in _UPRIGHT else 1)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode.startswith("I"):  # I;16, I;16B, I: one channel of 16 bits, sometimes held in 32
        values = np.asarray(image).astype(np.int64)  # (H, W)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{where}: values from {values.min()} to {values.max()} do not fit 16 bits; "
                "export the image with 8 bits per channel"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")  # 65535 -> 255
    if image.mode == "F":
        raise DataError(f"{where}: floating-point pixels have no fixed range; export with 8 bits per channel")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
