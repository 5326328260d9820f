"""Files of data sets, broken at random: bytes flipped, cut off, doubled; values swapped, huge, deeply nested."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

HUGE = (
    10**400, -(2**63), 1e308, "x" * 300_000, "\ud800", "ü" * 5000, [0] * 50_000, {str(n): n for n in range(9000)},
)  # fmt: skip
ODD = (
    None, True, 0, -1, 1.5, "", "NaN", [], {}, [[]], [None], {"": None}, "../../x", "a\0b", "/", float("nan"),
    float("inf"),
)  # fmt: skip


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes of a file changed, lost or doubled."""
    changed = bytearray(content)
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice((1, 2, 8, 60))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[rng.randrange(len(changed)) :]
    elif kind == 2:
        start = rng.randrange(len(changed))
        del changed[start : start + rng.choice((1, 4, 100))]
    elif kind == 3:
        start = rng.randrange(len(changed))
        changed[start:start] = changed[start : start + rng.choice((1, 8, 500))]
    else:
        start = rng.randrange(len(changed))
        for place in range(start, min(len(changed), start + rng.choice((4, 8, 64)))):
            changed[place] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(changed)


def of_value(value: Any, rng: random.Random) -> Any:
    """A JSON-like value of which one place holds something else."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    _collect(value, places)
    for _ in range(rng.choice((1, 1, 1, 3))):
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        try:
            if kind == 0:
                del holder[key]
            elif kind == 1:
                holder[key] = rng.choice(HUGE)
            elif kind == 2:
                holder[key] = nested(rng.choice((30, 990, 3000)), rng.random() < 0.5)
            elif kind == 3:
                other_holder, other_key = rng.choice(places)
                holder[key] = copy.deepcopy(other_holder[other_key])
            elif kind == 4 and isinstance(holder, list):
                holder += [copy.deepcopy(holder[key])] * rng.choice((1, 50))
            else:
                holder[key] = rng.choice(ODD)
        except (LookupError, TypeError, RecursionError):
            continue  # the place is gone already
    return value


def nested(depth: int, as_dict: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if as_dict else [value]
    return value


def written(value: Any) -> bytes:
    """JSON of any depth: Python's own writer gives up before a thousand levels."""
    pieces: list[str] = []
    work: list[Any] = [value]
    while work:
        one = work.pop()
        if isinstance(one, _Text):
            pieces.append(one.text)
        elif isinstance(one, dict):
            parts: list[Any] = [_Text("{")]
            for number, (key, held) in enumerate(one.items()):
                parts += [_Text(("," if number else "") + json.dumps(str(key)) + ":"), held]
            work += reversed([*parts, _Text("}")])
        elif isinstance(one, list):
            parts = [_Text("[")]
            for number, held in enumerate(one):
                parts += [_Text("," if number else ""), held]
            work += reversed([*parts, _Text("]")])
        elif isinstance(one, int) and abs(one) > 10**300:
            pieces.append(("-" if one < 0 else "") + "1" + "0" * 400)
        else:
            pieces.append(json.dumps(one, default=str))
    return "".join(pieces).encode("utf-8", "surrogatepass")


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text


def _collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, held in items:
        places.append((value, key))
        _collect(held, places)


Mutate = Callable[[random.Random], bytes]


def of_json(value: Any, *, lines: bool = False) -> Mutate:
    """Mutations of a JSON file, or of JSON lines: of its bytes or of its values."""
    whole = b"\n".join(map(written, value)) if lines else written(value)

    def mutate(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return of_bytes(whole, rng)
        changed = of_value(value, rng)
        return b"\n".join(map(written, changed)) if lines and isinstance(changed, list) else written(changed)

    return mutate
