"""Episodes played by a person: the page of ``ivt play`` and the environment behind it, which runs here.

While an episode runs, the browser gets what any agent is shown; target, IoU and rewards follow when it is over.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.utils.seeding import np_random

from ivt_env.data.sample import DataError, ImageArray
from ivt_env.env import GroundingEnv
from ivt_env.episodes import Box, Episode, image_file, load_episodes, save_episodes, save_image
from ivt_env.files import write_lines
from ivt_env.rollouts import begin_record, record_action
from ivt_env.viewer.images import saved_image
from ivt_env.viewer.page import page_parts
from ivt_env.viewer.rows import details, where_of
from ivt_env.viewer.server import Refused, Reply, ViewApp, as_reply

HUMAN = "human"
"""The agent's name in the records."""

_LARGEST = 1e6
"""Of a coordinate that is taken for a box at all; what is outside [0, 1] the environment refuses, with a reason."""


class PlayApp(ViewApp):
    """The page of ``ivt play``. Every finished episode is saved at once, and so are its steps as demonstrations."""

    def __init__(self, env: GroundingEnv, folder: str | Path, total: int, seed: int = 0, title: str = "Play") -> None:
        """Set up; goes on where an earlier session in ``folder`` ended.

        ``folder`` gets ``episodes.jsonl``, ``demonstrations.jsonl`` and ``images/``. ``total`` episodes are played,
        those of earlier sessions counted; episode i is seeded with ``seed + i``. Nothing else may use ``env``.
        """
        self.env, self.folder, self.total, self.seed = env, Path(folder), total, seed
        self.episodes = self._earlier()
        self.token = secrets.token_urlsafe(24)
        self._live: Episode | None = None
        self._playing = threading.RLock()
        self._shown: dict[tuple[str, str], ImageArray] = {}
        super().__init__({HUMAN: self.episodes}, self._image_of, title)

    def page(self) -> str:
        """The page itself, with the episodes that are over."""
        with self._playing:
            content = {"runs": self.content.overview(), "version": self.version, "play": {"token": self.token}}
            dataset = self.env.dataset
            served = f"{dataset.name} / {dataset.split} ({len(dataset):,} samples)"
            return "".join(page_parts(self.title, served, content, from_server=True, play=True))

    def get(self, path: str, query: Mapping[str, str]) -> Reply:
        """As for ``ivt view``, but the page is made anew: episodes are added while it is open."""
        if path == "/":
            return Reply(self.page().encode("utf-8", "xmlcharrefreplace"), "text/html; charset=utf-8")
        return super().get(path, query)

    def post(self, path: str, token: str, message: Any) -> Reply:
        """``/start``: the episode to play; ``/act``: one action in it."""
        # Compared as bytes: a str with other letters than ASCII would be refused by the comparison itself.
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self.token.encode()):
            raise Refused(403, "This is not the page that the server sent: reload it.")
        if not isinstance(message, dict):
            raise Refused(400, f"Send a JSON object, not {json.dumps(message)[:60]}.")
        with self._playing:
            if path == "/start":
                return as_reply(self._start())
            if path == "/act":
                return as_reply(self._act(message))
        raise Refused(404, "There is nothing to do there: /start and /act.")

    # ---- playing -------------------------------------------------------------------------------

    def _start(self) -> dict[str, Any]:
        """What a person may know of the running episode; begins one where none runs."""
        if self._live is None:
            if len(self.episodes) >= self.total:
                return self._standing()
            seed = self.seed + len(self.episodes)
            self.env.reset(seed=seed)
            game = self.env.playing()[0].game
            self._live = begin_record(game, HUMAN, seed)
            self._shown[game.sample.dataset, game.sample.image_id] = self.env.dataset.image(game.sample)
        known = {name: getattr(self._live, name) for name in ("expression", "dataset", "split", "size")}
        played = {"number": len(self.episodes) + 1, "total": self.total, "max_steps": self.env.max_steps}
        return known | played | {"image": self.content.number_of_image(self._live)} | self._progress(self._live)

    def _progress(self, episode: Episode) -> dict[str, Any]:
        """Where the running episode stands, without a word about how good it is."""
        boxes = [box for box in (episode.initial_box, *(step.box for step in episode.steps)) if box is not None]
        now, earlier = boxes[-1] if boxes else None, list(dict.fromkeys(boxes[:-1]))
        return {"step": len(episode.steps), "box": now, "earlier": earlier}

    def _act(self, message: Mapping[str, Any]) -> dict[str, Any]:
        episode = self._live
        if episode is None:
            raise Refused(409, "No episode is running: reload the page.")
        if episode.terminated or episode.truncated:  # its last action was taken, and could not be saved
            return self._finished(episode)
        if (message.get("number"), message.get("step")) != (len(self.episodes) + 1, len(episode.steps)):
            raise Refused(409, "This action belongs to another step, perhaps of another window: reload the page.")
        stop = message.get("stop") is True
        box = np.zeros(4, np.float32) if stop else _proposal(message.get("box"))
        invalid = self.env.step({"box": box, "stop": int(stop)})[-1].get("invalid")
        game = self.env.playing()[0].game
        record_action(episode, game, box, stop, invalid)
        if not game.over:
            return {"over": False, "invalid": invalid, **self._progress(episode)}
        return self._finished(episode)

    def _standing(self) -> dict[str, Any]:
        played = len(self.episodes)
        return {"finished": played >= self.total, "played": played, "total": self.total, "folder": str(self.folder)}

    def _finished(self, episode: Episode) -> dict[str, Any]:
        """Into the records: on disk first, so that what the page shows is never lost."""
        played, path = [*self.episodes, episode], self.folder / "images" / image_file(episode.image_id)
        # A mixture's samples bear the names of its parts, and demonstrations that of what is opened.
        opened = {"dataset": self.env.dataset.name, "split": self.env.dataset.split}
        rows = [row for i, e in enumerate(played) for row in demonstrations(e, self._index(self.seed + i))]
        try:
            if not path.exists():
                save_image(path, self._image_of(episode))
            write_lines(self.folder / "demonstrations.jsonl", (opened | row for row in rows))
            save_episodes(self.folder, played)
        except OSError as error:
            why = f"The episode is not saved yet ({error}): make room, then press a button again."
            raise Refused(500, why) from error
        self.episodes.append(episode)
        self.content.add(HUMAN, episode)
        self._live = None
        return {"over": True, "short": self.content.short(episode), "details": details(episode), **self._standing()}

    def _index(self, seed: int) -> int:
        """The sample that ``env.reset(seed=seed)`` draws: its number is needed, and no search for it is quick."""
        return int(np_random(seed)[0].integers(len(self.env.dataset)))

    def _image_of(self, episode: Episode) -> ImageArray:
        known = self._shown.get((episode.dataset, episode.image_id))
        return saved_image(self.folder / "images" / image_file(episode.image_id)) if known is None else known

    def _earlier(self) -> list[Episode]:
        path = self.folder / "episodes.jsonl"
        if not path.exists():
            return []
        found = load_episodes(path)
        dataset = self.env.dataset
        for seed, episode in enumerate(found, self.seed):
            sample = dataset[self._index(seed)]
            mine = (HUMAN, sample.dataset, sample.split, sample.sample_id)
            if (episode.agent, episode.dataset, episode.split, episode.sample_id) != mine:
                raise DataError(
                    f"{path} holds an episode of {episode.agent!r} on {where_of(episode)}, and this session would have "
                    f"had {HUMAN!r} on sample {sample.sample_id!r} of {sample.dataset}/{sample.split} (seed {seed}) "
                    "there: give another --out"
                )
        return found


def demonstrations(episode: Episode, index: int) -> list[dict[str, Any]]:
    """The steps of an episode as lines of the file that ``train_sft.py --demonstrations`` reads, but for the data set.

    A proposal that the environment refused demonstrates nothing and is left out. ``index`` is that of the sample.
    """
    rows: list[dict[str, Any]] = []
    shown, before = episode.initial_box, list[Box]()
    for step in episode.steps:
        if step.invalid is None and (step.stop or step.proposal is not None):
            row = {"index": index, "sample_id": episode.sample_id, "shown": shown}
            rows.append(row | {"answer": None if step.stop else step.proposal, "before": list(before)})
        if step.box is not None and step.box != shown:
            if shown is not None:
                before.append(shown)
            shown = step.box
    return rows


def _proposal(box: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or not all(type(v) in (int, float) and abs(v) <= _LARGEST for v in box):
        raise Refused(400, f"box is {json.dumps(box)[:80]}: give four numbers x1, y1, x2, y2 from 0 to 1, or stop.")
    return np.array(box, dtype=np.float32)
