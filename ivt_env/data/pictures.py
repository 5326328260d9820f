"""Reading one picture file: any common format to RGB, or an error that says what is wrong with it.

Which frame a box refers to. A camera stores pixels in one orientation and may add an EXIF note
"show me rotated". A viewer shows the rotated picture, and boxes drawn in a viewer refer to that;
``read_picture(file, where)`` gives that frame. The boxes of COCO (and so of RefCOCO, RefCOCO+
and RefCOCOg) refer to the pixels as stored, and COCO states the width and height they refer to.
``read_picture(file, where, size=(height, width))`` takes the stated size as authoritative: the
pixels as stored if they have it, else the rotated picture if that has it, else an error. A box is
thus never read in a frame of another shape.
"""

from __future__ import annotations

import io
import logging
import os

import numpy as np
from PIL import Image

from ivt_env.data.sample import DataError, Picture

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: as RGB this one takes 192 MB."""

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_log = logging.getLogger(__name__)


def read_picture(source: str | os.PathLike[str] | bytes, where: str, size: tuple[int, int] | None = None) -> Picture:
    """Decode a picture to RGB; the first frame, where the file holds several.

    Grayscale, palette, CMYK and 16-bit pictures are converted; transparency is laid on white.

    Args:
        source: path of the file, or its bytes.
        where: how an error names the picture (its path, or the row of the file that holds it).
        size: annotated (height, width) in pixels. Without it the EXIF rotation is applied; with it
            the frame that has this size is taken, the pixels as stored first (see the module).

    Returns:
        uint8 array (height, width, 3), owned by the caller.

    Raises:
        DataError: for a picture that is absent, no picture, cut off, too large (more than
            ``MAX_PIXELS``), of a kind with no 8-bit meaning (floating point), or of another size
            than the annotated one. Starts with ``where`` and ends with what to do.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(where, f"{image.width}x{image.height} pixels")
            image.load()
            upright = _UPRIGHT.get(_orientation(image, where))
            pixels = np.array(_to_rgb(image, where), dtype=np.uint8)  # (H, W, 3)
    except DataError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{where}: no such picture; check the path, or fetch the pictures again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(where, str(error)) from error
    except Exception as error:  # a decoder given broken bytes raises nearly anything
        raise DataError(
            f"{where}: not a whole picture that can be read ({type(error).__name__}: {error}); "
            "the file is cut off, damaged or of an unknown format: fetch or export it again"
        ) from error
    if upright is None or (size is not None and pixels.shape[:2] == tuple(size)):
        turned = pixels
    else:
        turned = np.array(Image.fromarray(pixels).transpose(upright), dtype=np.uint8)
    if size is not None and turned.shape[:2] != tuple(size):
        raise DataError(
            f"{where}: the picture is {pixels.shape[1]} wide and {pixels.shape[0]} high, its annotation "
            f"says {size[1]} wide and {size[0]} high, so its boxes would be wrong; put the original file "
            "in its place (not resized, cropped or rotated), or correct the annotation"
        )
    return turned


def _too_large(where: str, what: str) -> DataError:
    return DataError(
        f"{where}: picture refused because it is too large ({what}; the limit is {MAX_PIXELS} pixels); "
        "scale it down, and its boxes with it where they are in pixels"
    )


def _orientation(image: Image.Image, where: str) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception as error:  # a damaged EXIF block raises nearly anything; the pixels are whole
        _log.warning("%s: EXIF block unreadable (%s); the pixels are taken as stored", where, error)
        return 1


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode.startswith("I"):  # I;16, I;16B, I: one channel of 16 bits, sometimes held in 32
        values = np.asarray(image).astype(np.int64)  # (H, W)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                f"{where}: values from {values.min()} to {values.max()} do not fit 16 bits; "
                "export the picture with 8 bits per channel"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")  # 65535 -> 255
    if image.mode == "F":
        raise DataError(f"{where}: floating-point pixels have no fixed range; export with 8 bits per channel")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
