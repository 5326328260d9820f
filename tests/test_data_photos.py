"""The five photographs are served whole, in one frame, with the boxes as drawn.

Silent when false: demonstrations show boxes beside the objects, or a shared image that one
caller has drawn on.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ivt_env.data.photos as module
from ivt_env.data import Dataset, load_dataset, splits
from ivt_env.data.photos import Photos
from ivt_env.data.sample import DataError

FOLDER = Path(module.__file__).parent.parent / "assets" / "photos"
ROWS = [json.loads(line) for line in (FOLDER / "annotations.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("split", splits("photos"))
def test_every_split_serves_all_16_samples_as_they_are_annotated(split):
    photos = load_dataset("photos", split)
    assert isinstance(photos, Dataset) and (photos.name, photos.split) == ("photos", split)
    samples = [photos[i] for i in range(len(photos))]
    assert len(samples) == len(ROWS) == len({s.sample_id for s in samples}) == 16
    assert {s.image_id for s in samples} == {"astronaut", "coffee", "rocket", "chelsea", "camera"}
    eyes = [s for s in samples if s.expression in ("the eye on the left", "the eye on the right")]
    for sample, row in zip(samples, ROWS, strict=True):
        height, width = sample.size
        assert (sample.split, sample.dataset, sample.expression) == (split, "photos", row["expression"])
        assert np.allclose(np.multiply(sample.box, [width, height] * 2), row["bbox"], rtol=0, atol=1e-9)
        assert all(type(v) is float and 0 <= v <= 1 for v in sample.box)
        assert sample.siblings == tuple(o.box for o in eyes if sample in eyes and o is not sample)
        with Image.open(FOLDER / row["image"]) as image:
            assert np.array_equal(photos.image(sample), np.asarray(image.convert("RGB")))
    for index in (16, 10**9, -1):
        with pytest.raises(IndexError, match=f"there is no sample {index}"):
            photos[index]


def test_shared_image_cannot_be_drawn_on():
    photos = Photos()
    image = photos.image(photos[0])
    assert image is Photos("val").image(Photos("val")[0])
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0] = 0


def test_sample_of_another_data_set_has_no_image_here():
    scenes = load_dataset("scenes")
    with pytest.raises(DataError, match="is of 'scenes', not of photos"):
        Photos().image(scenes[0])


def test_damaged_installation_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FOLDER", tmp_path)
    module._samples.cache_clear()
    with pytest.raises(DataError, match=r"annotations\.jsonl: .*install ivt_env again"):
        Photos()
    (tmp_path / "annotations.jsonl").write_text('{"image": "a.jpg"}\n')
    with pytest.raises(DataError, match=r"annotations\.jsonl: .*install ivt_env again"):
        Photos()
