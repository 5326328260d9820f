"""Which options of ``train_grpo.py`` contradict each other, and which a resumed run may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivt_agents.grpo.trainer import SCALE_FLOOR
from ivt_agents.training import options
from ivt_agents.training.checkpoints import check_resume
from ivt_agents.training.run import RunError

if TYPE_CHECKING:  # the script imports this module; only its type is needed here
    from ivt_agents.grpo.train import Args

MAY_CHANGE = options.MAY_CHANGE | {"steps", "eval_steps", "eval_samples", "eval_split"}
"""Options that a resumed run may change: no step's gradient depends on them. All others are refused."""

RESULTS = ("policy", "adapter", "before_after.json", "checkpoints", "episodes", "metrics.jsonl")
"""What a run makes; a run anew removes it in this order."""

_LEAST = {
    **dict.fromkeys(("prompts", "num_iterations", "max_completion_length"), 1),
    **dict.fromkeys(("warmup_steps", "eval_steps"), 0),
}


def check_run(recorded: Mapping[str, Any], given: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on with a run under other options (``check_resume``)."""
    # A rate that falls to 0 at the last step depends on which that is.
    check_resume(recorded, given, out, MAY_CHANGE - ({"steps"} if recorded.get("cooldown") else set()))


def check_options(args: Args, processes: int = 1) -> None:
    """Refuse options that contradict each other, before anything is loaded. Changes nothing.

    Raises:
        RunError: names the value and says what would have gone wrong.
    """
    args.check(**_LEAST)
    if over := args.prompts % processes:
        raise RunError(
            f"prompts {args.prompts} on {processes} processes: {over} processes would play one more than the others,"
            f" and environments are made for equal shares; give a multiple of {processes}"
        )
    for wrong, why in chain(_reward(args), _advantage(args), _step(args), _loss(args)):
        if wrong:
            raise RunError(why)


Refusals = Iterator[tuple[bool, str]]
"""Whether to refuse, and why. Conditions refuse NaN, too."""


def _reward(a: Args) -> Refusals:
    bonus, penalty = f"format_bonus {a.format_bonus:g}", f"invalid_penalty {a.invalid_penalty:g}"
    yield not 0 <= a.format_bonus < inf, f"{bonus}: unusable answers would be paid for; give 0 or more"
    ignored = "an episode with an unusable answer earns nothing, the penalty neither; add --invalid-penalty 0"
    yield a.require_format and a.invalid_penalty != 0, f"require_format with {penalty}: {ignored}"
    twice = "an unusable answer would cost both; give --invalid-penalty 0, or no bonus"
    yield a.format_bonus != 0 and a.invalid_penalty != 0, f"{bonus} with {penalty}: {twice}"


def _advantage(a: Args) -> Refusals:
    alike = "all members of a group would be equal and every advantage 0"
    yield not a.temperature > 0, f"temperature {a.temperature:g}: {alike}"
    alone = "with no other members to compare with every advantage is 0"
    yield a.num_generations < 2, f"num_generations {a.num_generations}: {alone}"
    one_step = a.advantage == "return_to_go" and a.reward == "final" and a.episode_steps == 1
    yield one_step, "episode_steps 1 leaves nothing to refine, so steps need no credit: add --advantage trajectory"
    discount = f"discount {a.discount:g}"
    yield not 0 <= a.discount <= 1, f"{discount}: a later gain would count more than an earlier one; give 0 to 1"
    per_step = "it weighs later gains in an earlier step's return; give --advantage return_to_go --reward gain"
    unused = a.advantage != "return_to_go" or a.reward == "final"
    yield a.discount != 1 and unused, f"{discount} with advantage {a.advantage} and reward {a.reward}: {per_step}"
    if a.scale_rewards == "group":
        not_it = "Dr. GRPO is GRPO without that division; use --scale-rewards none or --loss-type grpo"
        yield a.loss_type == "dr_grpo", f"scale_rewards group with loss_type dr_grpo: {not_it}"
        weight = f"the KL penalty's weight would be anything from {a.beta:g} to {a.beta / SCALE_FLOOR:g}"
        yield a.kl_in == "reward", f"scale_rewards group with kl_in reward: {weight}; use --kl-in loss"


def _step(a: Args) -> Refusals:
    lost = "the weights would stay, go uphill or be lost; give more than 0"
    yield not a.max_grad_norm > 0, f"max_grad_norm {a.max_grad_norm:g}: {lost}"
    left = "it trains the layers' own matrices, of which an adapter leaves none; add --lora-r 0"
    yield a.optim == "muon" and a.lora_r > 0, f"optim muon with lora_r {a.lora_r}: {left}"
    yield not 0 <= a.cooldown <= a.steps, f"cooldown {a.cooldown} of {a.steps} steps: give 0 to {a.steps}"


def _loss(a: Args) -> Refusals:
    length = a.max_completion_length
    for name, value in (("epsilon", a.epsilon), ("epsilon_high", a.epsilon_high)):
        if value is not None:
            yield not value > 0, f"{name} {value:g}: the clip would stop the gradient of tokens that have not moved yet"
            if a.loss_type == "gspo" and value >= 0.05:
                wide = f"a whole answer of {length} tokens could become {(1 + value) ** length:,.0f} times as probable"
                yield True, f"{name} {value:g} with loss_type gspo: {wide} before it is clipped; leave it out"
    rounding = (
        "with loss_type gspo: a cached and a whole pass round differently, which alone moves an answer's mean ratio by"
        " 0.001 (tiny model, sdpa): 74 % of the answers would lie outside the clip range of 0.0003 before the first"
        " update; use float32, or a loss with token ratios"
    )
    for name, low in (("bf16", a.bf16), ("dtype bfloat16", a.dtype == "bfloat16"), ("nf4", a.quantize == "nf4")):
        yield a.loss_type == "gspo" and low, f"{name} {rounding}"
    never = "a ratio is never below 0, so the lower bound would never bind"
    yield a.epsilon is not None and a.epsilon > 1, f"epsilon {a.epsilon or 0:g}: {never}"
    yield not a.beta >= 0, f"beta {a.beta:g}: the policy would be paid for leaving its reference; give 0 or more"
    nothing = "nothing would be subtracted; add --beta (the paper: 0.04)"
    yield a.kl_in == "reward" and a.beta == 0, f"kl_in reward with beta 0: {nothing}"
