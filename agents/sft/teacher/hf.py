"""The ``hf:`` teacher: a vision-language model on this machine, loaded like any policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ivt_agents.sft.teacher.prompts import MAX_REPLY_TOKENS, SYSTEM, TraceRequest
from ivt_agents.vlm.generation import generate
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.prompts import Prompts
from ivt_agents.vlm.turns import WHOLE


class HFTeacher:
    """Writes remarks greedily with a local model: ``tiny``, a folder, or a hub name."""

    batch = 16

    def __init__(self, model: str) -> None:
        """Load ``model``, named as ``load_policy`` takes it."""
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.name = f"hf:{model}"
        self._policy = load_policy(model, dtype=dtype, max_new_tokens=MAX_REPLY_TOKENS)
        self._policy.model.eval()
        # The policy's own question would ask for a box.
        self._policy.dialogue.prompts = Prompts("{expression}")

    def write(self, requests: Sequence[TraceRequest], keep: Callable[[int, str], None]) -> None:
        """One text per request; empty where the model did not come to an end."""
        policy = self._policy
        images = policy.dialogue.process([r.image for r in requests])
        prompts = [
            policy.dialogue.prompt(f"{SYSTEM}\n\n{r.question}", None, [(image, WHOLE)])
            for r, image in zip(requests, images, strict=True)
        ]
        turns = generate(policy.core, prompts, policy.sampling, policy.generator, keep=False)
        for place, turn in enumerate(turns):
            keep(place, policy.text(turn) if turn.finished else "")
