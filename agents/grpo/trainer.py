"""The GRPO learner: collect groups, credit each step, take one clipped policy-gradient step."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from numpy.typing import NDArray

from ivt_agents.grpo.advantages import advantages as advantages_of
from ivt_agents.grpo.advantages import spread, zero_variance
from ivt_agents.grpo.collect import Groups, collect
from ivt_agents.grpo.losses import CLIPS, LOSSES, PER_SEQUENCE, clipped_sides, denominator, k3, kl_loss, kl_penalty
from ivt_agents.play.on_split import check_answers
from ivt_agents.training.checkpoints import load_state, save_state
from ivt_agents.training.finite import check_finite, check_weights
from ivt_agents.training.folder import what_is_kept
from ivt_agents.training.muon import Muon
from ivt_agents.training.run import MetricsLog, Stopwatch
from ivt_agents.training.sharding import whole_weights
from ivt_agents.vlm.adapters import has_reference, reference_adapter
from ivt_agents.vlm.generation import TokenScorer
from ivt_agents.vlm.load import can_pack
from ivt_agents.vlm.packing import micro_batches
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.turns import Turn
from ivt_env.vector_env import GroundingVectorEnv

if TYPE_CHECKING:  # the script imports this module
    from ivt_agents.grpo.train import Args

log = logging.getLogger(__name__)

WITHOUT_VARIANCE = 5
"""Steps in a row in which no group has an advantage, after which it is said."""

SCALE_FLOOR = 1e-3
"""A standard deviation of returns counts as at least this much reward."""

GOOD = 0.5
"""Stopping is right if the IoU is at least this, in the metrics of the stop. Nothing is trained on it."""


@dataclass
class Credit:
    """What one process learns from in a step."""

    rows: list[Turn]
    """Turns that carry a gradient."""
    advantages: list[float]
    """One for each of them."""
    skipped: int
    """Groups left out because all members earned alike."""
    masked_tokens: int
    """Tokens left out of the other groups because their turn was cut off by the token limit."""


class GRPOTrainer:
    """Trains a policy in place.

    Two parts of GRPO (arXiv 2402.03300) are off by default. Advantages are not divided by the group's standard
    deviation, because that inflates groups whose returns hardly differ, and continuous IoU makes many of them. Losses
    are not divided by each sequence's length, because that favours long wrong completions; one global token count
    divides instead. The baseline is the mean of the *other* members, per step, of the return-to-go.
    """

    def __init__(
        self,
        policy: VLMPolicy,
        env: GroundingVectorEnv,
        config: Args,
        accelerator: Accelerator,
        log: MetricsLog,
        folder: Path,
    ) -> None:
        """Prepare model, optimizer and reference.

        The parameters of ``policy`` that require gradients are trained. ``env`` has ``prompts / processes * group``
        environments, autoreset disabled; ``folder`` is that of the run, for checkpoints.
        """
        _refuse_dropout(policy.model)
        self.policy, self.env, self.config = policy, env, config
        given = zip(CLIPS[config.loss_type], (config.epsilon, config.epsilon_high), strict=True)
        self.bounds = [usual if own is None else own for usual, own in given]
        self.accelerator, self.log, self.folder = accelerator, log, folder
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        frozen = not any(p.requires_grad for n, p in policy.model.named_parameters() if "visual" in n)
        policy.frozen_vision = frozen
        scorer = TokenScorer(policy.model, policy.sampling, frozen, packing=can_pack(policy.model))
        self.worth = scorer.worth
        # Rollouts must compute as the update does, or the first ratio is not 1.
        policy.autocast = accelerator.autocast
        self.reference = self._reference(scorer) if config.beta > 0 else None
        optimizer: torch.optim.Optimizer
        if config.optim == "muon":
            optimizer = Muon(self.parameters, lr=config.learning_rate, weight_decay=0.0)
        else:
            optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.scorer: Any
        self.scorer, self.optimizer = accelerator.prepare(scorer, optimizer)
        # Sharding puts other parameters in the place of those that were there.
        self.parameters = [p for p in policy.model.parameters() if p.requires_grad]
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        self.step = 0
        self._without_variance = 0
        self._answers_checked = False

    def _reference(self, scorer: TokenScorer) -> Callable[[Sequence[Turn]], torch.Tensor]:
        """Log-probabilities under the policy that training started from, without gradient."""
        model = self.policy.model
        inside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        if _has_fresh_adapter(model):
            inside = model.disable_adapter  # the base is the warm-started policy and does not change
        elif has_reference(model):
            inside = partial(reference_adapter, model)
        else:
            still = copy.deepcopy(model).requires_grad_(False).eval()
            scorer = TokenScorer(still, scorer.sampling, scorer.frozen_vision, scorer.worth is not None)

        def reference(turns: Sequence[Turn]) -> torch.Tensor:
            with torch.no_grad(), inside():
                return scorer(turns)[0]

        return reference

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, one process may use the policy as it likes; all must enter and leave together."""
        return whole_weights(self.scorer, self.accelerator)

    def agreed(self, value: bool) -> bool:
        """The main process's answer, in all processes."""
        return bool(self._summed({"yes": value and self.accelerator.is_main_process})["yes"])

    def resume(self) -> None:
        """``load_state`` of the run's folder."""
        steps, updates = self.config.steps, self.config.num_iterations
        self.step = load_state(self.folder, self.policy.model, [self.optimizer], self.accelerator, steps, updates)

    def train(self, on_step: Callable[[int, dict[str, Any]], None]) -> None:
        """Run the remaining steps; ``on_step`` gets the step's number and metrics. Warns where nothing is learned."""
        while self.step < self.config.steps:
            metrics = self.train_step()
            self.step += 1
            nothing_learned = metrics["rollout/zero_variance_groups"] == 1
            self._without_variance = self._without_variance + 1 if nothing_learned else 0
            if self._without_variance == WITHOUT_VARIANCE and self.accelerator.is_main_process:
                log.warning(
                    "steps %d to %d: in every group all episodes had the same return, so nothing was learned. Likely"
                    " causes: unusable answers, a low --temperature, samples that are too easy or too hard",
                    self.step - WITHOUT_VARIANCE + 1,
                    self.step,
                )
            self.log.write(self.step, metrics)
            if self.step % self.config.save_steps == 0 or self.step == self.config.steps:
                save_state(self.folder, self.step, self.policy.model, [self.optimizer], self.accelerator, self.log)
            on_step(self.step, metrics)

    def train_step(self) -> dict[str, Any]:
        """One rollout and ``iterations`` optimizer steps on it."""
        config, accelerator, watch = self.config, self.accelerator, Stopwatch()
        rank, world = accelerator.process_index, accelerator.num_processes
        # All processes draw the same samples and each plays its share.
        draw = np.random.default_rng((config.seed, 21, self.step))
        indices = draw.integers(len(self.env.dataset), size=config.prompts)[rank::world]
        drawn = np.random.SeedSequence((config.seed, 22, self.step, rank)).generate_state(1, np.uint64)[0]
        self.policy.generator.manual_seed(int(drawn >> np.uint64(1)))
        with self.whole_weights():
            paid: dict[str, Any] = {"format_bonus": config.format_bonus, "require_format": config.require_format}
            groups = collect(self.env, self.policy, indices.tolist(), config.num_generations, watch, **paid)
            if not self._answers_checked:  # a policy whose first answers cannot be used is refused in all processes
                counts = self._summed({"unusable": len(groups.unusable), "answers": groups.taken.sum()})
                unusable, answers = int(counts["unusable"]), int(counts["answers"])
                check_answers(unusable, answers, groups.unusable, config.max_unusable, self.policy.may_stop)
                self._answers_checked = True
            rewards, metrics = self._rewards(groups)
        sampled = sum(v for episode in groups.turns for turn in episode for v in turn.log_probs)
        found = {"a reward": float(np.abs(rewards).sum()), "a sampled log-probability": sampled}
        check_finite(self.step + 1, found, what_is_kept(self.folder, config.learning_rate), accelerator)
        credit = self._credit(groups, rewards)
        watch.lap("reward")
        rising, left = (self.step + 1) / max(1, config.warmup_steps), config.steps - self.step
        lr = config.learning_rate * min(1.0, rising, left / max(1, config.cooldown))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        totals = self._totals(groups, credit)
        spare = groups.turns[0][0]
        for iteration in range(config.num_iterations):
            metrics |= self._update(credit.rows, credit.advantages, spare, totals["denominator"], iteration == 0)
        watch.lap("update")
        metrics |= {"time/" + k: v for k, v in watch.seconds.items()}
        metrics |= self._describe(groups, totals, credit) | {"train/lr": lr}
        seconds = sum(watch.seconds.values())
        speeds = {"episodes": "episodes", "tokens": "sampled", "images": "images"}
        return metrics | {f"speed/{k}_per_second": totals[v] / seconds for k, v in speeds.items()}

    def _rewards(self, groups: Groups) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """The rewards that are credited, (P, G, T), and metrics of the KL penalty where it is one of them.

        With ``kl_in="reward"`` a step pays beta times the sum of k1 over its tokens, as a number: it
        reaches earlier steps through their returns, as any other reward does.
        """
        config, accelerator = self.config, self.accelerator
        if self.reference is None or config.kl_in != "reward":
            return groups.rewards, {}
        horizon = groups.rewards.shape[-1]
        flat = groups.rewards.reshape(-1, horizon).copy()  # (P * G, T)
        played = enumerate(groups.turns)
        places = [(i, t) for i, episode in played for t, turn in enumerate(episode) if not self._is_by_opener(turn)]
        kl = paid = count = 0.0
        for start in range(0, len(places), config.per_device_train_batch_size):
            part = places[start : start + config.per_device_train_batch_size]
            turns = [groups.turns[i][t] for i, t in part]
            with accelerator.autocast():
                reference = self.reference(turns)
            old = torch.tensor([v for turn in turns for v in turn.log_probs], device=reference.device)
            penalty = config.beta * kl_penalty(old, reference)
            for place, tokens in zip(part, penalty.split([len(t.completion) for t in turns]), strict=True):
                flat[place] -= float(tokens.double().sum())
            kl, paid, count = kl + float(k3(old, reference).sum()), paid + float(penalty.sum()), count + len(old)
        sums = self._summed({"kl": kl, "paid": paid, "count": count, "episodes": len(groups.turns)})
        return flat.reshape(groups.rewards.shape), {
            "train/kl": sums["kl"] / max(sums["count"], 1),
            "rollout/kl_penalty": sums["paid"] / sums["episodes"],
        }

    def _summed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes."""
        sums = torch.tensor([float(v) for v in values.values()], device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(sums, "sum").tolist(), strict=True))

    def _is_by_opener(self, turn: Turn) -> bool:
        """Whether another model (the opener) gave this turn. Such turns are not trained on."""
        return self.policy.opener is not None and turn.prompt.opening

    def _credit(self, groups: Groups, rewards: NDArray[np.float64]) -> Credit:
        """Turns that carry a gradient, with their advantages."""
        config, out = self.config, Credit([], [], 0, 0)
        count, size, horizon = rewards.shape
        batch_spread = 1.0
        if config.scale_rewards == "batch":  # over all episodes of all processes
            returns = torch.tensor(rewards.sum(-1).ravel(), dtype=torch.float32, device=self.accelerator.device)
            batch_spread = spread(self.accelerator.gather(returns).double().cpu().numpy(), SCALE_FLOOR)
        for g in range(count):
            if zero_variance(rewards[g]):
                out.skipped += 1
                continue
            episodes = groups.turns[g * size : (g + 1) * size]
            compared = config.advantage == "episode_and_step"
            states = _states(episodes, horizon) if compared else np.zeros((size, horizon), dtype=np.int64)
            values = advantages_of(config.advantage, rewards[g], groups.taken[g], states, discount=config.discount)
            if config.scale_rewards != "none":
                group = config.scale_rewards == "group"
                values = values / (spread(rewards[g].sum(-1), SCALE_FLOOR) if group else batch_spread)
            for m, episode in enumerate(episodes):
                for t, turn in enumerate(episode):
                    if config.mask_truncated_completions and not turn.finished:
                        out.masked_tokens += len(turn.completion)  # a turn cut off by the limit was not an answer
                    elif not self._is_by_opener(turn):
                        out.rows.append(turn)
                        out.advantages.append(float(values[m, t]))
        return out

    def _totals(self, groups: Groups, credit: Credit) -> dict[str, float]:
        """Counts over all processes: the loss's denominator must not depend on how work is shared."""
        turns = [t for episode in groups.turns for t in episode]
        counts = {
            "tokens": sum(len(t.completion) for t in credit.rows),
            "sequences": len(credit.rows),
            "sampled": sum(len(t.completion) for t in turns),
            "actions": groups.taken.sum(),
            "episodes": len(groups.turns),
            "truncated": sum(not t.finished for t in turns),
            "masked_tokens": credit.masked_tokens,
            "images": sum(len(t.prompt.windows) for t in turns),
        }
        totals = self._summed(counts)
        capacity = totals["episodes"] * groups.taken.shape[-1] * self.policy.sampling.max_new_tokens
        totals["denominator"] = denominator(self.config.loss_type, totals["tokens"], totals["sequences"], capacity)
        return totals

    def _update(
        self, rows: list[Turn], advantages: list[float], spare: Turn, divisor: float, first: bool
    ) -> dict[str, float]:
        """One optimizer step over this process's turns, cut into micro-batches of similar length.

        ``spare`` is any turn, for a process that has run out of rows; ``divisor``, of the summed loss, is the same in
        all processes; ``first``: the policy is still the one that sampled.
        """
        config, accelerator = self.config, self.accelerator
        parts = micro_batches(rows, config.per_device_train_batch_size, self.policy.image_token, self.worth)
        # Every process must take part in the same number of backward passes, rows or no rows.
        most = int(accelerator.gather(torch.tensor([len(parts)], device=accelerator.device)).max())
        sums, worst = torch.zeros(7, dtype=torch.float64), 0.0
        self.policy.model.train()
        for number in range(most):
            idle = number >= len(parts)
            turns = [spare] if idle else [rows[i] for i in parts[number]]
            weights = [0.0] if idle else [advantages[i] for i in parts[number]]
            alone = contextlib.nullcontext() if number == most - 1 else accelerator.no_sync(self.scorer)
            with alone, accelerator.autocast():
                loss, stats, drift = self._loss(turns, weights)
                loss = loss / divisor * accelerator.num_processes * (0.0 if idle else 1.0)
            accelerator.backward(loss)
            sums += 0.0 if idle else stats
            worst = worst if idle else max(worst, drift)
        norm = 0.0
        if most:
            norm = float(accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm))
            step, remedy = self.step + 1, what_is_kept(self.folder, config.learning_rate)
            learned = {"an advantage": sum(map(abs, advantages)), "the loss": float(sums[0])}
            check_finite(step, learned | {"the gradient's norm": norm}, remedy, accelerator)
            self.optimizer.step()
            check_weights(step, self.policy.model, remedy, accelerator)
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.model.eval()
        reduced = accelerator.reduce(sums.float().to(accelerator.device), "sum").tolist()
        loss_sum, entropy, low, high, kl, drifts = reduced[:6]
        count = max(reduced[6], 1.0)
        found = {
            "train/loss": loss_sum / divisor,
            "train/grad_norm": norm,
            "train/entropy": entropy / count,
            "train/clip_fraction": (low + high) / count,
            "train/clip_fraction_low": low / count,
            "train/clip_fraction_high": high / count,
        }
        if self.reference is not None and config.kl_in == "loss":
            found["train/kl"] = kl / count
        if first:
            found["train/sampler_scorer_difference"] = drifts / count
            all_worst = accelerator.gather(torch.tensor([worst], device=accelerator.device))
            found["train/sampler_scorer_difference_max"] = float(all_worst.max())
        return found

    def _loss(self, turns: list[Turn], advantages: list[float]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Summed loss of one micro-batch, sums over tokens for the metrics, and the largest drift."""
        config, device = self.config, self.accelerator.device
        lengths = [len(t.completion) for t in turns]
        old = torch.tensor([v for t in turns for v in t.log_probs], device=device)
        counts = torch.tensor(lengths, device=device)
        weights = torch.tensor(advantages, device=device).repeat_interleave(counts)  # (N,)
        sequence = torch.arange(len(turns), device=device).repeat_interleave(counts)  # (N,)
        log_probs, entropy = self.scorer(turns)
        loss = LOSSES[config.loss_type](log_probs, old, weights, sequence, *self.bounds)
        kl = torch.zeros((), device=device)
        if self.reference is not None and config.kl_in == "loss":
            reference = self.reference(turns)
            by_sequence = sequence if config.loss_type in PER_SEQUENCE else None
            loss = loss + config.beta * kl_loss(log_probs, old, reference, by_sequence)
            kl = k3(log_probs.detach(), reference).sum()
        with torch.no_grad():
            low, high = clipped_sides(config.loss_type, log_probs, old, weights, sequence, *self.bounds)
            drift = (log_probs - old).abs()
        stats = [loss.detach(), entropy.detach().sum(), low, high, kl, drift.sum(), torch.tensor(float(len(old)))]
        return loss, torch.stack([s.double().cpu() for s in stats]), float(drift.max())

    def _describe(self, groups: Groups, totals: dict[str, float], credit: Credit) -> dict[str, float | None]:
        """What the rollouts looked like, over all processes: sums and counts are reduced, never means.

        None: there was nothing to measure it on.
        """
        ious, first, last = groups.ious, groups.ious[:, :, 0], groups.ious[:, :, -1]
        last_action = groups.taken & ~np.pad(groups.taken[:, :, 1:], ((0, 0), (0, 0), (0, 1)))  # (P, G, T)
        refined = (groups.taken & ~(groups.stopped[:, :, None] & last_action))[:, :, 1:]
        gains = np.diff(ious, axis=-1)  # (P, G, T - 1)
        by_step = {t: gains[:, :, t - 1][refined[:, :, t - 1]] for t in range(1, gains.shape[-1] + 1)}
        # Episodes that acted again while the current box was already good, so that they could have stopped.
        could = (groups.taken[:, :, 1:] & (ious[:, :, :-1] >= GOOD)).any(-1)
        right, episodes = (last[groups.stopped] >= GOOD).sum(), len(groups.turns)
        shares = {
            "final_iou": (last.sum(), episodes),
            "step0_iou": (first.sum(), episodes),
            "gain_per_refinement": (gains[refined].sum(), refined.sum()),
            "stop_rate": (groups.stopped.sum(), episodes),
            "stop_precision": (right, groups.stopped.sum()),
            "stop_recall": (right, could.sum()),
            **{f"gain_step_{t}": (found.sum(), len(found)) for t, found in by_step.items()},
            "parse_failure_rate": (groups.parse_failures, groups.taken.sum()),
            "zero_variance_groups": (credit.skipped, len(groups.rewards)),
            "reward": (groups.rewards.sum(), episodes),
        }
        parts = self._summed({name: part for name, (part, _) in shares.items()})
        wholes = self._summed({name: whole for name, (_, whole) in shares.items()})
        return {f"rollout/{name}": parts[name] / whole if whole else None for name, whole in wholes.items()} | {
            "rollout/actions_per_episode": totals["actions"] / totals["episodes"],
            "rollout/tokens_per_action": totals["sampled"] / totals["actions"],
            "rollout/truncated_turns": totals["truncated"] / totals["actions"],
            "train/masked_tokens": totals["masked_tokens"],
        }


def _states(episodes: list[list[Turn]], horizon: int) -> NDArray[np.int64]:
    """A number for what each step of a group's episodes observed, (G, T); -1 where no action was made.

    Members of a group play one image, so what they were asked and shown, and when, is the state: the ids name the
    current box and in the prefix layout everything before, and the images show the trail.
    """
    numbers: dict[tuple[int, tuple[int, ...], tuple[bytes, ...]], int] = {}
    out = np.full((len(episodes), horizon), -1, dtype=np.int64)
    for m, episode in enumerate(episodes):
        for t, turn in enumerate(episode):
            shown = tuple(image.patches.numpy().tobytes() for image in turn.prompt.images)
            out[m, t] = numbers.setdefault((t, tuple(turn.prompt.ids), shown), len(numbers))
    return out


def _has_fresh_adapter(model: Any) -> bool:
    """Whether switching the adapter off gives the policy that training starts from.

    Not so where the adapter already holds something (then "off" is the model *before* the warm start),
    nor where weights outside the adapter are trained.
    """
    if not hasattr(model, "disable_adapter"):
        return False
    named = list(model.named_parameters())
    outside = any(p.requires_grad for n, p in named if "lora_" not in n)
    return not outside and not any(bool(p.detach().any()) for n, p in named if "lora_B" in n)


def _refuse_dropout(model: torch.nn.Module) -> None:
    """Rollouts are sampled without dropout; an update with it would score another policy."""
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if rate:
            raise ValueError(
                f"dropout {rate} in {name}: the update would score a different policy from the one that sampled, so the"
                " first ratio would not be 1; set it to 0 in the model's configuration"
            )
