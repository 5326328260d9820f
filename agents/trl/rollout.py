"""Episodes for TRL's ``GRPOTrainer`` played by this project's own loop: its ``rollout_func``.

    policy = load_policy("tiny", temperature=1.0, layout="prefix")
    trainer = trl.GRPOTrainer(
        model=policy.model,
        reward_funcs=episode_return,
        processing_class=rollout_processor(policy),
        rollout_func=TRLRollout(policy, "IVT-Scenes-v0", split="train"),
        train_dataset=rollout_rows(range(1000)),
        args=trl.GRPOConfig(temperature=1.0, ...),
    )

``examples/train_with_trl.py`` trains with it; ``docs/trl.md`` compares it with ``ivt_agents.trl.environment`` and says
what TRL's interface cannot express. Written for TRL 1.16, and it imports nothing of it.

TRL reads a rollout's images from the ``images`` column of its row, *after* the rollout: that of ``rollout_rows`` holds
a ``RolloutImages``, which the rollout fills, and ``rollout_processor`` hands over as it is. TRL gives two-dimensional
positions to images of the prompt only, so a hook in front of the forward pass marks all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from transformers import BatchFeature

from ivt_agents.grpo.collect import collect
from ivt_agents.trl.environment import ImageProcessor
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.turns import EncodedImage, Turn
from ivt_env.rollouts import make_vector_env


class RolloutImages(Sequence[EncodedImage]):
    """The images of one rollout, in the order in which the model saw them; empty until it was played.

    Lists and tuples are rebuilt on the way from the data loader to the trainer; this is not, and a copy of it is the
    object itself: what the rollout fills is what the trainer reads.
    """

    def __init__(self) -> None:
        self._held: tuple[EncodedImage, ...] = ()

    def fill(self, images: Iterable[EncodedImage]) -> None:
        """Put in what the model saw, without the encodings that sampling kept; RuntimeError the second time."""
        if self._held:
            raise RuntimeError("these images belong to a rollout that was played already: take rows of rollout_rows")
        self._held = tuple(EncodedImage(p.patches, p.grid) for p in images)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, at: Any) -> Any:
        return self._held[at]

    def __deepcopy__(self, memo: Any = None) -> RolloutImages:
        return self

    __copy__ = __deepcopy__


def rollout_rows(indices: Iterable[int]) -> Any:
    """A ``datasets.Dataset`` with a row for each sample index; every look at a row gives it room for its images."""
    from datasets import Dataset  # type: ignore[import-untyped]

    def with_rooms(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        messages = [{"role": "user", "content": "", "index": i, "images": RolloutImages()} for i in batch["index"]]
        images = [message["images"] for message in messages]
        return {"prompt": [[message] for message in messages], "images": images, "index": batch["index"]}

    return Dataset.from_dict({"index": [int(i) for i in indices]}).with_transform(with_rooms)


class TRLRollout:
    """A ``rollout_func``: plays an episode for each prompt with the trainer's model."""

    def __init__(self, policy: VLMPolicy, env_id: str, **kwargs: Any) -> None:
        """Prepare ``policy``, whose layout is ``prefix``, to play ``env_id`` with the model of the trainer.

        ``kwargs`` are of the environment: ``split``, ``max_steps``, ``view`` and so on.
        """
        if policy.layout != "prefix":
            raise ValueError(
                f"layout {policy.layout!r}: a rollout of TRL is one growing sequence; load_policy(..., layout='prefix')"
            )
        self._policy = policy
        self._env = cache(partial(make_vector_env, env_id, **kwargs))  # by their number
        self._model: Any = None

    def __call__(self, prompts: Sequence[Sequence[dict[str, Any]]], trainer: Any) -> dict[str, list[Any]]:
        """Play one episode for each prompt of rows of ``rollout_rows``; a group's are repeated by TRL.

        Returns:
            For each episode ``prompt_ids`` (the first question), ``completion_ids`` (all that follows: answers,
            and the questions between them), ``logprobs`` of the ids that were sampled (0 elsewhere) and
            ``env_mask`` (1 where an id was sampled); for the reward functions ``total_reward``, ``final_iou``
            and ``actions``.
        """
        self._take(trainer)
        rooms: list[Any] = [prompt[-1].get("images") for prompt in prompts]
        if not all(isinstance(room, RolloutImages) for room in rooms):
            raise ValueError("the trainer's data set has to be made by rollout_rows(): a rollout puts images there")
        groups = collect(self._env(len(prompts)), self._policy, [prompt[-1]["index"] for prompt in prompts], 1)
        for room, turns in zip(rooms, groups.turns, strict=True):
            room.fill(turns[-1].prompt.images)
        columns = ("prompt_ids", "completion_ids", "logprobs", "env_mask")
        rows = zip(*map(_row, groups.turns), strict=True)
        return {name: list(values) for name, values in zip(columns, rows, strict=True)} | {
            "total_reward": groups.rewards.sum(-1).reshape(-1).tolist(),
            "final_iou": groups.ious[..., -1].reshape(-1).tolist(),
            "actions": groups.taken.sum(-1).reshape(-1).tolist(),
        }

    def _take(self, trainer: Any) -> None:
        """Play with the trainer's model from now on."""
        policy = self._policy
        if policy.sampling.temperature != trainer.args.temperature:
            raise ValueError(
                f"the policy samples at temperature {policy.sampling.temperature} and the trainer scores at"
                f" {trainer.args.temperature}: the update would be off-policy; give both the same"
            )
        if self._model is trainer.model:
            return
        self._model = policy.model = trainer.model
        policy.autocast = trainer.accelerator.autocast
        # Processes play the same samples; they must not sample the same answers.
        policy.generator = torch.Generator(device=trainer.model.device).manual_seed(
            trainer.args.seed + trainer.accelerator.process_index
        )
        trainer.model.register_forward_pre_hook(self._mark_images, with_kwargs=True)

    def _mark_images(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Say which ids are images: the model spreads those over rows and columns."""
        if kwargs.get("image_grid_thw") is not None and kwargs.get("mm_token_type_ids") is None:
            kwargs = kwargs | {"mm_token_type_ids": (kwargs["input_ids"] == self._policy.image_token).int()}
        return args, kwargs


def _row(turns: Sequence[Turn]) -> tuple[list[int], list[int], list[float], list[int]]:
    """One conversation: the first prompt; then ids, their log-probabilities, and which of them were sampled."""
    first = turns[0].prompt.ids
    ids, log_probs, sampled = list(first), [0.0] * len(first), [0] * len(first)
    for turn in turns:
        assert turn.prompt.ids[: len(ids)] == ids, "a conversation grows by appending"
        asked = len(turn.prompt.ids) - len(ids)
        ids = [*turn.prompt.ids, *turn.completion]
        log_probs += [0.0] * asked + list(turn.log_probs)
        sampled += [0] * asked + [1] * len(turn.completion)
    at = len(first)
    return ids[:at], ids[at:], log_probs[at:], sampled[at:]


def episode_return(total_reward: Sequence[float], **_: Any) -> list[float]:
    """A reward function for TRL: the total reward of each episode, as the rollout handed it over."""
    return list(total_reward)


class RolloutProcessor(ImageProcessor):
    """Hands TRL the images that the rollout prepared for the model."""

    def __call__(self, images: Sequence[RolloutImages], text: Any = None, **_: Any) -> BatchFeature:
        """``pixel_values`` and ``image_grid_thw`` of all rollouts in turn; the text is token ids already."""
        if not images or not all(isinstance(room, RolloutImages) and len(room) for room in images):
            raise ValueError("rollouts without images: give the trainer rollout_func=TRLRollout(...)")
        encoded = [one for room in images for one in room]
        patches, grids = torch.cat([p.patches for p in encoded]), torch.tensor([p.grid for p in encoded])
        return BatchFeature({"pixel_values": patches, "image_grid_thw": grids})


def rollout_processor(policy: VLMPolicy) -> RolloutProcessor:
    """The ``processing_class`` that goes with ``TRLRollout``."""
    return RolloutProcessor.of(policy)
