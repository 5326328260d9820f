"""Muon (Jordan et al. 2024) on processors without bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ivt_agents.vlm.precision import bf16_pays


class Muon(torch.optim.Muon):
    """torch's Muon. Where bfloat16 does not pay, it computes the update in float32.

    torch orthogonalises in bfloat16 always. A processor without instructions for it then spends a third of a training
    step of the tiny model on that alone, 16 times as long as in float32. Decays no weights in that case.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        if bf16_pays():
            return super().step(closure)
        for group in self.param_groups:
            assert closure is None and group["nesterov"] and not group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum_buffer"], group["momentum"])
                update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows, columns = parameter.shape
                parameter.add_(update, alpha=-float(group["lr"]) * max(1.0, rows / columns) ** 0.5)
        return None


def orthogonalised(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """A matrix with about the same singular vectors and all singular values near 1, by Newton-Schulz iterations.

    Each is ``a X + b (X X') X + c (X X')^2 X`` with ``coefficients`` a, b, c; ``eps`` is the least norm divided by.
    """
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
