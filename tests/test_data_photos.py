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
from ivt_env.data import Dataset, load_dataset
from ivt_env.data.photos import SPLITS, Photos
from ivt_env.data.sample import DataError

FOLDER = Path(module.__file__).parent.parent / "assets" / "photos"
ROWS = [json.loads(line) for line in (FOLDER / "annotations.jsonl").read_text("utf-8").splitlines()]


def test_photos_is_a_dataset_and_is_loaded_by_name():
    photos = load_dataset("photos")
    assert isinstance(photos, Dataset)
    assert (photos.name, photos.split) == ("photos", "train")


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_serves_all_16_samples_under_its_own_name(split):
    photos = Photos(split)
    samples = [photos[i] for i in range(len(photos))]
    assert len(samples) == len(ROWS) == 16
    assert {s.split for s in samples} == {split}
    assert {s.dataset for s in samples} == {"photos"}
    assert [s.expression for s in samples] == [row["expression"] for row in ROWS]


def test_sample_ids_are_unique_and_images_are_five():
    photos = Photos()
    samples = [photos[i] for i in range(len(photos))]
    assert len({s.sample_id for s in samples}) == 16
    assert {s.image_id for s in samples} == {"astronaut", "coffee", "rocket", "chelsea", "camera"}


def test_boxes_in_pixels_are_the_boxes_as_drawn():
    photos = Photos()
    for i, row in enumerate(ROWS):
        height, width = photos[i].size
        assert (height, width) == (row["height"], row["width"])
        assert np.allclose(np.multiply(photos[i].box, [width, height] * 2), row["bbox"], rtol=0, atol=1e-9)
        assert all(type(v) is float and 0 <= v <= 1 for v in photos[i].box)


def test_images_have_the_annotated_size_and_the_pixels_of_the_file():
    photos = Photos()
    for i, row in enumerate(ROWS):
        pixels = photos.image(photos[i])
        assert pixels.shape == (*photos[i].size, 3)
        with Image.open(FOLDER / row["image"]) as image:
            assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def test_only_the_two_eyes_are_siblings():
    photos = Photos()
    by_text = {photos[i].expression: photos[i] for i in range(len(photos))}
    left, right = by_text["the eye on the left"], by_text["the eye on the right"]
    assert left.siblings == (right.box,)
    assert right.siblings == (left.box,)
    others = [s for text, s in by_text.items() if "the eye" not in text]
    assert len(others) == 14
    assert all(s.siblings == () for s in others)


def test_shared_image_cannot_be_drawn_on():
    photos = Photos()
    image = photos.image(photos[0])
    assert image is Photos("val").image(Photos("val")[0])
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0] = 0


@pytest.mark.parametrize("index", [16, 10**9, -1])
def test_index_outside_the_range_is_an_index_error(index):
    with pytest.raises(IndexError, match=f"there is no sample {index}"):
        Photos()[index]


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
