"""The ``openai:`` teacher: any server that speaks chat completions with images.

Standard library only. The key comes from the environment variable ``OPENAI_API_KEY``; it travels in
one header and nowhere else: it is not written, not logged, and blotted out of what a server says.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ivt_agents.sft.teacher.prompts import SYSTEM, TraceRequest
from ivt_env.data.fetch import Patience

KEY_VARIABLE = "OPENAI_API_KEY"

MAX_REPLY_TOKENS = 120
"""Two sentences; a model that wants more is cut off and its text is too long to be used anyway."""

_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_LARGEST_REPLY = 4 * 2**20

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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Never follow."""
        return None


class OpenAITeacher:
    """Writes remarks through ``POST <base url>/chat/completions``."""

    batch = 1

    def __init__(self, address: str, budget: Budget | None = None, patience: Patience | None = None) -> None:
        """Check the address; nothing is sent yet.

        Args:
            address: ``<base url>`` or ``<base url>#<model>``, for example ``http://127.0.0.1:8000/v1``.
            budget: what the run may cost.
            patience: attempts, waits and time limit of one request; a server that asks for more than the
                longest wait (``Retry-After``) is given up.
        """
        base, _, model = address.partition("#")
        parts = urllib.parse.urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TeacherError(f"teacher address {parts.scheme}:...: give openai:http(s)://host[:port]/v1[#model]")
        if parts.username is not None or parts.password is not None or parts.query:
            # The address is written into the run's configuration.
            raise TeacherError(
                f"the teacher address for {parts.hostname} holds a password or a query: put the key into {KEY_VARIABLE}"
            )
        self._base, self._model = base.rstrip("/"), model
        self.name = f"openai:{self._base}" + (f"#{model}" if model else "")
        self.budget = budget or Budget()
        self.patience = patience or Patience(longest_wait_s=300.0, timeout_s=120.0)
        self.requests_sent = 0
        self.tokens_used = 0
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            # http.client would put the bad value into its message.
            raise TeacherError(f"{KEY_VARIABLE} holds characters that cannot stand in a header (value not shown)")
        if self._key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            log.warning("the key in %s is sent to %s without encryption (http)", KEY_VARIABLE, parts.hostname)
        self._opener = urllib.request.build_opener(_NoRedirects)

    def check(self) -> None:
        """Send one small request: a server that cannot answer is found before anything is measured or harvested.

        Raises:
            TeacherError: for an address, key or model that does not work, after at most two attempts.
        """
        patient, self.patience = self.patience, replace(self.patience, attempts=2, timeout_s=30.0)
        try:
            self._write(TraceRequest(np.full((64, 64, 3), 128, np.uint8), "Answer with the word ready."))
        except TeacherError as error:
            raise type(error)(
                f"the teacher was asked one small question first, and nothing else was done: {error}"
            ) from error
        finally:
            self.patience = patient

    def write(self, requests: Sequence[TraceRequest]) -> list[str]:
        """One text per request, as the model gave it; checked by the caller."""
        return [self._write(request) for request in requests]

    def _write(self, request: TraceRequest) -> str:
        image = base64.b64encode(request.png()).decode("ascii")
        body = {
            "model": self._model or self._only_model(),
            "messages": [
                {"role": "system", "content": SYSTEM},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
                        {"type": "text", "text": request.question},
                    ],
                },
            ],
            "temperature": 0,
            "max_tokens": MAX_REPLY_TOKENS,
        }
        reply = self._ask("/chat/completions", body)
        self._count(reply.get("usage"))
        try:
            content = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise TeacherError(f"{self.name}: the reply has no choices[0].message.content; no chat API?") from error
        # Some servers answer null where the model said nothing.
        return content if isinstance(content, str) else ""

    def _only_model(self) -> str:
        """The one model that the server serves."""
        listed = self._ask("/models", None).get("data")
        names = [str(m["id"]) for m in listed if isinstance(m, dict) and "id" in m] if isinstance(listed, list) else []
        if len(names) != 1:
            raise TeacherError(
                f"{self.name} serves {len(names)} models ({', '.join(names[:5]) or 'none listed'}): "
                f"name one, {self.name}#MODEL"
            )
        self._model = names[0]
        return self._model

    def _count(self, usage: Any) -> None:
        total = usage.get("total_tokens") if isinstance(usage, dict) else None
        if not isinstance(total, int) or isinstance(total, bool) or total < 0:
            raise TeacherError(
                f"{self.name} does not say what an answer costs (usage.total_tokens is {total!r}): the cap of "
                f"{self.budget.max_tokens} tokens could not be kept"
            )
        self.tokens_used += total

    def _spend(self) -> None:
        """Take one request out of the budget, or refuse."""
        if self.requests_sent >= self.budget.max_requests:
            raise BudgetError(f"the cap of {self.budget.max_requests} requests is reached (--teacher-max-requests)")
        if self.tokens_used >= self.budget.max_tokens:
            raise BudgetError(
                f"the cap of {self.budget.max_tokens} tokens is reached: {self.tokens_used} used (--teacher-max-tokens)"
            )
        self.requests_sent += 1

    def _ask(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One JSON object from the server, trying again where that can help."""
        failures = 0
        while True:
            self._spend()
            asked = None
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                said = self._said(error)
                if error.code in (401, 403):
                    held = "was refused" if self._key else "is not set"
                    raise TeacherError(f"{self.name}: {error.code}, the key in {KEY_VARIABLE} {held}. {said}") from None
                if error.code not in _RETRIED or "insufficient_quota" in said:
                    raise TeacherError(f"{self.name}{path}: {error.code} {error.reason}. {said}") from None
                asked = _seconds(error.headers.get("Retry-After"))
                why = f"{error.code} {error.reason}"
                if asked is not None and asked > self.patience.longest_wait_s:
                    raise TeacherError(f"{self.name}: {why}, and asks to wait {asked:.0f} s. {said}") from None
            except (json.JSONDecodeError, UnicodeDecodeError):
                why = "the reply is not JSON"
            except (OSError, http.client.HTTPException) as error:
                # URLError, timeouts, refused and cut connections.
                why = self._blot(str(getattr(error, "reason", error)) or type(error).__name__)
            failures += 1
            if failures >= self.patience.attempts:
                raise TeacherError(f"{self.name}: gave up after {failures} attempts, the last one: {why}")
            log.info("%s: %s; attempt %d of %d follows", self.name, why, failures + 1, self.patience.attempts)
            self.patience.wait(failures, asked)

    def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Accept": "application/json", "User-Agent": "ivt-env"}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode("utf-8"), "application/json"
        request = urllib.request.Request(self._base + path, data=data, headers=headers)
        if self._key:
            # Unredirected: not copied should a redirect ever be followed.
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        with self._opener.open(request, timeout=self.patience.timeout_s) as reply:
            content = reply.read(_LARGEST_REPLY)
        parsed = json.loads(content.decode("utf-8"))
        if not isinstance(parsed, dict):
            raise json.JSONDecodeError("not an object", "", 0)
        return parsed

    def _said(self, error: urllib.error.HTTPError) -> str:
        """The server's own words, short and without the key."""
        try:
            text = error.read(2000).decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException):
            return "(no message)"
        return "The server says: " + self._blot(" ".join(text.split())[:300]) if text.strip() else "(no message)"

    def _blot(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def _seconds(retry_after: str | None) -> float | None:
    """``Retry-After`` in seconds; it may also be a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
