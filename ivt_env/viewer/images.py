"""Finds the images of recorded episodes: beside the records, else in the data set they name."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ivt_env.data import load_dataset
from ivt_env.data.images import read_image
from ivt_env.data.sample import DataError, DataMissingError, Dataset, ImageArray, Sample
from ivt_env.episodes import Episode, image_file
from ivt_env.viewer.rows import where_of


class ImageFinder:
    """Call it with an episode to get its image.

    An image that a run saved (``images/`` in its folder) is taken first. Without one, the data set
    and split that the episode names are opened, and the sample found there must be the one that was
    played: another image, expression or size under the same id is an error, not an image.
    """

    def __init__(
        self, runs: Mapping[str, Sequence[Episode]], folders: Mapping[str, Path], data_root: str | Path | None = None
    ) -> None:
        """Set up, from the episodes and the folder of each run; nothing is read yet."""
        self.data_root = data_root
        # Folders as keys of a dict, which keeps their order.
        self._folders: dict[tuple[str, str], dict[Path, None]] = {}
        for name, run in runs.items():
            for episode in run:
                self._folders.setdefault((episode.dataset, episode.image_id), {})[folders[name]] = None
        self._opened = cache(self._open)
        self._places: dict[tuple[str, str], dict[str, int]] = {}
        # A server asks from several threads, and a data set need not bear that.
        self._lock = threading.Lock()

    def __call__(self, episode: Episode) -> ImageArray:
        """The image at full resolution; DataError for a data set that is there and broken.

        DataMissingError, which says what was tried, where there is none, or what the run saved is broken.
        """
        for folder in self._folders.get((episode.dataset, episode.image_id), ()):
            path = folder / "images" / image_file(episode.image_id)
            if path.is_file():
                return saved_image(path)
        with self._lock:
            # A mixture's samples are labelled with the data set they are from; their ids begin with it.
            mixed = episode.sample_id.startswith(f"{episode.dataset}/")
            dataset = self._opened("mixed" if mixed else episode.dataset, episode.split)
            try:
                if isinstance(dataset, str):
                    raise DataMissingError(dataset)
                sample = self._sample(dataset, episode)
            except DataMissingError as error:
                raise DataMissingError(f"The run saved no images, and {error}") from error
            return dataset.image(sample)

    def _open(self, name: str, split: str) -> Dataset | str:
        """A data set, or why there is none."""
        try:
            return load_dataset(name, split, self.data_root, strict=True)
        except DataMissingError as error:
            return str(error)
        except DataError as error:
            # A data set of one's own goes by a name that load_dataset does not know.
            try:
                own = load_dataset("custom", split, self.data_root, strict=True)
            except DataError:
                return f"the data set cannot be opened: {error}"
        return own if own.name == name else f"there is a data set {own.name!r} of your own here, but not {name!r}"

    def _sample(self, dataset: Dataset, episode: Episode) -> Sample:
        sample = _at_number(dataset, episode.sample_id)
        if sample is None:
            key = dataset.name, episode.split
            if key not in self._places:
                self._places[key] = {dataset[i].sample_id: i for i in range(len(dataset))}
            place = self._places[key].get(episode.sample_id)
            if place is None:
                here = f"{dataset.name}/{dataset.split} on this machine"
                raise DataMissingError(f"{here} has no sample {episode.sample_id!r}: is it another version?")
            sample = dataset[place]
        for what in ("image_id", "expression", "size"):
            now, then = getattr(sample, what), getattr(episode, what)
            if now != then:
                here = f"{where_of(episode)} is another one on this machine"
                raise DataMissingError(f"{here}: its {what} is {now!r}, in the run {then!r}")
        return sample


def _at_number(dataset: Dataset, sample_id: str) -> Sample | None:
    """The sample at the number that its id ends in, where that is the one: most data sets count this way."""
    digits = sample_id[len(sample_id.rstrip("0123456789")) :]
    if not digits or len(digits) > 12 or int(digits) >= len(dataset):
        return None
    sample = dataset[int(digits)]
    return sample if sample.sample_id == sample_id else None


def saved_image(path: Path) -> ImageArray:
    """An image that a run or a session saved; DataMissingError where it is broken or not there."""
    try:
        return read_image(path, str(path))
    except DataError as error:
        raise DataMissingError(f"{error}; delete it to have it taken from the data set, or play again") from error
