"""A vision-language model behind an address as an agent: ``openai:BASE_URL#MODEL``.

A prompt file says what it is asked. The observations of one ``act`` are sent at the same time, as many as
``concurrency`` allows, so that the one loop that plays many environments side by side keeps a server busy.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivt_agents.play.chat import Answer, AnswerCache, Budget, ChatClient, ServedError, Usage, user_turn
from ivt_agents.vlm.codec import BoxCodec, as_actions
from ivt_agents.vlm.prompts import DEFAULT, PromptFile, find_prompts, images_of, load_prompts
from ivt_env import boxes
from ivt_env.episodes import Episode
from ivt_env.files import FileError, forget
from ivt_env.rendering import size_on_canvas

log = logging.getLogger(__name__)

ANSWERS = "answers"
"""Folder of what a run has been answered; lies there only until the run is finished."""
PROMPTS = "prompts.yaml"
"""Copy of the prompt file of a run."""
FRAME_ANSWERS = 50
"""First answers by which a declared frame is checked."""
_LEAST_ANSWERS, _MUCH_BETTER = 10, 0.15
"""Fewer say nothing; another frame must give this much more mean IoU."""


@dataclass
class ServedOptions:
    """How models behind an address (`openai:BASE_URL#MODEL`) are asked."""

    prompt_file: str | None = None
    """What served models are asked and how they write boxes: a shipped prompt file (`ivt prompts` lists them), or a
    file. None: `qwen3-vl`."""
    concurrency: int = 16
    """Requests to a served model that are on their way at a time."""
    max_requests: int = 100_000
    """Cost cap of served models: requests of this run, repeated ones included."""
    max_tokens: int = 100_000_000
    """Cost cap of served models: tokens of this run, as the server counts them."""


MAY_CHANGE = frozenset({"concurrency", "max_requests", "max_tokens"})
"""Options on which no answer depends."""


class Served:
    """The served models of one run: one budget, one cache, one client for each address."""

    def __init__(self, options: ServedOptions | None = None, cache: Path | None = None) -> None:
        """Read the prompt file (``PromptError``); nothing is sent yet. ``cache`` is the folder of what was answered."""
        self.options = options or ServedOptions()
        self.cache = None if cache is None else AnswerCache(cache)
        self.usage = Usage(Budget(self.options.max_requests, self.options.max_tokens))
        name = self.options.prompt_file or DEFAULT
        self.asked, self.text = load_prompts(name), find_prompts(name).read_text(encoding="utf-8")
        self._clients: dict[str, ChatClient] = {}

    def policy(self, address: str, *, seed: int = 0, temperature: float = 0.0) -> ServedPolicy:
        """The policy at ``<base url>[#<model>]``; at its first use it has answered one small request by then."""
        if address not in self._clients:
            client = ChatClient(address, self.usage, cache=self.cache, concurrency=self.options.concurrency)
            client.check()
            if self.options.prompt_file is None:
                print(
                    f"{client.name} is asked with the prompts {DEFAULT} (boxes in {self.asked.codec.frame});"
                    " --prompt-file names others: `ivt prompts` lists them",
                    file=sys.stderr,
                )
            self._clients[address] = client
        return ServedPolicy(self._clients[address], self.asked, seed=seed, temperature=temperature)

    def check_same(self, folder: Path) -> None:
        """Refuse to go on with a run whose prompt file has been changed (``FileError``)."""
        copy = folder / PROMPTS
        if copy.exists() and copy.read_text(encoding="utf-8") != self.text:
            raise FileError(
                f"the prompts {self.options.prompt_file or DEFAULT} are not those that {folder} was begun with: {copy}"
                " is a copy of them; change the file back, or begin anew with another --out"
            )

    @contextmanager
    def run(self, kept: str, *flags: str) -> Iterator[None]:
        """Around the whole of a command: its cache is removed when it ends well, and goes on when it does not.

        A ``ServedError`` then says what is kept (``kept``: besides answers), and the command that goes on (``flags``).
        """
        try:
            yield
        except ServedError as error:
            if self.cache is None or not self._clients:
                raise
            # This process's command with the flags, and without --overwrite.
            words = [w for w in (Path(sys.argv[0]).name, *sys.argv[1:]) if w not in ("--overwrite", *flags)]
            command = shlex.join([*words[0].split(), *words[1:], *flags])
            raise type(error)(
                f"{error}. {len(self.cache)} answers are kept in {self.cache.folder}{kept}; this goes on, and asks"
                f" nothing twice: {command}"
            ) from error
        if self.cache is not None:
            forget(self.cache.folder)


class ServedPolicy:
    """Plays the environment with a model behind an address."""

    def __init__(self, client: ChatClient, asked: PromptFile, *, seed: int = 0, temperature: float = 0.0) -> None:
        """``client`` asks, ``asked`` says what; ``seed`` tells apart the answers of runs that sample."""
        self.client, self.asked, self.seed, self.temperature = client, asked, seed, temperature
        self.shown, self.layout = asked.shown, asked.layout
        self.reuse, self.batch_size = True, client.concurrency
        self.confidence = False
        """Ask for the probabilities of the tokens, too (``logprobs``), for a confidence in each answer."""
        self.turns: list[Answer | None] = []
        """What the last ``act`` was answered, one entry per environment; None where it was not active."""
        self._said: dict[int, list[dict[str, Any]]] = {}
        """In the prefix layout: each environment's conversation so far."""
        self._drawn: Counter[bytes] = Counter()
        """How often each observation was answered at random: each time is another draw."""

    def set_temperature(self, temperature: float) -> None:
        """Sample at another temperature from now on; 0 is greedy."""
        self.temperature = temperature

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Forget the conversations of the environments where ``mask`` (N,) is true."""
        self._said = {row: said for row, said in self._said.items() if row < len(mask) and not mask[row]}

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """One action per environment, see ``ivt_env.rollouts.Agent``; ServedError for an answer that cannot be had."""
        n = len(observations["box"])
        active = np.asarray(observations.get("active", np.ones(n, dtype=bool)))
        rows = [int(i) for i in np.flatnonzero(active)]
        draws = [self._draw(observations, row) for row in rows]
        jobs = [partial(self._answer, observations, row, draw) for row, draw in zip(rows, draws, strict=True)]
        self.turns = [None] * n
        answers = {}
        for row, (answer, box, stop) in zip(rows, self.client.run(jobs), strict=True):
            self.turns[row] = answer
            tokens = answer.prompt_tokens + answer.completion_tokens
            stated = {"text": answer.text, "tokens": tokens, "seconds": answer.seconds}
            if self.confidence:
                stated["confidence"] = answer.confidence
            answers[row] = box, stop, stated
        return as_actions(n, answers, "seconds", *(["confidence"] if self.confidence else []))

    def _draw(self, observations: Mapping[str, Any], row: int) -> tuple[int, int] | None:
        if not self.temperature:
            return None
        digest = hashlib.sha256(observations["expression"][row].encode("utf-8", "surrogatepass"))
        for image, _ in images_of(observations, row):
            digest.update(image.tobytes())
        self._drawn[digest.digest()] += 1
        return self.seed, self._drawn[digest.digest()]

    def _answer(
        self, observations: Mapping[str, Any], row: int, draw: tuple[int, int] | None
    ) -> tuple[Answer, list[float] | None, bool]:
        """The answer of one environment, its box relative to the whole image, and whether it is a stop."""
        asked, question = self.asked, self.asked.question(observations, row)
        turn = user_turn(question.text, question.images)
        messages = [{"role": "system", "content": asked.system}] if asked.system else []
        messages = [*self._said.get(row, messages), turn]
        body = {"messages": messages, "temperature": self.temperature, "max_tokens": asked.max_tokens}
        body |= {"logprobs": True} if self.confidence else {}
        body = {key: value for key, value in (body | dict(asked.request)).items() if value is not None}
        answer = self.client.ask(body, draw)
        if self.confidence and answer.confidence is None:
            raise ServedError(f"{self.client.name} gives no logprobs, and the most confident answer was asked for")
        if self.layout == "prefix":
            self._said[row] = [*messages, {"role": "assistant", "content": answer.text}]
        return answer, *question.read(answer.text if answer.finished else "")


def served_by(agent: Any) -> ServedPolicy | None:
    """The served model that an agent is, or that it wraps; None where there is none."""
    while agent is not None and not isinstance(agent, ServedPolicy):
        agent = getattr(agent, "agent", None)
    return agent


class FrameCheck:
    """Whether the first answers of a policy would fit much better in another frame than the declared one.

    It looks at targets, so that it belongs to scoring: it warns, and changes no answer.
    """

    def __init__(self, name: str, asked: PromptFile, canvas: int) -> None:
        self.name, self.asked, self.canvas = name, asked, canvas
        self._ious: list[dict[str, float]] = []
        self._said = False

    def see(self, episode: Episode) -> None:
        """Look at one more episode, up to ``FRAME_ANSWERS`` with a box."""
        if len(self._ious) >= FRAME_ANSWERS or not episode.steps:
            return
        numbers = self.asked.codec.parse(episode.steps[0].text).numbers
        if numbers is None:
            return
        size = self.asked.image.of(*size_on_canvas(episode.size, self.canvas))
        found = {}
        # The declared frame first, and all in both orders of x and y.
        for frame in dict.fromkeys([self.asked.codec.frame, "relative_1000", "relative_1", "resized_pixels"]):
            for order, said in (((0, 1, 2, 3), ""), ((1, 0, 3, 2), ", x and y swapped")):
                box = BoxCodec(frame).decode([numbers[k] for k in order], size)
                found[frame + said] = float(boxes.iou(box, episode.target))
        self._ious.append(found)
        if len(self._ious) == FRAME_ANSWERS:
            self.say()

    def say(self) -> None:
        """Log, once, what would fit much better, with numbers."""
        if self._said or len(self._ious) < _LEAST_ANSWERS:
            return
        self._said = True
        means = {frame: sum(one[frame] for one in self._ious) / len(self._ious) for frame in self._ious[0]}
        declared, best = self.asked.codec.frame, max(means, key=means.__getitem__)
        if means[best] >= means[declared] + _MUCH_BETTER:
            found = f"{means[declared]:.2f} as declared ({declared}), and {means[best]:.2f} as {best}"
            found = f"{self.name}: the first {len(self._ious)} boxes have a mean IoU of {found}"
            log.warning("%s: the prompt file probably declares another frame; nothing is changed", found)
