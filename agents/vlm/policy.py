"""A vision-language model as an agent."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ivt_agents.training.finite import NotFiniteError, unusable_weight
from ivt_agents.vlm.adapters import folded
from ivt_agents.vlm.cache import Memory
from ivt_agents.vlm.codec import STOP_TEXT, BoxCodec, as_actions
from ivt_agents.vlm.decode import fixed_decoder
from ivt_agents.vlm.dialogue import Dialogue
from ivt_agents.vlm.generation import Sampling, core_of, generate
from ivt_agents.vlm.precision import stored_as
from ivt_agents.vlm.prompts import LAYOUTS, POLICY_FILE, PromptFile, Prompts, images_of, looks_of
from ivt_agents.vlm.tiny import weights_folder
from ivt_agents.vlm.turns import WHOLE, Prompt, Turn
from ivt_env.files import whole_folder, write_whole

OWN = "policy"
"""First answers are the policy's own."""


class VLMPolicy:
    """Plays the environment with a Qwen-VL model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        prompts: Prompts,
        codec: BoxCodec,
        *,
        max_new_tokens: int = 48,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
        layout: str = "fresh",
        shown: Mapping[str, Any] | None = None,
        reuse: bool = True,
        name: str = "",
    ) -> None:
        """Wrap a loaded model; ``load_policy`` is the usual way here.

        ``model`` is a Qwen-VL for conditional generation or a peft model around one, ``prompts`` are what it is asked,
        and ``codec`` says how its boxes are written. A turn that runs into ``max_new_tokens`` has no action. With
        ``temperature`` 0 it is greedy, else ``seed`` decides. ``batch_size`` rows share a forward pass of generation.

        ``layout`` is ``fresh``, a prompt of its own each step, or ``prefix``, one growing conversation. ``shown`` are
        keywords of the environment that the policy was trained for (``view``, ``overlay``, ``closeup``, ``canvas``),
        for those who make one for it. With ``reuse`` equal prompts are computed once, image encodings are kept, and
        conversations continue on their key-value caches; without, all is computed anew each time: slower, the same.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r}: choose fresh or prefix")
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.codec, self.batch_size = codec, batch_size
        self.layout, self.reuse, self.name = layout, reuse, name
        self._opener: VLMPolicy | None = None
        self.shown: dict[str, Any] = {"view": "overlay"} | dict(shown or {})
        self.frozen_vision = True
        """Image encodings may be kept and used again."""
        self.generator = torch.Generator(device=model.device).manual_seed(seed)
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Around every forward pass of sampling: a learner sets its own, so that both compute alike."""
        self.decode = fixed_decoder(core_of(model))
        """What grows the completions; None: the loop of ``generate``."""
        self.may_stop = True
        """False: a stop is no action of this policy (``forbid_stop``), and one that it spells out is unusable."""
        self.turns: list[Turn | None] = []
        """What the last ``act`` did, one entry per environment; None where it was not active."""
        ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in _VISION_TOKENS}
        self.image_token = ids["image_pad"]
        stop_ids = tokenizer(STOP_TEXT, add_special_tokens=False)["input_ids"]
        self.dialogue = Dialogue(tokenizer, image_processor, prompts, codec)
        # The end that the template writes is the one that is taught; the model may know more.
        ends = dict.fromkeys((self.dialogue.end_id, *_more_ends(model, tokenizer)))
        self.sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            suppressed=tuple(i for i in ids.values() if i is not None),
            end_ids=tuple(ends),
            pad_id=self.dialogue.end_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            stop_id=stop_ids[0] if len(stop_ids) == 1 else None,
        )
        self._said: dict[int, tuple[Turn, Memory | None]] = {}
        """In the prefix layout: each environment's conversation so far."""

    @property
    def core(self) -> Any:
        """The model without its adapter's shell (the adapters themselves stay in place)."""
        return core_of(self.model)

    @property
    def opener(self) -> VLMPolicy | None:
        """The model that gives the first box, always greedy, so that learning to refine does not harm first boxes."""
        return self._opener

    @opener.setter
    def opener(self, opener: VLMPolicy | None) -> None:
        if opener is not None and self.layout != "fresh":
            raise ValueError(
                f"first_answers of another model with layout {self.layout}: two models cannot hold one conversation;"
                " take layout fresh"
            )
        self._opener = opener

    @property
    def first_answers(self) -> str:
        """Which model gives the first box: ``policy``, or the name of another model."""
        return OWN if self.opener is None else self.opener.name

    @property
    def view(self) -> str:
        """What a box is shown on: ``overlay``, ``closeup`` or ``both``."""
        return str(self.shown["view"])

    @property
    def temperature(self) -> float:
        """Of the sampling; 0 is greedy."""
        return self.sampling.temperature

    @property
    def repeats_itself(self) -> bool:
        """Whether it answers alike whenever it is shown the same: greedy, and without a conversation.

        A derived class may remember what it has seen, so it counts as one that does.
        """
        return type(self) is VLMPolicy and self.temperature == 0 and self.layout == "fresh"

    def set_temperature(self, temperature: float) -> None:
        """Sample at another temperature from now on; 0 is greedy."""
        self.sampling = replace(self.sampling, temperature=temperature)

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Forget the conversations of the environments where ``mask`` (N,) is true."""
        self._said = {row: said for row, said in self._said.items() if row < len(mask) and not mask[row]}

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """One action per environment; see ``ivt_env.rollouts.Agent``."""
        n = len(observations["box"])
        active = np.asarray(observations.get("active", np.ones(n, dtype=bool)))
        rows = [int(i) for i in np.flatnonzero(active)]
        self._said = {row: said for row, said in self._said.items() if row < n and active[row]}
        own = [row for row in rows if self.opener is None or observations["box"][row].any()]
        others = [row for row in rows if row not in set(own)]
        with self.autocast(), folded(self.model):
            made = dict(zip(own, self._turns(observations, own), strict=True))
            if self.opener is not None:
                self.opener.sampling = replace(self.sampling, temperature=0.0)
                made |= zip(others, self.opener._turns(observations, others), strict=True)
        self.turns = [made.get(row) for row in range(n)]
        answers = {}
        for row in rows:
            turn = made[row]
            text = self.text(turn)
            action = self.codec.parse(text if turn.finished else "")
            stated = {
                "text": text,
                "tokens": len(turn.prompt.ids) + len(turn.completion),
                "confidence": float(np.exp(np.mean(turn.log_probs))),
            }
            if turn.stop_probability is not None:
                stated["stop_probability"] = turn.stop_probability
            answers[row] = self.dialogue.box_of(action, turn.prompt), action.stop and self.may_stop, stated
        known = () if self.sampling.stop_id is None else ("stop_probability",)
        return as_actions(n, answers, "confidence", *known)

    def _turns(self, observations: Mapping[str, Any], rows: Sequence[int]) -> list[Turn]:
        """A turn for each row; the images of the next rows are prepared while the model is at work on these."""
        chunks = [rows[k : k + self.batch_size] for k in range(0, len(rows), self.batch_size)]
        waiting = [_NEXT.submit(self.prompts_for, observations, chunk) for chunk in chunks[:1]]
        turns: list[Turn] = []
        for number, chunk in enumerate(chunks, 1):
            prompts = waiting.pop().result()
            waiting += [_NEXT.submit(self.prompts_for, observations, later) for later in chunks[number : number + 1]]
            turns += self._generate(prompts, chunk)
        return turns

    def _generate(self, prompts: Sequence[Prompt], rows: Sequence[int]) -> list[Turn]:
        """A turn for each prompt; conversations that may go on are kept."""
        growing = self.layout == "prefix"
        training = self.core.training
        self.core.eval()
        memories: list[Memory | None] | None = None
        if growing and self.reuse:
            memories = [self._said[row][1] if row in self._said else None for row in rows]
        keep = self.frozen_vision and self.reuse
        turns = generate(self.core, prompts, self.sampling, self.generator, keep, memories, self.decode)
        if growing:
            kept = memories or [None] * len(turns)
            self._said |= {row: (turn, memory) for row, turn, memory in zip(rows, turns, kept, strict=True)}
        self.core.train(training)
        return turns

    def text(self, turn: Turn) -> str:
        """A turn's words, without the token that ends it. For people and for parsing, never re-tokenised."""
        ids = turn.completion[:-1] if turn.finished else turn.completion
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def prompts_for(self, observations: Mapping[str, Any], rows: Sequence[int]) -> list[Prompt]:
        """Prompts of the given environments.

        Equal observations of episodes that begin, or of the fresh layout, share one object, and so one prefill.
        """
        asked = [(row, images_of(observations, row)) for row in rows]
        looks = {row: looks_of(observations, row) for row in rows}
        keys = [(observations["expression"][row], observations["box"][row].tobytes(), looks[row]) for row, _ in asked]
        # Only what is asked alike about a like box can be equal: the images of all others need no comparing.
        alike = Counter(keys)
        named: list[tuple[Hashable, list[Hashable]]] = []
        images: dict[Hashable, NDArray[np.uint8]] = {}
        for (row, shown), key in zip(asked, keys, strict=True):
            shared = self.reuse and alike[key] > 1 and row not in self._said
            names: list[Hashable] = [
                (image.tobytes(), image.shape) if shared else (row, k) for k, (image, _) in enumerate(shown)
            ]
            images |= {name: image for name, (image, _) in zip(names, shown, strict=True)}
            named.append(((key, *names), names))
        encoded = dict(zip(images, self.dialogue.process(list(images.values())), strict=True))
        made: dict[Hashable, Prompt] = {}
        for (row, shown), (whole, names) in zip(asked, named, strict=True):
            if whole in made:
                continue
            box = observations["box"][row]
            views = [(encoded[name], window) for name, (_, window) in zip(names, shown, strict=True)]
            question = (observations["expression"][row], box if box.any() else None, views, looks[row])
            if row in self._said:
                made[whole] = self.dialogue.following(self._said[row][0], *question)
            else:
                made[whole] = self.dialogue.prompt(*question)
        return [made[whole] for whole, _ in named]

    def check(self) -> None:
        """Ask for one token about a blank image; ValueError where what comes back is not a number."""
        (image,) = self.dialogue.process([np.zeros((48, 64, 3), dtype=np.uint8)])
        prompt = self.dialogue.prompt("x", (0.25, 0.25, 0.75, 0.75), [(image, WHOLE)])
        once = replace(self.sampling, max_new_tokens=1, temperature=0.0)
        (turn,) = generate(self.core, [prompt], once, None, False)
        if not np.isfinite(turn.log_probs).all():
            raise ValueError("its answers are not finite (NaN or infinity)")

    def save(self, folder: str | Path, made_for: Mapping[str, Any] | None = None) -> None:
        """Write everything that ``load_policy`` needs into ``folder``, which appears complete or not at all.

        ``made_for`` are the options that made the policy. NotFiniteError for weights that are not finite.
        """
        if name := unusable_weight(self.model.named_parameters()):
            raise NotFiniteError(
                f"weight {name} is not finite, so {folder} is not written; train with a lower learning rate"
            )
        seen = {"around" if key == "closeup" else key: value for key, value in self.shown.items()}
        asked = PromptFile(self.dialogue.prompts, self.codec, self.layout, **seen)
        settings = asked.settings() | {"first_answers": self.first_answers} | stored_as(self.model)
        for adapter in getattr(self.model, "peft_config", {}).values():
            if adapter.base_model_name_or_path == str(weights_folder()):
                adapter.base_model_name_or_path = "tiny"  # wherever the package lies on the next machine
        with whole_folder(folder, made_for or {}) as partial:
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)
            self.image_processor.save_pretrained(partial)
            write_whole(partial / POLICY_FILE, json.dumps(settings, indent=1) + "\n")


def _more_ends(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a turn by ``generation_config.json``, all of which must be tokens that no text holds."""
    found = model.generation_config.eos_token_id
    ends = found if isinstance(found, list | tuple) else [] if found is None else [found]
    for end in ends:
        if type(end) is not int or end not in tokenizer.added_tokens_decoder:
            said = repr(tokenizer.decode([end])) if type(end) is int and 0 <= end < len(tokenizer) else "no token"
            raise ValueError(
                f"generation_config.json: eos_token_id {end!r} is {said}, not a special token: an answer would end"
                " wherever it is written; correct it"
            )
    return list(ends)


_OFFER = (
    'If it fits the object, answer {"stop": true}. Otherwise say briefly what is wrong with it, if anything, and answer'
)
_INSTEAD = "Say briefly what is wrong with it, if anything, and answer"


def without_stop(prompts: Prompts) -> Prompts:
    """The same question without the offer to stop; ValueError for an offer in words that are not known here."""
    text = prompts.text.replace(_OFFER, _INSTEAD)
    if "stop" in text.lower():
        raise ValueError(
            f"the policy's question offers a stop in words of its own: {prompts.text!r}. Write one without it into"
            " policy.json of the model's folder"
        )
    return replace(prompts, text=text)


def forbid_stop(policy: VLMPolicy) -> None:
    """Make a policy play without the stop, in place; its weights stay.

    It is not asked for one. Where the stop is one token it cannot be sampled, in rollouts and in the scores of an
    update alike, and no probability of it is stated. A stop that is spelt out is an unusable answer: the box stays.
    """
    policy.may_stop = False
    policy.dialogue.prompts = without_stop(policy.dialogue.prompts)
    stop = policy.sampling.stop_id
    if stop is not None:
        policy.sampling = replace(policy.sampling, suppressed=(*policy.sampling.suppressed, stop), stop_id=None)


_VISION_TOKENS = ("image_pad", "video_pad", "vision_start", "vision_end")


_NEXT = ThreadPoolExecutor(1, thread_name_prefix="prompts")
