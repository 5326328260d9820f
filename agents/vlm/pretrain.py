"""Trains the tiny Qwen3-VL from scratch on the scenes, on first answers only, and saves it.

    python -m ivt_agents.vlm.pretrain --out agents/vlm/tiny_qwen3vl

Three stages. First the vision tower learns to say what is in each cell of the image (shape, colour, texture,
box, mark): without it, a small model's language loss never tells the tower where to look. Then the whole model
answers several questions per image; every question sees the image and itself, never the other questions,
exactly as at inference. Whole scenes and close-ups are alike: each is an image, and boxes are relative to it. The
model never sees an overlay here. At last the language model learns prompts of two images, a scene and a close-up of it,
and to answer in the frame of either. A GPU is used where there is one.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from ivt_agents.command import progress_bars, run_command
from ivt_agents.sft.trainer import learning_rate, smoothed_targets
from ivt_agents.training.finite import NotFiniteError, check_finite, unusable_weight
from ivt_agents.training.muon import Muon
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import POLICY_FILE
from ivt_agents.vlm.precision import bf16_pays
from ivt_agents.vlm.pretrain_model import CellHead, SlotModel, words_of
from ivt_agents.vlm.pretrain_pool import KINDS, LABELS, NUMBERS, SEARCH_FROM, SLOT, Drawing, Pool, Words
from ivt_agents.vlm.prompts import load_prompts
from ivt_agents.vlm.tiny import build_model, tiny_image_processor, tiny_tokenizer
from ivt_env.failures import read_json
from ivt_env.files import whole_folder, write_whole

REMEDY = "What was saved before stays; give a lower --lr or --matrix-lr"
PAIR_REMEDY = "What was saved before stays; give a lower --pair-lr"


@dataclass
class Args:
    """Train the tiny model from scratch."""

    out: Path = Path("runs/tiny_qwen3vl")
    """Folder for the weights, tokenizer, image processor and the training record."""
    seed: int = 0
    """Seed of the initial weights and of the order of images."""
    scenes: int = 72_000
    """Distinct standard scenes, two images each: all of it and a close-up (28 KB of disk an image)."""
    search_scenes: int = 24_000
    """Distinct search scenes, three images each."""
    first_scene: int = 0
    """Index of the first training scene."""
    drawn_first: float = 0.1
    """Share of the scenes that is drawn before training starts; the rest comes until two thirds of the second stage."""
    vision_steps: int = 1_500
    """Steps of the first stage (vision tower on the labels of cells)."""
    vision_batch: int = 256
    """Images in a batch of the first stage."""
    vision_shares: tuple[float, float, float, float, float] = (0.3, 0.15, 0.05, 0.3, 0.2)
    """Of the first stage's images: whole scenes, close-ups, whole search scenes, close-ups of one object and of two."""
    steps: int = 8_000
    """Steps of the second stage (grounding)."""
    seconds: float | None = None
    """Instead of --steps: as many as end within this time from the start, before the third stage. The record has their
    number."""
    batch: int = 128
    """Images in a batch of the second stage."""
    shares: tuple[float, float, float, float, float] = (0.5, 0.2, 0.07, 0.08, 0.15)
    """The same of the second stage's images."""
    questions_per_image: int = 6
    """Questions asked about each image of a batch."""
    matrix_lr: float = 0.02
    """Muon's learning rate, on the text model's matrices."""
    lr: float = 2e-3
    """AdamW's learning rate, on everything else."""
    smoothing: tuple[float, float] = (10.0, 5.0)
    """Standard deviation of the coordinate targets (of 1000) at the start and at the end."""
    cell_weight: float = 0.1
    """Of the first stage's loss in the second stage: what has been learned about marks must not be lost."""
    model: Path | None = None
    """Folder of weights that the first two stages made: only the third stage is run."""
    pair_steps: int = 600
    """Steps of the third stage (prompts of two images)."""
    pair_batch: int = 24
    """Prompts of two images in a batch of the third stage, and prompts of one image, whose answers are to stay."""
    questions_per_pair: int = 4
    """Questions asked about each prompt of the third stage."""
    keep_weight: float = 10.0
    """Weight of the divergence of the answers to one image from what they were before the third stage."""
    pair_lr: tuple[float, float] = (0.004, 4e-4)
    """Learning rates of the third stage: Muon's and AdamW's."""
    save_seconds: float = 60.0
    """Time between saves in the second stage, so that an interruption does not lose everything."""
    workers: int = 2
    """Processes that draw the scenes."""


def questions(
    pool: Pool, rng: np.random.Generator, rows: NDArray[np.int64], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` questions about each of some images: token ids (rows, count, SLOT) and ``lengths`` (rows, count)."""
    chosen = rows[:, None], pool.choose(rng, rows, count)
    return torch.from_numpy(pool.slots[chosen]).long(), torch.from_numpy(pool.lengths[chosen]).long()


def cell_loss(head: CellHead, merged: torch.Tensor, deep: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Of the merged tokens and, at a lower weight, of the deep-stack mergers', which keeps them in the game too."""
    flat = labels.view(-1, LABELS)
    loss = head.loss(merged.flatten(0, 1), flat)
    for features in deep:
        loss = loss + 0.3 * head.loss(features.flatten(0, 1), flat)
    return loss


def autocast(device: torch.device) -> torch.autocast:
    """Computes in bfloat16 where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16_pays())


class Updates:
    """Optimizer steps of a stage: Muon on the matrices of the language model's layers, AdamW on what else is trained.

    Both learning rates rise over 50 steps and fall to a fiftieth. ``clipped``: the parameters whose gradient's norm is
    held below 1, if not all.
    """

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        parameters: Iterable[nn.Parameter],
        steps: int,
        lr: float,
        matrix_lr: float = 0.0,
        *,
        clipped: Iterable[nn.Parameter] | None = None,
        weight_decay: float = 0.0,
        remedy: str = REMEDY,
    ) -> None:
        parameters = list(parameters)
        of_layers = {id(p) for p in model.model.language_model.layers.parameters() if p.ndim == 2}
        matrices = [p for p in parameters if id(p) in of_layers]
        rest = [p for p in parameters if id(p) not in of_layers]
        adamw: dict[str, Any] = {"betas": (0.9, 0.98), "weight_decay": weight_decay, "fused": rest[0].is_cuda}
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [(torch.optim.AdamW(rest, lr=lr, **adamw), lr)]
        if matrices:
            self.optimizers.append((Muon(matrices, lr=matrix_lr, weight_decay=0.0), matrix_lr))
        self.clipped = parameters if clipped is None else list(clipped)
        self.steps, self.remedy = steps, remedy

    def take(self, step: int, loss: torch.Tensor) -> None:
        """Step number ``step``, from 0; NotFiniteError where the loss or its gradient is not finite."""
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate(step, self.steps, 1.0, warmup=50, floor=0.02)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.clipped, 1.0)
        check_finite(step + 1, {"the loss": float(loss.detach()), "the gradient's norm": float(norm)}, self.remedy)
        for optimizer, _ in self.optimizers:
            optimizer.step()


def train_vision(
    slots: SlotModel, head: CellHead, pool: Pool, args: Args, progress: Progress
) -> list[dict[str, float]]:
    """First stage: labels of cells from the vision tower."""
    device = slots.model.device
    parameters = [*slots.model.model.visual.parameters(), *head.parameters()]
    updates = Updates(slots.model, parameters, args.vision_steps, args.lr, weight_decay=0.01)
    rng = np.random.default_rng(args.seed)
    task, log = progress.add_task("vision", total=args.vision_steps, note=""), []
    for step in range(args.vision_steps):
        rows = pool.sample(rng, args.vision_batch, args.vision_shares)
        with autocast(device):
            merged, deep = slots.see(torch.from_numpy(pool.images[rows]).to(device))
        loss = cell_loss(head, merged, deep, torch.from_numpy(pool.cells[rows]).to(device))
        updates.take(step, loss)
        if step % 20 == 0 or step == args.vision_steps - 1:
            log.append({"stage": 1, "step": step, "loss": float(loss.detach())})
            progress.update(task, note=f"loss {log[-1]['loss']:.3f}")
        progress.advance(task)
    return log


def token_log_probs(
    slots: SlotModel, merged: torch.Tensor, deep: list[torch.Tensor], asked: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of the answers (B, questions, ANSWER), and the log-probabilities from which each of them is drawn."""
    with autocast(asked.device):
        hidden, told = slots.answer(merged, deep, asked, lengths.clamp(min=1))
        logits = slots.model.lm_head(hidden)  # (B, questions, ANSWER, vocabulary)
    return told, logits.float().log_softmax(-1)


def answer_loss(
    slots: SlotModel,
    merged: torch.Tensor,
    deep: list[torch.Tensor],
    asked: torch.Tensor,
    lengths: torch.Tensor,
    targets: torch.Tensor,
    descriptions: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of the numbers and of the other tokens of the answers, over the questions that there are.

    ``asked`` (B, questions, SLOT) and ``lengths`` (B, questions) as in ``SlotModel.answer``, 0 for no question; the
    last ``descriptions`` of the questions are answered in words, padded with 0. ``targets`` (1001, 1001): what to
    expect of the 1001 numbers where each of them is right.
    """
    device, numbers, boxes = asked.device, slots.numbers, asked.shape[1] - descriptions
    at_number = torch.tensor(NUMBERS, device=device)
    told, log_probs = token_log_probs(slots, merged, deep, asked, lengths)
    real = (lengths > 0).float()
    word = torch.ones(told.shape, device=device)
    word[:, :boxes].index_fill_(2, at_number, 0)
    word[:, boxes:] = (told[:, boxes:] != 0).float()
    plain = (log_probs.gather(-1, told[..., None])[..., 0] * word).sum(-1) / word.sum(-1).clamp(min=1)
    wanted = targets[slots.value_of[told[:, :boxes, at_number]]]  # (B, boxes, 4, 1001)
    smooth = (log_probs[:, :boxes, at_number].index_select(-1, numbers) * wanted).sum(-1).mean(-1)
    located = real[:, :boxes]
    return -(smooth * located).sum() / located.sum().clamp(min=1), -(plain * real).sum() / real.sum().clamp(min=1)


def train_grounding(
    slots: SlotModel,
    head: CellHead,
    drawing: Drawing,
    args: Args,
    progress: Progress,
    log: list[dict[str, float]],
    keep: Callable[[], None],
    only: int | None = None,
) -> None:
    """Second stage: single-shot grounding, several questions an image; its losses go into ``log``.

    ``keep`` is called every ``save_seconds``; it ends after ``only`` steps where that is given.
    """
    model, device, pool = slots.model, slots.model.device, drawing.pool
    parameters = [*model.parameters(), *head.parameters()]
    updates = Updates(model, parameters, args.steps, args.lr, args.matrix_lr, clipped=model.parameters())
    rng = np.random.default_rng(args.seed + 1)
    task, saved = progress.add_task("grounding", total=only or args.steps, note=""), time.monotonic()
    for step in range(only or args.steps):
        share = step / args.steps
        if step % 100 == 0:
            sigma = args.smoothing[0] * (1 - share) + args.smoothing[1] * share
            targets = smoothed_targets(sigma, torch.device("cpu")).to(device)
            if only is None:
                drawing.until(args.drawn_first + (1 - args.drawn_first) * min(1.0, 1.5 * share))
        rows = pool.sample(rng, args.batch, args.shares)
        asked, lengths = (found.to(device) for found in questions(pool, rng, rows, args.questions_per_image))
        with autocast(device):
            merged, deep = slots.see(torch.from_numpy(pool.images[rows]).to(device))
        boxes, words = answer_loss(slots, merged, deep, asked, lengths, targets)
        seen = cell_loss(head, merged, deep, torch.from_numpy(pool.cells[rows]).to(device))
        loss = boxes + words + args.cell_weight * seen
        updates.take(step, loss)
        if step % 20 == 0 or step == args.steps - 1:
            log.append({"stage": 2, "step": step, "loss": float(boxes.detach()), "sigma": sigma})
            progress.update(task, note=f"loss {log[-1]['loss']:.3f}")  # reading it waits for a GPU
        progress.advance(task)
        if only is None and time.monotonic() - saved > args.save_seconds:
            keep()
            saved = time.monotonic()


def save(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, args: Args, record: dict[str, Any]
) -> None:
    """Writes model (half precision), tokenizer, image processor and how they came about where ``load_policy`` looks."""
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(s) for s in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    half = {name: tensor.to("cpu", torch.float16) for name, tensor in model.state_dict().items()}
    if name := unusable_weight(half.items()):
        raise NotFiniteError(f"weight {name} is not finite in half precision, so {args.out} is not written. {REMEDY}")
    half.pop("lm_head.weight")  # tied to the input embeddings
    settings = load_prompts("tiny").settings()
    with whole_folder(args.out, asdict(args)) as partial:
        model.save_pretrained(partial, state_dict=half)
        tokenizer.save_pretrained(partial)
        tiny_image_processor().save_pretrained(partial)
        write_whole(partial / POLICY_FILE, json.dumps(settings, indent=1) + "\n")
        write_whole(partial / "training.json", json.dumps(record, indent=1, default=str) + "\n")


def pair_questions(
    pool: Pool, pairs: NDArray[np.int64], count: int, words: Words, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is asked about scenes and their close-ups: token ids (B, count + 1, SLOT) and ``lengths`` (B, count + 1).

    ``pairs`` (B, 2) are rows of both. Half of the ``count`` boxes are answered in the frame of the scene, half in that
    of the close-up; the last question asks for a description of the close-up.
    """
    scenes, closeups = pairs.T
    of_scenes, scene_lengths = questions(pool, rng, scenes, count - count // 2)
    of_closeups, closeup_lengths = questions(pool, rng, closeups, count // 2)
    of_closeups.scatter_(2, closeup_lengths[:, :, None], words.in_closeup)
    said = torch.from_numpy(pool.descriptions[closeups]).long()[:, None]  # (B, 1, ANSWER)
    described = torch.cat([torch.tensor(words.describe).expand(len(said), 1, -1), said], 2)
    described = nn.functional.pad(described, (0, SLOT - described.shape[2]))
    described_lengths = len(words.describe) * (said[:, :, 0] != 0).long()
    asked = torch.cat([of_scenes, of_closeups, described], 1)
    return asked, torch.cat([scene_lengths, closeup_lengths, described_lengths], 1)


def train_pairs(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    drawing: Drawing,
    args: Args,
    progress: Progress,
    log: list[dict[str, float]],
) -> None:
    """Third stage: prompts of two images, a scene and a close-up of it, and as many of one image.

    Half of the boxes are answered in the frame of the close-up, half in that of the scene; beside them, the close-up is
    described. The answers to one image are kept: what the model expected before this stage is their target. Only the
    language model is trained. The losses go into ``log``.
    """
    device, pool, per = model.device, drawing.pool, args.questions_per_pair
    one, two = SlotModel(model, tokenizer, per), SlotModel(model, tokenizer, per + 1, images=2)
    before = copy.deepcopy(one)
    matrix_lr, lr = args.pair_lr
    language = model.model.language_model.parameters()
    updates = Updates(model, language, args.pair_steps, lr, matrix_lr, remedy=PAIR_REMEDY)
    targets = smoothed_targets(args.smoothing[1], torch.device("cpu")).to(device)
    rng = np.random.default_rng(args.seed + 2)
    task = progress.add_task("two images", total=args.pair_steps, note="")
    for step in range(args.pair_steps):
        if step % 100 == 0:
            drawing.until(args.drawn_first + (1 - args.drawn_first) * min(1.0, 1.5 * step / args.pair_steps))
        rows = pool.sample(rng, args.pair_batch, args.shares)
        pairs = pool.sample_pairs(rng, args.pair_batch, sum(args.shares[SEARCH_FROM:]))  # (B, 2)
        single = [found.to(device) for found in questions(pool, rng, rows, per)]
        asked, lengths = (found.to(device) for found in pair_questions(pool, pairs, per, one.words, rng))
        shown = torch.from_numpy(pool.images[np.concatenate([rows, pairs.ravel()])]).to(device)
        with torch.no_grad(), autocast(device):
            merged, deep = one.see(shown)
        merged_pairs, deep_pairs = merged[len(rows) :], [d[len(rows) :] for d in deep]
        boxes, words = answer_loss(two, merged_pairs, deep_pairs, asked, lengths, targets, descriptions=1)
        seen = merged[: len(rows)], [d[: len(rows)] for d in deep]
        with torch.no_grad():
            _, wanted = token_log_probs(before, *seen, *single)
        _, log_probs = token_log_probs(one, *seen, *single)
        moved = (wanted.exp() * (wanted - log_probs)).sum(-1)  # Kullback-Leibler, (B, questions, ANSWER)
        moved = moved[single[1] > 0].mean()
        loss = boxes + words + args.keep_weight * moved
        updates.take(step, loss)
        if step % 20 == 0 or step == args.pair_steps - 1:
            found = {"loss": boxes, "words": words, "one image": moved}
            log.append({"stage": 3, "step": step} | {name: float(value.detach()) for name, value in found.items()})
            progress.update(task, note=f"loss {log[-1]['loss']:.3f}")
        progress.advance(task)


@torch.no_grad()
def marks_read(slots: SlotModel, head: CellHead, held_out: Drawing) -> dict[str, float]:
    """Share of the cells with a mark that are read rightly, for each kind of image of search scenes not trained on."""
    device, found = slots.model.device, {}
    held_out.until(1.0)
    pool = held_out.pool
    for kind in range(SEARCH_FROM, len(KINDS)):
        rows = np.array([pool.row(kind, scene) for scene in range(pool.scenes[1])])
        with autocast(device):
            merged, _ = slots.see(torch.from_numpy(pool.images[rows]).to(device))
        labels = torch.from_numpy(pool.cells[rows, :, 8]).to(device).view(-1)
        right = head.read(merged.flatten(0, 1)).argmax(-1) == labels
        if (labels >= 0).any():
            found[KINDS[kind]] = float(right[labels >= 0].float().mean())
    return found


def steps_within(seconds: float, slots: SlotModel, drawing: Drawing, args: Args) -> int:
    """Steps of the second stage that fit into ``seconds``, measured on a copy of the model."""
    device = slots.model.device
    start, rates = time.monotonic(), []
    with progress_bars(note=True, disable=True) as unseen:
        for steps in (10, 40):  # the first ones wait for memory and kernels
            began = time.monotonic()
            head = CellHead(slots.model.config.vision_config.out_hidden_size).to(device)
            train_grounding(copy.deepcopy(slots), head, drawing, args, unseen, [], lambda: None, only=steps)
            if device.type == "cuda":
                torch.cuda.synchronize()
            rates.append(steps / (time.monotonic() - began))
    # A few parts in a hundred for what is drawn, copied and saved on the way.
    return max(1, int(0.95 * (seconds - (time.monotonic() - start)) * rates[-1]))


def train(
    args: Args, drawing: Drawing, held_out: Drawing, progress: Progress, start: float | None = None
) -> dict[str, float]:
    """All stages on scenes that are being drawn; saves the model and its record, and returns seconds by stage.

    ``held_out`` are search scenes for ``marks_read``; ``start`` is the ``time.monotonic()`` from which ``args.seconds``
    counts, if not now.
    """
    start = time.monotonic() if start is None else start
    torch.manual_seed(args.seed)
    tokenizer = tiny_tokenizer()
    model = build_model(tokenizer, args.seed) if args.model is None else load_policy(str(args.model)).model.float()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    # Plain matrix products on a CPU: at these sizes the fused kernel's backward pass is twice as slow.
    model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    drawing.until(args.drawn_first)
    drawn = time.monotonic()
    seconds, log = {"drawing": drawn - start}, list[dict[str, float]]()
    record: dict[str, Any] = {
        "command": " ".join(["python -m ivt_agents.vlm.pretrain", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seconds": seconds,
        "log": log,
    }

    def keep(stage: str, since: float) -> None:
        seconds[stage] = time.monotonic() - since
        save(model, tokenizer, args, record | {"args": asdict(args)})

    if args.model is None:
        head = CellHead(model.config.vision_config.out_hidden_size).to(device)
        slots = SlotModel(model, tokenizer, args.questions_per_image)
        log += train_vision(slots, head, drawing.pool, args, progress)
        record["marks read"] = read = {"first stage": marks_read(slots, head, held_out)}
        seen = time.monotonic()
        seconds["vision"] = seen - drawn
        if args.seconds is not None:
            args = replace(args, steps=steps_within(args.seconds - (seen - start), slots, drawing, args))
        train_grounding(slots, head, drawing, args, progress, log, lambda: keep("grounding", seen))
        keep("grounding", seen)
        read["end"] = marks_read(slots, head, held_out)
    else:
        before = args.model / "training.json"
        record["before"] = read_json(before, "give a folder that this command wrote", ValueError)
    begun = time.monotonic()
    train_pairs(model, tokenizer, drawing, args, progress, log)
    keep("two images", begun)
    return seconds


def main(args: Args) -> None:
    """Draw the scenes, run all stages and save."""
    start = time.monotonic()
    words = words_of(tiny_tokenizer())
    with ExitStack() as stack:
        # First, so that the processes are made before anything starts a thread or takes a GPU.
        held_out = stack.enter_context(Drawing(words, 0, min(300, args.search_scenes or 300), 1, split="val"))
        drawing = stack.enter_context(
            Drawing(words, args.scenes, args.search_scenes, args.workers, first=args.first_scene)
        )
        progress = stack.enter_context(progress_bars(note=True))
        seconds = train(args, drawing, held_out, progress, start)
    print(f"saved to {args.out} after {sum(seconds.values()) / 60:.1f} minutes")


if __name__ == "__main__":
    run_command(main, Args)
