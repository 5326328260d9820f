"""Trains the tiny Qwen3-VL from scratch on the scenes, single shot only, and saves it.

    python -m ivt_agents.vlm.pretrain --out agents/vlm/tiny_qwen3vl

Two stages. First the vision tower learns to say what is in each cell of the image (shape, colour, texture,
box, mark): without it, a small model's language loss never tells the tower where to look. Then the whole model
answers several questions per image; every question sees the image and itself, never the other questions,
exactly as at inference. Whole scenes and close-ups are alike: each is an image, and boxes are relative to it. The
model never sees an overlay here. A GPU is used where there is one.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
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
from ivt_agents.vlm.policy import POLICY_FILE
from ivt_agents.vlm.precision import bf16_pays
from ivt_agents.vlm.pretrain_model import CellHead, SlotModel, words_of
from ivt_agents.vlm.pretrain_pool import ANSWER, KINDS, LABELS, NUMBERS, SEARCH_FROM, Drawing
from ivt_agents.vlm.prompts import load_prompts
from ivt_agents.vlm.tiny import build_image_processor, build_model, build_tokenizer
from ivt_env.files import whole_folder, write_whole

REMEDY = "What was saved before stays; give a lower --lr or --matrix-lr"


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
    """Instead of --steps: as many as end within this time from the start. The record has their number."""
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
    save_seconds: float = 60.0
    """Time between saves in the second stage, so that an interruption does not lose everything."""
    workers: int = 2
    """Processes that draw the scenes."""


class Images:
    """A pool on the device that trains: on a CPU the pool itself, on a GPU a copy that grows with it."""

    def __init__(self, drawing: Drawing, device: torch.device, *, copied: bool) -> None:
        self.drawing, self.pool, self.device = drawing, drawing.pool, device
        self._copies: dict[str, torch.Tensor] = {}
        if copied:
            for name in ("images", "cells", "slots", "lengths"):
                array = getattr(self.pool, name)
                like = torch.from_numpy(array[:0])
                self._copies[name] = torch.empty(array.shape, dtype=like.dtype, device=device)

    def until(self, share: float) -> None:
        """Wait until this share of the scenes is drawn."""
        before = list(self.pool.drawn)
        self.drawing.until(share)
        for kind in range(len(KINDS)):
            search = kind >= SEARCH_FROM
            low, high = self.pool.row(kind, before[search]), self.pool.row(kind, self.pool.drawn[search])
            for name, copied in self._copies.items():
                copied[low:high].copy_(torch.from_numpy(getattr(self.pool, name)[low:high]))

    def take(self, name: str, rows: NDArray[np.int64], index: NDArray[np.int64] | None = None) -> torch.Tensor:
        """Rows of one of the pool's arrays, on the device; with ``index`` (rows, k) those entries of each."""
        if not self._copies:
            array = getattr(self.pool, name)
            return torch.from_numpy(array[rows] if index is None else array[rows[:, None], index])
        at = torch.from_numpy(rows if index is None else np.stack([np.broadcast_to(rows[:, None], index.shape), index]))
        # Without waiting: the device is still at the step before.
        there = at.to(self.device, non_blocking=True)
        return self._copies[name][there if index is None else (there[0], there[1])]


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


def train_vision(
    slots: SlotModel, head: CellHead, images: Images, args: Args, progress: Progress
) -> list[dict[str, float]]:
    """First stage: labels of cells from the vision tower."""
    device, pool = images.device, images.pool
    parameters = [*slots.model.model.visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    rng = np.random.default_rng(args.seed)
    task, log = progress.add_task("vision", total=args.vision_steps, note=""), []
    for step in range(args.vision_steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.vision_steps, 1.0, warmup=50, floor=0.02)
        rows = pool.sample(rng, args.vision_batch, args.vision_shares)
        with autocast(device):
            merged, deep = slots.see(images.take("images", rows))
        loss = cell_loss(head, merged, deep, images.take("cells", rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        found = {"the loss of the vision stage": float(loss.detach()), "its gradient's norm": float(norm)}
        check_finite(step + 1, found, REMEDY)
        optimizer.step()
        if step % 20 == 0 or step == args.vision_steps - 1:
            log.append({"stage": 1, "step": step, "loss": float(loss.detach())})
            progress.update(task, note=f"loss {log[-1]['loss']:.3f}")
        progress.advance(task)
    return log


def train_grounding(
    slots: SlotModel,
    head: CellHead,
    images: Images,
    args: Args,
    progress: Progress,
    log: list[dict[str, float]],
    keep: Callable[[], None],
    only: int | None = None,
) -> None:
    """Second stage: single-shot grounding, several questions an image; its losses go into ``log``.

    ``keep`` is called every ``save_seconds``; it ends after ``only`` steps where that is given.
    """
    model, device, pool = slots.model, images.device, images.pool
    matrices = [p for n, p in model.model.language_model.layers.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen] + list(head.parameters())
    fused = device.type == "cuda"
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices, lr=args.matrix_lr, weight_decay=0.0), args.matrix_lr),
        (torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused), args.lr),
    ]
    numbers = torch.tensor(slots.words.numbers, device=device)
    value_of = torch.zeros(model.config.text_config.vocab_size, dtype=torch.long, device=device)
    value_of[numbers] = torch.arange(1001, device=device)
    at_number = torch.tensor(NUMBERS, device=device)
    at_word = torch.tensor([k for k in range(ANSWER) if k not in NUMBERS], device=device)
    rng = np.random.default_rng(args.seed + 1)
    task, saved = progress.add_task("grounding", total=only or args.steps, note=""), time.monotonic()
    for step in range(only or args.steps):
        share = step / args.steps
        if step % 100 == 0:
            sigma = args.smoothing[0] * (1 - share) + args.smoothing[1] * share
            targets = smoothed_targets(sigma, torch.device("cpu")).to(device)
            if only is None:
                images.until(args.drawn_first + (1 - args.drawn_first) * min(1.0, 1.5 * share))
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate(step, args.steps, 1.0, warmup=50, floor=0.02)
        rows = pool.sample(rng, args.batch, args.shares)
        picks = pool.choose(rng, rows, args.questions_per_image)
        asked, lengths = images.take("slots", rows, picks).long(), images.take("lengths", rows, picks).long()
        with autocast(device):
            merged, deep = slots.see(images.take("images", rows))
            hidden, told = slots.answer(merged, deep, asked, lengths.clamp(min=1))
            logits = model.lm_head(hidden)  # (B, questions, ANSWER, vocabulary)
        log_probs = logits.float().log_softmax(-1)
        real = (lengths > 0).float()  # (B, questions)
        count = real.sum().clamp(min=1)
        plain = log_probs[:, :, at_word].gather(-1, told[:, :, at_word, None])[..., 0]
        wanted = targets[value_of[told[:, :, at_number]]]  # (B, questions, 4, 1001)
        smooth = (log_probs[:, :, at_number].index_select(-1, numbers) * wanted).sum(-1)
        words, boxes = -(plain.mean(-1) * real).sum() / count, -(smooth.mean(-1) * real).sum() / count
        loss = boxes + words + args.cell_weight * cell_loss(head, merged, deep, images.take("cells", rows))
        for optimizer, _ in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        check_finite(step + 1, {"the loss": float(loss.detach()), "the gradient's norm": float(norm)}, REMEDY)
        for optimizer, _ in optimizers:
            optimizer.step()
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
        build_image_processor().save_pretrained(partial)
        write_whole(partial / POLICY_FILE, json.dumps(settings, indent=1) + "\n")
        write_whole(partial / "training.json", json.dumps(record, indent=1) + "\n")


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


def steps_within(
    seconds: float, model: Qwen3VLForConditionalGeneration, slots: Callable[..., SlotModel], images: Images, args: Args
) -> int:
    """Steps of the second stage that fit into ``seconds``, measured on a copy of the model."""
    start, rates = time.monotonic(), []
    with progress_bars(note=True, disable=True) as unseen:
        for steps in (10, 40):  # the first ones wait for memory and kernels
            began = time.monotonic()
            twin = copy.deepcopy(model)
            head = CellHead(twin.config.vision_config.out_hidden_size).to(twin.device)
            train_grounding(slots(twin), head, images, args, unseen, [], lambda: None, only=steps)
            if twin.device.type == "cuda":
                torch.cuda.synchronize()
            rates.append(steps / (time.monotonic() - began))
    # A few parts in a hundred for what is drawn, copied and saved on the way.
    return max(1, int(0.95 * (seconds - (time.monotonic() - start)) * rates[-1]))


def train(
    args: Args, drawing: Drawing, held_out: Drawing, progress: Progress, start: float | None = None
) -> dict[str, float]:
    """Both stages on scenes that are being drawn; saves the model and its record, and returns seconds by stage.

    ``held_out`` are search scenes for ``marks_read``; ``start`` is the ``time.monotonic()`` from which ``args.seconds``
    counts, if not now.
    """
    start = time.monotonic() if start is None else start
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    # Plain matrix products on a CPU: at these sizes the fused kernel's backward pass is twice as slow.
    model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    head = CellHead(model.config.vision_config.out_hidden_size).to(device)
    images = Images(drawing, device, copied=device.type != "cpu")
    images.until(args.drawn_first)

    def slots(of: Qwen3VLForConditionalGeneration) -> SlotModel:
        return SlotModel(of, tokenizer, args.questions_per_image)

    drawn = time.monotonic()
    log = train_vision(slots(model), head, images, args, progress)
    read = {"first stage": marks_read(slots(model), head, held_out)}
    seen = time.monotonic()
    if args.seconds is not None:
        args = replace(args, steps=steps_within(args.seconds - (seen - start), model, slots, images, args))
    seconds = {"drawing": drawn - start, "vision": seen - drawn}
    record = {
        "command": " ".join(["python -m ivt_agents.vlm.pretrain", *sys.argv[1:]]),
        "args": asdict(args) | {"out": str(args.out)},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "seconds": seconds,
        "marks read": read,
        "log": log,
    }

    def keep() -> None:
        seconds["grounding"] = time.monotonic() - seen
        save(model, tokenizer, args, record)

    train_grounding(slots(model), head, images, args, progress, log, keep)
    keep()
    read["end"] = marks_read(slots(model), head, held_out)
    keep()
    return seconds


def main(args: Args) -> None:
    """Draw the scenes, run both stages and save."""
    start = time.monotonic()
    words = words_of(build_tokenizer())
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
