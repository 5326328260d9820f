"""The GRPO learner: collect groups, credit each step, take one clipped policy-gradient step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from agents.grpo.advantages import ADVANTAGES, zero_variance
from agents.grpo.collect import Groups, collect
from agents.grpo.losses import clip_fraction, clipped_loss, k3, kl_loss
from agents.training import MetricsLog, Stopwatch, derived_seed, load_checkpoint, save_checkpoint
from agents.vlm.generation import TokenScorer
from agents.vlm.policy import VLMPolicy
from agents.vlm.turns import Turn
from ivt_env.vector_env import GroundingVectorEnv


@dataclass(frozen=True)
class GRPOConfig:
    """What the learner needs to know; the meaning of each field stands in ``train_grpo.py``."""

    steps: int
    prompts: int
    group: int
    lr: float
    warmup: int
    advantage: str
    iterations: int
    clip_low: float
    clip_high: float
    beta: float
    micro_batch: int
    max_grad_norm: float
    mask_truncated: bool
    seed: int
    save_every: int


class GRPOTrainer:
    """Trains a policy in place.

    What it leaves out of the GRPO of arXiv 2402.03300, and why: division by the group's standard
    deviation (it blows up groups that hardly differ, as continuous IoU makes them) and by each
    sequence's length (it favours long wrong answers); one global token count divides instead. The
    baseline is the mean of the *other* members, per step, of the return-to-go.
    """

    def __init__(
        self,
        policy: VLMPolicy,
        env: GroundingVectorEnv,
        config: GRPOConfig,
        accelerator: Accelerator,
        log: MetricsLog,
        folder: Path,
    ) -> None:
        """Prepare model, optimizer and reference.

        Args:
            policy: with the parameters to train requiring gradients.
            env: ``prompts / processes * group`` environments, autoreset disabled.
            config: see ``GRPOConfig``.
            accelerator: from accelerate.
            log: receives the metrics.
            folder: of the run, for checkpoints.
        """
        if config.prompts % accelerator.num_processes:
            raise ValueError(
                f"{config.prompts} prompts cannot be shared by {accelerator.num_processes} processes evenly"
            )
        if config.group < 2:
            raise ValueError("a group of one has no other members to compare with: every advantage would be 0")
        self.policy, self.env, self.config = policy, env, config
        self.accelerator, self.log, self.folder = accelerator, log, folder
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        frozen = not any(p.requires_grad for n, p in policy.model.named_parameters() if "visual" in n)
        policy.frozen_vision = frozen
        scorer = TokenScorer(policy.model, policy.sampling, frozen)
        self.reference = self._reference(scorer) if config.beta > 0 else None
        optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.scorer: Any
        self.scorer, self.optimizer = accelerator.prepare(scorer, optimizer)
        self.step = 0

    def _reference(self, scorer: TokenScorer) -> Callable[[Sequence[Turn]], torch.Tensor]:
        """Log-probabilities under the policy that training started from, without gradient."""
        model = self.policy.model
        if hasattr(model, "disable_adapter"):
            # The adapter is fresh and its base is the warm-started policy, so "without adapter" is it.
            def without_adapter(turns: Sequence[Turn]) -> torch.Tensor:
                with torch.no_grad(), model.disable_adapter():
                    return scorer(turns)[0]

            return without_adapter
        frozen = TokenScorer(copy.deepcopy(model).requires_grad_(False).eval(), scorer.sampling, scorer.frozen_vision)

        def of_copy(turns: Sequence[Turn]) -> torch.Tensor:
            with torch.no_grad():
                return frozen(turns)[0]

        return of_copy

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run's folder; exact to the bit on one machine."""
        state = load_checkpoint(self.folder)
        named = {n: p for n, p in self.policy.model.named_parameters() if p.requires_grad}
        if set(named) != set(state["parameters"]):
            raise ValueError(f"the checkpoint in {self.folder} was written with another --model or other LoRA options")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        # Randomness needs no saving: each step is seeded by (seed, step, process).
        if self.accelerator.is_main_process:
            named = {n: p.detach().cpu() for n, p in self.policy.model.named_parameters() if p.requires_grad}
            state = {"parameters": named, "optimizer": self.optimizer.state_dict()}
            save_checkpoint(self.folder, self.step, state)
        self.accelerator.wait_for_everyone()

    def train(self, on_step: Callable[[int, dict[str, float]], None]) -> None:
        """Run the remaining steps; ``on_step`` gets the step's number and metrics."""
        while self.step < self.config.steps:
            metrics = self.train_step()
            self.step += 1
            self.log.write(self.step, metrics)
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self.save()
            on_step(self.step, metrics)

    def train_step(self) -> dict[str, float]:
        """One rollout and ``iterations`` optimizer steps on it."""
        config, accelerator, watch = self.config, self.accelerator, Stopwatch()
        rank, world = accelerator.process_index, accelerator.num_processes
        # All processes draw the same samples and each plays its share.
        draw = np.random.default_rng((config.seed, 21, self.step))
        indices = draw.integers(len(self.env.dataset), size=config.prompts)[rank::world]
        self.policy.generator.manual_seed(derived_seed(config.seed, 22, self.step, rank))
        groups = collect(self.env, self.policy, indices.tolist(), config.group)
        watch.lap("rollout")
        rows, advantages, skipped = self._credit(groups)
        lr = config.lr * min(1.0, (self.step + 1) / max(1, config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        totals = self._totals(groups, rows)
        metrics: dict[str, float] = {}
        for iteration in range(config.iterations):
            metrics |= self._update(rows, advantages, groups.turns[0][0], totals["tokens"], iteration == 0)
        watch.lap("update")
        metrics |= {"time/" + k: v for k, v in watch.seconds.items()}
        metrics |= self._describe(groups, totals, skipped)
        seconds = sum(watch.seconds.values())
        metrics |= {"train/lr": lr, "speed/episodes_per_second": totals["episodes"] / seconds}
        metrics["speed/tokens_per_second"] = totals["sampled"] / seconds
        return metrics

    def _credit(self, groups: Groups) -> tuple[list[Turn], list[float], int]:
        """Turns that carry a gradient, with their advantages, and how many groups taught nothing."""
        rows: list[Turn] = []
        advantages: list[float] = []
        skipped = 0
        size = groups.rewards.shape[1]
        for g in range(groups.rewards.shape[0]):
            if zero_variance(groups.rewards[g]):
                skipped += 1
                continue
            values = ADVANTAGES[self.config.advantage](groups.rewards[g], groups.taken[g])
            for m in range(size):
                for t, turn in enumerate(groups.turns[g * size + m]):
                    if self.config.mask_truncated and not turn.finished:
                        continue  # a turn cut off by the limit was not an answer
                    rows.append(turn)
                    advantages.append(float(values[m, t]))
        return rows, advantages, skipped

    def _totals(self, groups: Groups, rows: list[Turn]) -> dict[str, float]:
        """Counts over all processes: the loss's denominator must not depend on how work is shared."""
        counts = torch.tensor(
            [
                float(sum(len(t.completion) for t in rows)),
                float(sum(len(t.completion) for episode in groups.turns for t in episode)),
                float(groups.taken.sum()),
                float(len(groups.turns)),
            ],
            device=self.accelerator.device,
        )
        tokens, sampled, actions, episodes = self.accelerator.reduce(counts, "sum").tolist()
        return {"tokens": max(tokens, 1.0), "sampled": sampled, "actions": actions, "episodes": episodes}

    def _update(
        self, rows: list[Turn], advantages: list[float], spare: Turn, tokens: float, first: bool
    ) -> dict[str, float]:
        """One optimizer step over all rows, cut into micro-batches of similar length."""
        config, accelerator = self.config, self.accelerator
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt.ids) + len(rows[i].completion))
        parts = [order[k : k + config.micro_batch] for k in range(0, len(order), config.micro_batch)]
        # Every process must take part in the same number of backward passes, rows or no rows.
        most = int(accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max())
        sums = torch.zeros(6, dtype=torch.float64)
        self.policy.model.train()
        for number in range(most):
            idle = number >= len(parts)
            # A process that has run out of rows goes through the motions with weight 0.
            turns = [spare] if idle else [rows[i] for i in parts[number]]
            weights = [0.0] if idle else [advantages[i] for i in parts[number]]
            last = number == most - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.scorer), accelerator.autocast():
                loss, stats = self._loss(turns, weights)
                loss = loss / tokens * accelerator.num_processes * (0.0 if idle else 1.0)
            accelerator.backward(loss)
            sums += 0.0 if idle else stats
        norm = torch.tensor(0.0)
        if most:
            norm = accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.model.eval()
        sums = accelerator.reduce(sums.float().to(accelerator.device), "sum").double().cpu()
        loss_sum, entropy, clipped, kl, drift, count = sums.tolist()
        count = max(count, 1.0)
        found = {
            "train/loss": loss_sum / tokens,
            "train/grad_norm": float(norm),
            "train/entropy": entropy / count,
            "train/clip_fraction": clipped / count,
        }
        if self.reference is not None:
            found["train/kl"] = kl / count
        if first:
            found["train/sampler_scorer_difference"] = drift / count
        return found

    def _loss(self, turns: list[Turn], advantages: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss of one micro-batch and, per token, sums for the metrics."""
        config, device = self.config, self.accelerator.device
        lengths = [len(t.completion) for t in turns]
        old = torch.tensor([v for t in turns for v in t.log_probs], device=device)
        weights = torch.tensor(advantages, device=device).repeat_interleave(torch.tensor(lengths, device=device))
        log_probs, entropy = self.scorer(turns)
        loss = clipped_loss(log_probs, old, weights, config.clip_low, config.clip_high)
        kl = torch.zeros((), device=device)
        if self.reference is not None:
            reference = self.reference(turns)
            loss = loss + config.beta * kl_loss(log_probs, old, reference)
            kl = k3(log_probs.detach(), reference).sum()
        with torch.no_grad():
            clipped = clip_fraction(log_probs, old, weights, config.clip_low, config.clip_high)
            drift = (log_probs - old).abs().sum()
        stats = [loss.detach(), entropy.detach().sum(), clipped, kl, drift, torch.tensor(float(len(old)))]
        return loss, torch.stack([s.double().cpu() for s in stats])

    def _describe(self, groups: Groups, totals: dict[str, float], skipped: int) -> dict[str, float]:
        """What the rollouts looked like, over all processes: sums and counts are reduced, never means."""
        ious, first, last = groups.ious, groups.ious[:, :, 0], groups.ious[:, :, -1]
        refined = groups.taken[:, :, 1:] & ~(groups.stopped[:, :, None] & _last_action(groups.taken)[:, :, 1:])
        gains = np.diff(ious, axis=-1)[refined]
        good = last[groups.stopped] >= 0.5
        values = [
            last.sum(),
            first.sum(),
            gains.sum(),
            float(len(gains)),
            groups.stopped.sum(),
            good.sum(),
            float(groups.parse_failures),
            float(skipped),
            groups.rewards.sum(),
        ]
        sums = torch.tensor([float(v) for v in values], device=self.accelerator.device)
        final, start, gain, refinements, stops, right, failures, flat, reward = self.accelerator.reduce(
            sums, "sum"
        ).tolist()
        episodes = totals["episodes"]
        return {
            "rollout/final_iou": final / episodes,
            "rollout/step0_iou": start / episodes,
            "rollout/gain_per_refinement": gain / refinements if refinements else float("nan"),
            "rollout/stop_rate": stops / episodes,
            "rollout/stop_precision": right / stops if stops else float("nan"),
            "rollout/parse_failure_rate": failures / totals["actions"],
            "rollout/zero_variance_groups": flat / self.config.prompts,
            "rollout/reward": reward / episodes,
            "rollout/actions_per_episode": totals["actions"] / episodes,
            "rollout/tokens_per_action": totals["sampled"] / totals["actions"],
        }


def _last_action(taken: np.ndarray) -> np.ndarray:
    """True at the last action of each episode, (P, G, T)."""
    after = np.concatenate([taken[:, :, 1:], np.zeros_like(taken[:, :, :1])], axis=-1)
    last: np.ndarray = taken & ~after
    return last
