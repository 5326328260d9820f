"""Chat models behind an OpenAI-compatible address: one client for policies and teachers.

The key comes from the environment variable ``OPENAI_API_KEY``. It is sent in one header, never written or logged,
and removed from what a server says.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import os
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ivt_env.files import write_whole

T = TypeVar("T")
Body = Mapping[str, Any]
"""What is sent to ``/chat/completions``, but for the model's name."""

KEY_VARIABLE = "OPENAI_API_KEY"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
"""Between two attempts: doubled each time, with a little chance in it."""
_LONGEST_ASKED_S = 60.0
"""A server that asks to wait longer (``Retry-After``) is given up."""

log = logging.getLogger(__name__)


class ServedError(ValueError):
    """A served model that cannot be used, or that was given up. Says why, and what to do."""


class BudgetError(ServedError):
    """The cost cap is reached: nothing more is sent."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one run may cost. Answers from a cache cost nothing."""

    max_requests: int = 10_000
    """HTTP requests sent for answers, repeated ones included."""
    max_tokens: int = 10_000_000
    """Prompt and answer tokens together, as the server counts them in ``usage``. Requests sent
    before that are still answered."""
    options: str = "--max"
    """Prefix of the two command-line options that set it, for messages."""

    def __post_init__(self) -> None:
        for name, value in (("requests", self.max_requests), ("tokens", self.max_tokens)):
            if value < 1:
                raise ServedError(f"a cap of {value} {name} allows nothing: give at least 1")


class Usage:
    """Counts what a run sends and gets, over all its clients, and keeps its budget."""

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget()
        self.requests = self.tokens = self.errors = 0
        self.on_change: Callable[[], None] = lambda: None
        """Called after each answer and each error, in any thread."""
        self._lock = threading.Lock()

    def begin_request(self) -> None:
        """Count a request; BudgetError where the budget is used up."""
        budget = self.budget
        with self._lock:
            if self.tokens >= budget.max_tokens:
                used = f"{self.tokens} used ({budget.options}-tokens)"
                raise BudgetError(f"the cap of {budget.max_tokens} tokens is reached: {used}")
            if self.requests >= budget.max_requests:
                raise BudgetError(f"the cap of {budget.max_requests} requests is reached ({budget.options}-requests)")
            self.requests += 1

    def end_request(self, tokens: int | None) -> None:
        """Count the tokens of an answer; None: a request that failed."""
        with self._lock:
            self.tokens += tokens or 0
            self.errors += tokens is None
        self.on_change()

    def __str__(self) -> str:
        return f"{self.requests} requests, {self.tokens} tokens, {self.errors} errors"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one request."""

    text: str
    finished: bool
    """The model ended its answer; false: it ran into the limit of tokens."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """From sending the request that was answered to its answer."""
    images: int = 0
    """Images in the request."""
    confidence: float | None = None
    """Geometric mean of the tokens' probabilities, where the request asked for them (``logprobs``)."""


class AnswerCache:
    """Answers on disk, one small file each, by the hash of what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored answer, or None. A file that cannot be read is an answer to be asked for again."""
        path = self.folder / f"{key}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found["text"], str):
                return dict(found)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        log.warning("%s is damaged and will be asked for again", path)
        return None

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        """Store an answer, which has a ``text``, whole or not at all."""
        write_whole(self.folder / f"{key}.json", json.dumps(dict(answer)) + "\n", sync=False)

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*.json"))


class ChatClient:
    """Asks one model at one address, several requests at a time; safe to use from several threads."""

    def __init__(
        self,
        address: str,
        usage: Usage | None = None,
        *,
        cache: AnswerCache | None = None,
        concurrency: int = 16,
        attempts: int = 6,
        timeout_s: float = 120.0,
    ) -> None:
        """Check ``<base url>`` or ``<base url>#<model>`` (``ServedError``); nothing is sent yet.

        ``attempts`` are requests for one answer; waits grow, and ``Retry-After`` is honoured up to a minute.
        """
        try:
            import openai
        except ImportError as error:
            raise ServedError('a served model needs the package openai: pip install "ivt-env[served]"') from error
        base, _, model = address.partition("#")
        parts = urllib.parse.urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServedError(f"address {parts.scheme}:...: give openai:http(s)://host[:port]/v1[#model]")
        if parts.username is not None or parts.password is not None or parts.query:
            # The address is written into the run's configuration.
            raise ServedError(
                f"the address for {parts.hostname} holds a password or a query: put the key into {KEY_VARIABLE}"
            )
        if concurrency < 1:
            raise ServedError(f"concurrency {concurrency}: give at least 1")
        base = base.rstrip("/")
        self._model, self._base = model, base
        self.name = f"openai:{base}" + (f"#{model}" if model else "")
        self.usage, self.cache = usage or Usage(), cache
        self.attempts, self.concurrency = attempts, concurrency
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            raise ServedError(f"{KEY_VARIABLE} holds characters that a header cannot hold (value not shown)")
        if self._key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            log.warning("the key in %s is sent to %s without encryption (http)", KEY_VARIABLE, parts.hostname)
        self._client = openai.OpenAI(
            base_url=base,
            api_key=self._key or "none",
            timeout=timeout_s,
            max_retries=0,  # counted, and ended together, here
            # A redirect would carry the key to another host.
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False, event_hooks={"request": [self._without_none], "response": [_judge]}
            ),
        )
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="requests")
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self._flying: dict[str, Future[Answer]] = {}
        """Requests on their way, so that equal ones are sent once."""

    def check(self) -> None:
        """Send one small request, at most twice, before anything else; ServedError for a server that cannot answer."""
        patient = self.attempts, self._client
        self.attempts, self._client = 2, self._client.with_options(timeout=30.0)
        try:
            image = np.full((64, 64, 3), 128, np.uint8)
            self._send({"messages": [user_turn("Answer with the word ready.", [image])], "max_tokens": 16})
        except ServedError as error:
            raise type(error)(
                f"the model was asked one small question first, and nothing else was done: {error}"
            ) from error
        finally:
            self.attempts, self._client = patient

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """What the jobs give, in order; ``concurrency`` of them at a time.

        After the first error, which is raised, jobs that have not begun are left out; what is on its way is awaited.
        """
        self._given_up.clear()
        futures = [self._threads.submit(job) for job in jobs]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION)[0]:
                future.result()  # raises what it raised
            return [future.result() for future in futures]
        except BaseException:
            self._given_up.set()
            for future in futures:
                future.cancel()
            wait(futures)
            raise

    def ask(self, body: Body, draw: Any = None) -> Answer:
        """The model's answer to a request, from the cache where it is there; ServedError where it cannot be had.

        ``draw``: which of several answers to the same request is meant, where it samples; part of the cache's key.
        """
        said = json.dumps([self._base, self._model, body, draw], sort_keys=True, default=str)
        key = hashlib.sha256(said.encode()).hexdigest()
        with self._lock:
            theirs = self._flying.get(key)
            mine: Future[Answer] = Future()
            if theirs is None:
                self._flying[key] = mine
        if theirs is not None:
            return theirs.result()
        try:
            stored = None if self.cache is None else self.cache.get(key)
            # A file with other fields was written by another version.
            known = stored is not None and stored.keys() == {field.name for field in fields(Answer)}
            answer = Answer(**stored) if stored is not None and known else self._send(body)
            if self.cache is not None and not known:
                self.cache.put(key, asdict(answer))
            mine.set_result(answer)
            return answer
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._flying[key]

    def _send(self, body: Body) -> Answer:
        with self._lock:
            if not self._model:
                listed = getattr(self._try(lambda client: client.models.list())[0], "data", None)
                names = [str(getattr(model, "id", None)) for model in (listed if isinstance(listed, list) else ())]
                if len(names) != 1:
                    raise ServedError(
                        f"{self.name} serves {len(names)} models ({', '.join(names[:5]) or 'none listed'}): "
                        f"name one, {self.name}#MODEL"
                    )
                self._model = names[0]
        rest = {key: value for key, value in body.items() if key != "messages"}
        images, messages = 0, []
        for turn in body["messages"]:
            parts = turn["content"]
            if isinstance(parts, list):
                images += sum(isinstance(part, SentImage) for part in parts)
                parts = [part.part() if isinstance(part, SentImage) else part for part in parts]
            messages.append({**turn, "content": parts})
        reply, seconds = self._try(
            lambda client: client.chat.completions.create(model=self._model, messages=messages, extra_body=rest)
        )
        usage = getattr(reply, "usage", None)  # a server may answer any JSON, null too
        sent, said, total = (getattr(usage, f"{what}_tokens", None) for what in ("prompt", "completion", "total"))
        if type(total) is not int or total < 0:
            self.usage.end_request(None)
            raise ServedError(
                f"{self.name} does not say what an answer costs (usage.total_tokens is {total!r}): the cap of "
                f"{self.usage.budget.max_tokens} tokens could not be kept"
            )
        self.usage.end_request(total)
        try:
            choice = reply.choices[0]
            text = choice.message.content
        except (AttributeError, IndexError, TypeError) as error:
            raise ServedError(f"{self.name}: the reply has no choices[0].message.content; no chat API?") from error
        return Answer(
            text=text if isinstance(text, str) else "",  # some servers answer null where the model said nothing
            finished=choice.finish_reason != "length",
            prompt_tokens=sent if type(sent) is int else total,
            completion_tokens=said if type(said) is int else 0,
            seconds=round(seconds, 3),
            images=images,
            confidence=_confidence(choice) if rest.get("logprobs") else None,
        )

    def _try(self, call: Callable[[Any], T]) -> tuple[T, float]:
        """What ``call`` gets from the client and in how many seconds; tried again where that can help."""
        import openai

        for attempt in range(self.attempts):
            self.usage.begin_request()
            start, asked = time.monotonic(), None
            try:
                return call(self._client), time.monotonic() - start
            except openai.APIStatusError as error:
                status, headers = error.status_code, error.response.headers
                said = self._without_key(f"{status} {error.response.reason_phrase}. {error.response.text}")[:400]
                passing = status in (408, 409, 429) or status >= 500
                asked = _seconds(headers.get("Retry-After"))
                if status in (401, 403):
                    held = "was refused" if self._key else "is not set"
                    said, passing = f"{status}, the key in {KEY_VARIABLE} {held}. {said}", False
                if asked is not None and asked > _LONGEST_ASKED_S:
                    said, passing = f"{said}, and the server asks to wait {asked:g} s", False
                if not passing or "insufficient_quota" in error.response.text:
                    self.usage.end_request(None)
                    raise ServedError(f"{self.name}: {said}") from None
            except openai.OpenAIError as error:
                said = self._without_key(str(error.__cause__ or error))
            self.usage.end_request(None)
            pause = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.75, 1) if asked is None else asked
            if attempt + 1 < self.attempts and self._given_up.wait(pause):
                break
        raise ServedError(f"{self.name}: gave up after {attempt + 1} attempts, the last one: {said}")

    def _without_none(self, request: Any) -> None:
        if not self._key:  # the client insists on one
            del request.headers["Authorization"]

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


class SentImage:
    """An image in a request: encoded once, and only where it is sent; in a cache's key it is its pixels' hash."""

    def __init__(self, pixels: np.ndarray) -> None:
        """Wrap a copy of RGB uint8 (height, width, 3): an environment may draw its next image into the same array."""
        self._pixels, self._url = np.array(pixels), ""
        self._name = f"{pixels.shape} {hashlib.sha256(self._pixels.tobytes()).hexdigest()}"

    def __str__(self) -> str:
        return self._name

    def part(self) -> dict[str, Any]:
        """The part of a message that holds it, as PNG."""
        if not self._url:
            file = io.BytesIO()
            Image.fromarray(self._pixels).save(file, "PNG", compress_level=1)
            self._url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
        return {"type": "image_url", "image_url": {"url": self._url}}


def user_turn(text: str, images: Sequence[np.ndarray]) -> dict[str, Any]:
    """A user's turn: images, RGB uint8 (height, width, 3), in front of a text."""
    return {"role": "user", "content": [*map(SentImage, images), {"type": "text", "text": text}]}


def _confidence(choice: Any) -> float | None:
    tokens = getattr(choice.logprobs, "content", None)
    return math.exp(sum(t.logprob for t in tokens) / len(tokens)) if tokens else None


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:  # a date
        return None


def _judge(response: Any) -> None:
    """Make a successful reply that is not JSON a 502, which the client treats as a server error."""
    content = response.read()
    if response.is_success:
        try:
            json.loads(content)
        except ValueError:
            response.status_code, response.extensions["reason_phrase"] = 502, b"(the reply is not JSON)"
