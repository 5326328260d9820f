"""A text space for any language, through every kind of vectorisation and flattening."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatten, flatten_space, unflatten
from gymnasium.vector.utils import read_from_shared_memory
from numpy.typing import NDArray

MAX_EXPRESSION = 1024
"""Characters (Unicode code points) that an expression may have; what is longer is refused before it is played."""

_CODE_POINTS = 0x110000
"""How many there are; as a number in a row it marks what lies behind the end of a text."""


class Expression(spaces.Text):
    """A ``Text`` space that holds any string up to its length: expressions come in every language.

    Flattened and between processes a text is a row of ``max_length`` code points: Gymnasium's own indices into a
    character set would need a set that holds every character.
    """

    def __init__(self, max_length: int = MAX_EXPRESSION) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a string that is not too long; its characters are not restricted."""
        return isinstance(x, str) and len(x) <= self.max_length

    def __repr__(self) -> str:
        return f"Expression({self.max_length})"


@flatten_space.register(Expression)
def _flatten_space(space: Expression) -> spaces.Box:
    return spaces.Box(0, _CODE_POINTS, (space.max_length,), np.int32)


@flatten.register(Expression)
def _flatten(space: Expression, x: str) -> NDArray[np.int32]:  # type: ignore[misc]  # declared for a type variable
    if x not in space:
        raise ValueError(f"text of {len(x)} characters; at most {space.max_length} fit")
    row = np.full(space.max_length, _CODE_POINTS, dtype=np.int32)
    row[: len(x)] = np.frombuffer(x.encode("utf-32-le", "surrogatepass"), dtype="<i4")
    return row


@unflatten.register(Expression)
def _unflatten(space: Expression, x: NDArray[Any]) -> str:  # type: ignore[misc]  # declared for a type variable
    return "".join(chr(int(c)) for c in x[x < _CODE_POINTS])


class SharedExpressions(Sequence[str]):
    """The expressions of all environments, read from shared memory whenever they are looked at.

    ``AsyncVectorEnv`` reads the shared memory once, when it is made: right for arrays, which are views, but a tuple
    of str would stay empty. Copying, its default, gives a plain tuple.
    """

    def __init__(self, space: Expression, shared_memory: Any, n: int) -> None:
        rows = np.frombuffer(shared_memory.get_obj(), dtype=np.int32)  # as Gymnasium writes flattened texts
        self._space, self._rows = space, rows.reshape(n, space.max_length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index] if isinstance(index, slice) else _unflatten(self._space, self._rows[index])

    def __deepcopy__(self, memo: Any) -> tuple[str, ...]:
        return tuple(self)


@read_from_shared_memory.register(Expression)
def _read(space: Expression, shared_memory: Any, n: int = 1) -> SharedExpressions:
    return SharedExpressions(space, shared_memory, n)
