"""What every data set gives: samples, and the images behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

ImageArray = NDArray[np.uint8]
"""RGB, shape (height, width, 3)."""


class DataError(ValueError):
    """A data set, file, row or image that cannot be used. Names the place and the remedy."""


class DataMissingError(DataError):
    """A real data set was asked for and is not on this machine."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, one referring expression, one target box."""

    sample_id: str
    """Unique within the data set and split."""
    image_id: str
    """Samples with the same value share their image; statistics are clustered by it."""
    expression: str
    box: tuple[float, float, float, float]
    """The target: xyxy, relative to the image."""
    size: tuple[int, int]
    """(height, width) of the image in pixels."""
    dataset: str
    """What was really read, for example ``scenes``, ``photos`` or ``refcocog``."""
    split: str
    siblings: tuple[tuple[float, float, float, float], ...] = ()
    """Boxes of other objects of the target's class, where the data set knows them."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able extras of the data set (category, number of distractors, ids)."""


@runtime_checkable
class Dataset(Protocol):
    """A split of a data set: random access to samples, and their images on demand."""

    name: str
    split: str

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index`` (0-based); IndexError outside the range."""
        ...

    def image(self, sample: Sample) -> ImageArray:
        """The sample's image at full resolution, RGB uint8 (height, width, 3)."""
        ...
