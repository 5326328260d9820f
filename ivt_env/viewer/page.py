"""Write episodes as one HTML file that needs no server and no network.

The page holds everything: its style, its script, the episodes as JSON and each distinct image
once. Boxes are drawn by the browser over the image, so an image is shared by all its episodes.
Steps and texts stand in blocks of a few dozen episodes, which the page reads when it needs them.

Expressions and model output are text of unknown origin. They reach the page as JSON in which no
character can end a script block, are shown as text only, and the page's Content-Security-Policy
lets nothing run but the one script whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ivt_env.data.sample import DataError, DataMissingError, ImageArray
from ivt_env.episodes import Episode
from ivt_env.files import whole_file
from ivt_env.viewer.rows import Content, details, where_of

_JPEG_QUALITY = 85
_CHUNK = 50
"""Episodes in one block of details: parsing one takes a browser about a millisecond."""


def write_page(
    path: str | Path,
    episodes: Mapping[str, Sequence[Episode]] | Sequence[Episode],
    image_of: Callable[[Episode], ImageArray],
    title: str,
    max_image_side: int = 512,
) -> Path:
    """Write a self-contained page of ``episodes`` to ``path``; returns the path.

    Several runs, given by name, are shown two at a time, side by side. Their episodes are matched
    by data set, split and sample id; repeated episodes of one sample are matched in order. The
    file appears whole or not at all.

    ``image_of`` is called once per distinct image; where it raises ``DataMissingError``, the page shows that message
    in the image's place. Images larger than ``max_image_side`` pixels are scaled down; none is enlarged.
    """
    if max_image_side < 1:
        raise ValueError(f"max_image_side is {max_image_side}, it must be at least 1 pixel")
    runs = dict(episodes) if isinstance(episodes, Mapping) else {_name(episodes): episodes}
    if not any(runs.values()):
        raise ValueError(f"no episodes to show in {list(runs)}: give at least one")
    content = Content(runs)
    before, middle, after = page_parts(title, content.served(), {"runs": content.overview(), "chunk": _CHUNK})
    path = Path(path)
    # "xmlcharrefreplace": a title may hold a lone surrogate, which has no UTF-8 form.
    with whole_file(path, "w", errors="xmlcharrefreplace") as file:
        file.write(before)
        for number, run in enumerate(content.runs.values()):
            for start in range(0, len(run), _CHUNK):
                rows = [details(episode) for episode in run[start : start + _CHUNK]]
                file.write(_block(f"details-{number}-{start // _CHUNK}", rows))
        file.write(middle)
        # One image at a time: a page can hold more images than memory.
        for index, episode in enumerate(content.images):
            file.write(_block(f"image-{index}", _image_source(image_of, episode, max_image_side)))
        file.write(after)
    return path


def page_parts(
    title: str, served: str, content: Mapping[str, Any], *, from_server: bool = False, play: bool = False
) -> tuple[str, str, str]:
    """The text of a page: before its episodes' details, from there to its images, and the end.

    ``served`` says which data were really read, ``content`` is what the script reads, ``from_server`` lets it ask for
    more, and with ``play`` the page is there to play as well.
    """
    folder = files("ivt_env.viewer")
    names = ["template.html", "viewer.css", "loading.js", "viewer.js", *(["play.js"] if play else [])]
    # splitlines: the hashes below must match the text after the browser has normalised line ends.
    texts = (folder.joinpath(name).read_text(encoding="utf-8") for name in names)
    template, style, *scripts = ("\n".join(text.splitlines()) + "\n" for text in texts)
    script = "".join(scripts)
    sources = "img-src 'self' data:; connect-src 'self'" if from_server else "img-src data:"
    hashes = f"script-src '{_hash_source(script)}'; style-src '{_hash_source(style)}'"
    policy = f"default-src 'none'; {sources}; {hashes}; base-uri 'none'; form-action 'none'"
    fields = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "served": html.escape(served),
        "content": script_json(content),
        "script": script,
        "play": folder.joinpath("play.html").read_text(encoding="utf-8") if play else "",
    }

    def fill(part: str) -> str:
        # One pass, so that a field's own text is never taken for a placeholder.
        return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], part)

    before, rest = template.split("{{details}}")
    middle, after = rest.split("{{images}}")
    return fill(before), fill(middle), fill(after)


def script_json(value: Any) -> str:
    """JSON that is safe inside a ``<script>`` element: pure ASCII, without ``<``, ``>`` and ``&``."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def image_jpeg(pixels: ImageArray, episode: Episode, max_side: int) -> bytes:
    """The image as a JPEG file, at most ``max_side`` pixels on its longer side; DataError for another image's shape."""
    where = f"image {episode.image_id!r} of {where_of(episode)}"
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise DataError(f"{where} is {pixels.dtype} {pixels.shape}, it must be uint8 (height, width, 3)")
    shown_height, shown_width = pixels.shape[:2]
    height, width = episode.size
    # An image scaled to whole pixels is off by less than one pixel a side; more is another image.
    if abs(shown_width * height - width * shown_height) > width + height:
        raise DataError(
            f"{where} is {shown_width}x{shown_height} pixels, the episode says {width}x{height}: "
            "the shapes differ, so its boxes would be drawn in the wrong place"
        )
    image = Image.fromarray(pixels)
    image.thumbnail((max_side, max_side))
    encoded = io.BytesIO()
    # 4:4:4, because shared colour samples smear the edges of small coloured shapes.
    image.save(encoded, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return encoded.getvalue()


def _name(run: Sequence[Episode]) -> str:
    agents = {episode.agent for episode in run}
    return (agents.pop() if len(agents) == 1 else "") or "episodes"


def _block(name: str, value: Any) -> str:
    return f'<script type="application/json" id="{name}">{script_json(value)}</script>\n'


def _image_source(image_of: Callable[[Episode], ImageArray], episode: Episode, max_side: int) -> str | dict[str, str]:
    """A data URL, or why there is no image."""
    try:
        image = image_of(episode)
    except DataMissingError as error:
        return {"missing": str(error)}
    encoded = base64.b64encode(image_jpeg(image, episode, max_side))
    return "data:image/jpeg;base64," + encoded.decode("ascii")


def _hash_source(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
