"""Teachers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from ivt_agents.play.chat import Budget, ChatClient, Usage, user_turn
from ivt_agents.sft.teacher.prompts import MAX_REPLY_TOKENS, SYSTEM, TeacherError, TraceRequest


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
        from ivt_agents.sft.teacher.hf import HFTeacher

        return HFTeacher(rest)
    raise TeacherError(f"teacher {name!r}: choose template, hf:MODEL or openai:BASE_URL[#MODEL]")
