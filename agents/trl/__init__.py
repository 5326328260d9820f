"""The environment for TRL's GRPOTrainer: as a tool, or as whole episodes from this project's loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import yaml  # type: ignore[import-untyped]


def config_fields(words: Sequence[str], config: type) -> dict[str, Any]:
    """Fields of a dataclass such as ``trl.GRPOConfig`` from words ``name=value``, YAML; ValueError for others."""
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        known = [field.name for field in fields(config) if field.init]
        if not given or name not in known:
            near = "".join(f", such as {near}" for near in get_close_matches(name, known, 1))
            raise ValueError(f"{word!r}: give name=value with a field of {config.__name__}{near}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{word!r}: the value cannot be read") from error
        if isinstance(found[name], str):  # YAML 1.1 takes 1e-5, without a point, for a text
            with suppress(ValueError):
                found[name] = float(value)
    return found
