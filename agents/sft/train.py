"""Supervised warm start: teaches a policy to correct its own boxes, and to stop.

    ivt train-sft                                    # the tiny model on the embedded scenes
    ivt train-sft --demonstrations traces.jsonl      # demonstrations made elsewhere
    ivt train-sft --teacher openai:http://127.0.0.1:8000/v1   # a model writes the traces
    ivt train-sft --config configs/paper_qwen3vl_4b.yaml --dry-run   # what it would need
    ivt train-sft --single-shot --steps 500          # the control: single shots only
    accelerate launch --num_processes 2 train_sft.py       # the same on several processes

1. Harvest: the student plays one step on samples of the training split.
2. Teach: the template teacher shows its boxes, shifted ones and those of other objects, says what is seen there, and
   keeps the box, corrects it or goes to another object. A model teacher (``hf:`` or ``openai:``) keeps the boxes and
   writes the words.
3. Fine-tune: cross-entropy on the answers only.

It ends with a table of before and after, without ground truth, on the validation split.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.progress import Progress

from ivt_agents.command import Hidden, progress_bars
from ivt_agents.play.chat import Budget
from ivt_agents.play.on_split import play, summary
from ivt_agents.sft.demonstrations import (
    Demonstration,
    can_be_said,
    load_demonstrations,
    save_demonstrations,
    teach_as_the_paper,
)
from ivt_agents.sft.harvest import AnswerCache, write_traces
from ivt_agents.sft.lessons import teach_to_look
from ivt_agents.sft.teacher.load import Teacher, load_teacher
from ivt_agents.sft.trainer import to_turns, train
from ivt_agents.training.folder import (
    CONFIG,
    PROCESSES,
    RunError,
    check_new,
    check_resume,
    checkpoints,
    forget_run,
    number_of,
    recorded_options,
    write_json,
)
from ivt_agents.training.options import MAY_CHANGE as SHARED_MAY_CHANGE
from ivt_agents.training.options import TrainingOptions
from ivt_agents.training.run import MetricsLog, end_training, make_accelerator, seed_everything
from ivt_agents.training.sharding import check_shareable, fill_parameters, gathered_parameters
from ivt_agents.vlm.adapters import make_trainable, merged
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy, forbid_stop
from ivt_agents.vlm.prompts import TINY_NAME
from ivt_agents.vlm.turns import Turn
from ivt_env.failures import read_json
from ivt_env.files import lock_folder
from ivt_env.metrics.table import render
from ivt_env.rollouts import make_vector_env
from ivt_env.vector_env import GroundingVectorEnv

MAY_CHANGE = SHARED_MAY_CHANGE | {"teacher_cache", "teacher_max_requests", "teacher_max_tokens"}
"""Options that a resumed run may change: neither the policy nor the table depends on them."""

RESULTS = ("policy", "before_after.json", "checkpoints", "before.json", "demonstrations.jsonl", "metrics.jsonl")
"""What a run makes; a run anew removes it in this order."""
HARVEST = ("harvest.jsonl", "harvest.json", "first_boxes.json")
"""What a model teacher wrote. It says by itself whom it is of, so that a run that was cut off finds it again."""

_LEAST = {"samples": 1, "gradient_accumulation_steps": 1, "teacher_max_requests": 0, "teacher_max_tokens": 0}


@dataclass
class Args(TrainingOptions):
    """Supervised warm start on corrective traces."""

    model: str = "tiny"
    """The student: `tiny`, a folder, or a hub name."""
    out: Path = Path("runs/sft")
    """Run folder: configuration, metrics, demonstrations, the policy, samples."""
    samples: int = 5_000
    """Samples to harvest (all of the split if it has fewer)."""
    demonstrations: Path | None = None
    """JSON lines from any teacher; nothing is harvested then."""
    teacher: str = "template"
    """Who writes the traces: `template`, `hf:MODEL`, or `openai:BASE_URL[#MODEL]` (key in OPENAI_API_KEY)."""
    teacher_max_requests: Hidden[int] = 10_000
    """Cost cap of an `openai:` teacher: requests of this run, retries included."""
    teacher_max_tokens: Hidden[int] = 10_000_000
    """Cost cap of an `openai:` teacher: tokens of this run, as the server counts them."""
    teacher_cache: Hidden[Path] = Path("runs/teacher-cache")
    """Texts of model teachers, by a hash of model, prompt and image; asking again costs nothing."""
    lessons: Hidden[Literal["looks", "paper"]] = "looks"
    """`looks`: the student's own box, good and shifted ones and those of other objects, each with what is seen and what
    to do. `paper`: a straight walk from bad first boxes only, and no stop anywhere."""
    pixels: Hidden[float | None] = None
    """Times the most pixels that the student may be shown of an image, trained and saved so: the control of equal
    compute that spends it on a larger image. None: as the student says."""
    single_shot: bool = False
    """Teach first answers only. The control that every claim about the loop must beat."""
    steps: int = 300
    """Optimizer steps."""
    per_device_train_batch_size: int = 24
    """Demonstrations in one forward pass of one process."""
    gradient_accumulation_steps: Hidden[int] = 2
    """Forward passes in a step: each process learns from that many times the demonstrations of one pass."""
    optim: Hidden[Literal["adamw", "muon"]] = "muon"
    """`muon`: Muon at ten times that rate on the language model's matrices, AdamW on the rest."""
    smoothing: Hidden[float | None] = None
    """Smooth the targets of coordinates over this many thousandths of an image's side. 0: hard targets. None: 6 where
    the model writes a number in one token, else 0."""
    first_answers: Hidden[Literal["model", "policy"] | None] = None
    """Which model gives the first box. `model`: the student before training, so that learning to refine does not harm
    first boxes; the policy names it. None: `model` where every weight learns `looks`, else `policy`."""
    freeze_vision_tower: Hidden[bool] = True
    """Train the language model alone; its image encodings are then computed without gradient."""
    save_steps: Hidden[int] = 50
    """Steps between checkpoints."""


def check_options(args: Args) -> None:
    """Refuse options that cannot work (``RunError``, ``PolicyError``), before anything is loaded."""
    args.check(**_LEAST)
    args.check_model(args.lora_r)
    if args.first_answers == "model" and args.single_shot:
        raise RunError("first_answers model with single_shot: nothing would be learned; leave one of them out")
    if args.first_answers == "model" and args.layout == "prefix":
        raise RunError("first_answers model with layout prefix: two models cannot hold one conversation; leave one out")
    # This form refuses NaN, too.
    if args.smoothing is not None and not 0 <= args.smoothing < math.inf:
        raise RunError(f"smoothing {args.smoothing:g}: a standard deviation; give 0 or more thousandths")
    if args.pixels is not None and not 0 < args.pixels < math.inf:
        raise RunError(f"pixels {args.pixels:g}: no image has so many; give a factor above 0")


def main(args: Args) -> Path:
    """Run the three stages; returns the folder of the trained policy."""
    if args.dry_run:
        args.print_dry_run(
            model=args.model,
            # The token limits of load_policy: no demonstration is longer than what may be sampled.
            new_tokens=48 if args.model == TINY_NAME else 160,
            turns=1,
            rollout_rows=100,
            micro_batch=args.per_device_train_batch_size,
            pixels=args.pixels,
        )
        return args.out
    check_options(args)
    teacher = _teacher(args)
    measured_on = args.measured_on()
    accelerator = make_accelerator(args.bf16)
    if teacher is not None and accelerator.num_processes > 1:
        raise RunError(
            f"{accelerator.num_processes} processes would each ask {args.teacher}: run one process with --steps 0, "
            f"then this with --teacher template --demonstrations {args.out / 'demonstrations.jsonl'} and another --out"
        )
    with lock_folder(args.out) if accelerator.is_main_process else contextlib.nullcontext():
        return _train(args, teacher, measured_on, accelerator)


def _train(args: Args, teacher: Teacher | None, measured_on: range, accelerator: Accelerator) -> Path:
    options: dict[str, Any] = {**asdict(args), PROCESSES: accelerator.num_processes}
    if args.resume:
        check_resume(recorded_options(args.out), options, args.out, MAY_CHANGE)
    elif not args.overwrite:
        check_new(args.out, ["policy"])
    accelerator.wait_for_everyone()  # all have looked before one writes
    seed_everything(args.seed)
    policy = _student(args, str(accelerator.device))
    policy.autocast = accelerator.autocast
    env_kwargs: dict[str, Any] = {"split": args.split, "data_root": args.data_root, "strict": True, **policy.shown}
    env = make_vector_env(args.env, 1, **env_kwargs)
    dataset = env.dataset
    chief = accelerator.is_main_process
    if chief:
        if not args.resume:
            made = (*RESULTS, *(HARVEST if args.overwrite else ()))
            given = None if args.demonstrations is None else args.demonstrations.resolve()
            forget_run(args.out, [name for name in made if (args.out / name).resolve() != given])
        write_json(args.out / CONFIG, options)
    found = checkpoints(args.out) if args.resume else []
    kept = (number_of(found[-1]) if found else 0) if args.resume else None
    log = MetricsLog(args.out, chief, args.report_to, kept, config=asdict(args))
    with progress_bars(note=True, disable=not chief) as progress:
        first = args.out / "before.json"
        if chief and not (args.resume and first.exists()):  # measured once, however often the run is cut off
            write_json(first, _measure(policy, args, measured_on, progress, "before"))
        before = read_json(first, f"remove {first} to measure it again", RunError) if chief else {}
        taught = args.out / "demonstrations.jsonl"
        if args.resume and taught.exists():
            demonstrations = load_demonstrations(taught, dataset)
        else:
            demonstrations = _demonstrations(args, policy, env, env_kwargs, teacher, progress)
        accelerator.wait_for_everyone()  # all have looked before one writes
        teacher = None  # a local model's memory is needed for the training
        screen = env.screen
        if policy.opener is not None:  # what another model answers is not learned
            demonstrations = [d for d in demonstrations if d.shown is not None]
        usable = [d for d in demonstrations if can_be_said(d, policy.view, screen.around, dataset[d.index].size)]
        if len(usable) < len(demonstrations) and chief:
            progress.console.print(
                f"{len(demonstrations) - len(usable)} of {len(demonstrations)} demonstrations left out: a box lies"
                f" outside the image that view {policy.view} shows"
            )
        demonstrations = usable
        if not demonstrations:
            raise RunError(
                "no demonstrations are left to learn from: where first_answers is another model, none without a box is"
                " used, and each answer must lie in the image that it is measured in"
            )
        if chief:
            save_demonstrations(taught, demonstrations)
        _prepare_parameters(policy, args)
        check_shareable(policy.model, accelerator, args.optim)
        task = progress.add_task("training", total=args.steps, note="")

        def make_turns(chosen: Sequence[int]) -> list[Turn]:
            return to_turns(policy, env.screen, dataset, [demonstrations[i] for i in chosen])

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step, note=f"loss {loss:.3f}")

        images = [dataset[d.index].image_id for d in demonstrations]
        train(policy, make_turns, images, accelerator, log, args, on_step, resume=bool(found))
        folder = args.out / "policy"
        trained = gathered_parameters(policy.model) if accelerator.distributed_type == DistributedType.FSDP else None
        if chief:
            if trained is not None:  # the sharded model is of no use to one process alone: the same again, whole
                policy = _student(args, "cpu")
                _prepare_parameters(policy, args)
                fill_parameters(policy.model, trained)
            policy.model = merged(policy.model)
            policy.save(folder, options)
            after = _measure(policy, args, measured_on, progress, "after")
    log.close()
    accelerator.wait_for_everyone()
    if chief and before:
        report(args.out, before, after)
        print(f"policy saved to {folder}")
    end_training(accelerator)
    return folder


def _student(args: Args, device: str) -> VLMPolicy:
    """The policy that is taught, before anything is trained."""
    policy = load_policy(args.model, pixels=args.pixels, device=device, **args.loading())
    if args.lessons == "paper":
        forbid_stop(policy)
    looks = args.lora_r == 0 and args.lessons == "looks" and not args.single_shot and policy.layout == "fresh"
    keeps = looks if args.first_answers is None else args.first_answers == "model"
    if keeps and policy.opener is None:  # a student whose first answers are another model's keeps that
        policy.opener = load_policy(args.model, device=device, **args.loading())
    return policy


def _prepare_parameters(policy: VLMPolicy, args: Args) -> None:
    """Decide what is trained: everything, or adapters."""
    policy.model = make_trainable(policy.model, args.lora_r, args.lora_alpha)
    if args.freeze_vision_tower:
        policy.core.model.visual.requires_grad_(False)
    policy.frozen_vision = args.freeze_vision_tower or args.lora_r > 0
    args.prepare_update(policy.model)


def _teacher(args: Args) -> Teacher | None:
    """The model that writes the traces; None: the template does, or nobody has to."""
    if args.teacher == "template":
        return None
    if args.demonstrations is not None or args.single_shot:
        given = "--single-shot" if args.single_shot else "--demonstrations"
        raise RunError(
            f"--teacher {args.teacher.partition(':')[0]} with {given}: no traces would be written; "
            "add --teacher template"
        )
    # Before anything is written: an address that holds a password must not reach the run's configuration.
    return load_teacher(args.teacher, Budget(args.teacher_max_requests, args.teacher_max_tokens))


def _demonstrations(
    args: Args,
    policy: VLMPolicy,
    env: GroundingVectorEnv,
    env_kwargs: dict[str, Any],
    teacher: Teacher | None,
    progress: Progress,
) -> list[Demonstration]:
    dataset = env.dataset
    if args.demonstrations is not None:
        return load_demonstrations(args.demonstrations, dataset)
    rng = np.random.default_rng((args.seed, 1))
    size = min(args.samples, len(dataset))
    indices = [int(i) for i in rng.choice(len(dataset), size=size, replace=False)]
    if args.single_shot:
        samples = [(i, dataset[i]) for i in indices]
        return [Demonstration(dataset.name, dataset.split, i, s.sample_id, None, s.box) for i, s in samples]
    boxes_file = args.out / "first_boxes.json"
    made_for = {"model": args.model, "dataset": dataset.name, "split": dataset.split, "indices": indices}
    saved = read_json(boxes_file, "remove it") if teacher is not None and boxes_file.exists() else {}
    if saved.items() >= made_for.items():
        boxes = saved["boxes"]
    else:
        task = progress.add_task("harvesting", total=len(indices), note="")
        how: dict[str, Any] = {"ignore_stop": True, "max_steps": 1, "max_unusable": args.max_unusable, **env_kwargs}
        episodes = play(policy, args.env, indices=indices, on_progress=partial(progress.advance, task), **how)
        boxes = [episode.steps[0].box for episode in episodes]
    if args.lessons == "paper":
        drafts = teach_as_the_paper(dataset, indices, boxes)
        if not drafts:
            raise RunError(
                f"lessons paper: none of {size} first boxes has an IoU of 0.85 or less, so there is nothing to"
                " correct; give more --samples or a harder --split"
            )
    else:
        lesson_rng, counted = np.random.default_rng((args.seed, 2)), policy.dialogue.prompts.counts_looks
        drafts = teach_to_look(dataset, indices, boxes, lesson_rng, policy.view, env.screen.around, counted=counted)
    if teacher is None:
        return drafts
    # A harvest that was cut off must go on with the very same boxes; not every GPU repeats itself to the bit.
    write_json(boxes_file, made_for | {"boxes": boxes})
    task = progress.add_task("teaching", total=len(drafts), note="")
    cache, path = AnswerCache(args.teacher_cache), args.out / "harvest.jsonl"
    return write_traces(drafts, dataset, teacher, path, cache, on_progress=partial(progress.advance, task))


def _measure(policy: VLMPolicy, args: Args, indices: range, progress: Progress, name: str) -> dict[str, float]:
    if not indices:
        return {}
    task = progress.add_task(f"measuring {name}", total=len(indices), note="")
    # Of a student that was never asked to look again, answers without a box are what is to be expected.
    taken = None if name == "before" else 1.0
    advance = partial(progress.advance, task)
    return dict(summary(args.measure(policy, indices, on_progress=advance, max_unusable=taken)))


def report(out: Path, before: dict[str, float], after: dict[str, float]) -> None:
    """Write and print the end of a training command: greedy answers without ground truth, what refinement adds."""
    write_json(out / "before_after.json", {"before": before, "after": after})
    before, after = (d | {"refinement (final - step 0 IoU)": d["final_iou"] - d["step0_iou"]} for d in (before, after))
    lines = [[k, f"{before[k]:.3f}", f"{after[k]:.3f}", f"{after[k] - before[k]:+.3f}"] for k in before]
    print(render(["without ground truth, greedy", "before", "after", "change"], lines))
