"""Policy losses on sampled tokens. Pure functions over tensors, no model.

All arguments are flat over the N sampled tokens of a batch; ``sequence`` (N,) gives for each token
the number of the sequence (the answer of one step) that it belongs to, 0 .. S - 1. A sequence is never
cut by a micro-batch.

Every loss is a *sum*. The caller divides it by ``denominator``, one global number that is known before
the update, so that micro-batches and processes add up exactly. Below, r is the ratio of the new to the
old probability of a token, A its advantage, |o| the number of tokens of its sequence, and
clip(r) = min(max(r, 1 - clip_low), 1 + clip_high).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, bincount, minimum, zeros

CLIPS: dict[str, tuple[float, float]] = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    # The ratio of a whole answer is a geometric mean, which moves far less than a token's (section 5.1).
    "gspo": (3e-4, 4e-4),
    # No lower bound, as in the paper; the paper gives no number for the upper one, this is DAPO's.
    "cispo": (1.0, 0.28),
}
"""Default (clip_low, clip_high) of each loss."""


def lengths(sequence: Tensor) -> Tensor:
    """For each token the number of tokens of its sequence, (N,)."""
    return bincount(sequence)[sequence]


def surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """min(r A, clip(r) A) per token (PPO, arXiv 1707.06347, eq. 7), with DAPO's separate upper bound."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return minimum(ratio * advantages, clipped * advantages)


def clipped_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, sequence: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """- sum_i sum_t min(r A, clip(r) A).

    DAPO (arXiv 2503.14476) divides by the tokens of the whole batch: every token weighs the same, and a higher upper
    bound leaves room for improbable tokens to grow ("clip-higher"). Dr. GRPO (arXiv 2503.20783) divides by a constant
    that no answer can change: the most tokens that the rollout could have had, episodes x actions x token limit.
    """
    return -surrogate((log_probs - old_log_probs).exp(), advantages, clip_low, clip_high).sum()


def grpo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, sequence: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """- 1/S sum_i 1/|o_i| sum_t min(r A, clip(r) A): the mean over each answer, then over answers.

    GRPO (arXiv 2402.03300, eq. 3). A token of a long answer weighs less: long wrong answers are
    punished too little (arXiv 2503.20783). Divided by the number of sequences S.
    """
    values = surrogate((log_probs - old_log_probs).exp(), advantages, clip_low, clip_high)
    return -(values / lengths(sequence)).sum()


def gspo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, sequence: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """- 1/S sum_i min(s_i A_i, clip(s_i) A_i), s_i = exp(1/|o_i| sum_t log r_t).

    GSPO (arXiv 2507.18071): one ratio for a whole answer, the geometric mean of its tokens', so an
    answer is clipped as a whole. All tokens of a step have the same advantage here. Divided by the
    number of sequences S.
    """
    values = surrogate(sequence_ratio(log_probs, old_log_probs, sequence), advantages, clip_low, clip_high)
    return -(values / lengths(sequence)).sum()


def cispo(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, sequence: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """- 1/N sum_i sum_t detach(clip(r)) A log pi: REINFORCE with a capped importance weight.

    CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): the clip bounds a token's weight and never
    removes its gradient. Divided by the global number of tokens N.
    """
    weight = (log_probs.detach() - old_log_probs).exp().clamp(1 - clip_low, 1 + clip_high)
    return -(weight * advantages * log_probs).sum()


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Tensor]
LOSSES: dict[str, Loss] = {
    "grpo": grpo,
    "dr_grpo": clipped_loss,
    "dapo": clipped_loss,
    "gspo": gspo,
    "cispo": cispo,
}
PER_SEQUENCE = ("grpo", "gspo")
"""Losses that average over each sequence first."""


def denominator(loss: str, tokens: float, sequences: float, capacity: float) -> float:
    """What the sum is divided by; at least 1, so that a step in which nothing is learned is no 0 / 0.

    ``tokens`` and ``sequences`` are those that carry a gradient, in all processes; ``capacity`` is the most tokens that
    the rollout could have had.
    """
    if loss == "dr_grpo":
        return max(capacity, 1.0)
    return max(sequences if loss in PER_SEQUENCE else tokens, 1.0)


def sequence_ratio(log_probs: Tensor, old_log_probs: Tensor, sequence: Tensor) -> Tensor:
    """Geometric mean of the ratios of each token's sequence, (N,)."""
    count = bincount(sequence)  # (S,)
    sums = zeros(len(count), dtype=log_probs.dtype, device=log_probs.device)
    means = sums.index_add(0, sequence, log_probs - old_log_probs) / count  # (S,)
    return means.exp()[sequence]


def clipped_sides(
    loss: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    sequence: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """How many tokens the clip acts on (no gradient; cispo: a capped weight): at the lower bound, at the upper one.

    The lower bound stops tokens that were bad and have become rarer, the upper one tokens that were good
    and have become more frequent; which of them binds says which way the policy has moved too far.
    """
    by_sequence = loss == "gspo"
    ratio = sequence_ratio(log_probs, old_log_probs, sequence) if by_sequence else (log_probs - old_log_probs).exp()
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    if loss != "cispo":  # which caps the weight, whatever the advantage
        low, high = low & (advantages < 0), high & (advantages > 0)
    return low.float().sum(), high.float().sum()


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token, never negative."""
    delta = reference_log_probs - log_probs
    return delta.exp() - delta - 1


def kl_loss(
    log_probs: Tensor, old_log_probs: Tensor, reference_log_probs: Tensor, sequence: Tensor | None = None
) -> Tensor:
    """Sum of ratio * k3. Its gradient is that of the reverse KL under the current policy.

    k3 alone as a loss follows the forward KL instead (arXiv 2512.21852); the differentiable ratio
    puts the missing score-function term back. ``sequence`` divides each token's term by the length of its sequence,
    as losses ``PER_SEQUENCE`` do.
    """
    ratio = (log_probs - old_log_probs).exp()
    values = ratio * k3(log_probs, reference_log_probs)
    return (values if sequence is None else values / lengths(sequence)).sum()


def kl_penalty(old_log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """k1 = log(policy / reference) per token, detached: what KL in the reward subtracts.

    As a reward k1 gives the exact gradient of the reverse KL; as a loss its gradient would be 0 in
    expectation (arXiv 2512.21852).
    """
    return (old_log_probs - reference_log_probs).detach()
