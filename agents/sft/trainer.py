"""Supervised fine-tuning of a policy on demonstrations."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from agents.sft.demonstrations import Demonstration
from agents.training import MetricsLog
from agents.vlm.codec import STOP_TEXT
from agents.vlm.generation import Sampling, TokenScorer
from agents.vlm.policy import VLMPolicy
from agents.vlm.turns import Turn
from ivt_env.data.sample import Dataset
from ivt_env.env import Screen
from ivt_env.game import Game
from ivt_env.rewards import RewardConfig


def to_turns(
    policy: VLMPolicy, screen: Screen, dataset: Dataset, demonstrations: Sequence[Demonstration]
) -> list[Turn]:
    """Demonstrations as turns: the observation the environment would give, and the answer's ids."""
    turns, images = [], []
    for demonstration in demonstrations:
        sample = dataset[demonstration.index]
        game = Game(sample, RewardConfig(), 1, demonstration.shown)
        observation = screen.observe(screen.load(sample), game)
        height, width = observation["extent"]
        images.append(observation["image"][:height, :width])
    for demonstration, picture in zip(demonstrations, policy.process(images), strict=True):
        expression = dataset[demonstration.index].expression
        prompt = policy.prompt(expression, demonstration.shown, picture)
        resized = picture.resized(policy.image_processor.patch_size)
        stop = demonstration.answer is None
        action = STOP_TEXT if demonstration.answer is None else policy.codec.action_text(demonstration.answer, resized)
        text = action if stop or not demonstration.trace else f"{demonstration.trace}\n{action}"
        turns.append(Turn(prompt, policy.completion(text), finished=True))
    return turns


def batches(count: int, batch: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Indices of ``steps`` batches, epoch after epoch, each epoch in a new order."""
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:batch]
        order = order[batch:]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine down to a tenth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


def train(
    policy: VLMPolicy,
    make_turns: Callable[[Sequence[int]], list[Turn]],
    count: int,
    accelerator: Accelerator,
    log: MetricsLog,
    *,
    steps: int,
    batch: int,
    micro_batch: int,
    peak_lr: float,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Cross-entropy on the answers' tokens, end of turn included; nothing else carries loss.

    Args:
        policy: trained in place; all its parameters that require gradients.
        make_turns: turns for indices 0..count-1.
        count: number of demonstrations.
        accelerator: from accelerate; each process takes its share of every batch.
        log: receives the loss.
        steps: optimizer steps.
        batch: demonstrations in a step, over all processes.
        micro_batch: demonstrations in one forward pass.
        peak_lr: of AdamW.
        seed: of the order.
        on_step: called with (step, loss) after each step.
    """
    plain = Sampling(pad_id=policy.sampling.pad_id)
    scorer: Any = TokenScorer(policy.model, plain, frozen_vision=not _trains_vision(policy))
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.0)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    policy.model.train()
    rng = np.random.default_rng((seed, 11))
    for step, turns in enumerate(_prepared(batches(count, batch, steps, rng), make_turns, accelerator)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr, warmup=min(20, max(1, steps // 10)))
        tokens = torch.tensor(float(sum(len(t.completion) for t in turns)), device=accelerator.device)
        total = accelerator.reduce(tokens, "sum")
        loss_sum = 0.0
        # Turns of similar length together: less padding.
        turns.sort(key=lambda t: len(t.prompt.ids) + len(t.completion))
        parts = [turns[k : k + micro_batch] for k in range(0, len(turns), micro_batch)]
        for number, part in enumerate(parts):
            with _sync(accelerator, scorer, number == len(parts) - 1), accelerator.autocast():
                log_probs, _ = scorer(part)
                # One global token count, times the number of processes because DDP averages: the
                # gradient does not depend on how the batch is cut up.
                loss = -log_probs.sum() / total * accelerator.num_processes
            accelerator.backward(loss)
            loss_sum += float(loss.detach()) / accelerator.num_processes
        norm = accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(accelerator.reduce(torch.tensor(loss_sum, device=accelerator.device), "sum"))
        log.write(step + 1, {"sft/loss": value, "sft/grad_norm": float(norm), "sft/tokens": float(total)})
        on_step(step + 1, value)
    policy.model.eval()


def _prepared(
    chosen: Iterator[np.ndarray], make_turns: Callable[[Sequence[int]], list[Turn]], accelerator: Accelerator
) -> Iterator[list[Turn]]:
    """This process's turns of each batch, the next one made in a thread while the current one is trained on."""
    rank, world = accelerator.process_index, accelerator.num_processes
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[list[Turn]]] = deque()
        for batch in chosen:
            waiting.append(thread.submit(make_turns, [int(i) for i in batch[rank::world]]))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _sync(accelerator: Accelerator, module: nn.Module, last: bool) -> Any:
    """Gradients travel between processes at the last micro-batch only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(module)


def _trains_vision(policy: VLMPolicy) -> bool:
    return any(
        p.requires_grad for n, p in policy.model.named_parameters() if ".visual." in n or n.startswith("visual.")
    )
