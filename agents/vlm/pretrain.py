"""Trains the tiny Qwen3-VL from scratch on the scenes, single shot only, and saves it.

    python -m ivt_agents.vlm.pretrain --out agents/vlm/tiny_qwen3vl

Two stages. First the vision tower learns to say what stands in each cell of the picture (shape,
colour, texture, box): without it, a small model's language loss never tells the tower where to look.
Then the whole model answers several questions per picture; every question sees the picture and
itself, never the other questions, exactly as at inference. The model never sees an overlay here.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from ivt_agents.command import progress_bars, run_command
from ivt_agents.vlm.policy import POLICY_FILE
from ivt_agents.vlm.prompts import TINY
from ivt_agents.vlm.tiny import INPUT_SIDE, build_image_processor, build_model, build_tokenizer, number_ids
from ivt_env.data.scenes import make_scene
from ivt_env.data.scenes.world import COLOURS, SHAPES, TEXTURES, Thing
from ivt_env.files import whole_folder, write_whole

GRID = INPUT_SIDE // 8
CELLS = INPUT_SIDE // 16


@dataclass
class Args:
    """Train the tiny model from scratch."""

    out: Path = Path("runs/tiny_qwen3vl")
    """Folder for the weights, tokenizer, image processor and the training record."""
    seed: int = 0
    """Seed of the initial weights and of the order of pictures."""
    init: Path | None = None
    """Folder of an earlier run of this command to go on from; None: from scratch."""
    first_picture: int = 0
    """Index of the first training scene, so that a run that goes on sees new ones."""
    pictures: int = 30_000
    """Distinct training scenes, drawn once (27 KB of memory each)."""
    questions: int = 12
    """Questions made for each scene."""
    vision_steps: int = 800
    """Steps of the first stage (vision tower on cell labels)."""
    vision_batch: int = 64
    """Pictures in a batch of the first stage."""
    steps: int = 5_600
    """Steps of the second stage (grounding)."""
    batch: int = 32
    """Pictures in a batch of the second stage."""
    questions_per_picture: int = 6
    """Questions asked about each picture of a batch."""
    matrix_lr: float = 0.02
    """Muon's learning rate, on the text model's matrices."""
    lr: float = 2e-3
    """AdamW's learning rate, on everything else."""
    smoothing: tuple[float, float] = (10.0, 6.0)
    """Standard deviation of the coordinate targets (of 1000) at the start and at the end."""
    save_every: int = 500
    """Steps of the second stage between saves, so that an interruption does not lose everything."""
    workers: int = 2
    """Processes that draw the scenes."""


@dataclass
class Pool:
    """Training scenes held in memory, as the model sees them."""

    pictures: NDArray[np.uint8]
    """(N, 96, 96, 3)"""
    cells: NDArray[np.float32]
    """(N, 36, 8): presence, shape, colour, texture, box; rows of merged tokens."""
    expressions: list[list[str]]
    boxes: list[NDArray[np.float32]]
    """For each scene (questions, 4), relative."""


def _one(job: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float32], list[str], NDArray[np.float32]]:
    index, questions = job
    scene = make_scene("train", index)
    picture = Image.fromarray(scene.picture()).resize((INPUT_SIDE, INPUT_SIDE), Image.Resampling.BICUBIC)
    asked = scene.questions(questions)
    boxes = np.array([scene.things[q.target].box for q in asked], dtype=np.float32)
    return np.asarray(picture), cell_labels(scene.things), [q.text for q in asked], boxes


def cell_labels(things: Sequence[Thing]) -> NDArray[np.float32]:
    """What each merged token should know, (36, 8).

    A cell speaks for the object that covers most of it or, before that, for a small object that
    lies mostly inside it, which would otherwise have no cell at all.
    """
    labels = np.zeros((CELLS * CELLS, 8), dtype=np.float32)
    best = np.zeros(CELLS * CELLS)
    for thing in things:
        x1, y1, x2, y2 = (np.array(thing.box) * CELLS).tolist()
        for row in range(int(y1), min(CELLS, math.ceil(y2))):
            for column in range(int(x1), min(CELLS, math.ceil(x2))):
                shared = (min(x2, column + 1) - max(x1, column)) * (min(y2, row + 1) - max(y1, row))
                score = shared + shared / ((x2 - x1) * (y2 - y1))
                cell = row * CELLS + column
                if score > max(best[cell], 0.3):
                    best[cell] = score
                    labels[cell] = (
                        1,
                        SHAPES.index(thing.shape),
                        COLOURS.index(thing.colour),
                        TEXTURES.index(thing.texture),
                        *thing.box,
                    )
    return labels


def draw_pool(args: Args, progress: Progress) -> Pool:
    """Draws ``args.pictures`` scenes in ``args.workers`` processes."""
    task = progress.add_task("drawing scenes", total=args.pictures, note="")
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.workers) as workers:
        jobs = ((index, args.questions) for index in range(args.first_picture, args.first_picture + args.pictures))
        for row in workers.imap(_one, jobs, chunksize=100):
            rows.append(row)
            progress.advance(task)
    return Pool(
        np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]), [r[2] for r in rows], [r[3] for r in rows]
    )


def patchify(pictures: NDArray[np.uint8], device: torch.device | str = "cpu") -> torch.Tensor:
    """What Qwen's image processor makes of (B, 96, 96, 3) pictures, for the whole batch at once.

    Returns:
        (B * 144, 3 * 2 * 8 * 8), patches ordered by merge block, values in [-1, 1].
    """
    x = torch.from_numpy(pictures).to(device).float().div_(127.5).sub_(1)  # (B, H, W, 3)
    m, p = 2, 8
    x = x.view(len(pictures), CELLS, m, p, CELLS, m, p, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)  # (B, block row, block column, m, m, 3, p, p)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # the picture stands for two frames
    return x.reshape(len(pictures) * GRID * GRID, 3 * 2 * p * p)


def grid_of(count: int) -> torch.Tensor:
    """``image_grid_thw`` of ``count`` square pictures, (count, 3)."""
    return torch.tensor([[1, GRID, GRID]]).expand(count, 3)


class CellHead(nn.Module):
    """Reads the cell labels off the vision tower's merged tokens. Thrown away after the first stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1 + len(SHAPES) + len(COLOURS) + len(TEXTURES) + 4)

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss; ``features`` (B * 36, width), ``labels`` (B * 36, 8)."""
        out = self.linear(features.float())
        presence, shape, colour, texture, box = out.split([1, len(SHAPES), len(COLOURS), len(TEXTURES), 4], dim=-1)
        there = labels[:, 0] > 0
        parts = [
            F.binary_cross_entropy_with_logits(presence[:, 0], labels[:, 0]),
            F.cross_entropy(shape[there], labels[there, 1].long()),
            F.cross_entropy(colour[there], labels[there, 2].long()),
            F.cross_entropy(texture[there], labels[there, 3].long()),
            10 * F.smooth_l1_loss(box[there], labels[there, 4:], beta=0.02),
        ]
        return torch.stack(parts).sum()


def cosine(step: int, total: int, floor: float = 0.05, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class PackedQuestions:
    """Lays several questions about one picture into one sequence, each blind to the others."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device | str = "cpu") -> None:
        self.tokenizer, self.device = tokenizer, device
        content = [{"type": "image"}, {"type": "text", "text": "\x00"}]
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, self.after = rendered.split("\x00")
        pads = "<|image_pad|>" * (CELLS * CELLS)
        self.prefix: list[int] = tokenizer(before.replace("<|image_pad|>", pads))["input_ids"]
        self.first_image = self.prefix.index(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.cache: dict[str, list[int]] = {}

    def question(self, expression: str) -> list[int]:
        """Token ids from the end of the picture up to where the answer begins."""
        if expression not in self.cache:
            text = TINY.fill(expression, None) + self.after
            self.cache[expression] = self.tokenizer(text)["input_ids"]
        return self.cache[expression]

    def answer(self, box: NDArray[np.float32]) -> list[int]:
        """Token ids of the answer, end of turn included."""
        numbers = [str(int(v)) for v in np.round(box * 1000)]
        text = '{"bbox_2d": [' + ", ".join(numbers) + "]}"
        if text not in self.cache:
            self.cache[text] = [*self.tokenizer(text)["input_ids"], self.end]
        return self.cache[text]

    def batch(
        self, items: list[list[tuple[str, NDArray[np.float32]]]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequences for ``items`` (pictures, each with its questions and boxes).

        Returns:
            input ids (B, L), position ids (3, B, L), attention mask (B, 1, L, L) added to the attention
            scores, loss mask (B, L) true where the *next* token is part of an answer.
        """
        rows, segments, scored = [], [], []
        for questions in items:
            ids, segment, score = list(self.prefix), [0] * len(self.prefix), [False] * len(self.prefix)
            for number, (expression, box) in enumerate(questions, 1):
                asked, answer = self.question(expression), self.answer(box)
                ids += asked + answer
                segment += [number] * (len(asked) + len(answer))
                score += [False] * (len(asked) - 1) + [True] * len(answer) + [False]
            rows.append(ids)
            segments.append(segment)
            scored.append(score)
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([r + [pad] * (length - len(r)) for r in rows]).to(self.device)
        segment_ids = torch.tensor([s + [-1] * (length - len(s)) for s in segments]).to(self.device)  # (B, L)
        loss_mask = torch.tensor([s + [False] * (length - len(s)) for s in scored]).to(self.device)
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        on_prefix = (segment_ids == 0)[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        visible = ((same | on_prefix) & causal)[:, None]  # (B, 1, L, L)
        attention = torch.zeros(visible.shape, device=self.device).masked_fill_(~visible, -1e9)
        return input_ids, self._positions(segment_ids), attention, loss_mask

    def _positions(self, segment_ids: torch.Tensor) -> torch.Tensor:
        """M-RoPE positions: every question starts where the picture ended; shape (3, B, L)."""
        length = segment_ids.shape[1]
        start = self.first_image
        prefix = torch.arange(len(self.prefix)).expand(3, -1).clone()
        cell = torch.arange(CELLS * CELLS)
        image = torch.stack([torch.zeros_like(cell), cell // CELLS, cell % CELLS]) + start
        prefix[:, start : start + CELLS * CELLS] = image
        tail = torch.arange(len(self.prefix) - start - CELLS * CELLS) + start + CELLS
        prefix[:, start + CELLS * CELLS :] = tail
        after = int(tail[-1]) + 1
        index = torch.arange(length, device=self.device).expand_as(segment_ids)
        new = torch.ones_like(segment_ids, dtype=torch.bool)
        new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        begins = torch.where(new, index, 0).cummax(dim=1).values
        positions = (index - begins + after).expand(3, -1, -1).clone()  # (3, B, L)
        positions[:, :, : len(self.prefix)] = prefix[:, None].to(self.device)
        return positions


def smoothed_targets(numbers: list[int], vocabulary: int, sigma: float) -> torch.Tensor:
    """Rows of a target distribution for each number token, (1001, vocabulary)."""
    values = torch.arange(1001.0)
    near = torch.exp(-0.5 * ((values[:, None] - values) / sigma) ** 2)
    rows = torch.zeros(1001, vocabulary)
    rows[:, torch.tensor(numbers)] = near / near.sum(1, keepdim=True)
    return rows


def train_vision(
    model: Qwen3VLForConditionalGeneration, pool: Pool, args: Args, progress: Progress
) -> list[dict[str, float]]:
    """First stage: cell labels from the vision tower."""
    device = model.device
    visual, head = model.model.visual, CellHead(model.config.vision_config.out_hidden_size).to(device)
    parameters = [*visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng(args.seed)
    task, log = progress.add_task("vision", total=args.vision_steps, note=""), []
    for step in range(args.vision_steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine(step, args.vision_steps)
        rows = rng.integers(0, len(pool.pictures), args.vision_batch)
        labels = torch.from_numpy(pool.cells[rows]).to(device).reshape(-1, 8)
        with torch.autocast(device.type, torch.bfloat16):
            out = visual(patchify(pool.pictures[rows], device), grid_of(len(rows)).to(device))
        loss = head.loss(out.pooler_output, labels)
        for feature in out.deepstack_features:  # keeps the deep-stack merger in the game too
            loss = loss + 0.3 * head.loss(feature, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0 or step == args.vision_steps - 1:
            log.append({"stage": 1, "step": step, "loss": float(loss.detach())})
            progress.update(task, note=f"loss {log[-1]['loss']:.3f}")
        progress.advance(task)
    return log


def train_grounding(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pool: Pool,
    args: Args,
    progress: Progress,
) -> list[dict[str, float]]:
    """Second stage: single-shot grounding, several questions a picture."""
    matrices = [p for n, p in model.model.language_model.layers.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, lr=args.matrix_lr, weight_decay=0.0), args.matrix_lr),
        (torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0), args.lr),
    ]
    device = model.device
    packer, numbers = PackedQuestions(tokenizer, device), number_ids(tokenizer)
    value_of = torch.full((len(tokenizer),), -1)
    value_of[torch.tensor(numbers)] = torch.arange(1001)
    value_of = value_of.to(device)
    rng = np.random.default_rng(args.seed + 1)
    task, log = progress.add_task("grounding", total=args.steps, note=""), []
    for step in range(args.steps):
        if step % 100 == 0:
            share = step / args.steps
            sigma = args.smoothing[0] * (1 - share) + args.smoothing[1] * share
            targets = smoothed_targets(numbers, len(tokenizer), sigma).to(device)
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(step, args.steps)
        rows = rng.integers(0, len(pool.pictures), args.batch)
        items = []
        for row in rows:
            count = min(args.questions_per_picture, len(pool.expressions[row]))
            picks = rng.choice(len(pool.expressions[row]), count, replace=False)
            items.append([(pool.expressions[row][k], pool.boxes[row][k]) for k in picks])
        input_ids, positions, attention, loss_mask = packer.batch(items)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(
                input_ids=input_ids,
                position_ids=positions,
                attention_mask=attention,
                pixel_values=patchify(pool.pictures[rows], device),
                image_grid_thw=grid_of(len(rows)).to(device),
            ).last_hidden_state
            logits = model.lm_head(hidden[loss_mask])  # (answer tokens, vocabulary)
        log_probs = logits.float().log_softmax(-1)
        nexts = input_ids.roll(-1, dims=1)[loss_mask]
        values = value_of[nexts]
        is_number = values >= 0
        plain = -log_probs[~is_number].gather(1, nexts[~is_number, None]).mean()
        smooth = -(targets[values[is_number]] * log_probs[is_number]).sum(-1).mean()
        loss = smooth + plain
        for optimizer, _ in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        if step % 20 == 0 or step == args.steps - 1:
            log.append({"stage": 2, "step": step, "loss": float(smooth.detach()), "sigma": sigma})
            progress.update(task, note=f"loss {log[-1]['loss']:.3f}")  # reading it waits for a GPU
        progress.advance(task)
        if (step + 1) % args.save_every == 0:
            save(model, tokenizer, args)
    return log


def save(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, args: Args) -> None:
    """Writes model (half precision), tokenizer and image processor where ``load_policy`` finds them."""
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(s) for s in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    half = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    half.pop("lm_head.weight")  # tied to the input embeddings
    settings = {"prompt": TINY.text, "frame": "relative_1000"}
    with whole_folder(args.out, asdict(args)) as partial:
        model.save_pretrained(partial, state_dict=half)
        tokenizer.save_pretrained(partial)
        build_image_processor().save_pretrained(partial)
        write_whole(partial / POLICY_FILE, json.dumps(settings, indent=1) + "\n")


def train(args: Args, pool: Pool, progress: Progress) -> dict[str, float]:
    """Both stages on scenes that are drawn; saves the model and its record, and returns seconds by stage."""
    start = time.time()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    if args.init is None:
        model = build_model(tokenizer, args.seed)
    else:
        model = Qwen3VLForConditionalGeneration.from_pretrained(args.init, dtype=torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    # Plain matrix products on a CPU: at these sizes the fused kernel's backward pass is twice as slow.
    model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    log = train_vision(model, pool, args, progress) if args.vision_steps else []
    seen = time.time()
    log += train_grounding(model, tokenizer, pool, args, progress)
    save(model, tokenizer, args)
    seconds = {"vision": seen - start, "grounding": time.time() - seen}
    record = {
        "command": " ".join(["python -m ivt_agents.vlm.pretrain", *sys.argv[1:]]),
        "args": asdict(args) | {"out": str(args.out), "init": str(args.init)},
        "seconds": seconds,
        "log": log,
    }
    write_whole(args.out / "training.json", json.dumps(record, indent=1))
    return seconds


def main(args: Args) -> None:
    """Draw the scenes, run both stages and save."""
    start = time.time()
    with progress_bars(note=True) as progress:
        train(args, draw_pool(args, progress), progress)
    print(f"saved to {args.out} after {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run_command(main, Args)
