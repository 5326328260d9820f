"""The ``openai:`` teacher: any server that speaks chat completions with images, through the ``openai`` client.

The key comes from the environment variable ``OPENAI_API_KEY``. It is sent in one header, never written or logged,
and removed from what a server says.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ivt_agents.sft.teacher.prompts import SYSTEM, TraceRequest

KEY_VARIABLE = "OPENAI_API_KEY"

MAX_REPLY_TOKENS = 120
"""Two sentences; a longer text is cut off and too long to be used anyway."""

log = logging.getLogger(__name__)


class TeacherError(ValueError):
    """A teacher that cannot be used, or that gave up. Says why, and what to do."""


class BudgetError(TeacherError):
    """The cost cap is reached: nothing more is sent."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one run may cost. Answers from the cache cost nothing."""

    max_requests: int = 10_000
    """HTTP requests sent for answers, retries included."""
    max_tokens: int = 10_000_000
    """Prompt and answer tokens together, as the server counts them in ``usage``."""

    def __post_init__(self) -> None:
        """Refuse caps that allow nothing."""
        for name, value in (("requests", self.max_requests), ("tokens", self.max_tokens)):
            if value < 1:
                raise TeacherError(f"a cap of {value} {name} allows nothing: give at least 1")


class OpenAITeacher:
    """Writes remarks through ``POST <base url>/chat/completions``."""

    batch = 1

    def __init__(self, address: str, budget: Budget | None = None, attempts: int = 6, timeout_s: float = 120.0) -> None:
        """Check the address; nothing is sent yet.

        Args:
            address: ``<base url>`` or ``<base url>#<model>``, for example ``http://127.0.0.1:8000/v1``.
            budget: what the run may cost.
            attempts: requests for one answer; waits grow, and ``Retry-After`` is honoured up to two minutes.
            timeout_s: of one request.
        """
        try:
            import openai
        except ImportError as error:
            raise TeacherError('an openai: teacher needs the package openai: pip install "ivt-env[served]"') from error
        base, _, model = address.partition("#")
        parts = urllib.parse.urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TeacherError(f"teacher address {parts.scheme}:...: give openai:http(s)://host[:port]/v1[#model]")
        if parts.username is not None or parts.password is not None or parts.query:
            # The address is written into the run's configuration.
            raise TeacherError(
                f"the teacher address for {parts.hostname} holds a password or a query: put the key into {KEY_VARIABLE}"
            )
        base = base.rstrip("/")
        self._model, self.name = model, f"openai:{base}" + (f"#{model}" if model else "")
        self.budget, self.attempts = budget or Budget(), attempts
        self.requests_sent = self.tokens_used = 0
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            raise TeacherError(f"{KEY_VARIABLE} holds characters that a header cannot hold (value not shown)")
        if self._key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            log.warning("the key in %s is sent to %s without encryption (http)", KEY_VARIABLE, parts.hostname)
        self._client = openai.OpenAI(
            base_url=base,
            api_key=self._key or "none",
            timeout=timeout_s,
            # A redirect would carry the key to another host.
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False, event_hooks={"request": [self._sent], "response": [_judge]}
            ),
        )

    def _sent(self, request: Any) -> None:
        self.requests_sent += 1
        if not self._key:  # the client insists on one
            del request.headers["Authorization"]

    def check(self) -> None:
        """Send one small request: a server that cannot answer is found before anything is measured or harvested.

        Raises:
            TeacherError: for an address, key or model that does not work, after at most two attempts.
        """
        patient = self.attempts, self._client
        self.attempts, self._client = 2, self._client.with_options(timeout=30.0)
        try:
            self.write([TraceRequest(np.full((64, 64, 3), 128, np.uint8), "Answer with the word ready.")])
        except TeacherError as error:
            raise type(error)(
                f"the teacher was asked one small question first, and nothing else was done: {error}"
            ) from error
        finally:
            self.attempts, self._client = patient

    def write(self, requests: Sequence[TraceRequest]) -> list[str]:
        """One text per request, as the model gave it; checked by the caller."""
        return [self.answer(request.image, request.question, MAX_REPLY_TOKENS, SYSTEM) for request in requests]

    def answer(self, image: np.ndarray, question: str, max_tokens: int, system: str = "") -> str:
        """The model's text about an image, RGB uint8 (height, width, 3); empty where it said nothing."""
        if not self._model:
            names = [model.id for model in self._ask(lambda client: client.models.list()).data]
            if len(names) != 1:
                raise TeacherError(
                    f"{self.name} serves {len(names)} models ({', '.join(names[:5]) or 'none listed'}): "
                    f"name one, {self.name}#MODEL"
                )
            self._model = names[0]
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        shown = {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"}
        content = [{"type": "image_url", "image_url": shown}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": content})
        reply = self._ask(
            lambda client: client.chat.completions.create(
                model=self._model, messages=messages, temperature=0, max_tokens=max_tokens
            )
        )
        total = getattr(reply.usage, "total_tokens", None)
        if type(total) is not int or total < 0:
            raise TeacherError(
                f"{self.name} does not say what an answer costs (usage.total_tokens is {total!r}): the cap of "
                f"{self.budget.max_tokens} tokens could not be kept"
            )
        self.tokens_used += total
        try:
            text = reply.choices[0].message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise TeacherError(f"{self.name}: the reply has no choices[0].message.content; no chat API?") from error
        return text if isinstance(text, str) else ""  # some servers answer null where the model said nothing

    def _ask(self, call: Callable[[Any], Any]) -> Any:
        """What ``call`` gets from the client, which tries again where that can help and the budget allows it."""
        import openai

        sent, left = self.requests_sent, self.budget.max_requests - self.requests_sent
        if self.tokens_used >= self.budget.max_tokens:
            raise BudgetError(
                f"the cap of {self.budget.max_tokens} tokens is reached: {self.tokens_used} used (--teacher-max-tokens)"
            )
        try:
            if left > 0:
                return call(self._client.with_options(max_retries=min(self.attempts, left) - 1))
        except openai.APIStatusError as error:
            said = self._without_key(f"{error.status_code} {error.response.reason_phrase}. {error.response.text}")[:400]
            if error.status_code in (401, 403):
                held = "was refused" if self._key else "is not set"
                raise TeacherError(
                    f"{self.name}: {error.status_code}, the key in {KEY_VARIABLE} {held}. {said}"
                ) from None
            if self.requests_sent - sent == 1 and left > 1:
                wait = error.response.headers.get("Retry-After")
                asked = f", and the server asks to wait {wait} s" if wait else ""
                raise TeacherError(f"{self.name}: {said}{asked}") from None
        except openai.OpenAIError as error:
            said = self._without_key(str(error.__cause__ or error))
        if self.requests_sent >= self.budget.max_requests:
            raise BudgetError(f"the cap of {self.budget.max_requests} requests is reached (--teacher-max-requests)")
        raise TeacherError(f"{self.name}: gave up after {self.requests_sent - sent} attempts, the last one: {said}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _judge(response: Any) -> None:
    """Tell the client what it does not know: a broken reply is a server's failure, an exhausted quota stays so."""
    content = response.read()
    if response.is_success:
        try:
            json.loads(content)
        except ValueError:
            response.status_code, response.extensions["reason_phrase"] = 502, b"(the reply is not JSON)"
    elif b"insufficient_quota" in content:
        response.headers["x-should-retry"] = "false"
