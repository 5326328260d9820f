"""The environment as TRL's ``GRPOTrainer`` takes one: ``environment_factory``, ``reset`` and a tool.

    policy = load_policy("tiny")
    trainer = trl.GRPOTrainer(
        model=policy.model,
        reward_funcs=episode_reward,
        processing_class=processor_for(policy),
        environment_factory=lambda: TRLGrounding(policy, "IVT-Scenes-v0"),
        train_dataset=datasets.Dataset.from_list(rows(range(1000))),
        args=trl.GRPOConfig(max_tool_calling_iterations=2, ...),  # actions of an episode, less one
    )

``examples/train_with_trl.py`` trains with it; ``docs/trl.md`` compares it with ``ivt_agents.trl.rollout``.

Written for TRL 1.16, and it imports nothing of it. ``reset`` returns the first image and the question; the tool
``answer`` plays one action and returns the image with the box drawn. The model answers in this project's text format:
every answer but a stop goes to the tool, so an unreadable one costs a step. The token ids of a conversation are those
of the ``prefix`` layout.

A tool cannot end a rollout: TRL asks again until an answer calls no tool, or ``max_tool_calling_iterations`` is used
up. A limit of T actions is a limit of T - 1 tool calls; the last answer is then sampled and never handed to the tool.
``episode_reward`` plays it, so it has to be the reward function; a ``get_reward`` method, which takes no argument,
could not see it. An answer that ``generation_kwargs={"max_new_tokens": n}`` cut off is followed by the next question
without an end-of-turn token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
from PIL import Image
from transformers import Qwen3VLProcessor

import ivt_env  # noqa: F401  registers the ids
from ivt_agents.vlm.codec import parse_action
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.prompts import PromptFile

TOOL = "answer"

# A tool's response is the user's next turn, as in the prefix layout. Tool calls are rendered because TRL
# refuses a template that drops them; what the model sampled is never rendered again.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TRLGrounding:
    """One episode at a time. Every public method but ``reset`` is a tool, so there is just one."""

    def __init__(self, policy: VLMPolicy, env_id: str, **kwargs: Any) -> None:
        """Make ``env_id`` with ``kwargs`` of ``gym.make``; ``policy`` gives wording and codec (``ValueError``)."""
        self._asked = PromptFile(policy.dialogue.prompts, policy.codec)
        if policy.codec.frame != "relative_1000":
            raise ValueError(
                f"frame {policy.codec.frame}: boxes in pixels of the resized image cannot be read here, because a tool"
                " never sees how the processor resized it; use a model that writes 0..1000"
            )
        if kwargs.get("view", "overlay") != "overlay":
            raise ValueError(f"view {kwargs['view']!r}: only the whole image is offered here; leave view='overlay'")
        self._env = gym.make(env_id, **kwargs)
        self._over = True

    def reset(self, index: int, **_: Any) -> list[dict[str, Any]]:
        """Begin with sample ``index``, the one column of the row that is needed; content blocks of the user's turn.

        TRL's signature says text; its trainer takes blocks, too.
        """
        observation, _ = self._env.reset(seed=0, options={"index": int(index)})
        self._over, self._played, self._total = False, 0, 0.0
        return self._shown(observation)

    def answer(self, text: str) -> list[dict[str, Any]]:
        """Play one action and look at the image with the current box drawn.

        Args:
            text: The answer, which holds one JSON object with a box or a stop.

        Returns:
            The next image and question.
        """
        if self._over:
            raise RuntimeError("the episode is over: set max_tool_calling_iterations to the limit of actions less one")
        box, stop = self._question.read(text)
        # A box that is none is refused by the environment, with the reason in its info; the step counts.
        step = {"box": np.array(box or [np.nan] * 4, dtype=np.float32), "stop": int(stop)}
        observation, reward, terminated, truncated, _ = self._env.step(step)
        self._played += 1
        self._total += float(reward)
        self._over = terminated or truncated
        return self._shown(observation)

    def _shown(self, observation: dict[str, Any]) -> list[dict[str, Any]]:
        self._question = self._asked.question({key: [value] for key, value in observation.items()}, 0)
        image = Image.fromarray(self._question.images[0])
        return [{"type": "image", "image": image}, {"type": "text", "text": self._question.text}]


def episode_reward(
    completions: Sequence[Sequence[dict[str, Any]]], environments: Sequence[TRLGrounding], **_: Any
) -> list[float]:
    """Total reward of each episode, after playing the answer that TRL sampled and did not hand over."""
    totals = []
    for messages, environment in zip(completions, environments, strict=True):
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if len(answers) > environment._played and not environment._over:
            environment.answer(answers[-1])
        totals.append(environment._total)
    return totals


def rows(indices: Iterable[int]) -> list[dict[str, Any]]:
    """Rows of a data set for TRL: an empty user's turn, which ``reset`` fills, and the sample's index."""
    return [{"prompt": [{"role": "user", "content": ""}], "index": int(i)} for i in indices]


class ImageProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor for images alone: transformers builds the video part only with torchvision."""

    @classmethod
    def of(cls, policy: VLMPolicy) -> Self:
        """With a policy's parts, and the template of its conversations."""
        tokenizer = copy.deepcopy(policy.tokenizer)
        tokenizer.chat_template = CHAT_TEMPLATE
        return cls(image_processor=policy.image_processor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept each part as it is, the missing video part among them."""
        return type(argument)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Save the parts beside each other, as ``load_policy`` reads them."""
        return [*self.image_processor.save_pretrained(save_directory), *self.tokenizer.save_pretrained(save_directory)]


def processor_for(policy: VLMPolicy) -> ImageProcessor:
    """A processor for TRL that speaks the policy's action format."""
    processor = ImageProcessor.of(policy)
    tokenizer = processor.tokenizer
    # TRL asks the tokenizer for tool calls if it has a template to find them with; it is not used.
    tokenizer.response_template = {}

    def parse_response(response: Sequence[int], **_: Any) -> dict[str, Any]:
        """The message that sampled ids make: a tool call, or a stop, which calls nothing and so ends the rollout."""
        ids = list(response)
        finished = bool(ids) and ids[-1] in policy.sampling.end_ids
        text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
        message = {"role": "assistant", "content": text}
        if not (finished and parse_action(text).stop):
            # A cut-off answer is no answer, even where an action could be read from it.
            arguments = {"text": text if finished else ""}
            message["tool_calls"] = [{"type": "function", "function": {"name": TOOL, "arguments": arguments}}]
        return message

    tokenizer.parse_response = parse_response
    return processor
