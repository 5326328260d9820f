"""The paper's mixture: full thirds, no image in two splits, the same choice for everyone.

If images leaked between its splits, the score of a trained policy would be its memory; if the ids
were not fixed, two people who say "the mixture" would mean different samples.
"""

from __future__ import annotations

import json
import resource
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from made_up_source import write_made_up

from ivt_agents.cli import main
from ivt_env.data import DataError, load_dataset, mixture
from ivt_env.data.mixture import PARTS, SIZES, draw, open_mixture, read_ids
from ivt_env.data.table import Row


class Fake:
    """As much of a table as drawing looks at."""

    def __init__(self, prefix: str, images: list[int], per_image: list[int]):
        pairs = [(f"coco-{p}", f"{prefix}-{p}-{k}") for p, n in zip(images, per_image, strict=True) for k in range(n)]
        self._images, self._samples = [p for p, _ in pairs], [s for _, s in pairs]

    def image_ids(self):
        return self._images

    def sample_ids(self):
        return self._samples


@pytest.fixture(scope="module")
def published() -> dict:
    """Tables of the published sizes; Ref-L4 shares 300 images with each split of RefCOCOg."""
    rng = np.random.default_rng(0)
    overlap = 300

    def some(prefix, first, samples, most):
        counts = []
        while sum(counts) < samples:
            counts.append(min(int(rng.integers(1, most + 1)), samples - sum(counts)))
        return Fake(prefix, list(range(first, first + len(counts))), counts)

    return {
        ("refcocog", "train"): some("g", 0, 8051, 6),
        ("refcocog", "val"): some("g", 100_000, 4896, 5),
        ("refcocog", "test"): some("g", 200_000, 9602, 5),
        ("refadv", "test"): some("adv", 900_000, 1142, 3),
        ("refl4", "val"): some("l", 100_000 - overlap, 13420, 6),
        ("refl4", "test"): some("l", 200_000 - overlap, 31921, 6),
    }


def test_splits_have_the_papers_sizes_in_equal_thirds_and_share_no_image(published):
    image_of = {
        (*key, sample): image
        for key, table in published.items()
        for sample, image in zip(table.sample_ids(), table.image_ids(), strict=True)
    }
    everywhere = Counter(image for table in published.values() for image in set(table.image_ids()))
    assert max(everywhere.values()) > 1, "the sets must overlap, or this shows nothing"
    drawn = [draw(published, seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    for ids in drawn[1:]:
        assert {split: len(rows) for split, rows in ids.items()} == SIZES
        for split, rows in ids.items():
            thirds = Counter(name for name, _, _ in rows)
            assert max(thirds.values()) - min(thirds.values()) <= 1, (split, thirds)
            assert {(name, part) for name, part, _ in rows} <= set(PARTS[split])
            assert len(set(rows)) == len(rows)
        images = [{image_of[row] for row in rows} for rows in ids.values()]
        assert len(set.union(*images)) == sum(map(len, images))


def test_too_few_samples_are_an_error_that_names_the_third(published):
    few = published | {("refadv", "test"): Fake("adv", list(range(900_000, 900_900)), [1] * 900)}
    with pytest.raises(
        DataError, match=r"train needs 800 samples of refadv test .* 562 are left.*ivt data check refadv"
    ):
        draw(few, 0)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Three real tables on disk behind the three names, and a small mixture of them."""
    made = {}
    for name in ("refcocog", "refadv", "refl4"):
        one = write_made_up(tmp_path / name)

        def read(bad, folder, one=one, name=name):
            for row in one._read(bad, folder):
                own = f"{name}-{row.image_id}"  # every set its own images
                yield Row(**{f: getattr(row, f) for f in Row.__dataclass_fields__} | {"image_id": own})
                if row.split != "train":  # one split may serve three of the mixture, from images of its own
                    for copy in range(4):
                        yield replace(row, sample_id=f"{row.sample_id}-{copy}", image_id=f"{own}-{copy}")

        made[name] = one.source(name=name, read=read)
    monkeypatch.setattr(mixture, "find_source", lambda name, split, root: made.get(name))
    monkeypatch.setattr("ivt_env.data.find_source", lambda name, split, root: made.get(name))
    for split in SIZES:
        monkeypatch.setitem(SIZES, split, 9)
    return tmp_path


def test_samples_keep_the_label_of_their_data_set_and_show_its_image(parts):
    mixed = open_mixture(parts, "test")
    assert len(mixed) == 9
    assert Counter(mixed[i].dataset for i in range(9)) == {"refcocog": 3, "refadv": 3, "refl4": 3}
    for i in range(9):
        sample = mixed[i]
        assert sample.sample_id.startswith(sample.dataset + "/") and sample.split == "test"
        assert mixed.image(sample).shape == (*sample.size, 3)
    with pytest.raises(IndexError, match="9 samples"):
        mixed[9]


def test_ids_are_written_once_and_used_by_everyone(parts):
    first = open_mixture(parts, "train", seed=5)
    path = parts / "mixed" / "ids.json"
    written = path.read_text("utf-8")
    assert json.loads(written)["seed"] == 5
    again = open_mixture(parts, "train", seed=6)  # the file counts, not the seed
    assert list(again) == list(first)
    assert path.read_text("utf-8") == written
    served = load_dataset("mixed", "train", parts, strict=True)
    assert [s.sample_id for s in served] == [s.sample_id for s in first]


def test_ids_of_other_files_are_refused_by_name(parts):
    open_mixture(parts, "test")
    path = parts / "mixed" / "ids.json"
    content = json.loads(path.read_text("utf-8"))
    content["splits"]["test"][0][2] = "nobody"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(DataError, match=r"ids\.json: test names sample 'nobody' of refcocog test, which is not there"):
        open_mixture(parts, "test")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not whole JSON"),
        ("[]", "holds no 'splits'"),
        ('{"splits": {"train": []}}', "holds no 'splits'"),
        (
            '{"splits": {"train": [], "val": [], "test": [["refcocog", "test"]]}}',
            r"test row 0 is \['refcocog', 'test'\]",
        ),
        ('{"splits": {"train": [], "val": [], "test": [["refcocog", "train", "1"]]}}', "test row 0"),
        ('{"splits": {"train": 3, "val": [], "test": []}}', "train row 0 is 3"),
    ],
)
def test_broken_ids_are_refused_with_the_remedy(tmp_path, content, reason):
    path = tmp_path / "ids.json"
    path.write_text(content, "utf-8")
    with pytest.raises(DataError, match=reason + ".*delete it"):
        read_ids(path)


def test_ids_are_kept_where_they_cannot_be_drawn_anew(tmp_path, capsys):
    path = tmp_path / "mixed" / "ids.json"
    path.parent.mkdir()
    path.write_text("mine", "utf-8")
    assert main(["data", "mix", "--again", "--data-root", str(tmp_path)]) == 2
    assert "refcocog test is not in" in capsys.readouterr().err and path.read_text("utf-8") == "mine"


def test_drawing_anew_replaces_the_ids_that_count_wherever_they_lie(parts, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(parts / "user-cache"))
    own, cached = parts / "mixed" / "ids.json", parts / "user-cache" / "ivt_env" / "mixed" / "ids.json"
    words = ["data", "mix", "--data-root", str(parts)]
    for path in (cached, own):  # as if the data folder could not be written at first
        open_mixture(parts, "test", seed=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        own.rename(path)
        assert main(words) == 2 and str(path) in capsys.readouterr().err
        assert main([*words, "--again", "--seed", "7"]) == 0
        assert f"ids in {path}" in capsys.readouterr().out
        assert json.loads(path.read_text("utf-8"))["seed"] == 7
        path.unlink()


def test_a_disk_that_is_full_is_named_and_the_ids_stay(parts, monkeypatch, capsys):
    open_mixture(parts, "test", seed=1)
    path = parts / "mixed" / "ids.json"
    kept, before = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert main(["data", "mix", "--again", "--data-root", str(parts)]) == 2
        assert f"error: {path}: File too large" in capsys.readouterr().err and path.read_bytes() == kept
        path.unlink()
        monkeypatch.setenv("XDG_CACHE_HOME", str(parts / "user-cache"))
        assert main(["data", "mix", "--data-root", str(parts)]) == 2
        assert "user-cache" in (told := capsys.readouterr().err) and "File too large" in told, "both places"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [p for p in parts.rglob("*") if p.name.endswith((".partial", "ids.json"))]
