"""A table gives each sample its own image, in the annotated frame, or an error that names the file.

Silent when false: boxes on a resized, rotated or foreign image train a model that looks merely
weak, and an image that one user drew on is what the next one sees.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up_source import IMAGE_REMEDY, MadeUp, refuse_writing, write_made_up
from PIL import Image

from ivt_env.data import DataError, cache_folder, load_dataset
from ivt_env.data import table as module
from ivt_env.data.table import open_table

pytestmark = pytest.mark.usefixtures("private_machine")


@pytest.fixture
def made(tmp_path) -> MadeUp:
    return write_made_up(tmp_path / "root")


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_every_sample_gets_its_image_which_cannot_be_drawn_on_and_its_path(made):
    for split in ("train", "val", "test"):
        table = open_table(made.source(), split)
        for sample in list(table):
            assert table.image_path(sample) == made.images / sample.image_id
            image = table.image(sample)
            assert np.array_equal(image, pixels_of(made.images / sample.image_id)) and image is table.image(sample)
            with pytest.raises(ValueError, match="read-only"):
                image[0, 0] = 0


def test_first_folder_that_holds_the_file_counts(made):
    folders = [made.root / name for name in ("absent", "first", "second")]
    for folder in folders[1:]:
        shutil.copytree(made.images, folder)
    table = open_table(made.source(image_folders=folders), "train")
    sample = table[0]
    assert table.image_path(sample).parent == folders[1]
    table.image_path(sample).unlink()
    assert table.image_path(sample).parent == folders[2]


def test_opening_reads_no_image_and_few_are_kept(made, monkeypatch):
    read = []
    monkeypatch.setattr(module, "read_image", lambda path, *rest: read.append(path.name) or np.zeros((1, 1, 3)))
    table = open_table(made.source(), "train", cached_bytes=2 * np.zeros((1, 1, 3)).nbytes)
    a, b, c = ({s.image_id: s for s in list(table)}).values()
    assert read == []
    for sample in (a, a, b, a, c):
        table.image(sample)
    assert len(read) == 3  # c pushed out b, the least recently used
    table.image(a)
    assert len(read) == 3
    table.image(b)
    assert len(read) == 4
    small = open_table(made.source(), "train", cached_bytes=1)
    for sample in (a, a, b, b):
        small.image(sample)
    assert len(read) == 6, "the last image is kept however large it is"


def test_missing_image_is_an_error_with_its_path_only_when_asked_for(made):
    (made.images / "p0.png").unlink()
    table = open_table(made.source(), "train")
    with pytest.raises(DataError) as caught:
        table.image(table[0])
    assert str(caught.value) == (f"{made.images / 'p0.png'}: this image of made-up is missing; {IMAGE_REMEDY}")
    last = table[len(table) - 1]
    assert table.image(last).shape == (*last.size, 3)
    Image.new("RGB", (15, 10)).save(made.images / "p0.png")
    with pytest.raises(DataError, match=r"p0\.png: the image is 15 wide and 10 high, .* 30 wide and 20 high"):
        table.image(table[0])


def test_annotations_without_any_image_folder_are_refused_at_once_unless_none_is_needed(made):
    folders = [made.root / "one", made.root / "two"]
    source = made.source(image_folders=folders)
    with pytest.raises(DataError) as caught:
        open_table(source, "train")
    assert str(caught.value) == (
        f"{made.folder}: made-up is here but its images are not: there is no folder {folders[0]} or {folders[1]}; "
        f"{IMAGE_REMEDY}"
    )
    table = open_table(source, "train", need_images=False)
    with pytest.raises(DataError, match=r"one.p0\.png: this image of made-up is missing"):
        table.image(table[0])


def test_sample_from_elsewhere_has_no_image_here(made):
    table = open_table(made.source(), "train")
    for stranger in (load_dataset("scenes")[0], open_table(made.source(), "val")[0]):
        with pytest.raises(DataError, match=f"made-up train has no image '{stranger.image_id}'; give one of its"):
            table.image(stranger)


# --- Images that the files themselves hold ------------------------------------------------------


def embedded(made: MadeUp):
    """A source whose reader writes the images out."""

    def read(bad, folder):
        (folder / "images").mkdir(exist_ok=True)
        for path in made.images.iterdir():
            shutil.copyfile(path, folder / "images" / path.name)
        yield from made._read(bad, folder)

    return made.source(read=read, image_folders=[], embedded=True)


@pytest.mark.parametrize("read_only", [False, True])
def test_embedded_images_lie_beside_the_index_wherever_that_is(made, monkeypatch, read_only):
    if read_only:
        refuse_writing(monkeypatch, made.folder)
    for _ in range(2):
        table = open_table(embedded(made), "train")
        place = table.image_path(table[0]).parent
        assert place.name == "images"
        assert place.is_relative_to(cache_folder() if read_only else made.folder / ".ivt_index")
        assert np.array_equal(table.image(table[0]), pixels_of(made.images / "p0.png"))
    assert made.reads == 1


def test_embedded_images_are_found_where_their_index_could_not_be_written(made, monkeypatch):
    write = module._write_index

    def full_disk(path, *rest):
        if path.is_relative_to(made.root):
            raise OSError(28, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(module, "_write_index", full_disk)
    for _ in range(2):
        table = open_table(embedded(made), "train")
        assert np.array_equal(table.image(table[0]), pixels_of(made.images / "p0.png"))
    assert made.reads == 2


def test_embedded_images_with_nowhere_to_go_are_an_error_that_names_the_folders(made, monkeypatch, tmp_path):
    refuse_writing(monkeypatch, tmp_path)
    with pytest.raises(DataError, match=r"rows\.json.*holds images, which must be written out.*\.ivt_index or .*ivt"):
        open_table(embedded(made), "train")
    assert made.reads == 0
