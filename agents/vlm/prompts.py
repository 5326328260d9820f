"""What a policy is asked at each step.

One wording serves SFT, rollouts and evaluation. In the ``fresh`` layout each step is a new prompt
that holds the current picture (overlay drawn) and, in the model's own coordinates, the current box:
in a growing conversation the box would stand in the model's earlier answer.
"""

from __future__ import annotations

from dataclasses import dataclass

NO_BOX_TEXT = "none"


@dataclass(frozen=True, slots=True)
class Prompts:
    """The user's turn, with ``{expression}`` and ``{box}`` to be filled in."""

    text: str

    def fill(self, expression: str, box_text: str | None) -> str:
        """The user's text; ``box_text`` is the current box in the model's coordinates, or None."""
        # str.replace, not str.format: an expression may hold braces.
        filled = self.text.replace("{box}", box_text or NO_BOX_TEXT)
        return filled.replace("{expression}", expression)


TINY = Prompts("Locate {expression}. Current box: {box}.")
"""Short, because the tiny model learns and runs on two CPU cores."""

QWEN = Prompts(
    'Locate the object that this expression describes: "{expression}". Current box: {box}.\n'
    "The current box, if there is one, is drawn on the picture as a translucent red rectangle. If it "
    'fits the object, answer {"stop": true}. Otherwise say briefly what is wrong with it, if anything, '
    'and answer with one JSON object: {"bbox_2d": [x1, y1, x2, y2]}.'
)
"""For pretrained models. Our choice: the paper does not give its prompts."""
