"""A text space for any language, through every kind of vectorisation."""

from __future__ import annotations

import string
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory
from numpy.typing import NDArray


class Expression(spaces.Text):
    """A ``Text`` space that holds any string up to its length: expressions come in every language."""

    def __init__(self, max_length: int = 1024) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a string that is not too long; its characters are not restricted."""
        return isinstance(x, str) and len(x) <= self.max_length


# Text itself passes indices into its character set between processes; code points need no set.
@create_shared_memory.register(Expression)
def _create(space: Expression, n: int = 1, ctx: ModuleType | None = None) -> Any:
    assert ctx is not None
    return ctx.Array(np.dtype(np.int32).char, n * space.max_length)


@write_to_shared_memory.register(Expression)
def _write(space: Expression, index: int, values: str, shared_memory: Any) -> None:
    row = _rows(space, shared_memory)[index]
    row[:] = 0
    row[: len(values)] = [ord(c) for c in values]


class SharedExpressions(Sequence[str]):
    """The expressions of all environments, read from shared memory whenever they are looked at.

    ``AsyncVectorEnv`` reads the shared memory once, when it is made: right for arrays, which are
    views, but a tuple of str would stay empty for ever. Copying gives a plain tuple, and
    ``AsyncVectorEnv(copy=True)``, the default, copies every observation.
    """

    def __init__(self, space: Expression, shared_memory: Any, n: int) -> None:
        self._rows = _rows(space, shared_memory)[:n]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index] if isinstance(index, slice) else _text(self._rows[index])

    def __deepcopy__(self, memo: Any) -> tuple[str, ...]:
        return tuple(_text(row) for row in self._rows)


@read_from_shared_memory.register(Expression)
def _read(space: Expression, shared_memory: Any, n: int = 1) -> SharedExpressions:
    return SharedExpressions(space, shared_memory, n)


def _text(row: NDArray[np.int32]) -> str:
    return "".join(chr(c) for c in row[row > 0])


def _rows(space: Expression, shared_memory: Any) -> NDArray[np.int32]:
    """The shared buffer as (environments, max_length) code points, 0 behind the end."""
    return np.frombuffer(shared_memory.get_obj(), dtype=np.int32).reshape(-1, space.max_length)
