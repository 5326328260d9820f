"""Teachers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch

from ivt_agents.play.chat import Budget, ChatClient, Usage, user_turn
from ivt_agents.sft.teacher.prompts import MAX_REPLY_TOKENS, SYSTEM, TeacherError, TraceRequest
from ivt_agents.vlm.generation import generate
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.prompts import Prompts
from ivt_agents.vlm.turns import WHOLE


class Teacher(Protocol):
    """Writes remarks on students' boxes."""

    name: str
    """Says who wrote a trace; part of the cache's key."""
    batch: int
    """How many requests it likes to be given at once."""

    def write(self, requests: Sequence[TraceRequest], keep: Callable[[int, str], None]) -> None:
        """Call ``keep`` with the place of each request and its text, unchecked, as soon as it is there.

        It may be called in other threads; what was kept before an error stays.
        """
        ...


class ServedTeacher:
    """The ``openai:`` teacher: any server that speaks chat completions with images."""

    def __init__(self, client: ChatClient) -> None:
        self._client, self.name, self.batch = client, client.name, client.concurrency

    def write(self, requests: Sequence[TraceRequest], keep: Callable[[int, str], None]) -> None:
        """As many requests at a time as the client sends."""
        self._client.run([partial(self._write, k, request, keep) for k, request in enumerate(requests)])

    def _write(self, place: int, request: TraceRequest, keep: Callable[[int, str], None]) -> None:
        messages = [{"role": "system", "content": SYSTEM}, user_turn(request.question, [request.image])]
        body = {"messages": messages, "temperature": 0, "max_tokens": MAX_REPLY_TOKENS}
        keep(place, self._client.ask(body).text)


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


def load_teacher(name: str, budget: Budget | None = None) -> Teacher:
    """The teacher called ``name``: ``hf:<model>`` or ``openai:<base url>[#<model>]``, which may cost ``budget``.

    A served model has answered one small request by then.
    The template is not a ``Teacher``: it looks at numbers, not at images, and never fails.
    """
    kind, _, rest = name.partition(":")
    if kind == "openai" and rest:
        client = ChatClient(rest, Usage(replace(budget or Budget(), options="--teacher-max")))
        client.check()
        return ServedTeacher(client)
    if kind == "hf" and rest:
        return HFTeacher(rest)
    raise TeacherError(f"teacher {name!r}: choose template, hf:MODEL or openai:BASE_URL[#MODEL]")
