"""Which options of ``train_sft.py`` cannot work, or would train something else than was asked for."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from ivt_agents.training import options
from ivt_agents.training.run import RunError

if TYPE_CHECKING:  # the script imports this module; only its type is needed here
    from ivt_agents.sft.train import Args

MAY_CHANGE = options.MAY_CHANGE | {"teacher_cache", "teacher_max_requests", "teacher_max_tokens"}
"""Options that a resumed run may change: neither the policy nor the table depends on them."""

RESULTS = ("policy", "before_after.json", "checkpoints", "before.json", "demonstrations.jsonl", "metrics.jsonl")
"""What a run makes; a run anew removes it in this order."""
HARVEST = ("harvest.jsonl", "harvest.json", "first_boxes.json")
"""What a model teacher wrote. It says by itself whom it is of, so that a run that was cut off finds it again."""

_LEAST = {"samples": 1, "gradient_accumulation_steps": 1, "teacher_max_requests": 0, "teacher_max_tokens": 0}


def check_options(args: Args) -> None:
    """Refuse options that cannot work, before anything is loaded. Changes nothing.

    Raises:
        RunError: names the value and says what would have gone wrong.
        PolicyError: for a number format that cannot be had.
    """
    args.check(**_LEAST)
    args.check_model(args.lora_r)
    if args.first_answers == "model" and args.single_shot:
        raise RunError("first_answers model with single_shot: nothing would be learned; leave one of them out")
    if args.first_answers == "model" and args.layout == "prefix":
        raise RunError("first_answers model with layout prefix: two models cannot hold one conversation; leave one out")
    # So written, NaN is refused, too.
    if args.smoothing is not None and not 0 <= args.smoothing < inf:
        raise RunError(f"smoothing {args.smoothing:g}: a standard deviation; give 0 or more thousandths")
    if args.pixels is not None and not 0 < args.pixels < inf:
        raise RunError(f"pixels {args.pixels:g}: no image has so many; give a factor above 0")
