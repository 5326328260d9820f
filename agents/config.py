"""Configuration files: YAML whose keys are the fields of a script's ``Args``.

    sft:                 # train_sft.py reads this part
      model: Qwen/Qwen3-VL-4B-Instruct
    grpo:                # train_grpo.py this one, and rollout and evaluate theirs
      steps: 200
    own_gain:            # python -m experiments.paper: what another GRPO beside `grpo` changes of it
      reward: gain
    evaluate:
      policies: [base=tiny, grpo=runs/grpo/policy]

A file gives defaults; flags on the command line override them. Every key must be a field, and stand there
once: a misspelt one would otherwise leave its default in force without a word, and of two the last would win.
"""

from __future__ import annotations

import contextlib
import difflib
import types
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]

from ivt_env.data.checked import short
from ivt_env.failures import reading

T = TypeVar("T")

SECTIONS = ("sft", "grpo", "own_gain", "rollout", "evaluate")

MEANT = {
    # TRL's and transformers' names for what is called otherwise here
    "max_steps": ("steps", "episode_steps"),
    "output_dir": ("out",),
    "model_name_or_path": ("model",),
    "torch_dtype": ("dtype",),
    "load_in_4bit": ("quantize",),
    "use_peft": ("lora_r",),
    "resume_from_checkpoint": ("resume",),
    "num_train_epochs": ("steps",),
    "warmup_ratio": ("warmup_steps",),
    "max_length": ("max_completion_length",),
    "generation_batch_size": ("prompts", "num_generations"),
    # those of other trainers
    "lr": ("learning_rate",),
    "batch": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "max_new_tokens": ("max_completion_length",),
    "mixed_precision": ("bf16",),
    "kl_coef": ("beta",),
    "lora_rank": ("lora_r",),
}
"""What is meant by a name that an option has elsewhere."""

_SAYS = {
    "steps": "training steps",
    "episode_steps": "actions in an episode",
    "prompts": "samples in a step",
    "num_generations": "episodes of each sample",
    "bf16": "a switch",
    "quantize": "none or nf4",
    "lora_r": "rank; 0: no adapter",
}


class ConfigError(ValueError):
    """A configuration file that cannot be used. Names file and key."""


class KeysOnce(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that stands twice in one mapping, at any depth."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As in PyYAML, which would take the last of two. Here ``<<`` is still one key."""
        node = super().compose_mapping_node(anchor)  # type: ignore[no-untyped-call]
        lines: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise yaml.composer.ComposerError(
                    None, None, f"key {key.value!r} is given twice, in lines {lines[name]} and {line}: remove one"
                )
            lines[name] = line
        return node


def load_config(path: Path, args: type[T], section: str, base: T | None = None) -> T:
    """``args`` with the values of a ``section`` (``ConfigError``), else those of ``base`` or the defaults."""
    content = _read(path)
    if (values := content.get(section)) is None:
        raise ConfigError(f"{path} has no part {section!r}, which this script reads; it has: {', '.join(content)}")
    names = {f.name for f in fields(args)} - {"config"}  # type: ignore[arg-type]
    for key in values if isinstance(values, dict) else ():
        if told := meant(str(key), args, flags=False):
            raise ConfigError(f"{path}: {section}.{short(key)}: {told}")
    _known(values, names, f"{path}: {section}")
    hints = get_type_hints(args)
    given = {k: _fitting(v, hints[k], f"{path}: {section}.{k}") for k, v in values.items()}
    return args(**given) if base is None else replace(base, **given)  # type: ignore[type-var]


def has_section(path: Path, section: str) -> bool:
    """Whether the file has that part, and something in it; ConfigError for no configuration."""
    return _read(path).get(section) is not None


def meant(name: str, args: type, flags: bool = True) -> str | None:
    """What to say instead of a foreign name of an option, of a field or flag; None: it is none, or ``args`` has it.

    ``flags``: write options as flags, not as keys of a file.
    """
    name = name.replace("-", "_")
    hints = get_type_hints(args)
    # `steps` of a command that does not train are something else.
    known = [n for n in MEANT.get(name, ()) if n in hints and (n != "steps" or hints[n] is int)]
    if name in hints or not known:
        return None
    written = ["--" + n.replace("_", "-") if flags else n for n in known]
    return "say " + " or ".join(
        w + (f" ({_SAYS[n]})" if n in _SAYS else "") for w, n in zip(written, known, strict=True)
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no configuration at {path}")
    with reading(path, kind=ConfigError, problem="cannot be read as YAML"):
        content = yaml.load(path.read_text(encoding="utf-8"), KeysOnce)  # a safe loader
    _known(content, SECTIONS, f"{path}")
    return content  # type: ignore[no-any-return]


def _known(found: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{where}: expected a mapping of {', '.join(sorted(known))}; found {short(found)}")
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(str(key)[:100], list(known), n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown key {short(key)}; the closest is {close[0]!r}")


def _fitting(value: Any, hint: Any, where: str) -> Any:
    """The value as the field's type, or an error; nothing is guessed."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (hint,) = [t for t in inner if t is not type(None)]
        return _fitting(value, hint, where)
    if origin is Literal:
        if value in inner:
            return value
        raise ConfigError(f"{where}: {short(value)}; choose from {', '.join(map(repr, inner))}")
    if origin is tuple:
        if isinstance(value, list) and len(value) == len(inner):
            return tuple(_fitting(v, t, where) for v, t in zip(value, inner, strict=True))
        raise ConfigError(f"{where}: {short(value)}; expected a list of {len(inner)}")
    if origin is list:
        if isinstance(value, list):
            return [_fitting(v, inner[0], f"{where}[{number}]") for number, v in enumerate(value)]
        raise ConfigError(f"{where}: {short(value)}; expected a list")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, (str, int)) and not isinstance(value, bool):
        # YAML 1.1 takes 1e-5 for text: it wants 1.0e-5.
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if type(value) is hint:
        return value
    raise ConfigError(f"{where}: {short(value)}; expected {getattr(hint, '__name__', hint)}")
