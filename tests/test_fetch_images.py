"""A folder of images is complete and whole, or the command says which are missing.

Silent when false: a split trains and scores on the images that happened to arrive.
"""

from __future__ import annotations

import io

import pytest
from file_server import QUICK, Served, jpeg, leftovers
from PIL import Image

from ivt_env.data.fetch_images import fetch_images, is_whole_image
from ivt_env.data.sample import DataError


@pytest.fixture
def images(server):
    names = [f"COCO_train2014_{number:012d}.jpg" for number in range(12)]
    for number, name in enumerate(names):
        server.files[f"/p/{name}"] = Served(jpeg(number * 20))
    return names


def get(server, names, folder, **kwargs):
    return fetch_images(names, folder, lambda name: f"{server.url}/p/{name}", 4, patience=QUICK, **kwargs)


def test_images_come_in_parallel_and_only_once(server, images, tmp_path):
    seen = []
    folder = tmp_path / "deep" / "images"
    assert get(server, images * 2, folder, progress=lambda *state: seen.append(state)) == (12, 0)
    assert leftovers(folder) == images
    assert all((folder / name).read_bytes() == server.files[f"/p/{name}"].content for name in images)
    assert seen == [(number, 12) for number in range(1, 13)]
    assert get(server, images, folder) == (0, 12)
    assert len(server.log) == 12


def test_a_half_image_is_fetched_again(server, images, tmp_path):
    get(server, images, tmp_path)
    whole = (tmp_path / images[3]).read_bytes()
    (tmp_path / images[3]).write_bytes(whole[: len(whole) // 2])
    (tmp_path / images[4]).write_bytes(b"")
    assert get(server, images, tmp_path) == (2, 10)
    assert (tmp_path / images[3]).read_bytes() == whole


def test_a_image_is_whole_by_its_end_or_by_decoding():
    whole = jpeg(7)
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    assert is_whole_image(whole)
    assert is_whole_image(whole + b"\0" * 9)
    assert is_whole_image(whole + b"bytes of a camera")
    assert is_whole_image(png.getvalue())
    assert not is_whole_image(whole[:-40])
    assert not is_whole_image(whole[:2] + whole[-2:][:1])
    assert not is_whole_image(b"")
    assert not is_whole_image(b"<html>log in first</html>")


def test_failed_images_are_listed_at_the_end_and_the_others_kept(server, images, tmp_path):
    server.files[f"/p/{images[2]}"].faults = [404]
    server.files[f"/p/{images[5]}"].faults = [500] * 3
    server.files[f"/p/{images[7]}"] = Served(b"<html>log in first</html>")
    server.files[f"/p/{images[8]}"].faults = [("cut", 100)]  # comes with the second attempt
    with pytest.raises(DataError, match="3 of 12 images could not be downloaded.*run the same command") as caught:
        get(server, images, tmp_path)
    for number, reason in ((2, "404"), (5, "500"), (7, "not a whole image")):
        assert any(images[number] in line and reason in line for line in str(caught.value).splitlines())
    assert leftovers(tmp_path) == [name for n, name in enumerate(images) if n not in (2, 5, 7)]
    server.files[f"/p/{images[7]}"] = Served(jpeg(9))
    assert get(server, images, tmp_path) == (3, 9)


def test_a_server_that_is_gone_ends_it_early(tmp_path, server):
    names = [f"{number}.jpg" for number in range(3000)]
    with pytest.raises(DataError, match=r"were not tried, because so many failed in a row"):
        get(server, names, tmp_path)
    assert len(server.log) < 2000


def test_a_full_disk_ends_it_at_once(server, images, tmp_path, full_disk):
    with pytest.raises(DataError, match="the disk .* is full"):
        get(server, images, tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["../a.jpg", "/a.jpg", "b/a.jpg", "..", "C:a.jpg", "b\\a.jpg", "a\0.jpg"])
def test_a_image_cannot_climb_out_of_its_folder(server, tmp_path, name):
    with pytest.raises(DataError, match="is not the plain name of a file"):
        get(server, [name], tmp_path / "p")
    assert not server.log


def test_an_empty_list_of_images_needs_no_network(tmp_path):
    assert fetch_images([], tmp_path / "p", lambda name: "http://127.0.0.1:1/") == (0, 0)
