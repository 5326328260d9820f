"""Easy scenes: few objects, asked for by what they look like, held in memory at the size that is seen."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from PIL import Image

from ivt_env.data.sample import Dataset, ImageArray, Sample

MAX_THINGS = 2
"""Objects in an easy scene."""
KIND = "attributes"
"""Its expressions name a colour, a shape, a texture or a size, and compare nothing."""


def easy_indices(dataset: Dataset, count: int) -> list[int]:
    """The first ``count`` easy samples of a split of the scenes.

    Raises:
        ValueError: where the data set is another one, or has not as many.
    """
    if dataset.name != "scenes":
        raise ValueError(f"easy scenes are picked from the scenes, not from {dataset.name}: use --no-easy there")
    metas = ((index, dataset[index].meta) for index in range(len(dataset)))
    easy = (index for index, meta in metas if meta["things"] <= MAX_THINGS and meta["kind"] == KIND)
    found = list(itertools.islice(easy, count))
    if len(found) < count:
        raise ValueError(f"{dataset.name} {dataset.split} has {len(found)} easy samples, {count} were asked for")
    return found


class SmallImages:
    """``Dataset`` of some samples of another, whose images are scaled to a square once and then held.

    To draw a scene takes longer than to play it. Boxes are relative, so they hold for the small image.
    """

    def __init__(self, dataset: Dataset, indices: list[int], side: int) -> None:
        """Hold nothing yet. ``indices`` of the samples give their order here; images are ``side`` pixels square."""
        self.name, self.split = dataset.name, dataset.split
        self._dataset, self._indices, self._side = dataset, indices, side
        self._images: dict[str, ImageArray] = {}

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``; IndexError outside the range."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split}: {len(self)} samples are held, index {index} is outside")
        return replace(self._dataset[self._indices[index]], size=(self._side, self._side))

    def image(self, sample: Sample) -> ImageArray:
        """RGB uint8 (side, side, 3)."""
        if sample.image_id not in self._images:
            full = Image.fromarray(self._dataset.image(sample))
            held = np.asarray(full.resize((self._side, self._side), Image.Resampling.BOX))
            held.setflags(write=False)
            self._images[sample.image_id] = held
        return self._images[sample.image_id]
