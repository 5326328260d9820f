"""Every common kind of image file becomes the RGB that a viewer shows, or a clear error.

Silent when false: a CMYK image comes out inverted, a 16-bit one black, a truncated one half gray,
a rotated one with its boxes beside the objects; training goes on, with worse numbers.
"""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
from eval_layouts import bomb_bytes
from PIL import Image

from ivt_env.data import images
from ivt_env.data.images import read_header, read_image
from ivt_env.data.sample import DataError

ORIENTATION = 0x0112


def smooth_image(height: int = 48, width: int = 64) -> np.ndarray:
    """Red grows to the right, green grows downwards: no two corners alike, JPEG-friendly."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_comes_back_exactly_from_path_and_from_bytes(tmp_path):
    expected = smooth_image()
    Image.fromarray(expected).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        found = read_image(source, "a.png")
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected)
        found[0, 0] = 7  # the caller owns it


def test_gray_bits_palettes_and_animations_show_their_colours():
    gray = smooth_image()[..., 0]
    assert np.array_equal(read_image(encoded(Image.fromarray(gray)), "gray"), np.stack([gray] * 3, -1))
    bits = gray > 127
    assert np.array_equal(read_image(encoded(Image.fromarray(bits)), "bits"), np.stack([bits * np.uint8(255)] * 3, -1))
    expected = np.zeros((4, 6, 3), np.uint8)
    expected[:, :3], expected[:, 3:] = (200, 10, 30), (0, 90, 255)
    palette = Image.fromarray(expected).quantize(4)
    assert palette.mode == "P"
    assert np.array_equal(read_image(encoded(palette), "palette"), expected)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(raw, "a.gif")[0, 0].tolist() == [255, 0, 0], "the first frame"


def test_cmyk_jpeg_is_not_inverted():
    expected = smooth_image()
    raw = encoded(Image.fromarray(expected).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(raw)).mode == "CMYK"
    difference = np.abs(read_image(raw, "cmyk").astype(int) - expected)
    assert difference.mean() < 6  # an inverted image is off by more than 80


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    if mode == "P":
        image = Image.new("P", (3, 1))
        image.putpalette([9, 9, 9, 0, 0, 0, 204, 204, 204])
        image.putpixel((1, 0), 1), image.putpixel((2, 0), 2)
        raw = encoded(image, transparency=0)
    else:
        image = Image.new(mode, (3, 1), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
        image.putpixel((1, 0), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
        image.putpixel((2, 0), (0, 0, 0, 51) if mode == "RGBA" else (0, 51))
        raw = encoded(image)
    assert read_image(raw, "alpha")[0].tolist() == [[255] * 3, [0] * 3, [204] * 3]


def test_16_bit_gray_is_scaled_to_8_bits():
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    found = read_image(encoded(Image.fromarray(values)), "16 bit")
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]
    found = read_image(encoded(Image.fromarray(values.astype(np.int32)), "TIFF"), "16 in 32")
    assert found[0, :, 2].tolist() == [0, 1, 128, 255]


def test_pixels_without_an_8_bit_meaning_are_refused():
    with pytest.raises(DataError, match="real.tif: floating-point"):
        read_image(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "real.tif")
    with pytest.raises(DataError, match="deep.tif: values from 0 to 70000"):
        read_image(encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"), "deep.tif")


# What a viewer shows for each EXIF orientation, from the pixels as stored (EXIF 2.3, tag 274).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


FORMATS = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "AVIF": {"quality": 100}}
"""Every kind of file that carries an orientation and is read; how a test saves it."""


def rotated(orientation: int, kind: str = "PNG", height: int = 48, width: int = 64) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(Image.fromarray(smooth_image(height, width)), kind, exif=exif, **FORMATS[kind])


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 12  # lossy formats


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_annotated_size_chooses_the_frame_and_without_one_it_is_the_upright_one(orientation, kind):
    for height, width in ((48, 64), (64, 48), (48, 48)):
        raw, stored = rotated(orientation, kind, height, width), smooth_image(height, width)
        upright = UPRIGHT[orientation](stored)
        header = read_header(raw, "exif")
        assert (header.stored, header.orientation) == ((height, width), orientation)
        assert header.upright == upright.shape[:2]
        assert bool(header.unclear) == (orientation != 1 and upright.shape == stored.shape)
        assert near(read_image(raw, "exif"), upright)
        assert near(read_image(raw, "exif", header.stored), stored), "the pixels as stored are preferred"
        if header.upright != header.stored:
            assert near(read_image(raw, "exif", header.upright), upright)
        elif height != width:
            with pytest.raises(DataError, match="boxes would be wrong"):
                read_image(raw, "b.jpg", (width, height))
        with pytest.raises(DataError, match=rf"b\.jpg: the image is {width} wide and {height} high, .* 100 wide and"):
            read_image(raw, "b.jpg", (50, 100))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_block_does_not_cost_the_image(caplog, monkeypatch):
    raw = encoded(Image.fromarray(smooth_image()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f\x01")
    expected = read_image(raw, "c.jpg")
    assert expected.shape == (48, 64, 3)

    def unreadable(_):
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", unreadable)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read_image(raw, "c.jpg"), expected)
    assert "c.jpg: EXIF block unreadable (not a TIFF file)" in caplog.text


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_image_is_refused_at_every_length(kind):
    whole = encoded(Image.fromarray(smooth_image()), kind)
    expected = read_image(whole, "whole")
    # The last 20 bytes of a PNG are a check sum and an end mark: every pixel comes before them.
    end = len(whole) - (20 if kind == "PNG" else 0)
    for length in range(end):
        with pytest.raises(DataError, match=r"cut\.jpg: .*fetch or export it again"):
            read_image(whole[:length], "cut.jpg")
    for length in range(end, len(whole)):
        assert np.array_equal(read_image(whole[:length], "whole but for its end mark"), expected)


def test_file_that_is_missing_or_no_image_is_refused_under_the_name_that_it_is_given(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404 Not Found</html>")
    with pytest.raises(DataError, match=r"^rows\.parquet row 7: not a whole image"):
        read_image(tmp_path / "page.jpg", "rows.parquet row 7")
    with pytest.raises(DataError, match="folder: not a whole image"):
        read_image(tmp_path, "folder")
    with pytest.raises(DataError, match=r"no\.jpg: no such image; check the path"):
        read_image(tmp_path / "no.jpg", "no.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8001, 10_000, 60_000])
def test_oversized_image_is_refused_before_it_is_decoded(side):
    with pytest.raises(DataError, match=r"bomb\.png: image refused because it is too large .*scale it down"):
        read_image(bomb_bytes(side, side), "bomb.png")


def test_limit_is_on_pixels_and_inclusive(monkeypatch):
    raw = encoded(Image.fromarray(smooth_image(48, 64)))
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64)
    assert read_image(raw, "at the limit").shape == (48, 64, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(DataError, match="64x48 pixels; the limit is 3071"):
        read_image(raw, "above")


@pytest.mark.filterwarnings("ignore")
def test_any_damaged_bytes_give_a_image_or_a_data_error():
    """Bytes flipped at random: no other exception may reach a training run."""
    rng = np.random.default_rng(0)
    refused = 0
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encoded(Image.fromarray(smooth_image()), kind), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(len(damaged), size=6)] = rng.integers(256, size=6)
            try:
                found = read_image(damaged.tobytes(), "damaged")
            except DataError:
                refused += 1
            else:
                assert found.ndim == 3 and found.shape[2] == 3 and found.dtype == np.uint8
    assert refused > 20
