"""Which options of ``train_grpo.py`` contradict each other, and which a resumed run may change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivt_agents.grpo.trainer import GRPOConfig
from ivt_agents.training.checkpoints import check_resume
from ivt_agents.training.run import RunError, check_least, check_rate, check_share
from ivt_agents.training.tracking import check_tracker

if TYPE_CHECKING:  # the script imports this module; only its type is needed here
    from ivt_agents.grpo.train import Args

MAY_CHANGE = frozenset(
    {
        # how long, how often
        "steps",
        "save_every",
        "eval_every",
        "eval_samples",
        "eval_split",
        # what is saved at the end
        "start_share",
        # what is refused
        "max_unusable",
        # where to, and what is shown
        "out",
        "tracker",
        "config",
        "resume",
        "overwrite",
        # reckoned with by a dry run only
        "dry_run",
        "gpu_memory_gb",
        "image",
    }
)
"""Options that a resumed run may change: no step's gradient depends on them. All others are refused."""

RESULTS = ("policy", "adapter", "before_after.json", "checkpoints", "episodes", "metrics.jsonl")
"""What a run makes; a run anew removes it in this order."""

_LEAST = {
    "steps": 0,
    "warmup": 0,
    "save_every": 1,
    "eval_every": 0,
    "eval_samples": 0,
    "lora_rank": 0,
    "seed": 0,
    "max_steps": 1,
}


def check_run(recorded: Mapping[str, Any], given: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on with a run under other options (``check_resume``)."""
    # A rate that falls to 0 at the last step depends on which that is.
    check_resume(recorded, given, out, MAY_CHANGE - ({"steps"} if recorded.get("cooldown") else set()))


def check_options(args: Args, processes: int = 1) -> None:
    """Refuse options that contradict each other, before anything is loaded. Changes nothing.

    Args:
        args: as given.
        processes: that the training would run on.

    Raises:
        RunError: names the value and says what would have gone wrong.
    """
    check_tracker(args.tracker)
    check_least(args, _LEAST)
    check_rate(args.lr)
    check_share("max_unusable", args.max_unusable)
    if not args.max_grad_norm > 0:
        raise RunError(
            f"max_grad_norm {args.max_grad_norm:g}: the weights would stay, go uphill or be lost; give more than 0"
        )
    _check_rollout(args, processes)
    _check_credit(args)
    _check_steps(args)
    _check_loss(args)


def _check_rollout(args: Args, processes: int) -> None:
    if not args.temperature > 0:  # so written, NaN is refused, too
        raise RunError(f"temperature {args.temperature:g}: all members of a group would be equal and every advantage 0")
    if args.group < 2:
        raise RunError(f"group {args.group}: with no other members to compare with every advantage is 0")
    if args.prompts % processes:
        raise RunError(
            f"prompts {args.prompts} on {processes} processes: {args.prompts % processes} processes would play one more"
            f" than the others, and the environments are made for equal shares; give a multiple of {processes}"
        )
    for name in ("prompts", "iterations", "micro_batch", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise RunError(f"{name} {getattr(args, name)}: the policy would never be updated; give at least 1")
    if not 0 <= args.format_bonus < float("inf"):
        raise RunError(f"format_bonus {args.format_bonus:g}: unusable answers would be paid for; give 0 or more")
    if args.require_format and args.invalid_penalty:
        raise RunError(
            f"require_format with invalid_penalty {args.invalid_penalty:g}: an episode with an unusable answer earns"
            " nothing, the penalty neither, so it would be ignored; add --invalid-penalty 0"
        )
    if args.format_bonus and args.invalid_penalty:
        raise RunError(
            f"format_bonus {args.format_bonus:g} with invalid_penalty {args.invalid_penalty:g}: an unusable answer"
            " would cost both, and the run would be recorded as either; give --invalid-penalty 0, or no bonus"
        )
    if args.advantage == "return_to_go" and args.reward == "final" and args.max_steps == 1:
        raise RunError("max_steps 1 leaves nothing to refine, so credit per step is one value: add --credit trajectory")


def _check_credit(args: Args) -> None:
    if args.advantage == "episode_and_step" and not args.omega > 0:
        raise RunError(
            f"omega {args.omega:g} with credit episode_and_step: nothing of the step comparison would be left, or it"
            " would be turned round; use --credit trajectory, or a positive omega"
        )
    if args.advantage != "episode_and_step" and args.omega != 1.0:
        raise RunError(
            f"omega {args.omega:g} with credit {args.advantage}: it would be ignored, and the run would be recorded as"
            " one with a step comparison; add --credit episode_and_step"
        )
    if not 0 <= args.discount <= 1:
        raise RunError(f"discount {args.discount:g}: a later gain would count more than an earlier one; give 0 to 1")
    if args.discount != 1 and (args.advantage != "return_to_go" or args.reward == "final"):
        raise RunError(
            f"discount {args.discount:g} with credit {args.advantage} and reward {args.reward}: it weighs later gains"
            " in an earlier step's return; give --credit return_to_go --reward gain"
        )
    if args.scale == "none" and args.scale_floor != GRPOConfig.scale_floor:
        raise RunError(
            f"scale_floor {args.scale_floor:g} with scale none: nothing is divided, so it would be ignored; add"
            " --scale group or --scale batch"
        )
    if args.scale != "none" and not args.scale_floor > 0:
        raise RunError(
            f"scale_floor {args.scale_floor:g} with scale {args.scale}: members whose rewards differ by 0.00001 would"
            " get advantages as large as members that differ by 1; give at least 0.001"
        )
    if args.scale == "group" and args.loss == "dr_grpo":
        raise RunError(
            "scale group with loss dr_grpo: Dr. GRPO is GRPO without that division; the run would carry its name and"
            " weigh groups that hardly differ up to 1 / scale_floor times as much; use --scale none or --loss grpo"
        )
    if args.scale == "group" and args.kl_in == "reward":
        raise RunError(
            "scale group with kl_in reward: the KL penalty would be divided by each group's standard deviation, so its"
            f" weight would be anything from {args.beta:g} to {args.beta / args.scale_floor:g}; use --kl-in loss"
        )


def _check_steps(args: Args) -> None:
    if args.optimizer == "muon" and args.lora_rank:
        raise RunError(
            f"optimizer muon with lora_rank {args.lora_rank}: it trains the layers' own matrices, of which an adapter"
            " leaves none; add --lora-rank 0"
        )
    if not 0 <= args.start_share < 1:
        raise RunError(
            f"start_share {args.start_share:g}: nothing of what was learned would be left; give 0 to below 1"
        )
    if args.start_share and args.lora_rank and (args.quantize == "nf4" or args.dtype == "bfloat16"):
        raise RunError(
            f"start_share {args.start_share:g} with an adapter that cannot be merged exactly: it is saved by"
            " itself, and there are no weights to go back with; leave it out"
        )
    if args.cooldown < 0 or args.cooldown > args.steps:
        raise RunError(f"cooldown {args.cooldown} of {args.steps} steps: give 0 to {args.steps}")


def _check_loss(args: Args) -> None:
    for name, value in (("clip_low", args.clip_low), ("clip_high", args.clip_high)):
        if value is None:
            continue
        if not value > 0:
            raise RunError(f"{name} {value:g}: the clip would stop the gradient of tokens that have not moved yet")
        if args.loss == "gspo" and value >= 0.05:
            grown = (1 + value) ** args.max_new_tokens
            raise RunError(
                f"{name} {value:g} with loss gspo: it bounds the mean ratio of a whole answer, so an answer of"
                f" {args.max_new_tokens} tokens could become {grown:,.0f} times as probable before it is clipped, which"
                " is no clip at all; leave it out (0.0003 and 0.0004)"
            )
    low = {"mixed_precision bf16": args.mixed_precision == "bf16", "dtype bfloat16": args.dtype == "bfloat16"}
    low["quantize nf4"] = args.quantize == "nf4"
    if args.loss == "gspo" and any(low.values()):
        raise RunError(
            f"{next(name for name, chosen in low.items() if chosen)} with loss gspo: a cached and a whole pass round"
            " differently, which alone moves an answer's mean ratio by 0.001 (tiny model, sdpa): 74 % of the answers"
            " would lie outside the clip range of 0.0003 before the first update; use float32, or a loss with token"
            " ratios"
        )
    if args.clip_low is not None and args.clip_low > 1:
        raise RunError(f"clip_low {args.clip_low:g}: a ratio is never below 0, so the lower bound would never bind")
    if not args.beta >= 0:
        raise RunError(f"beta {args.beta:g}: the policy would be paid for leaving its reference; give 0 or more")
    if args.kl_in == "reward" and args.beta == 0:
        raise RunError(
            "kl_in reward with beta 0: nothing would be subtracted, and the run would be recorded as one with a KL"
            " penalty; add --beta (the paper: 0.04)"
        )
