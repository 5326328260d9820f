"""What is said between client and server: JSON texts, read strictly, and observations in both directions.

A message is ``{"type": ..., "data": {...}}``. Everything a client sends is checked here before anything is done
with it; what is wrong raises ``ProtocolError``, whose code and message are the reply.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PATH = "/ws"
"""Where the server listens for WebSockets."""
ENCODINGS = ("png", "raw")
"""Of pictures: a PNG file, or the bytes of the array in C order; both in base64, both exact."""
KWARGS = ("split", "strict", "max_steps", "canvas", "view", "overlay", "reward", "initial_box")
"""What a client may say about an environment; ``data_root`` only where the operator allows it."""

_KEYS = {
    "reset": ("env", "kwargs", "encoding", "seed", "options", "episode_id"),
    "step": ("box", "stop"),
    "state": (),
    "close": (),
}
_LARGEST_SEED = 2**64 - 1


class ProtocolError(ValueError):
    """A message that cannot be acted on; its code and its text are sent back."""

    def __init__(self, code: str, message: str) -> None:
        """Keep both.

        Args:
            code: one word for programs; ``docs/server.md`` lists them.
            message: for people: what was wrong, with its value, and what is right.
        """
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server allows; every bound is per server process unless it says otherwise."""

    max_sessions: int = 64
    """Sessions at once, that is connections."""
    max_sessions_per_client: int = 16
    """Sessions at once from one address."""
    session_seconds: float = 6 * 3600.0
    """A session's whole life."""
    idle_seconds: float = 600.0
    """Without a whole message from the client."""
    reply_seconds: float = 20.0
    """A client may take to receive one reply."""
    max_message_bytes: int = 64 * 1024
    """Of a message of the client."""
    max_canvas: int = 1024
    """Side of an observation's picture, in pixels."""
    max_steps: int = 100
    """Of an episode."""

    def __post_init__(self) -> None:
        """Refuse bounds that admit nothing.

        Raises:
            ValueError: names the bound.
        """
        for name in self.__slots__:
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} is {value}: give a number above 0")
        if self.max_canvas < 16:
            raise ValueError(f"max_canvas is {self.max_canvas}: an observation has at least 16 pixels a side")


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a client: of a known type, with known keys."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)


def parse(text: str | bytes) -> Message:
    """Read a message.

    Raises:
        ProtocolError: for what is no JSON object, or has an unknown type or key.
    """
    if isinstance(text, bytes):
        raise ProtocolError("BINARY_MESSAGE", "a binary frame: send JSON as text")
    try:
        found = json.loads(text, parse_constant=_refuse_constant)
    except ProtocolError:
        raise
    except RecursionError:
        raise ProtocolError("INVALID_JSON", "not read: lists or objects nested too deeply") from None
    except ValueError as error:
        # JSONDecodeError, or an integer with more digits than Python reads.
        raise ProtocolError("INVALID_JSON", f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ProtocolError("VALIDATION_ERROR", f"a message is an object with type and data, not {_shown(found)}")
    kind, data = found.get("type"), found.get("data", {})
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ProtocolError("UNKNOWN_TYPE", f"message type {_shown(kind)}: choose one of {', '.join(_KEYS)}")
    check_keys(found, ("type", "data"), "a message")
    if not isinstance(data, dict):
        raise ProtocolError("VALIDATION_ERROR", f"data {_shown(data)}: give an object")
    check_keys(data, _KEYS[kind], f"the data of {kind!r}")
    return Message(kind, data)


def check_keys(found: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    """Refuse keys that nobody reads: a misspelt one would be an option that was not set.

    Raises:
        ProtocolError: names the first unknown key.
    """
    unknown = sorted(found.keys() - set(known))
    if unknown:
        there_are = f"there are {', '.join(known)}" if known else "it has none"
        raise ProtocolError("VALIDATION_ERROR", f"unknown key {_shown(unknown[0])} in {what}; {there_are}")


def read_seed(value: Any) -> int | None:
    """A seed, or None.

    Raises:
        ProtocolError: for anything but an integer from 0 to 2**64 - 1.
    """
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= _LARGEST_SEED:
        raise ProtocolError("VALIDATION_ERROR", f"seed {_shown(value)}: give an integer from 0 to {_LARGEST_SEED}")
    return value


def read_options(value: Any) -> dict[str, Any]:
    """Options of a reset: ``index`` and ``initial_box``; their ranges are the environment's to check.

    Raises:
        ProtocolError: for another key, an index that is no integer, or a box that is not four numbers.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ProtocolError("VALIDATION_ERROR", f"options {_shown(value)}: give an object")
    check_keys(value, ("index", "initial_box"), "options")
    options = dict(value)
    if options.get("index") is not None and type(options["index"]) is not int:
        raise ProtocolError("VALIDATION_ERROR", f"index {_shown(options['index'])}: give an integer")
    if options.get("initial_box") is not None:
        options["initial_box"] = read_box(options["initial_box"]).tolist()
    return options


def read_box(value: Any) -> NDArray[np.float32]:
    """A box (4,) float32; ``null`` stands for a coordinate that is not a number.

    Raises:
        ProtocolError: for anything but a list of four numbers.
    """
    right = isinstance(value, list) and len(value) == 4
    if not right or not all(v is None or type(v) in (int, float) for v in value):
        raise ProtocolError("VALIDATION_ERROR", f"box {_shown(value)}: give four numbers x1, y1, x2, y2 in 0..1")
    try:
        numbers = [math.nan if v is None else float(v) for v in value]
    except OverflowError:
        raise ProtocolError("VALIDATION_ERROR", f"box {_shown(value)}: a number too large for a coordinate") from None
    with np.errstate(over="ignore"):  # an infinity is refused by the environment, with a reason
        return np.array(numbers, dtype=np.float32)


def read_action(data: Mapping[str, Any]) -> dict[str, Any]:
    """An action of the environment from a step's data.

    Raises:
        ProtocolError: where ``stop`` is neither 0 nor 1, or there is neither a box nor a stop.
    """
    stop = data.get("stop", 0)
    if type(stop) not in (int, bool) or stop not in (0, 1):
        raise ProtocolError("VALIDATION_ERROR", f"stop {_shown(stop)}: give 0 or 1")
    if not stop and "box" not in data:
        raise ProtocolError("VALIDATION_ERROR", "a step without an action: give a box, or stop 1")
    box = read_box(data["box"]) if "box" in data else np.zeros(4, dtype=np.float32)
    return {"box": box, "stop": int(stop)}


def box_out(box: Any) -> list[float | None]:
    """A box as ``read_box`` reads it back, bit for bit as float32: NaN is null, an infinity a number beyond it."""
    numbers = np.asarray(box, dtype=np.float32).tolist()
    return [None if math.isnan(v) else math.copysign(1e300, v) if math.isinf(v) else v for v in numbers]


def observation_out(observation: Mapping[str, Any], encoding: str) -> dict[str, Any]:
    """An observation as JSON takes it: pictures encoded, arrays as lists."""
    out: dict[str, Any] = {}
    for name, value in observation.items():
        if isinstance(value, np.ndarray) and value.ndim == 3:
            out[name] = _picture_out(value, encoding)
        else:
            out[name] = plain(value)
    return out


def plain(value: Any) -> Any:
    """Arrays and numpy's numbers as Python's."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


def picture_in(value: Mapping[str, Any]) -> NDArray[np.uint8]:
    """A picture (height, width, 3), as ``observation_out`` wrote it.

    Raises:
        ValueError: for what is no picture, or not of the size that it states.
    """
    try:
        shape, coded = tuple(value["shape"]), base64.b64decode(value["data"], validate=True)
        if value["encoding"] == "raw":
            return np.frombuffer(coded, dtype=np.uint8).reshape(shape).copy()
        # The size is checked before the pixels are made: a small file can hold a very large picture.
        with Image.open(io.BytesIO(coded), formats=("PNG",)) as file:
            if file.mode != "RGB" or (file.height, file.width, 3) != shape:
                raise ValueError(f"{file.mode} of {file.size}, not RGB of {shape}")
            return np.array(file)
    except (KeyError, TypeError, binascii.Error, OSError) as error:
        raise ValueError(f"no picture: {error}") from error


def _picture_out(picture: NDArray[np.uint8], encoding: str) -> dict[str, Any]:
    if encoding == "raw":
        coded = picture.tobytes()
    else:
        file = io.BytesIO()
        # The least compression: a step waits for it, and most of a scene is flat colour.
        Image.fromarray(picture).save(file, "PNG", compress_level=1)
        coded = file.getvalue()
    return {"encoding": encoding, "shape": list(picture.shape), "data": base64.b64encode(coded).decode("ascii")}


def error_out(code: str, message: str) -> str:
    """An error as it is sent."""
    return json.dumps({"type": "error", "data": {"code": code, "message": message}})


def _refuse_constant(name: str) -> NoReturn:
    raise ProtocolError("INVALID_JSON", f"{name} is no JSON; null stands for a coordinate that is not a number")


def _shown(value: Any) -> str:
    """A value of the client's for a message: whatever it is, short and on one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
