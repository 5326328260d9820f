"""The documentation says what the code does, builds without a warning and without a network, and fetches nothing.

Silent when false: a newcomer types what the page says and gets something else; a page that loads a font from
elsewhere tells a stranger who reads it; a link leads nowhere.
"""

from __future__ import annotations

import doctest
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

import ivt_env
from ivt_env.env import GroundingEnv
from ivt_env.grounding import action_space, observation_space

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
WITH_DOCTESTS = [page for page in PAGES if re.search(r"^>>> ", page.read_text(encoding="utf-8"), re.MULTILINE)]
TRANSCRIPTS = [DOCS / f"{name}.md" for name in ("own_agent", "sb3", "viewer")]

sys.path.insert(0, str(DOCS))
import make_gallery  # noqa: E402

OFFLINE = """
import runpy, socket, sys
def refuse(*_, **__):
    raise OSError("the documentation must build without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = ["sphinx", *sys.argv[1:]]
runpy.run_module("sphinx", run_name="__main__")
"""


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """An empty folder, and no data set anywhere on the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IVT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return tmp_path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("furo", reason='the site needs pip install "ivt-env[docs]"')
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "-W", "--keep-going", "-q", "-d", str(out / "trees"), str(DOCS)]
    run = subprocess.run([*command, str(out / "html")], capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return out / "html"


def test_the_site_builds_offline_without_a_warning_and_has_every_page(site):
    for page in PAGES:
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file(), page
    assert "RewardConfig" in (site / "api.html").read_text(encoding="utf-8")


def test_nothing_in_the_site_is_fetched_from_elsewhere(site):
    """Links that a reader follows may lead out; what a page loads by itself may not."""
    seen = 0
    for path in site.glob("**/*"):
        if path.suffix == ".html":
            text = path.read_text(encoding="utf-8")
            loaded = re.findall(r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=[\"']([^\"']+)", text)
            for tag in re.findall(r"<link\b[^>]*>", text):
                loaded += re.findall(r"\bhref=[\"']([^\"']+)", tag)
            loaded += re.findall(r"url\(\s*[\"']?([^\"')]+)", text)
        elif path.suffix == ".css":
            text = path.read_text(encoding="utf-8")
            loaded = re.findall(r"url\(\s*[\"']?([^\"')]+)", text)
            loaded += re.findall(r"@import\s+[\"']([^\"']+)", text)
        else:
            continue
        seen += len(loaded)
        assert [one for one in loaded if re.match(r"(https?:)?//", one)] == [], path.relative_to(site)
    assert seen > 100  # the patterns find what there is


@pytest.mark.filterwarnings("ignore:[\\s\\S]*EMBEDDED SCENES ARE SERVED")
@pytest.mark.parametrize("page", WITH_DOCTESTS, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_examples_of_a_page_do_what_it_says(page, newcomer):
    # The end of a block would be taken for output.
    text = re.sub(r"^```.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest(text, {}, page.stem, str(page), 0)
    complaints: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=complaints.append)
    assert result.attempted > 2 and result.failed == 0, "".join(complaints)


def test_the_doctests_of_the_pages_were_found():
    names = {page.stem for page in WITH_DOCTESTS}
    assert {"index", "tour", "environments"} <= names


def test_the_page_of_the_environments_lists_every_id_key_and_argument():
    text = (DOCS / "environments.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    keys = {*observation_space("both", 64, 3).spaces, "box[0]", "box[3]"} | ({*action_space().spaces} - {"box"})
    arguments = {*inspect.signature(GroundingEnv.__init__).parameters} - {"self"}
    assert keys | arguments <= rows
    for env_id, kwargs in ivt_env.IDS.items():
        (line,) = [line for line in text.splitlines() if line.startswith("|") and f"`{env_id}`" in line]
        (page,) = re.findall(rf"\[`{kwargs['dataset']}`\]\((data/\w+\.md)", line)
        assert f"`{kwargs['dataset']}`" in (DOCS / page).read_text(encoding="utf-8") or page.endswith(
            f"{kwargs['dataset']}.md"
        )


def test_the_map_answers_its_questions_with_files_and_names_that_exist():
    text = (DOCS / "map.md").read_text(encoding="utf-8")
    rooms = re.findall(r"`([a-z_0-9/]+/)`", text)
    assert rooms and [room for room in rooms if not (ROOT / room).is_dir()] == []
    answers = re.findall(r"^\| .+\? \| `([^`]+)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(answers) == 20
    for file, name in answers:
        assert re.search(rf"^(?:def |class )?{name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_gallery_is_what_the_renderer_draws(tmp_path):
    """Letters differ a little from one version of FreeType to the next; everything else may not."""
    make_gallery.main(make_gallery.Args(out=tmp_path))
    made = {path.name for path in tmp_path.iterdir()}
    kept = {path.name for path in (DOCS / "gallery").iterdir() if path.suffix in (".png", ".gif")}
    assert made == kept and "episode.gif" in made
    for name in made:
        with Image.open(tmp_path / name) as new, Image.open(DOCS / "gallery" / name) as old:
            pairs = list(zip(ImageSequence.Iterator(new), ImageSequence.Iterator(old), strict=True))
            for left, right in pairs:
                a, b = (np.asarray(image.convert("RGB")).astype(int) for image in (left, right))
                assert a.shape == b.shape and np.abs(a - b).mean() < 3, name


def test_the_gallery_weighs_at_most_a_megabyte_and_its_page_shows_all_of_it():
    images = [path for path in (DOCS / "gallery").iterdir() if path.suffix in (".png", ".gif")]
    assert 0 < sum(path.stat().st_size for path in images) <= 1_000_000
    page = (DOCS / "gallery" / "index.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page)
    assert {name for _, name in shown} == {path.name for path in images}
    assert all(len(words) > 20 for words, _ in shown), "every image is described in words"


def test_the_moving_image_shows_a_proposal_a_correction_and_a_stop():
    with Image.open(DOCS / "gallery" / "episode.gif") as gif:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(gif)]
    assert len(frames) == 4
    red = [int(((f[..., 0] > 180) & (f[..., 1] < 90) & (f[..., 2] < 90)).sum()) for f in frames]
    assert red[0] < red[1] and red[0] < red[2], "a box is drawn from the first proposal on"
    changed = [np.abs(b[:300] - a[:300]).max(axis=-1).mean() for a, b in zip(frames, frames[1:], strict=False)]
    assert changed[0] > 1 and changed[1] > 1 and changed[2] < 0.5, "a stop changes nothing on the image"


def commands_of(page: Path) -> list[tuple[str, str]]:
    """Every command of a page's console blocks with the output that the page shows."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    parts = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]


# What a page shows of a policy that it trained: another processor rounds otherwise, and training multiplies that.
LEARNED_FIGURES = re.compile(r"^ppo |.* sampled final IoU ")
LEARNED_STEPS = re.compile(r"^  (step \d|stop|end) +.*IoU")


def form_and_figures(output: str) -> tuple[list[str], list[float]]:
    """Lines of an output, and the learned figures that were cut out of them; an episode's steps count as one line."""
    lines: list[str] = []
    figures: list[float] = []
    for line in output.strip().splitlines():
        if LEARNED_FIGURES.match(line):
            figures += map(float, re.findall(r"\d\.\d+", line))
            line = re.sub(r"\d\.\d+", "#", line)
        elif LEARNED_STEPS.match(line):
            line = "(steps)"
            if lines[-1:] == [line]:
                continue
        lines.append(line.rstrip())
    return lines, figures


def test_only_learned_figures_may_differ_and_only_a_little():
    page = (
        "4096 of 8192 actions   sampled final IoU 0.060\n  target    0.331\n  step 0    IoU 0.404\n  end       IoU 0.2"
    )
    lines, figures = form_and_figures(page)
    assert lines == ["4096 of 8192 actions   sampled final IoU #", "  target    0.331", "(steps)"] and figures == [0.06]
    assert form_and_figures("ppo   0.088   0.098") == (["ppo   #   #"], [0.088, 0.098])
    assert form_and_figures("centre   0.111") == (["centre   0.111"], [])


@pytest.mark.parametrize("page", TRANSCRIPTS, ids=lambda page: page.stem)
def test_a_transcript_is_what_the_machine_answers(page, newcomer):
    text = page.read_text(encoding="utf-8")
    for name, content in re.findall(r"```python title=\"([\w.]+)\"\n(.*?)```", text, re.DOTALL):
        assert len(content.splitlines()) < 20
        (newcomer / name).write_text(content, encoding="utf-8")
    commands = commands_of(page)
    assert commands
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, shown in commands:
        run = subprocess.run(
            ["bash", "-c", command], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=900,
            check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        if page.stem != "sb3":
            assert run.stdout.strip() == shown.strip(), command
            continue
        (lines, figures), (lines_shown, figures_shown) = form_and_figures(run.stdout), form_and_figures(shown)
        assert lines == lines_shown, command
        assert figures == pytest.approx(figures_shown, abs=0.05), command
        if "sampled" in shown:
            assert figures[2] > figures[0], "it learns"


def test_the_citation_names_this_version_and_the_paper():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license", "type"} <= set(citation)
    assert citation["version"] == ivt_env.__version__ and citation["license"] == "Apache-2.0"
    assert "2606.13156" in str(citation["references"])
