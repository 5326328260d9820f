"""Multi-turn GRPO in the environment.

    python train_grpo.py                                     # tiny model, its own warm start, 2 cores
    python train_grpo.py --model runs/sft/policy             # from a warm start made before
    python train_grpo.py --out runs/grpo --resume            # go on where a run was cut off
    accelerate launch --num_processes 2 train_grpo.py        # the same on several GPUs
    torchrun --standalone --nproc_per_node 2 train_grpo.py   # the same on several processes without a GPU

Each step plays groups of episodes of the same sample with the policy itself, credits every action
with its return-to-go minus the mean of the other members', and takes one clipped policy-gradient
step. Rewards are IoU gains, so an episode's return is its final IoU: nothing is picked with the
target. It ends with a table of before and after, label-free, on the validation split.

Losses, credit and scaling are options (`--loss`, `--credit`, `--scale`); options that contradict each
other are refused before anything is loaded. `docs/pitfalls.md` says which test guards against what.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import train_sft
from agents.command import run_command
from agents.evaluation import play, summary
from agents.grpo.losses import CLIPS
from agents.grpo.trainer import GRPOConfig, GRPOTrainer
from agents.training import MetricsLog, RunError, make_accelerator, seed_everything, write_json
from agents.vlm.dry_run import GENERATION_ROWS, Plan, dry_run
from agents.vlm.policy import TINY_NAME, VLMPolicy, load_policy
from ivt_env.episodes import save_episodes
from ivt_env.rollouts import make_vector_env


@dataclass
class Args:
    """Multi-turn GRPO on IoU gains."""

    config: Path | None = None
    """YAML file whose part `grpo` gives defaults; flags override it."""
    model: str | None = None
    """The warm-started policy: a folder or hub name. None: `train_sft.py` is run first, on `tiny`."""
    env: str = "IVT-Scenes-v0"
    """Registered id to train in."""
    split: str = "train"
    """Split to train on."""
    data_root: str | None = None
    """Folder of real data sets."""
    out: Path = Path("runs/grpo")
    """Run folder: configuration, metrics, checkpoints, the policy, sampled episodes."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    steps: int = 60
    """Training steps: a rollout and an update each."""
    prompts: int = 16
    """Samples in a step, over all processes."""
    group: int = 8
    """Episodes of each sample (the paper: 6)."""
    max_steps: int = 3
    """Actions in an episode (the paper: one proposal and two refinements)."""
    reward: Literal["gain", "final"] = "gain"
    """`gain`: IoU gain at each step. `final`: IoU of the last box, paid at the end (the paper)."""
    step_cost: float = 0.0
    """Subtracted for every proposal."""
    invalid_penalty: float = 0.1
    """Subtracted for an answer without a usable box or stop. Without it, an empty answer keeps the box as
    a stop does, and the policy learns to say nothing (seen after 40 steps). The paper pays 0.1 for format."""
    advantage: Annotated[
        Literal["return_to_go", "trajectory", "episode_and_step"], tyro.conf.arg(aliases=["--credit"])
    ] = "return_to_go"
    """Credit per step, one value for the whole episode, or that plus a comparison of equal states (GiGPO)."""
    omega: float = 1.0
    """Weight of the comparison of equal states in `episode_and_step`."""
    scale: Literal["none", "group", "batch"] = "none"
    """Divide advantages by the standard deviation of a group's returns, or of all returns of the step."""
    scale_floor: float = 1e-3
    """That standard deviation counts as at least this much reward."""
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"
    """Policy loss. With one optimizer step per rollout gspo equals grpo, and cispo equals dapo."""
    lr: float = 1e-3
    """Learning rate of AdamW."""
    warmup: int = 5
    """Steps over which it rises from 0."""
    lora_rank: int = 16
    """Rank of LoRA adapters on the language model; 0 trains every weight."""
    iterations: int = 1
    """Optimizer steps on each rollout."""
    clip_low: float | None = None
    """The probability ratio is clipped at 1 - clip_low ... None: what fits the loss (dapo: 0.2)."""
    clip_high: float | None = None
    """... and at 1 + clip_high. None: what fits the loss (dapo: 0.28)."""
    beta: Annotated[float, tyro.conf.arg(aliases=["--kl-coef"])] = 0.0
    """Weight of the KL divergence to the warm-started policy (the paper: 0.04)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Add it to the loss (k3 times ratio), or subtract it from each step's reward (k1)."""
    temperature: float = 1.0
    """Of the rollouts; the update scores with the same."""
    max_new_tokens: int = 40
    """Token limit of a turn."""
    mask_truncated: bool = True
    """Leave turns that ran into the limit out of the loss."""
    micro_batch: int = 64
    """Turns in one forward and backward pass."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    seed: int = 0
    """Decides samples and sampling."""
    save_every: int = 20
    """Steps between checkpoints."""
    eval_every: int = 20
    """Steps between greedy evaluations on the validation split; 0: only before and after."""
    eval_samples: int = 300
    """Validation samples of each evaluation; 0: none at all."""
    eval_split: str = "val"
    """Split of those evaluations."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Number format of the update's passes."""
    tensorboard: bool = True
    """Write TensorBoard event files beside the JSON lines."""
    dry_run: bool = False
    """Build the true architecture without weights, print what it needs and what fits, and end."""
    gpu_memory_gb: float = 80.0
    """Memory of the GPU that a dry run reckons with."""
    picture: tuple[int, int] = (480, 640)
    """Height and width of the pictures that a dry run reckons with."""


def main(args: Args) -> Path:
    """Train; returns the folder of the trained policy."""
    if args.dry_run:
        check_options(args)
        print(dry_run(_plan(args)))
        return args.out
    accelerator = make_accelerator(args.mixed_precision)
    chief = accelerator.is_main_process
    check_options(args, accelerator.num_processes)
    low, high = CLIPS[args.loss]
    args.clip_low = low if args.clip_low is None else args.clip_low
    args.clip_high = high if args.clip_high is None else args.clip_high
    if args.resume and args.model is None:
        args.model = _recorded_model(args.out)
    args.model = args.model or _warm_start(args)
    seed_everything(args.seed)
    policy = load_policy(
        args.model,
        temperature=args.temperature,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        device=str(accelerator.device),
    )
    if hasattr(policy.model, "merge_and_unload"):
        # A second adapter would take the place of the first, and "without adapter" would be the model
        # before its warm start: the reference of the KL divergence must be the policy as given.
        policy.model = policy.model.merge_and_unload()
    policy.model.requires_grad_(args.lora_rank == 0)
    if args.lora_rank:
        policy.model = train_sft.add_lora(policy.model, args.lora_rank)
    reward = {"kind": args.reward, "step_cost": args.step_cost, "invalid_penalty": args.invalid_penalty}
    env = make_vector_env(
        args.env,
        args.prompts // accelerator.num_processes * args.group,
        split=args.split,
        data_root=args.data_root,
        strict=True,
        max_steps=args.max_steps,
        reward=reward,
    )
    config = GRPOConfig(**{k: getattr(args, k) for k in GRPOConfig.__dataclass_fields__})
    # The log is opened after the checkpoint is read: a resumed run drops what it will write again.
    log = MetricsLog(args.out, enabled=False)
    trainer = GRPOTrainer(policy, env, config, accelerator, log, args.out)
    if args.resume:
        trainer.resume()
    trainer.log = log = MetricsLog(
        args.out, enabled=chief, tensorboard=args.tensorboard, keep_until=trainer.step if args.resume else None
    )
    if chief:
        write_json(args.out / "config.json", asdict(args))
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), disable=not chief) as progress:
        task = progress.add_task("GRPO", total=args.steps, completed=trainer.step, note="")
        if chief and trainer.step == 0:
            log.write(0, _evaluate(policy, args, 0))

        def on_step(step: int, metrics: dict[str, float]) -> None:
            note = f"final IoU {metrics['rollout/final_iou']:.3f}  stop {metrics['rollout/stop_rate']:.2f}"
            progress.update(task, completed=step, note=note)
            due = step == args.steps or (args.eval_every and step % args.eval_every == 0)
            if chief and due:
                log.write(step, _evaluate(policy, args, step))

        trainer.train(on_step)
    folder = args.out / "policy"
    if chief:
        if args.lora_rank:
            policy.model.save_pretrained(args.out / "adapter")
            policy.model = policy.model.merge_and_unload()
        policy.save(folder)
    log.close()
    accelerator.wait_for_everyone()
    if chief:
        _report(args, folder)
    # With several processes: without it the one that ends first can abort the others.
    accelerator.end_training()
    return folder


def _plan(args: Args) -> Plan:
    """What a dry run reckons with."""
    return Plan(
        model=args.model or TINY_NAME,
        gpu_memory_gb=args.gpu_memory_gb,
        picture=args.picture,
        new_tokens=args.max_new_tokens,
        turns=args.max_steps,
        rollout_rows=min(GENERATION_ROWS, args.prompts * args.group),
        micro_batch=args.micro_batch,
        lora_rank=args.lora_rank,
        autocast=args.mixed_precision == "bf16",
        reference_copy=args.beta > 0 and args.lora_rank == 0,
    )


def check_options(args: Args, processes: int = 1) -> None:
    """Refuse options that contradict each other, before anything is loaded. Changes nothing.

    Args:
        args: as given.
        processes: that the training would run on.

    Raises:
        RunError: names the value and says what would have gone wrong.
    """
    _check_rollout(args, processes)
    _check_credit(args)
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
    if args.advantage == "return_to_go" and args.reward == "final" and args.max_steps == 1:
        raise RunError("max_steps 1 leaves nothing to refine: use evaluate.py's single-shot control instead")


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
    if args.scale == "none" and args.scale_floor != Args.scale_floor:
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
    if args.loss == "gspo" and args.mixed_precision == "bf16":
        raise RunError(
            "mixed_precision bf16 with loss gspo: rollouts are sampled in float32, and bf16 rounding alone moves an"
            " answer's mean ratio by 0.005 (tiny model): 97 % of the answers would lie outside the clip range of 0.0003"
            " before the first update; use --mixed-precision no, or a loss with token ratios"
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


def _recorded_model(out: Path) -> str:
    import json

    path = out / "config.json"
    if not path.exists():
        raise RunError(f"nothing to resume in {out}: no config.json; start without --resume")
    return str(json.loads(path.read_text(encoding="utf-8"))["model"])


def _warm_start(args: Args) -> str:
    """The SFT policy beside this run, made now unless a finished one is there."""
    out = args.out.with_name(args.out.name + "-sft")
    if (out / "policy" / "policy.json").exists():
        print(f"warm start: using {out / 'policy'}")
        return str(out / "policy")
    print("warm start: none given, training one (pass --model to use your own)")
    folder = train_sft.main(
        train_sft.Args(env=args.env, split=args.split, data_root=args.data_root, out=out, seed=args.seed)
    )
    return str(folder)


def _evaluate(policy: VLMPolicy, args: Args, step: int) -> dict[str, float]:
    """Greedy episodes on the validation split; the last ones are kept to be looked at."""
    if not args.eval_samples:
        return {}
    sampling, generator = policy.sampling, policy.generator
    env = make_vector_env(args.env, 1, split=args.eval_split, data_root=args.data_root, strict=True)
    count = min(args.eval_samples, len(env.dataset))
    policy.set_temperature(0.0)
    episodes = play(
        policy,
        args.env,
        args.eval_split,
        range(count),
        ignore_stop=False,
        max_steps=args.max_steps,
        data_root=args.data_root,
        strict=True,
        agent_name=f"step {step}",
    )
    policy.sampling, policy.generator = sampling, generator
    save_episodes(args.out / "episodes" / f"step-{step:06d}", episodes[:50], None)
    return {f"eval/{k}": v for k, v in summary(episodes).items()}


def _report(args: Args, folder: Path) -> None:
    """The table of before and after, read back from the run's own metrics."""
    import json

    rows: list[dict[str, Any]] = [json.loads(x) for x in (args.out / "metrics.jsonl").read_text().splitlines()]
    measured = [r for r in rows if "eval/final_iou" in r]
    if len(measured) > 1:
        first, last = ({k[5:]: v for k, v in r.items() if k.startswith("eval/")} for r in (measured[0], measured[-1]))
        write_json(args.out / "before_after.json", {"before": first, "after": last})
        print(train_sft.before_and_after(first, last))
    print(f"policy saved to {folder}")


if __name__ == "__main__":
    run_command(main, Args, section="grpo")
