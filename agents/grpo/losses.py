"""Policy losses on sampled tokens. Pure functions over tensors, no model.

All arguments are flat over the sampled tokens of a batch, shape (N,); all losses are sums, and the
caller divides by one global token count, so that micro-batches and processes add up exactly.
"""

from __future__ import annotations

import torch


def clipped_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> torch.Tensor:
    """Sum of the clipped surrogate (PPO, arXiv 1707.06347, eq. 7), with DAPO's separate upper bound.

    Args:
        log_probs: of the sampled tokens under the policy being trained.
        old_log_probs: under the policy that sampled them.
        advantages: of the step that each token belongs to.
        clip_low: the ratio's lower bound is 1 - clip_low.
        clip_high: the ratio's upper bound is 1 + clip_high.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


def clip_fraction(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> torch.Tensor:
    """How many tokens have no gradient because the clip binds."""
    ratio = (log_probs - old_log_probs).exp()
    high = (ratio > 1 + clip_high) & (advantages > 0)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    return (high | low).float().sum()


def k3(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token, never negative."""
    delta = reference_log_probs - log_probs
    return delta.exp() - delta - 1


def kl_loss(log_probs: torch.Tensor, old_log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """Sum of ratio * k3. Its gradient is that of the reverse KL under the current policy.

    k3 alone as a loss follows the forward KL instead (arXiv 2512.21852); the differentiable ratio
    puts the missing score-function term back.
    """
    ratio = (log_probs - old_log_probs).exp()
    return (ratio * k3(log_probs, reference_log_probs)).sum()
