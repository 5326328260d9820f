"""From observations to prompts, and from completions to boxes.

In the layout ``fresh`` each step is a prompt of its own. In ``prefix``, the paper's, an episode is one growing
conversation: what was asked, what was sampled, and then the next image. Ids are only ever appended; nothing sampled
is tokenised again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivt_agents.vlm.codec import BoxCodec, ParsedAction
from ivt_agents.vlm.prompts import Prompts
from ivt_agents.vlm.turns import Box, EncodedImage, Prompt, Turn
from ivt_env import boxes

View = tuple[EncodedImage, Box]
"""An image and the region that it shows, relative to the whole image."""
_ANSWER = {"role": "assistant", "content": "\x01"}


class Dialogue:
    """Speaks a model's chat template, token by token."""

    def __init__(self, tokenizer: Any, image_processor: Any, prompts: Prompts, codec: BoxCodec) -> None:
        """Wrap those of a Qwen-VL; ValueError for a chat template that ends no completion with a special token."""
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.prompts, self.codec = prompts, codec
        self.image_token: int = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._frames: dict[tuple[int, bool], tuple[str, str]] = {}
        self._token_cache: dict[str, list[int]] = {}
        self.end_id = self._end()
        """The token with which the chat template ends an answer."""

    def process(self, images: Sequence[NDArray[np.uint8]]) -> list[EncodedImage]:
        """Images (height, width, 3) as the image processor hands them to the model."""
        if len(images) < 2 * _CHUNK:
            return self._process(images)
        # Most of it is resizing, which releases Python's lock.
        chunks = [images[k : k + _CHUNK] for k in range(0, len(images), _CHUNK)]
        return [image for part in _THREADS.map(self._process, chunks) for image in part]

    def _process(self, images: Sequence[NDArray[np.uint8]]) -> list[EncodedImage]:
        out = self.image_processor(images=list(images), return_tensors="pt")
        grids = [tuple(int(v) for v in g) for g in out["image_grid_thw"]]
        # pixel_values is ragged: patches of all images one after the other.
        sizes = np.cumsum([int(np.prod(g)) for g in grids])[:-1].tolist()
        parts = out["pixel_values"].tensor_split(sizes)
        return [EncodedImage(patches, grid) for patches, grid in zip(parts, grids, strict=True)]  # type: ignore[arg-type]

    def prompt(self, expression: str, box: Sequence[float] | None, views: Sequence[View], looks: int = 1) -> Prompt:
        """One step's prompt of its own: the images, the question, and the current box in numbers.

        ``looks``: how often the episode has looked where the box lies, for prompts that say it.
        """
        asked = self._asked(expression, box, views, looks, False)
        return Prompt(asked, [p for p, _ in views], [w for _, w in views], opening=box is None)

    def following(
        self, turn: Turn, expression: str, box: Sequence[float] | None, views: Sequence[View], looks: int = 1
    ) -> Prompt:
        """The next prompt of a growing conversation, behind ``turn``."""
        asked = self._asked(expression, box, views, looks, True)
        # The template ends the answer; a turn that ended itself has done so already.
        asked = asked[1:] if turn.finished else asked
        images = [*turn.prompt.images, *(p for p, _ in views)]
        return Prompt([*turn.prompt.ids, *turn.completion, *asked], images, [w for _, w in views])

    def completion(self, text: str) -> list[int]:
        """Token ids of an answer written out, end of turn included."""
        return [*self._tokens(text, special=False), self.end_id]

    def action_text(self, box: Sequence[float], views: Sequence[View], number: int = 1) -> str:
        """The answer with a box (relative to the whole image), which must lie in image ``number``, from 1."""
        if not 1 <= number <= len(views):
            raise ValueError(f"an answer in the frame of image {number}, but {len(views)} shown")
        image, window = views[number - 1]
        inside = boxes.into_window(box, window)
        if (inside < -1e-3).any() or (inside > 1 + 1e-3).any():
            raise ValueError(f"box {[round(float(v), 4) for v in box]} does not lie in {window}, which the image shows")
        resized = image.resized(self.image_processor.patch_size)
        return self.codec.action_text(boxes.clip(inside).tolist(), resized, number)

    def box_of(self, action: ParsedAction, prompt: Prompt) -> list[float] | None:
        """The box of an answer, relative to the whole image; None if it speaks of an image that is not there."""
        patch, shown = self.image_processor.patch_size, prompt.images[-len(prompt.windows) :]
        sizes = [image.resized(patch) for image in shown]
        return self.codec.box_of(action, sizes, prompt.windows)

    def _asked(
        self, expression: str, box: Sequence[float] | None, views: Sequence[View], looks: int, later: bool
    ) -> list[int]:
        image, window = views[0]
        inside = None if box is None else boxes.clip(boxes.into_window(box, window)).tolist()
        resized = image.resized(self.image_processor.patch_size)
        box_text = None if inside is None else self.codec.box_text(inside, resized)
        text = self.prompts.fill(expression, box_text, [w for _, w in views], resized, looks)
        before, after = self._frame(len(views), later)
        # The template is rendered once with a mark in place of the text, so special tokens that an
        # expression may spell out stay plain text: only the frame is parsed for them.
        ids: list[int] = []
        queue = iter(views)
        for token in self._tokens(before, special=True):
            merged = 1
            if token == self.image_token:
                merged = int(np.prod(next(queue)[0].grid)) // self.image_processor.merge_size**2
            ids += [token] * merged
        if next(queue, None) is not None:
            raise ValueError("the chat template leaves images out (chat_template.jinja)")
        return [*ids, *self._tokens(text, special=False), *self._tokens(after, special=True)]

    def _frame(self, images: int, later: bool) -> tuple[str, str]:
        """The chat template around a user's text; ``later`` with the end of the answer before it."""
        key = (images, later)
        if key in self._frames:
            return self._frames[key]
        opening = self._rendered([_user("\x00", images)])
        before, _, after = opening.partition("\x00")
        if later:
            whole = self._rendered([_user("\x00", images), _ANSWER, _user("\x02", images)])
            head, _, rest = whole.partition("\x01")
            end = self.tokenizer.convert_ids_to_tokens(self.end_id)
            if head != opening or not rest.startswith(end):
                raise ValueError(
                    "the chat template rewrites earlier turns, or ends an answer otherwise than with"
                    f" {end}: a conversation cannot grow by appending; use layout='fresh'"
                )
            before, _, after = rest.partition("\x02")
        self._frames[key] = (before, after)
        return before, after

    def _end(self) -> int:
        """The special token right behind an answer in the chat template."""
        whole = self._rendered([_user("\x00", 1), _ANSWER], begun=False)
        _, answered, rest = whole.partition("\x01")
        ids = self._tokens(rest.lstrip(), special=True)
        if not answered or not ids or ids[0] not in self.tokenizer.added_tokens_decoder:
            raise ValueError(
                f"the chat template (chat_template.jinja) ends an answer with {rest[:40]!r}, which begins with no"
                " special token: where an answer ends could be neither taught nor seen; write one there"
            )
        return ids[0]

    def _rendered(self, messages: list[dict[str, Any]], begun: bool = True) -> str:
        """Messages as the chat template writes them, the next answer ``begun``."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begun))

    def _tokens(self, text: str, special: bool) -> list[int]:
        key = f"{special}{text}"
        if key not in self._token_cache:
            if len(self._token_cache) > 100_000:
                self._token_cache.clear()
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)
            self._token_cache[key] = list(encoded["input_ids"])
        return self._token_cache[key]


def _user(text: str, images: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


_CHUNK = 8
"""Images that one thread prepares at a time."""
_THREADS = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="images")
