"""A contact sheet: samples of a data set with their boxes drawn, because people look sooner than they read."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ivt_env.data.sample import DataError, Dataset, ImageArray
from ivt_env.rendering import Overlay, caption_font, draw_overlay, place_on_canvas

_BACKGROUND, _INK, _FAINT = (24, 26, 30), (235, 235, 235), (150, 155, 165)
_TARGET, _SIBLING = (0, 220, 90), (120, 170, 255)
_MOST_PIXELS = 250_000_000  # more would fill the memory
_MARGIN = 10
_LINES = 3


def can_draw(text: str) -> bool:
    """Whether the captions' font has every letter of a text."""
    font = caption_font(12)
    missing = bytes(font.getmask("\ue123"))  # of the private area: no font has it
    return all(bytes(font.getmask(letter)) != missing for letter in set(text) if not letter.isspace())


def contact_sheet(dataset: Dataset, indices: Sequence[int], columns: int = 4, side: int = 300) -> ImageArray:
    """Draw samples side by side: target green, other objects of its class blue, expression below.

    An image that cannot be read leaves its place empty with the reason, so that one broken file
    does not hide the rest.

    Args:
        dataset: what to show.
        indices: which samples.
        columns: cells in a row.
        side: of an image's place in pixels; images are scaled down to it, never enlarged.
    """
    if not indices or columns < 1:
        raise ValueError(f"a sheet needs samples and columns, got {len(indices)} samples and {columns} columns")
    columns = min(columns, len(indices))
    letter = max(11, side // 22)
    line_height = round(letter * 1.35)
    height, width = side + 2 * _MARGIN + line_height * (_LINES + 1), side + 2 * _MARGIN
    size = columns * width, -(-len(indices) // columns) * height
    if size[0] * size[1] > _MOST_PIXELS:
        raise ValueError(f"a sheet of {size} pixels is too large; give a smaller --side or fewer samples")
    font = caption_font(letter)
    page = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(page)
    letters = max(8, int(side / pen.textlength("abcdefghij", font=font) * 10))
    for place, index in enumerate(indices):
        left, top = place % columns * width + _MARGIN, place // columns * height + _MARGIN
        sample = dataset[index]
        try:
            canvas, extent = place_on_canvas(dataset.image(sample), side)
        except DataError as error:
            for number, line in enumerate(textwrap.wrap(str(error), letters)[: side // line_height]):
                pen.text((left, top + number * line_height), line, font=font, fill=(255, 120, 110))
        else:
            for sibling in sample.siblings:
                draw_overlay(canvas, extent, sibling, Overlay("outline", _SIBLING, width=1))
            draw_overlay(canvas, extent, sample.box, Overlay("outline", _TARGET, width=max(2, side // 120)))
            # Only the image, not the black rest of its canvas.
            page.paste(Image.fromarray(canvas[: extent[0], : extent[1]]), (left, top))
        lines = textwrap.wrap(sample.expression, letters, max_lines=_LINES, placeholder=" …") or [""]
        for number, line in enumerate(lines):
            pen.text((left, top + side + _MARGIN // 2 + number * line_height), line, font=font, fill=_INK)
        note = f"{index}  {sample.dataset} {sample.split} {sample.sample_id}"
        while pen.textlength(note, font=font) > side:
            note = note[:-2] + "…"
        pen.text((left, top + side + _MARGIN // 2 + len(lines) * line_height), note, font=font, fill=_FAINT)
    return np.asarray(page).copy()
