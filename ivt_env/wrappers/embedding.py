"""A fixed vector for a text: hashed words, no model, no download, the same on every machine."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

PAIR_WEIGHT = 0.5
"""What a pair of neighbouring words counts for; a word counts for 1."""

# Scripts that do not part words with spaces give one word a sign.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")


@dataclass(frozen=True, slots=True)
class HashedText:
    """Feature hashing of words and of pairs of neighbouring words (Weinberger et al., arXiv 0902.2206).

    A hash sends each word, and each ordered pair of neighbours, to one of ``size`` places and to a sign; what falls
    on one place is added up, and the sum is scaled to length 1. It knows word order in pairs only and no meanings:
    *red* is as far from *orange* as from *ring*. Case and punctuation do not count.
    """

    size: int = 128
    """Numbers in a vector."""
    seed: int = 0
    """Of the hash."""

    def __post_init__(self) -> None:
        """Refuse sizes and seeds that cannot be used."""
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size {self.size!r} of the text embedding: give an integer of at least 1")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed!r} of the text embedding: give an integer of at least 0, below 2**64")

    def embed(self, text: str) -> NDArray[np.float32]:
        """The vector of a text, shape (size,), of length 1; zeros for a text without a word."""
        words = _WORD.findall(text.casefold())
        vector = np.zeros(self.size)
        pairs = (f"{first} {second}" for first, second in pairwise(words))
        for term, weight in (*((word, 1.0) for word in words), *((pair, PAIR_WEIGHT) for pair in pairs)):
            place, sign = _place(term, self.size, self.seed)
            vector[place] += weight * sign
        length = float(np.linalg.norm(vector))
        return (vector / length if length > 0 else vector).astype(np.float32)


@lru_cache(maxsize=65536)
def _place(term: str, size: int, seed: int) -> tuple[int, int]:
    """Place 0..size-1 and sign of a term. Python's own ``hash`` differs from process to process."""
    digest = hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=9, key=seed.to_bytes(8, "little"))
    number = digest.digest()
    return int.from_bytes(number[:8], "little") % size, 1 if number[8] & 1 else -1
