"""Where the parts of a model are, and what its files say; what does not fit is refused by the file's name.

A source is a whole model or an adapter, which names the model or adapter that it is put on. What an adapter's folder
does not hold (tokenizer, image processor, prompts) is that of the model below it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from ivt_agents.vlm.codec import ANSWER, FRAMES
from ivt_agents.vlm.footprint import resized
from ivt_agents.vlm.policy import OWN, POLICY_FILE
from ivt_agents.vlm.precision import DTYPES
from ivt_agents.vlm.prompts import DEFAULT, HELD, TINY_NAME, PromptFile, load_prompts, prompt_file
from ivt_agents.vlm.tiny import weights_folder
from ivt_env.failures import read_json, reading

CONFIG, ADAPTER, WEIGHTS = "config.json", "adapter_config.json", "*.safetensors"
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
AGAIN = "make the policy again, or fetch the model again"

_PROMPTS = {"relative_1000": "qwen3-vl", "resized_pixels": "qwen2.5-vl"}
"""Prompts of models that do not say what they are asked, by frame."""

_MOST_LAYERS, _MOST_RANK = 1000, 4096
_LEAST_PIXELS = 2**22
"""No processor enlarges images to more than this."""
_PROBE = 4096
"""Longest side of an image that is processed to see what a processor does."""


class PolicyError(ValueError):
    """A model folder that cannot be used. Says which file, and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model and the adapters on it."""

    adapters: tuple[Path, ...]
    """Folders, the outermost first."""
    base: str
    """A folder, or a name of the hub."""

    @property
    def name(self) -> str:
        """What was asked for."""
        return str(self.adapters[0]) if self.adapters else self.base

    def find(self, *files: str) -> str | None:
        """The outermost part that holds one of ``files``; a name of the hub holds everything."""
        for part in (*map(str, self.adapters), self.base):
            if not Path(part).exists() or any((Path(part) / file).exists() for file in files):
                return part
        return None

    def holding(self, *files: str) -> str:
        """``find``; PolicyError where no part holds one of ``files``."""
        if (part := self.find(*files)) is None:
            raise PolicyError(f"{self.name} holds no {files[0]}: {AGAIN}")
        return part


def find_source(name: str | Path) -> Source:
    """Where a model is; nothing but ``adapter_config.json`` is read. PolicyError where it or its base is not there."""
    adapters: list[Path] = []
    while True:
        folder = weights_folder() if str(name) == TINY_NAME else Path(name)
        if not folder.exists():
            if folder.is_absolute() or str(name).startswith((".", "runs")) or str(name).count("/") != 1:
                raise PolicyError(
                    f"{adapters[-1] / ADAPTER}: its base {name} is not there; put it there, or write where it is (or"
                    f" {TINY_NAME!r}) as base_model_name_or_path"
                    if adapters
                    else f"no model at {name}: give a folder that holds one, {TINY_NAME!r}, or a hub name like"
                    " Qwen/Qwen3-VL-4B-Instruct"
                )
            return Source(tuple(adapters), str(name))
        if not (folder / ADAPTER).exists():
            if not (folder / CONFIG).exists():
                raise PolicyError(f"{folder} holds neither {CONFIG} nor {ADAPTER}: it is not a model folder")
            return Source(tuple(adapters), str(folder))
        found = read_json(folder / ADAPTER, AGAIN, PolicyError)
        pattern = found.get("rank_pattern")
        ranks = [found.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
        if any(rank is not None and not (type(rank) is int and 0 < rank <= _MOST_RANK) for rank in ranks):
            raise PolicyError(f"{folder / ADAPTER}: rank {ranks[0]!r}, expected 1 to {_MOST_RANK}; {AGAIN}")
        name = found.get("base_model_name_or_path") or ""
        if not isinstance(name, str) or not name or folder in adapters:
            raise PolicyError(
                f"{folder / ADAPTER}: base_model_name_or_path is {name!r}; write the folder or hub name of the model"
                " that the adapter was trained on"
            )
        adapters.append(folder)


def read_settings(source: Source, model_type: str) -> tuple[PromptFile, dict[str, str]]:
    """What a policy is asked, and how it is held (``HELD``): as it was saved (``PolicyError``), or by default."""
    usual = _PROMPTS.get(FRAMES.get(model_type, ""), DEFAULT)
    found: dict[str, Any] = load_prompts(usual).settings() | {"frame": FRAMES.get(model_type)}
    parts = [*source.adapters, Path(source.base)]
    path = next((part / POLICY_FILE for part in parts if (part / POLICY_FILE).exists()), None)
    if path is None:
        run = parts[0].parent
        if parts[0].name == "policy" and (run / "metrics.jsonl").exists():
            raise PolicyError(
                f"{parts[0]} holds no {POLICY_FILE}: the run {run} was ended before its policy was saved; go on with"
                " --resume, or train it again"
            )
        print(
            f"{source.name} holds no {POLICY_FILE}: it is asked with the prompts {usual} (whole image with the box"
            f" drawn, a fresh prompt each step); `ivt prompts NAME --into {source.name}` makes one that asks otherwise",
            file=sys.stderr,
        )
    else:
        said = read_json(path, AGAIN, PolicyError)
        found = {key: found[key] for key in ("prompt", "frame")} | {k: v for k, v in said.items() if v is not None}
    with reading(path or f"model type {model_type!r}", AGAIN, PolicyError):
        asked = prompt_file(found)
        if asked.codec.answer != ANSWER:
            raise ValueError(f"answer is {asked.codec.answer!r:.80}; a model on this machine answers {ANSWER}")
        choices = {"frame": tuple(FRAMES.values()), "dtype": tuple(DTYPES), "quantize": ("none", "nf4")}
        for key, known in choices.items():
            if key in found and found[key] not in known:
                raise ValueError(f"{key} is {found[key]!r:.80}, expected one of {', '.join(sorted(set(known)))}")
        if type(opener := found.get("first_answers", OWN)) is not str or str(source.name) == opener:
            raise ValueError(f"first_answers is {opener!r:.80}, expected {OWN!r} or the name of another model")
    return asked, {key: found[key] for key in HELD if key in found}


def check_config(source: Source, config: Any) -> None:
    """Refuse a configuration that describes another model than the weights beside it, before memory is taken."""
    folder = Path(source.base)
    if not folder.exists():
        return
    for part in (config.get_text_config(), config.vision_config):
        layers = getattr(part, "num_hidden_layers", getattr(part, "depth", 1))
        if not (type(layers) is int and 0 < layers <= _MOST_LAYERS):
            raise PolicyError(f"{folder / CONFIG}: {layers!r} layers, expected 1 to {_MOST_LAYERS}; {AGAIN}")
    held = 0
    for path in folder.glob(WEIGHTS):
        with reading(path, f"is it complete? {AGAIN}", PolicyError), safe_open(path, "pt") as weights:
            held += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())
    with torch.device("meta"):
        wanted = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    if held and not wanted / 2 < held < 2 * wanted:
        raise PolicyError(
            f"{folder}: {CONFIG} describes {wanted:,} parameters, and the weights have {held:,}: they do not belong"
            f" together; {AGAIN}"
        )


def load_tokenizer(source: Source, config: Any) -> Any:
    """The tokenizer of a model, which must know its placeholders and no ids beyond its vocabulary."""
    folder = source.holding(*TOKENIZER)
    with reading(f"tokenizer of {folder}", AGAIN, PolicyError):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        if not tokenizer.chat_template:
            raise PolicyError(f"tokenizer of {folder}: no chat template (chat_template.jinja); {AGAIN}")
        image, known = tokenizer.convert_tokens_to_ids("<|image_pad|>"), config.get_text_config().vocab_size
    if image != config.image_token_id or len(tokenizer) > known:
        raise PolicyError(
            f"tokenizer of {folder}: {len(tokenizer)} tokens with <|image_pad|> as {image}, but {source.base} has"
            f" {known} with {config.image_token_id}: they do not belong together; {AGAIN}"
        )
    return tokenizer


def load_image_processor(source: Source, config: Any, pixels: float | None = None) -> Any:
    """The image processor of a model with ``pixels`` times its budget, tried on a few images.

    Pillow's, also where torchvision is installed: that resizes to other pixels, so the same model would see other
    images on another machine.
    """
    folder = source.holding(*PROCESSOR)
    with reading(f"image processor of {folder}", AGAIN, PolicyError):
        processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        limits = pixel_limits(processor, folder)
        most = limits[1]
        if pixels is not None:
            limits = scaled(limits, pixels, folder)
            # Set on the object: as an option, min_pixels and max_pixels of the file would win.
            processor.size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
        vision = config.vision_config
        patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        for key, wanted in (("patch_size", patch), ("merge_size", merge), ("temporal_patch_size", frames)):
            if (found := getattr(processor, key, None)) != wanted:
                raise PolicyError(f"image processor of {folder}: {key} {found!r}, but the model has {wanted}; {AGAIN}")
        sides = [(20, 30)]  # to be enlarged, or rounded to whole tokens
        if pixels is not None:  # an image that is scaled down to the new budget, and one between the two
            sides += [(side, side) for b in {most, limits[1]} if (side := math.isqrt(b) + 2 * patch) < _PROBE]
        for height, width in sides:
            done = processor(images=[np.zeros((height, width, 3), np.uint8)], return_tensors="pt")
            rows, columns = resized(height, width, patch, merge, limits)
            grid, made = (1, rows // patch, columns // patch), tuple(int(v) for v in done["image_grid_thw"][0])
            if made != grid or tuple(done["pixel_values"].shape) != (math.prod(grid), 3 * frames * patch**2):
                raise PolicyError(
                    f"image processor of {folder}: {limits[1]} pixels at most were asked for, {height} x {width} would"
                    f" be {math.prod(grid) // merge**2} visual tokens, and {type(processor).__name__} makes"
                    f" {math.prod(made) // merge**2}: it does not do as it is told"
                )
    return processor


def pixel_limits(processor: Any, folder: str) -> tuple[int, int]:
    """The least and the most pixels of an image that an image processor hands on."""
    size = processor.size
    # "Edges" by name, areas by meaning: the least and the most pixels of an image after resizing.
    least, most = size["shortest_edge"], size["longest_edge"]
    if not (type(least) is type(most) is int and 0 < least <= min(most, _LEAST_PIXELS)):
        raise PolicyError(f"image processor of {folder}: from {least!r} to {most!r} pixels; {AGAIN}")
    return least, most


def scaled(limits: tuple[int, int], pixels: float, folder: str) -> tuple[int, int]:
    """``limits`` with ``pixels`` times the most."""
    least, most = limits
    wanted = round(most * pixels) if math.isfinite(pixels) else 0
    if wanted < least:
        raise PolicyError(
            f"pixels {pixels:g}: {folder} takes at most {most} pixels of an image and never fewer than {least};"
            f" give at least {least / most:g}"
        )
    return least, wanted
