"""A vision-language model as an agent, and how it is loaded and saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from agents.vlm.codec import FRAMES, STOP_TEXT, BoxCodec, parse_action
from agents.vlm.generation import Sampling, generate
from agents.vlm.prompts import QWEN, Prompts
from agents.vlm.tiny import weights_folder
from agents.vlm.turns import Picture, Prompt, Turn

TINY_NAME = "tiny"
"""The name of the shipped model, wherever a model folder or hub name is taken."""

POLICY_FILE = "policy.json"


class PolicyError(ValueError):
    """A model folder that cannot be used. Says which file, and what to do."""


class VLMPolicy:
    """Plays the environment with a Qwen-VL model, one fresh prompt a step."""

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
        batch_size: int = 128,
        frozen_vision: bool = True,
    ) -> None:
        """Wrap a loaded model; ``load_policy`` is the usual way here.

        Args:
            model: Qwen-VL for conditional generation, or a peft model around one.
            tokenizer: its tokenizer, with a chat template.
            image_processor: its image processor.
            prompts: what is asked.
            codec: how its boxes are written.
            max_new_tokens: limit of a turn; a turn that runs into it has no action.
            temperature: 0 for greedy.
            seed: of the sampling.
            batch_size: rows in one forward pass of generation.
            frozen_vision: picture encodings may be kept and used again.
        """
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.prompts, self.codec, self.batch_size = prompts, codec, batch_size
        self.frozen_vision = frozen_vision
        self.generator = torch.Generator(device=model.device).manual_seed(seed)
        self.turns: list[Turn | None] = []
        """What the last ``act`` did, one entry per environment; None where it was not active."""
        ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in _VISION_TOKENS}
        self.image_token = ids["image_pad"]
        stop_ids = tokenizer(STOP_TEXT, add_special_tokens=False)["input_ids"]
        end_ids = model.generation_config.eos_token_id
        self.sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            suppressed=tuple(i for i in ids.values() if i is not None),
            end_ids=tuple(end_ids) if isinstance(end_ids, list | tuple) else (end_ids,),
            pad_id=tokenizer.pad_token_id,
            stop_id=stop_ids[0] if len(stop_ids) == 1 else None,
        )
        self._template: tuple[str, str] | None = None
        self._token_cache: dict[str, list[int]] = {}

    @property
    def core(self) -> Any:
        """The model without its adapter's shell (the adapters themselves stay in place)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def set_temperature(self, temperature: float) -> None:
        """Sample at another temperature from now on; 0 is greedy."""
        self.sampling = replace(self.sampling, temperature=temperature)

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Nothing to forget: every step is a fresh prompt."""

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """One action per environment; see ``ivt_env.rollouts.Agent``."""
        n = len(observations["box"])
        active = np.asarray(observations.get("active", np.ones(n, dtype=bool)))
        rows = [int(i) for i in np.flatnonzero(active)]
        prompts = self.prompts_for(observations, rows)
        training = self.core.training
        self.core.eval()
        turns: list[Turn] = []
        for start in range(0, len(prompts), self.batch_size):
            chunk = prompts[start : start + self.batch_size]
            turns += generate(self.core, chunk, self.sampling, self.generator, self.frozen_vision)
        self.core.train(training)
        self.turns = [None] * n
        actions: dict[str, Any] = {
            "box": np.full((n, 4), np.nan, dtype=np.float32),
            "stop": np.zeros(n, dtype=np.int64),
            "text": [""] * n,
            "parse_failure": np.zeros(n, dtype=bool),
            "confidence": np.zeros(n),
        }
        if self.sampling.stop_id is not None:
            actions["stop_probability"] = np.zeros(n)
        for row, turn in zip(rows, turns, strict=True):
            self.turns[row] = turn
            text = self.text(turn)
            action = parse_action(text) if turn.finished else parse_action("")
            actions["text"][row] = text
            actions["stop"][row] = int(action.stop)
            actions["parse_failure"][row] = action.failed
            actions["confidence"][row] = float(np.exp(np.mean(turn.log_probs)))
            if turn.stop_probability is not None:
                actions["stop_probability"][row] = turn.stop_probability
            if action.numbers is not None:
                resized = turn.prompt.pictures[-1].resized(self.image_processor.patch_size)
                actions["box"][row] = self.codec.decode(action.numbers, resized)
        return actions

    def text(self, turn: Turn) -> str:
        """A turn's words, without the token that ends it. For people and for parsing, never re-tokenised."""
        ids = turn.completion[:-1] if turn.finished else turn.completion
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def prompts_for(self, observations: Mapping[str, Any], rows: Sequence[int]) -> list[Prompt]:
        """Prompts of the given environments. Equal observations share one object, and so one prefill."""
        made: dict[tuple[str, bytes, bytes], Prompt] = {}
        keys, fresh = [], []
        for row in rows:
            height, width = observations["extent"][row]
            image = observations["image"][row][:height, :width]
            key = (observations["expression"][row], observations["box"][row].tobytes(), image.tobytes())
            keys.append(key)
            if key not in made:
                made[key] = Prompt([], [])
                fresh.append((key, image, observations["box"][row]))
        if fresh:
            pictures = self.process([image for _, image, _ in fresh])
            for (key, _, box), picture in zip(fresh, pictures, strict=True):
                prompt = self.prompt(key[0], box if box.any() else None, picture)
                made[key].ids, made[key].pictures = prompt.ids, prompt.pictures
        return [made[key] for key in keys]

    def process(self, images: Sequence[NDArray[np.uint8]]) -> list[Picture]:
        """Pictures (height, width, 3) as the image processor hands them to the model."""
        out = self.image_processor(images=list(images), return_tensors="pt")
        grids = [tuple(int(v) for v in g) for g in out["image_grid_thw"]]
        # pixel_values is ragged: patches of all pictures one after the other.
        parts = torch.split(out["pixel_values"], [int(np.prod(g)) for g in grids])
        return [Picture(patches, grid) for patches, grid in zip(parts, grids, strict=True)]  # type: ignore[arg-type]

    def prompt(self, expression: str, box: Sequence[float] | None, picture: Picture) -> Prompt:
        """One step's prompt: the picture, the question, and the current box in the model's frame."""
        resized = picture.resized(self.image_processor.patch_size)
        text = self.prompts.fill(expression, None if box is None else self.codec.box_text(box, resized))
        before, after = self._frame()
        merged = int(np.prod(picture.grid)) // self.image_processor.merge_size**2
        # The template is rendered once with a mark in place of the text, so special tokens that an
        # expression may spell out stay plain text: only the frame is parsed for them.
        ids = self._tokens(before, special=True)
        place = ids.index(self.image_token)
        ids = [*ids[:place], *[self.image_token] * merged, *ids[place + 1 :]]
        return Prompt([*ids, *self._tokens(text, special=False), *self._tokens(after, special=True)], [picture])

    def completion(self, text: str) -> list[int]:
        """Token ids of a demonstration's answer, end of turn included."""
        return [*self._tokens(text, special=False), self.sampling.end_ids[0]]

    def _frame(self) -> tuple[str, str]:
        """The chat template around the user's text."""
        if self._template is None:
            content = [{"type": "image"}, {"type": "text", "text": "\x00"}]
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            before, _, after = rendered.partition("\x00")
            self._template = (before, after)
        return self._template

    def _tokens(self, text: str, special: bool) -> list[int]:
        key = f"{special}{text}"
        if key not in self._token_cache:
            if len(self._token_cache) > 100_000:
                self._token_cache.clear()
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)
            self._token_cache[key] = list(encoded["input_ids"])
        return self._token_cache[key]

    def save(self, folder: str | Path) -> None:
        """Write everything that ``load_policy`` needs: the model (or its adapter) and its helpers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        settings = {"prompt": self.prompts.text, "frame": self.codec.frame}
        (folder / POLICY_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


_VISION_TOKENS = ("image_pad", "video_pad", "vision_start", "vision_end")


def load_policy(
    name: str | Path,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | None = None,
    batch_size: int = 128,
) -> VLMPolicy:
    """Load a policy: the shipped ``tiny`` model, a folder, or a model of the hub by name.

    A folder may hold a whole model or a peft adapter, which is put on the base that it names. The
    tokenizer and the image processor are loaded apart: the combined processor needs torchvision.

    Raises:
        PolicyError: for a folder that is not there, is no model, or does not fit its own weights.
    """
    folder = weights_folder() if str(name) == TINY_NAME else Path(name)
    source: str = str(folder) if folder.exists() else str(name)
    looks_like_path = folder.is_absolute() or str(name).startswith((".", "runs")) or str(name).count("/") != 1
    if not folder.exists() and looks_like_path:
        raise PolicyError(
            f"no model at {name}: give a folder that holds one, 'tiny', or a hub name like Qwen/Qwen3-VL-4B-Instruct"
        )
    if folder.exists() and not any((folder / f).exists() for f in ("config.json", "adapter_config.json")):
        raise PolicyError(f"{folder} holds neither config.json nor adapter_config.json: it is no model folder")
    adapter = folder / "adapter_config.json"
    base = source
    if folder.exists() and adapter.exists():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        base = str(weights_folder()) if base == TINY_NAME else base
    model = _load_model(base, dtype)
    if base != source:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    if device == "cpu":
        # The fused attention kernel's backward pass takes twice as long as plain matrix products
        # at the sizes that a CPU can train.
        (model.get_base_model() if base != source else model).set_attn_implementation("eager")
    settings: dict[str, Any] = {"prompt": QWEN.text, "frame": FRAMES.get(model.config.model_type)}
    if (folder / POLICY_FILE).exists():
        settings |= json.loads((folder / POLICY_FILE).read_text(encoding="utf-8"))
    if settings["frame"] is None:
        raise PolicyError(f"{name}: model type {model.config.model_type!r} has no box codec; known: {sorted(FRAMES)}")
    tiny = (folder / POLICY_FILE).exists()
    return VLMPolicy(
        model,
        AutoTokenizer.from_pretrained(source, padding_side="left"),
        AutoImageProcessor.from_pretrained(source),
        Prompts(settings["prompt"]),
        BoxCodec(settings["frame"]),
        max_new_tokens=max_new_tokens or (48 if tiny else 160),
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )


def _load_model(source: str, dtype: torch.dtype | str) -> Any:
    """The model, refusing weights that do not fit their own configuration."""
    if Path(source).exists():
        transformers_logging.disable_progress_bar()  # a local file is read in a blink
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise PolicyError(
            f"{source} could not be loaded ({first}). Is it complete, and do weights and config.json belong together?"
        ) from error
    wrong = {
        k: sorted(map(str, report[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[k]
    }
    if wrong:
        kind, keys = next(iter(wrong.items()))
        raise PolicyError(
            f"{source}: weights and config.json do not belong together: {kind.replace('_', ' ')} {keys[:3]}"
        )
    return model
