"""Multi-turn GRPO in the environment.

    ivt train-grpo                                     # tiny model, its own warm start, 2 cores
    ivt train-grpo --model runs/sft/policy             # from a warm start made before
    ivt train-grpo --out runs/grpo --resume            # go on where a run was cut off
    accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 8 train_grpo.py   # several GPUs
    torchrun --standalone --nproc_per_node 2 train_grpo.py   # the same on several processes without a GPU

Each step plays groups of episodes of the same sample with the policy itself, credits every action with its episode's
return minus the mean return of the other members, and takes one clipped policy-gradient step. The reward is the gain in
IoU minus small penalties, so a return is the final IoU minus these: the ground truth never selects a step. It ends with
a table of before and after, without ground truth, on the validation split.

Losses, advantages and scaling are options (`--loss-type`, `--advantage`, `--scale-rewards`); options that contradict
each other are refused before anything is loaded. `docs/pitfalls.md` says which test guards against what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from ivt_agents.command import Hidden, progress_bars
from ivt_agents.grpo.losses import CLIPS
from ivt_agents.grpo.trainer import SCALE_FLOOR, GRPOTrainer
from ivt_agents.play.on_split import summary
from ivt_agents.sft import train as train_sft
from ivt_agents.training.folder import (
    CONFIG,
    PROCESSES,
    RunError,
    check_new,
    check_resume,
    forget_run,
    read_metrics,
    recorded_options,
    write_json,
)
from ivt_agents.training.options import MAY_CHANGE as SHARED_MAY_CHANGE
from ivt_agents.training.options import TrainingOptions
from ivt_agents.training.run import MetricsLog, end_training, make_accelerator, seed_everything
from ivt_agents.training.sharding import check_shareable, fill_parameters, gathered_parameters
from ivt_agents.vlm.adapters import drop_reference, layer_matrices, make_trainable, merged
from ivt_agents.vlm.dry_run import GENERATION_ROWS
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy, forbid_stop
from ivt_agents.vlm.prompts import TINY_NAME
from ivt_env.episodes import save_episodes
from ivt_env.files import asked_of, lock_folder, refuse_other
from ivt_env.rollouts import make_vector_env

MAY_CHANGE = SHARED_MAY_CHANGE | {"steps", "eval_steps", "eval_samples", "eval_split"}
"""Options that a resumed run may change: no step's gradient depends on them. All others are refused."""

RESULTS = ("policy", "adapter", "before_after.json", "checkpoints", "episodes", "metrics.jsonl")
"""What a run makes; a run anew removes it in this order."""

_LEAST = {
    **dict.fromkeys(("prompts", "num_iterations", "max_completion_length"), 1),
    **dict.fromkeys(("warmup_steps", "eval_steps"), 0),
}


@dataclass
class Args(TrainingOptions):
    """Multi-turn GRPO on IoU gains."""

    model: str | None = None
    """The warm-started policy: a folder or hub name. None: `train_sft.py` is run first, on `tiny`."""
    out: Path = Path("runs/grpo")
    """Run folder: configuration, metrics, checkpoints, the policy, sampled episodes."""
    steps: int = 50
    """Training steps: a rollout and an update each."""
    prompts: int = 8
    """Samples in a step, over all processes."""
    num_generations: int = 8
    """Episodes of each sample (the paper: 6)."""
    stop: Hidden[bool] = True
    """The policy may end an episode. False: it is not asked to, its stop cannot be sampled, and every episode
    makes all its refinements (the paper)."""
    reward: Hidden[Literal["gain", "final"]] = "gain"
    """`gain`: IoU gain at each step. `final`: IoU of the last box, paid at the end (the paper)."""
    step_cost: Hidden[float] = 0.01
    """Subtracted for every proposal: a look must bring more than that."""
    invalid_penalty: Hidden[float] = 0.1
    """Subtracted for an answer without a usable box or stop. Without it, an empty answer keeps the box as
    a stop does, and the policy learns to say nothing (seen after 40 steps)."""
    wrong_stop_penalty: Hidden[float] = 0.2
    """Subtracted for a stop on a box whose IoU is below 0.5: it must earn less than going on."""
    format_bonus: Hidden[float] = 0.0
    """Added once, at the end, where every answer of an episode held a usable box or stop (the paper: 0.1)."""
    require_format: Hidden[bool] = False
    """An episode with an unusable answer earns nothing. Without a stop, an unusable answer is the only way to keep a
    box, and a bonus of 0.1 is too small to prevent it (`docs/paper.md`)."""
    advantage: Literal["trajectory", "return_to_go", "episode_and_step"] = "trajectory"
    """Advantage from the whole episode's return, from each step's return-to-go, or from the first plus a comparison of
    steps in equal states. IoU gains telescope: episodes that end alike have equal returns, but not returns-to-go."""
    discount: Hidden[float] = 1.0
    """Discount factor of the return-to-go. 1: all gains up to the end, so that the final IoU is maximised. 0: each
    action is credited with its own gain only, for a policy that spoils every box in later steps."""
    scale_rewards: Hidden[Literal["none", "group", "batch"]] = "none"
    """Divide advantages by the standard deviation of a group's returns, or of all returns of the step."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"
    """Policy loss. With one optimizer step per rollout gspo equals grpo, and cispo equals dapo."""
    optim: Hidden[Literal["adamw", "muon"] | None] = None
    """`muon`: Muon on the matrices of the language model's layers, and nothing else is trained; with --lora-r 0. On
    the tiny model it learns from the same episodes what AdamW hardly does (`docs/paper.md`). None: `adamw` for an
    adapter, else `muon`."""
    warmup_steps: Hidden[int] = 5
    """Steps over which the learning rate rises from 0."""
    cooldown: Hidden[int] = 0
    """Last steps over which the learning rate falls to 0, which averages out the noise of single steps."""
    num_iterations: Hidden[int] = 1
    """Optimizer steps on each rollout."""
    epsilon: Hidden[float | None] = None
    """The probability ratio is clipped at 1 - epsilon ... None: what fits the loss (dapo: 0.2)."""
    epsilon_high: Hidden[float | None] = None
    """... and at 1 + epsilon_high. None: what fits the loss (dapo: 0.28)."""
    beta: float = 0.04
    """Weight of the KL divergence to the warm-started policy (the paper's value). With 0, some runs forget what SFT
    taught; a full fine-tune then needs no frozen copy of the model."""
    kl_in: Hidden[Literal["loss", "reward"]] = "loss"
    """Add it to the loss (k3 times ratio), or subtract it from each step's reward (k1)."""
    temperature: Hidden[float] = 0.4
    """Of the rollouts; the update scores with the same."""
    max_completion_length: int = 48
    """Token limit of a turn."""
    mask_truncated_completions: Hidden[bool] = True
    """Leave turns that ran into the limit out of the loss."""
    per_device_train_batch_size: int = 64
    """Turns in one forward and backward pass."""
    max_grad_norm: Hidden[float] = 1.0
    """Gradients are clipped to this norm."""
    save_steps: Hidden[int] = 20
    """Steps between checkpoints."""
    eval_steps: Hidden[int] = 20
    """Steps between greedy evaluations on the validation split; 0: only before and after."""


def main(args: Args) -> Path:
    """Train; returns the folder of the trained policy."""
    if args.dry_run:
        check_options(args)
        args.print_dry_run(
            model=args.model or TINY_NAME,
            new_tokens=args.max_completion_length,
            turns=args.episode_steps,
            rollout_rows=min(GENERATION_ROWS, args.prompts * args.num_generations),
            micro_batch=args.per_device_train_batch_size,
            reference_copy=args.beta > 0 and args.lora_r == 0,
        )
        return args.out
    args.check_model(args.lora_r)
    accelerator = make_accelerator(args.bf16)
    with lock_folder(args.out) if accelerator.is_main_process else contextlib.nullcontext():
        return _train(args, accelerator)


def _train(args: Args, accelerator: Accelerator) -> Path:
    chief = accelerator.is_main_process
    check_options(args, accelerator.num_processes)
    low, high = CLIPS[args.loss_type]
    args.optim = args.optim or ("adamw" if args.lora_r else "muon")
    args.epsilon = low if args.epsilon is None else args.epsilon
    args.epsilon_high = high if args.epsilon_high is None else args.epsilon_high
    options: dict[str, Any] = {**asdict(args), PROCESSES: accelerator.num_processes}
    if args.resume:
        recorded = recorded_options(args.out)
        # The run recorded what its policy said; that folder may say something else by now.
        for name in ("model", "view", "layout"):
            options[name] = options[name] or recorded.get(name)
            setattr(args, name, options[name])
        check_run(recorded, options, args.out)
    elif not args.overwrite:
        check_new(args.out, ["policy"])
    measured_on = args.measured_on()
    args.model = args.model or _warm_start(args, accelerator)
    seed_everything(args.seed)
    policy = _load(args, str(accelerator.device))
    check_shareable(policy.model, accelerator, args.optim)
    penalties = {name: getattr(args, name) for name in ("step_cost", "invalid_penalty", "wrong_stop_penalty")}
    seen: dict[str, Any] = {"reward": {"kind": args.reward, **penalties}, "max_steps": args.episode_steps}
    seen |= {"split": args.split, "data_root": args.data_root, "strict": True, **policy.shown}
    env = make_vector_env(args.env, args.prompts // accelerator.num_processes * args.num_generations, **seen)
    # The log is opened after the checkpoint is read: a resumed run drops what it will write again.
    log = MetricsLog(args.out, enabled=False)
    trainer = GRPOTrainer(policy, env, args, accelerator, log, args.out)
    if args.resume:
        trainer.resume()
    options |= {"model": args.model, "view": policy.view, "layout": policy.layout}
    if chief:
        if not args.resume:
            forget_run(args.out, RESULTS)
        write_json(args.out / CONFIG, options)
    kept = trainer.step if args.resume else None
    trainer.log = log = MetricsLog(args.out, chief, args.report_to, kept, config=options)

    def evaluate(step: int) -> None:
        """Greedy episodes on the validation split, where they are due."""
        due = step in (0, args.steps) or (args.eval_steps and step % args.eval_steps == 0)
        # A run that was killed after a checkpoint may have one evaluation still to make.
        if due and measured_on and not trainer.agreed(log.holds(step, "eval/")):
            with trainer.whole_weights():
                if not chief:
                    return
                sampling, generator = policy.sampling, policy.generator
                policy.set_temperature(0.0)
                episodes = args.measure(policy, measured_on, agent_name=f"step {step}")
                policy.sampling, policy.generator = sampling, generator
                save_episodes(args.out / "episodes" / f"step-{step:06d}", episodes[:50], None)  # to be looked at
                log.write(step, {f"eval/{k}": v for k, v in summary(episodes).items()})

    with progress_bars(note=True, disable=not chief) as progress:
        task = progress.add_task("GRPO", total=args.steps, completed=trainer.step, note="")
        evaluate(trainer.step)

        def on_step(step: int, metrics: dict[str, float]) -> None:
            note = f"final IoU {metrics['rollout/final_iou']:.3f}  stop {metrics['rollout/stop_rate']:.2f}"
            progress.update(task, completed=step, note=note)
            evaluate(step)

        trainer.train(on_step)
    folder = args.out / "policy"
    trained = gathered_parameters(policy.model) if trainer.sharded else None
    if chief:
        if trained is not None:  # the sharded model is of no use to one process alone: the same again, whole
            policy = _load(args, "cpu")
            fill_parameters(policy.model, trained)
        drop_reference(policy.model)
        if args.lora_r and not (Path(str(args.model)) / "adapter_config.json").exists():  # else its base is another
            policy.save(args.out / "adapter", options)
        policy.model = merged(policy.model)
        policy.save(folder, options)
    log.close()
    accelerator.wait_for_everyone()
    if chief:
        # Read back from the run's own metrics.
        measured = [row for row in read_metrics(args.out / "metrics.jsonl") if "eval/final_iou" in row]
        if len(measured) > 1:
            ends = (measured[0], measured[-1])
            first, last = ({k[5:]: v for k, v in row.items() if k.startswith("eval/")} for row in ends)
            train_sft.report(args.out, first, last)
        print(f"policy saved to {folder}")
    end_training(accelerator)
    return folder


def _load(args: Args, device: str) -> VLMPolicy:
    """The policy as training starts from it: what is trained requires gradients."""
    policy = load_policy(
        str(args.model),
        temperature=args.temperature,
        seed=args.seed,
        max_new_tokens=args.max_completion_length,
        device=device,
        **args.loading(),
    )
    if not args.stop:
        forbid_stop(policy)
    policy.model = make_trainable(policy.model, args.lora_r, args.lora_alpha, reference=args.beta > 0)
    if args.optim == "muon":
        matrices = layer_matrices(policy.model)
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(name in matrices)
    args.prepare_update(policy.model)
    return policy


def _warm_start(args: Args, accelerator: Accelerator) -> str:
    """The SFT policy beside this run, made now unless a finished one is there."""
    out = args.out.with_name(args.out.name + "-sft")
    taught = {name: getattr(args, name) for name in ("env", "split", "data_root", "seed", "view", "layout")}
    lessons: Literal["looks", "paper"] = "looks" if args.stop else "paper"
    # It is measured here, before the first step.
    wanted = train_sft.Args(**taught, bf16=args.bf16, eval_samples=0, out=out, lessons=lessons)
    wanted.max_unusable = args.max_unusable
    made = asked_of(out / "policy")
    wanted.resume = made is None and (out / CONFIG).exists()  # one that was cut off goes on
    accelerator.wait_for_everyone()  # all have looked before one writes
    if made is None:
        print("warm start: none given, training one (pass --model to use your own)")
        return str(train_sft.main(wanted))
    remedy = f"remove {out}, give another --out, or say --model {out / 'policy'} to use it all the same"
    refuse_other(out / "policy", made, taught | {"lessons": lessons}, remedy)
    print(f"warm start: using {out / 'policy'}")
    return str(out / "policy")


def check_run(recorded: Mapping[str, Any], given: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on with a run under other options (``check_resume``)."""
    # With a cooldown, the learning rate depends on the number of steps.
    check_resume(recorded, given, out, MAY_CHANGE - ({"steps"} if recorded.get("cooldown") else set()))


def check_options(args: Args, processes: int = 1) -> None:
    """Refuse (``RunError``) options that contradict each other, before anything is loaded."""
    args.check(**_LEAST)
    if over := args.prompts % processes:
        raise RunError(
            f"prompts {args.prompts} on {processes} processes: {over} processes would play one more than the others,"
            f" and environments are made for equal shares; give a multiple of {processes}"
        )
    for wrong, why in _contradictions(args):
        if wrong:
            raise RunError(why)


def _contradictions(a: Args) -> Iterator[tuple[bool, str]]:
    """Whether to refuse, and why. Conditions refuse NaN, too."""
    bonus, penalty = f"format_bonus {a.format_bonus:g}", f"invalid_penalty {a.invalid_penalty:g}"
    yield not 0 <= a.format_bonus < inf, f"{bonus}: unusable answers would be paid for; give 0 or more"
    ignored = "an episode with an unusable answer earns nothing, the penalty neither; add --invalid-penalty 0"
    yield a.require_format and a.invalid_penalty != 0, f"require_format with {penalty}: {ignored}"
    twice = "an unusable answer would cost both; give --invalid-penalty 0, or no bonus"
    yield a.format_bonus != 0 and a.invalid_penalty != 0, f"{bonus} with {penalty}: {twice}"
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
    lost = "the weights would stay, go uphill or be lost; give more than 0"
    yield not a.max_grad_norm > 0, f"max_grad_norm {a.max_grad_norm:g}: {lost}"
    left = "it trains the layers' own matrices, of which an adapter leaves none; add --lora-r 0"
    yield a.optim == "muon" and a.lora_r > 0, f"optim muon with lora_r {a.lora_r}: {left}"
    yield not 0 <= a.cooldown <= a.steps, f"cooldown {a.cooldown} of {a.steps} steps: give 0 to {a.steps}"
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
    nothing = "nothing would be subtracted; give --beta more than 0 (the paper: 0.04)"
    yield a.kl_in == "reward" and a.beta == 0, f"kl_in reward with beta 0: {nothing}"
