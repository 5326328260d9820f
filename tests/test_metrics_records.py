"""Hand-made records for the metrics tests: a box whose IoU with the target is whatever is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ivt_env.episodes import Box, Episode, Step

TARGET: Box = (0.0, 0.0, 0.5, 1.0)
STOP = "stop"
UNPARSED = "unparsed"
REFUSED = "refused"


def box_of(iou: float) -> Box:
    """A box inside the target that covers the share ``iou`` of it, so that this is its IoU."""
    return (0.0, 0.0, 0.5 * iou, 1.0)


def episode(
    actions: Sequence[float | str],
    name: str = "s0",
    *,
    image: str | None = None,
    start: float | None = None,
    stop_probability: Sequence[float | None] | None = None,
    confidence: Sequence[float | None] | None = None,
    dataset: str = "scenes",
) -> Episode:
    """An episode whose actions are IoUs of proposals, ``STOP``, ``UNPARSED`` or ``REFUSED``."""
    box = None if start is None else box_of(start)
    iou = 0.0 if start is None else start
    steps = []
    for t, action in enumerate(actions):
        before = iou
        proposal: Box | None = None
        if not isinstance(action, str):
            proposal = box = box_of(action)
            iou = action
        elif action == REFUSED:
            proposal = (0.5, 0.5, 0.5, 0.5)
        steps.append(
            Step(
                proposal=proposal,
                stop=action == STOP,
                box=box,
                iou=iou,
                reward=iou - before,
                invalid={REFUSED: "x2 <= x1", UNPARSED: "no action"}.get(str(action)),
                parse_failure=action == UNPARSED,
                stop_probability=None if stop_probability is None else stop_probability[t],
                confidence=None if confidence is None else confidence[t],
            )
        )
    return Episode(
        sample_id=name,
        image_id=image or name,
        dataset=dataset,
        split="test",
        expression="the left half",
        target=TARGET,
        size=(100, 100),
        steps=steps,
        initial_box=None if start is None else box_of(start),
        terminated=bool(actions) and actions[-1] == STOP,
    )


def random_pair(n: int, seed: int, steps: int = 4) -> tuple[list[Episode], list[Episode]]:
    """The same policy without and with the stop: equal up to where the second one stops."""
    rng = np.random.default_rng(seed)
    forced, stopping = [], []
    for i in range(n):
        ious: list[float | str] = [
            UNPARSED if u < 0.1 else float(v)
            for u, v in zip(rng.random(steps), rng.uniform(0.05, 1, steps), strict=True)
        ]
        says = rng.random(steps).tolist()
        k = int(rng.integers(0, steps + 1))
        name, image = f"s{i}", f"p{i // 2}"
        forced.append(episode(ious, name, image=image, stop_probability=says))
        cut = [*ious[:k], STOP] if k < steps else ious
        stopping.append(episode(cut, name, image=image))
    return forced, stopping
