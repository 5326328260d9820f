"""Five annotated photographs that come with the package: real images without a download."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ivt_env.boxes import to_relative
from ivt_env.data import splits
from ivt_env.data.images import read_image
from ivt_env.data.sample import DataError, ImageArray, Sample
from ivt_env.failures import reading

_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "photos"
_EYES = {"the eye on the left", "the eye on the right"}
"""The only expressions whose targets are of one class and in one image, checked by eye."""


class Photos:
    """16 referring expressions on five photographs (``assets/photos``, boxes good to about 3 px).

    A demonstration, not a benchmark: five photographs are too few to be divided, so **every split
    (train, val, test, all) serves all 16 samples**. A score on them says that the parts fit
    together, not that a model is good, and training on them is training on the test.

    ``siblings`` are filled for the cat's two eyes only; the other boxes on an image belong to
    objects of other classes.
    """

    name = "photos"

    def __init__(self, split: str = "train") -> None:
        """Open a split, train, val, test or all; DataError for another."""
        if split not in splits(self.name):
            raise DataError(f"photos has no split {split!r}; it has {', '.join(splits(self.name))} (all the same)")
        self.split = split
        self._samples = _samples(split)

    def __len__(self) -> int:
        """16."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``; IndexError outside 0..15."""
        if not 0 <= index < len(self._samples):
            raise IndexError(f"photos holds {len(self._samples)} samples, there is no sample {index}")
        return self._samples[index]

    def image(self, sample: Sample) -> ImageArray:
        """The photograph, uint8 (height, width, 3); shared and read-only, copy it to draw on it."""
        if sample.dataset != self.name:
            raise DataError(f"sample {sample.sample_id!r} is of {sample.dataset!r}, not of photos")
        return _photograph(sample.image_id, sample.size)


@lru_cache(maxsize=16)
def _photograph(image_id: str, size: tuple[int, int]) -> ImageArray:
    path = _FOLDER / f"{image_id}.jpg"
    image = read_image(path, str(path), size)
    image.setflags(write=False)
    return image


@lru_cache(maxsize=4)
def _samples(split: str) -> list[Sample]:
    path = _FOLDER / "annotations.jsonl"
    samples: list[Sample] = []
    with reading(path, "install ivt_env again", DataError, "photographs missing or changed"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            image_id, size = Path(row["image"]).stem, (row["height"], row["width"])
            number = sum(sample.image_id == image_id for sample in samples)
            box = tuple(to_relative(row["bbox"], size).tolist())
            samples.append(Sample(f"{image_id}-{number}", image_id, row["expression"], box, size, Photos.name, split))
    eyes = [sample for sample in samples if sample.expression in _EYES]
    siblings = {eye.sample_id: tuple(other.box for other in eyes if other is not eye) for eye in eyes}
    return [replace(sample, siblings=siblings.get(sample.sample_id, ())) for sample in samples]
