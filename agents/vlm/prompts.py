"""What a policy is asked at each step.

One wording serves SFT, rollouts and evaluation. It holds the current box in the model's own
coordinates (those of the first image shown), and the images say by themselves what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NO_BOX_TEXT = "none"

WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Prompts:
    """The user's turn, with ``{expression}`` and ``{box}`` to be filled in."""

    text: str
    closeup: str = ""
    """Added where the only image shown is a close-up."""
    with_closeup: str = ""
    """Added where a close-up is shown beside the whole image."""

    def fill(
        self, expression: str, box_text: str | None, windows: Sequence[tuple[float, float, float, float]] = (WHOLE,)
    ) -> str:
        """The user's text; ``box_text`` is in the model's coordinates, ``windows`` are what the images show."""
        # str.replace, not str.format: an expression may hold braces.
        filled = self.text.replace("{box}", box_text or NO_BOX_TEXT)
        if len(windows) > 1:
            filled += self.with_closeup
        elif tuple(windows[0]) != WHOLE:
            filled += self.closeup
        return filled.replace("{expression}", expression)


TINY = Prompts("Locate {expression}. Current box: {box}.")
"""Short, because the tiny model learns and runs on two CPU cores."""

QWEN = Prompts(
    'Locate the object that this expression describes: "{expression}". Current box: {box}.\n'
    "The current box, if there is one, is drawn on the image as a translucent red rectangle. If it "
    'fits the object, answer {"stop": true}. Otherwise say briefly what is wrong with it, if anything, '
    'and answer with one JSON object: {"bbox_2d": [x1, y1, x2, y2]}.',
    closeup=" The image shows only the region around the current box, enlarged; all coordinates refer to it.",
    with_closeup=" The second image shows the region around the current box, enlarged. To answer in its coordinates,"
    ' write {"picture": 2, "bbox_2d": [x1, y1, x2, y2]}.',
)
"""For pretrained models. Our choice: the paper does not give its prompts."""
