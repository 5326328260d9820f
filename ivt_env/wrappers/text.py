"""The environment for a chat model: an image and a question out, an answer in words in.

env = TextActions(gym.make("IVT-Scenes-v0"))
observation, info = env.reset(seed=0)
answer = chat(visible_image(observation), observation["text"])
observation, reward, terminated, truncated, info = env.step(answer)
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from ivt_env import boxes
from ivt_env.data.sample import ImageArray
from ivt_env.expression_space import Expression
from ivt_env.text_actions import from_thousandths, parse_action, to_thousandths

QUESTION = (
    'Find the object that this expression describes: "{expression}".\n'
    "Boxes are [x1, y1, x2, y2]: left, top, right and bottom edge in thousandths of the image's width and height,"
    " so that [0, 0, 1000, 1000] is all of it. Current box: {box}. Where there is one, it is drawn on the image in"
    " translucent red.\n"
    'If the current box fits the object tightly, answer {"stop": true}. Otherwise say in a sentence what is wrong with'
    ' it, if there is one, and end with one JSON object: {"bbox_2d": [x1, y1, x2, y2]}.'
)
"""What is asked at every step, with ``{expression}`` and ``{box}`` to be filled in."""

NO_BOX_WORD = "none"
MAX_TEXT = 8192
"""Characters of a question, and of the answers that the action space holds."""


class TextActions(gym.Wrapper[dict[str, Any], Any, dict[str, Any], Any], gym.utils.RecordConstructorArgs):
    """Questions and answers in words; the rules and rewards are those of the environment.

    ## Action space
    A string of any characters: optional reasoning, then a JSON object with a box or a stop, of which the last
    complete one counts: `{"bbox_2d": [x1, y1, x2, y2]}` in thousandths of the image, or `{"stop": true}`.
    A text without a usable action uses up its step, changes nothing, and is told by `info["parse_failure"]` and, in
    words, `info["invalid"]`. So is a box that cannot be used (`x2 <= x1`, beyond 1000), without the parse failure.

    ## Observation space
    | key | space | meaning |
    | --- | --- | --- |
    | `image` | `Box(0, 255, (S, S, 3), uint8)` | canvas, the image at its top left, the current box drawn |
    | `extent` | `Box((2,), int32)` | height and width of the image on the canvas, pixels |
    | `text` | `Text` | the question: what to find, the current box, how to answer |

    Show the model `visible_image(observation)`, the image without the canvas's margin: that is what its
    thousandths refer to. Each observation stands for itself, so a model can be asked anew at every step.
    """

    def __init__(self, env: gym.Env[Any, Any], question: str = QUESTION) -> None:
        """Wrap.

        Args:
            env: a grounding environment with the view ``overlay``.
            question: asked at every step; ``{expression}`` and ``{box}`` are filled in.

        Raises:
            ValueError: for an environment of another kind or view, or a question that asks for nothing.
        """
        gym.utils.RecordConstructorArgs.__init__(self, question=question)
        gym.Wrapper.__init__(self, env)
        given = env.observation_space
        if not isinstance(given, spaces.Dict) or not {"image", "extent", "expression", "box"} <= set(given):
            raise ValueError(f"TextActions wraps a grounding environment; this one observes {given}")
        if "window" in given.spaces:
            raise ValueError("boxes in text refer to the whole image: make the environment with view='overlay'")
        if "{expression}" not in question:
            raise ValueError(f"question {question!r} has no {{expression}}: the model would not know what to find")
        self.question = question
        self.action_space = text = Expression(MAX_TEXT)
        self.observation_space = spaces.Dict({"image": given["image"], "extent": given["extent"], "text": text})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode; options as in the environment."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._asked(observation), info

    def step(self, action: str) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """Play an answer. ``info["parse_failure"]`` says whether no action could be read from it.

        Raises:
            TypeError: for an answer that is no string.
        """
        if not isinstance(action, str):
            raise TypeError(f"an answer is a str, not {type(action).__name__}: give the model's text as it is")
        read = parse_action(action)
        why = None
        if read.failed:
            why = 'the text holds no {"bbox_2d": [x1, y1, x2, y2]} or {"stop": true}'
        elif read.image != 1:
            why = f"the box is said to refer to image {read.image}; one was shown"
        # The environment refuses what is no number, and the step counts.
        box = [np.nan] * 4 if read.numbers is None or why is not None else from_thousandths(read.numbers)
        with np.errstate(over="ignore"):
            proposal = np.array(box, dtype=np.float32)
        observation, reward, terminated, truncated, info = self.env.step({"box": proposal, "stop": int(read.stop)})
        info = {**info, "parse_failure": read.failed}
        if why is not None:
            info["invalid"] = why
        return self._asked(observation), reward, terminated, truncated, info

    def _asked(self, observation: dict[str, Any]) -> dict[str, Any]:
        box = observation["box"]
        shown = NO_BOX_WORD if boxes.is_no_box(box) else str(to_thousandths(box))
        # str.replace, not str.format: the question holds braces, and an expression may; it is filled in last.
        text = self.question.replace("{box}", shown).replace("{expression}", observation["expression"])
        return {"image": observation["image"], "extent": observation["extent"], "text": text}


def visible_image(observation: dict[str, Any]) -> ImageArray:
    """The image of an observation without the canvas's margin, RGB uint8 (height, width, 3)."""
    height, width = (int(v) for v in observation["extent"])
    image: ImageArray = observation["image"][:height, :width]
    return image
