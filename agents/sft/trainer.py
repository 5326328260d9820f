"""Supervised fine-tuning of a policy on demonstrations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from ivt_agents.sft.demonstrations import Demonstration
from ivt_agents.training.checkpoints import load_state, save_state
from ivt_agents.training.finite import check_finite, check_weights
from ivt_agents.training.folder import what_is_kept
from ivt_agents.training.muon import Muon
from ivt_agents.training.run import MetricsLog
from ivt_agents.vlm.adapters import layer_matrices
from ivt_agents.vlm.codec import STOP_TEXT
from ivt_agents.vlm.dialogue import View
from ivt_agents.vlm.generation import Sampling, TokenScorer
from ivt_agents.vlm.load import can_pack
from ivt_agents.vlm.packing import micro_batches
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.prompts import images_of, looks_of
from ivt_agents.vlm.turns import Box, Prompt, Turn
from ivt_env.data.sample import Dataset
from ivt_env.game import Game
from ivt_env.grounding import LiveEpisode, Screen

if TYPE_CHECKING:  # the script imports this module
    from ivt_agents.sft.train import Args


def to_turns(
    policy: VLMPolicy, screen: Screen, dataset: Dataset, demonstrations: Sequence[Demonstration]
) -> list[Turn]:
    """Demonstrations as turns: what the policy would have seen in its layout, and the answer's ids."""
    dialogue = policy.dialogue
    asked: list[list[tuple[Box | None, list[tuple[Hashable, Box]], int]]] = []
    opened: dict[str, Any] = {}
    images: dict[Hashable, NDArray[np.uint8]] = {}
    for demonstration in demonstrations:
        sample = dataset[demonstration.index]
        if sample.image_id not in opened:
            opened[sample.image_id] = screen.load(sample)
        boxes_shown: list[Box | None] = [demonstration.shown]
        if policy.layout == "prefix" and demonstration.shown is not None:
            boxes_shown = [None, *demonstration.before, demonstration.shown]
        asked.append([])
        for number, box in enumerate(boxes_shown):
            earlier = boxes_shown[1:number] if len(boxes_shown) > 1 else demonstration.before
            game = Game.with_history(sample, [*(b for b in earlier if b is not None), *([] if box is None else [box])])
            observation = LiveEpisode(screen, 0, game, opened[sample.image_id]).observe()
            one = {key: [value] for key, value in observation.items()}
            # Demonstrations about one image with one box drawn share it, and so its encoding.
            trail = tuple(earlier) if screen.overlay.trail else ()
            seen = {(sample.image_id, box, trail, k): view for k, view in enumerate(images_of(one, 0))}
            images |= {name: image for name, (image, _) in seen.items()}
            asked[-1].append((box, [(name, window) for name, (_, window) in seen.items()], looks_of(one, 0)))
    encoded = dict(zip(images, dialogue.process(list(images.values())), strict=True))
    turns = []
    for demonstration, questions in zip(demonstrations, asked, strict=True):
        expression = dataset[demonstration.index].expression
        prompt: Prompt | None = None
        views: list[View] = []
        for box, named, looks in questions:
            before, views = views, [(encoded[name], window) for name, window in named]
            if prompt is None:
                prompt = dialogue.prompt(expression, box, views, looks)
            else:
                assert box is not None
                said = Turn(prompt, dialogue.completion(dialogue.action_text(box, before)), finished=True)
                prompt = dialogue.following(said, expression, box, views, looks)
        assert prompt is not None
        text = STOP_TEXT
        if demonstration.answer is not None:
            text = dialogue.action_text(demonstration.answer, views, demonstration.image)
        if demonstration.trace:
            text = f"{demonstration.trace}\n{text}"
        turns.append(Turn(prompt, dialogue.completion(text), finished=True))
    return turns


def batches(samples: Sequence[Hashable], batch: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices of ``steps`` batches, epoch after epoch, each epoch in a new order.

    ``samples`` has for each demonstration its sample or image. Those of one come one after the other, so that it is
    decoded, and where they show the same box encoded, once.
    """
    members: dict[Hashable, list[int]] = {}
    for k, sample in enumerate(samples):
        members.setdefault(sample, []).append(k)
    groups = [np.array(m, dtype=np.int64) for m in members.values()]
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, *(groups[g] for g in rng.permutation(len(groups)))])
        yield order[:batch]
        order = order[batch:]


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.1) -> float:
    """Linear warm-up, then cosine down to the share ``floor`` of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def smoothed_targets(sigma: float, device: torch.device) -> torch.Tensor:
    """Rows of a target distribution over the numbers 0..1000 for each of them, (1001, 1001)."""
    values = torch.arange(1001.0, device=device)
    near = torch.exp(-0.5 * ((values[:, None] - values) / sigma) ** 2)
    return near / near.sum(1, keepdim=True)


SMOOTHING = 6.0


class AnswerLoss(TokenScorer):
    """Cross-entropy of each answer token, with coordinates smoothed on request.

    A box that is off by two thousandths is nearly right, and a hard target says it is as wrong as any
    other. With ``smoothing`` a number's target is a Gaussian over the numbers near it. Where the
    tokenizer writes a number in several tokens there is nothing to smooth over.
    """

    def __init__(self, policy: VLMPolicy, frozen_vision: bool, smoothing: float | None = 0.0) -> None:
        """Wrap a policy's model.

        ``smoothing`` is the standard deviation of the targets, in thousandths of an image's side; ValueError where the
        tokenizer writes a number in several tokens. 0: hard targets. None: ``SMOOTHING`` where it has a token for each.
        """
        encoded = [policy.tokenizer(str(n), add_special_tokens=False)["input_ids"] for n in range(1001)]
        single = all(len(ids) == 1 for ids in encoded)
        if smoothing is None:
            smoothing = SMOOTHING if single else 0.0
        plain = Sampling(pad_id=policy.sampling.pad_id)
        super().__init__(policy.model, plain, frozen_vision, packing=can_pack(policy.model))
        self.smoothing = smoothing
        self.targets: torch.Tensor
        self.numbers: torch.Tensor
        if smoothing > 0:
            if not single:
                raise ValueError(
                    f"smoothing {smoothing:g}: this model writes a number in several tokens, so that near numbers are"
                    " no near tokens; use smoothing 0"
                )
            numbers = torch.tensor([ids[0] for ids in encoded], device=policy.core.device)
            self.register_buffer("targets", smoothed_targets(smoothing, numbers.device), persistent=False)
            self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, turns: Sequence[Turn]) -> torch.Tensor:  # type: ignore[override]
        """Losses of the answers' tokens, (N,), turn after turn."""
        log_probs = self.distributions(turns)
        ids = torch.tensor([i for t in turns for i in t.completion], device=log_probs.device)
        losses = -log_probs.gather(1, ids[:, None])[:, 0]
        if self.smoothing > 0:
            value = ids[:, None] == self.numbers  # (N, 1001)
            smooth = -(self.targets[value.int().argmax(1)] * log_probs[:, self.numbers]).sum(-1)
            losses = torch.where(value.any(1), smooth, losses)
        return losses


def make_optimizers(policy: VLMPolicy, kind: str) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers of the parameters that require gradients, and each one's learning rate relative to the peak.

    ``kind`` is ``adamw``, or ``muon``: Muon (Jordan 2024) for the language model's matrices, at ten times the rate of
    AdamW, which keeps the rest, as in the tiny model's own training.
    """
    chosen = layer_matrices(policy.model) if kind == "muon" else {}
    made: list[tuple[torch.optim.Optimizer, float]] = []
    if chosen:
        made.append((Muon(list(chosen.values()), lr=0.0, weight_decay=0.0), 10.0))
    rest = [p for n, p in policy.model.named_parameters() if p.requires_grad and n not in chosen]
    made.append((torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0), 1.0))
    return made


def train(
    policy: VLMPolicy,
    make_turns: Callable[[Sequence[int]], list[Turn]],
    samples: Sequence[Hashable],
    accelerator: Accelerator,
    log: MetricsLog,
    args: Args,
    on_step: Callable[[int, float], None],
    resume: bool = False,
) -> None:
    """Cross-entropy on the answers' tokens, end of turn included; nothing else carries loss.

    ``policy`` is trained in place, all its parameters that require gradients. ``make_turns`` makes turns for indices of
    demonstrations, whose ``samples`` are those of ``batches``; ``on_step`` gets (step, loss).
    """
    frozen = not any(p.requires_grad for p in policy.core.model.visual.parameters())
    micro_batch, seed, steps = args.per_device_train_batch_size, args.seed, args.steps
    batch = micro_batch * args.gradient_accumulation_steps * accelerator.num_processes
    answer_loss: Any = AnswerLoss(policy, frozen, args.smoothing)
    worth = answer_loss.worth
    made, shares = zip(*make_optimizers(policy, args.optim), strict=True)
    answer_loss, *kept = accelerator.prepare(answer_loss, *made)
    # Sharding puts other parameters in the place of those that were there.
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    begun = load_state(args.out, policy.model, kept, accelerator, steps, 1) if resume else 0
    policy.model.train()
    rng = np.random.default_rng((seed, 11))
    left = islice(batches(samples, batch, steps, rng), begun, None)
    for step, turns in enumerate(_prepared(left, make_turns, accelerator), begun):
        rate = learning_rate(step, steps, args.learning_rate, warmup=min(20, max(1, steps // 10)))
        for one, share in zip(kept, shares, strict=True):
            for group in one.param_groups:
                group["lr"] = rate * share
        tokens = torch.tensor(float(sum(len(t.completion) for t in turns)), device=accelerator.device)
        total = accelerator.reduce(tokens, "sum")
        loss_sum = 0.0
        parts = [[turns[k] for k in part] for part in micro_batches(turns, micro_batch, policy.image_token, worth)]
        # Every process must take part in the same number of passes; one that has no more repeats its last, for nothing.
        most = int(accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max())
        for number in range(most):
            # Gradients travel between processes at the last micro-batch only.
            alone = contextlib.nullcontext() if number == most - 1 else accelerator.no_sync(answer_loss)
            with alone, accelerator.autocast():
                losses = answer_loss(parts[min(number, len(parts) - 1)])
                # One global token count, times the number of processes because gradients are averaged: they do
                # not depend on how the batch is cut up.
                loss = losses.sum() / total * (accelerator.num_processes if number < len(parts) else 0.0)
            accelerator.backward(loss)
            loss_sum += float(loss.detach()) / accelerator.num_processes
        norm = accelerator.clip_grad_norm_(parameters, 1.0)
        found = {"the loss": loss_sum, "the gradient's norm": float(norm)}
        remedy = what_is_kept(args.out, args.learning_rate)
        check_finite(step + 1, found, remedy, accelerator)
        for one in kept:
            one.step()
            one.zero_grad(set_to_none=True)
        check_weights(step + 1, policy.model, remedy, accelerator)
        value = float(accelerator.reduce(torch.tensor(loss_sum, device=accelerator.device), "sum"))
        log.write(step + 1, {"sft/loss": value, "sft/grad_norm": float(norm), "sft/tokens": float(total)})
        if (step + 1) % args.save_steps == 0 or step + 1 == steps:
            save_state(args.out, step + 1, policy.model, kept, accelerator, log)
        on_step(step + 1, value)
    policy.model.eval()


def _prepared(
    chosen: Iterator[np.ndarray], make_turns: Callable[[Sequence[int]], list[Turn]], accelerator: Accelerator
) -> Iterator[list[Turn]]:
    """This process's turns of each batch, the next one made in a thread while the current one is trained on."""
    rank, world = accelerator.process_index, accelerator.num_processes
    with ThreadPoolExecutor(1) as thread:
        ready: Future[list[Turn]] | None = None
        for batch in chosen:
            following = thread.submit(make_turns, [int(i) for i in batch[rank::world]])
            if ready is not None:
                yield ready.result()
            ready = following
        if ready is not None:
            yield ready.result()
