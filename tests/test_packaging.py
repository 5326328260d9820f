"""What is published holds everything it needs, and works away from the source tree.

Silent when false: the photographs, the page or the tiny model are missing from what others install, and nobody here
sees it, because here they lie beside the code.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import pytest

import ivt_env

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_SOURCE = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__")

# No other package of this project may be found than the installed one, and torch must not be needed.
AWAY = """
import sys
import gymnasium as gym, ivt_env
assert ivt_env.__file__.startswith(sys.argv[1]), ivt_env.__file__
for name in ("IVT-Scenes-v0", "IVT-Photos-v0"):
    env = gym.make(name, split="test", render_mode="rgb_array")
    env.reset(seed=0)
    env.step({"box": [0.1, 0.1, 0.6, 0.6], "stop": 0})
    assert env.render().ndim == 3
assert "torch" not in sys.modules
print("played")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, made from an sdist, made from a copy of the source: (wheel, sdist)."""
    pytest.importorskip("build", reason='building needs pip install "ivt-env[dev]"')
    source, out = tmp_path_factory.mktemp("source") / "ivt-env", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    # `pip install` shows setuptools' warnings to a newcomer.
    assert "Warning: " not in run.stdout + run.stderr, run.stderr[-3000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def in_wheel(built):
    with zipfile.ZipFile(built[0]) as archive:
        return {info.filename: info.file_size for info in archive.infolist()}


def files_of(folder: str) -> set[str]:
    """Every file below a folder of the source that is no by-product."""
    paths = (path for path in (ROOT / folder).glob("**/*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_of_the_tests(in_wheel):
    wanted = files_of("ivt_env") | {f"ivt_{name}" for name in files_of("agents")}
    packed = {name for name in in_wheel if ".dist-info/" not in name}
    assert packed == wanted
    assert len([name for name in wanted if name.endswith(".jpg")]) == 5
    assert {"ivt_env/py.typed", "ivt_env/viewer/template.html", "ivt_env/viewer/play.js"} <= wanted
    assert in_wheel["ivt_agents/vlm/tiny_qwen3vl/model.safetensors"] > 1_000_000


def test_the_sdist_holds_the_tests_the_pages_and_what_they_run(built):
    with tarfile.open(built[1]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    for folder in ("ivt_env", "agents", "experiments", "tests", "docs", "configs", "examples"):
        assert files_of(folder) <= names, sorted(files_of(folder) - names)[:5]
    top = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"}
    assert top | {"pyproject.toml", "train_sft.py", "train_grpo.py", "evaluate.py"} <= names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith(("runs/", ".venv/"))]


def test_the_metadata_says_what_pyproject_says(built):
    with zipfile.ZipFile(built[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        licences = [one for one in archive.namelist() if ".dist-info/licenses/" in one]
    assert metadata["Version"] == ivt_env.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    bare = {requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement}
    assert {re.split(r"[<>=]", one)[0] for one in bare} == {"gymnasium", "numpy", "pillow", "pyarrow"}
    assert "ivt = ivt_agents.cli:main" in entry_points and any(one.endswith("/LICENSE") for one in licences)


def test_every_extra_that_a_message_names_exists_and_every_requirement_has_a_lower_bound():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("ivt_env/**/*.py"), *ROOT.glob("agents/**/*.py")]
    sources += [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    named = {extra for group in re.findall(r"ivt-env\[([a-z0-9,]+)\]", text) for extra in group.split(",")}
    assert {"train", "server", "human"} <= named <= set(PROJECT["optional-dependencies"])
    every = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    assert [one for one in every if ">=" not in one] == []


def test_what_the_pages_say_about_installing_works_in_an_empty_environment(built, tmp_path):
    """The packages that it needs are lent from here, so that pip finds them there and nothing is fetched."""
    home, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, timeout=600)
    lent = {str(Path(found.__file__).parents[1]) for found in (gym, pytest)}
    (site,) = home.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text("\n".join(sorted(lent)), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "IVT_DATA")}
    environment |= {"PATH": f"{home / 'bin'}{os.pathsep}{environment['PATH']}", "PIP_NO_INDEX": "1", "PIP_QUIET": "1"}
    for command, expected in (
        (["pip", "uninstall", "--yes", "setuptools"], ""),  # a venv's own is too old for torch; the lent one counts
        (["pip", "install", f"{built[0]}[train]"], ""),
        (["pip", "install", "ivt-env[train]"], ""),  # as messages say, once it is installed
        (["python", "-c", AWAY, str(home)], "played"),
        (["ivt", "--version"], f"ivt-env {ivt_env.__version__}"),
        (["ivt", "--help"], "train-sft"),
        (["ivt", "envs"], "IVT-Scenes-v0"),
        (["ivt", "rollout", "--agent", "random", "--episodes", "2"], ""),
        (["ivt", "train-sft", "--dry-run", "--image", "384", "384"], "visual tokens"),
    ):
        run = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert run.returncode == 0 and expected in run.stdout, (command, run.stdout[-500:], run.stderr[-2000:])


def test_no_page_or_message_names_what_a_wheel_does_not_hold_or_an_index_that_has_no_ivt_env():
    """The scripts are for a clone, of which README speaks; the command `ivt` is everywhere."""
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("agents/**/*.py"), *ROOT.glob("configs/*.yaml")]
    found = [
        f"{page.relative_to(ROOT)}: {line.strip()}"
        for page in pages
        if page.name != "command_line.md"
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.search(r"python (train_sft|train_grpo|evaluate)\.py|^pip install \"?ivt-env", line)
    ]
    assert not found


def test_it_works_beside_evaluate_and_openai_agents_whatever_was_installed_first(built, tmp_path):
    """Hugging Face's ``evaluate`` and OpenAI's ``agents`` have the names of a script and a folder of this checkout."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    theirs = [f"{name}=={version(name)}" for name in ("evaluate", "openai-agents")]
    download = [*pip, "download", "--no-deps", "--dest", str(tmp_path), *theirs]
    run = subprocess.run(download, capture_output=True, text=True, timeout=300, check=False)
    if run.returncode:
        pytest.skip(f"the package index cannot be reached: {run.stderr.strip()[-200:]}")
    both, found = [[str(built[0])], [*map(str, tmp_path.glob("*.whl"))]], []
    for name, order in (("ours first", both), ("theirs first", both[::-1])):
        site = tmp_path / name
        for wheels in order:
            install = [*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), *wheels]
            subprocess.run(install, check=True, timeout=300)
        found.append({path.relative_to(site): path.read_bytes() for path in site.rglob("*.py")})
    assert found[0] == found[1]
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = "import agents, evaluate, ivt_agents; agents.Runner, evaluate.load, ivt_agents; print(agents.__file__)"
    for command, expected in (
        ([sys.executable, "-c", code], str(site)),
        # pip keeps the first package's bin in a target folder, so the command is called by its module
        ([sys.executable, "-m", "ivt_agents.cli", "evaluate", "--help"], "--policies"),
    ):
        run = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0 and expected in run.stdout, run.stderr[-2000:]
