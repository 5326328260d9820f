"""What ``python -m ivt_agents.play.rollout`` promises to someone who looks at an environment or an agent.

If one of these is false, a person debugs the wrong thing: numbers that are not the environment's,
scenes shown under the name of a real data set, or a traceback where a word was mistyped.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import ivt_env
from ivt_agents.play.by_name import load_agent
from ivt_agents.play.rollout import Args, describe, main
from ivt_env import failures
from ivt_env.data import DatasetFallbackWarning
from ivt_env.episodes import Episode, Step, image_file, load_episodes
from ivt_env.rollouts import make_vector_env, rollout

ROOT = Path(ivt_env.__path__[0]).parent
CORNER = '''"""An agent in a file of its own."""

import numpy as np


class Corner:
    """Proposes the top left quarter, then a box that is none, then stops."""

    def act(self, observations):
        step = observations["step"]
        box = np.where(step[:, None] == 0, [0, 0, 0.5, 0.5], [0.9, 0, 0.1, 1])
        return {"box": box, "stop": step >= 2, "text": ["here\\x1b[2J\\nor there"] * len(step)}

    def reset(self, mask):
        """Nothing to forget."""
'''


def command(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in ``cwd`` without any real data set within reach."""
    done = subprocess.run(
        [sys.executable, "-m", "ivt_agents.play.rollout", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "IVT_DATA": str(cwd / "no-data"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def refused(capsys: pytest.CaptureFixture[str], args: Args) -> str:
    """The one line that ``main`` says on stderr about ``args``."""
    assert failures.run(lambda: main(args)) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and errors.count("\n") == 1
    return errors


# ---- the command itself ----------------------------------------------------------------------


def test_the_default_run_shows_an_episode_and_writes_what_it_says(tmp_path: Path) -> None:
    done = command(tmp_path)
    folder = tmp_path / "runs" / "rollout"
    (episode,) = load_episodes(folder)
    assert episode.dataset == "scenes" and episode.split == "val" and episode.agent == "oracle"
    for shown in (
        episode.expression,
        f"scenes/val, sample {episode.sample_id}",
        "  ".join(f"{v:.3f}" for v in episode.target),
        *("  ".join(f"{v:.3f}" for v in s.proposal) for s in episode.steps if s.proposal),
        *(f"IoU {s.iou:.3f}   reward {s.reward:+.3f}" for s in episode.steps),
        f"stopped, final IoU {episode.final_iou:.3f}",
        str(Path("runs/rollout/episodes.jsonl")),
        str(Path("runs/rollout/page.html")),
    ):
        assert shown in done.stdout
    assert len(episode.steps) == 3 and done.stderr == ""
    assert (folder / "images" / image_file(episode.image_id)).is_file()
    assert episode.expression in (folder / "page.html").read_text(encoding="utf-8")


def test_a_bar_on_the_terminal_leaves_the_json_alone(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    words = ["--json", "--env", "IVT-Photos-v0", "--agent", "random", "--episodes", "3", "--out", str(tmp_path / "x")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "ivt_agents.cli", "rollout", *words]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 4096):
                shown += part
        output = process.communicate(timeout=300)[0]
    os.close(ours)
    assert process.returncode == 0, shown
    saved = (tmp_path / "x" / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in output.splitlines()] == [json.loads(line) for line in saved]
    assert {json.loads(line)["dataset"] for line in saved} == {"photos"} and len(saved) == 3
    assert b"random" in shown and b"3/3" in shown


def test_an_agent_of_a_few_lines_in_the_current_directory_plays(tmp_path: Path) -> None:
    assert len(CORNER.splitlines()) < 20
    (tmp_path / "corner.py").write_text(CORNER)
    done = command(tmp_path, "--agent", "corner:Corner", "--index", "2", "--episodes", "2", "--out", "out")
    first, second = load_episodes(tmp_path / "out")
    assert (first.sample_id, second.sample_id) == ("val-2", "val-3")
    assert first.steps[0].proposal == (0, 0, 0.5, 0.5) and first.steps[1].invalid
    assert "refused: x2 <= x1" in done.stdout and "| or there" in done.stdout
    assert "\x1b" not in done.stdout and "here\\x1b[2J" in done.stdout  # model text cannot drive a terminal


def test_an_absent_data_set_is_refused_when_strict_and_else_replaced_loudly(
    tmp_path: Path, private_machine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "no-data")
    args = Args(env="IVT-RefCOCOg-v0", agent="centre", data_root=root, out=tmp_path / "out")
    says = refused(capsys, replace(args, strict=True))
    assert says.startswith("error: refcocog: not on this machine; looked for ") and not args.out.exists()
    with pytest.warns(DatasetFallbackWarning, match="EMBEDDED SCENES ARE SERVED INSTEAD"):
        main(args)
    printed = capsys.readouterr().out
    assert "served    scenes/val" in printed and "IN PLACE OF refcocog" in printed
    assert load_episodes(args.out)[0].dataset == "scenes"


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from ivt_agents.play.rollout import Args, main; "
        f"sys.exit(main(Args(out=__import__('pathlib').Path({str(tmp_path)!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


# ---- the same in this process ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"env": "IVT-Scene-v0"}, "no environment 'IVT-Scene-v0' (did you mean 'IVT-Scenes-v0'?)"),
        ({"env": "CartPole-v1"}, "no environment 'CartPole-v1'"),
        ({"split": "vall"}, "no split 'vall' (did you mean 'val'?)"),
        ({"index": 10_000}, "--index 10000, 1 episode(s): scenes/val holds samples 0 to 9999"),
        ({"index": 9_999, "episodes": 2}, "--index 9999, 2 episode(s)"),
        ({"index": -1}, "--index -1"),
        ({"episodes": 0}, "--episodes 0"),
        ({"seed": -1}, "--seed -1"),
        ({"episode_steps": 0}, "max_steps 0"),
        ({"agent": "nowhere_at_all:Agent"}, "no module 'nowhere_at_all'"),
        ({"agent": "orakle"}, "no agent 'orakle' (did you mean 'oracle'?)"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_written(
    changed: dict[str, object], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert says in refused(capsys, Args(out=out, **changed))  # type: ignore[arg-type]
    assert not out.exists()


def test_an_output_folder_that_cannot_be_made_is_refused_before_playing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(capsys, Args(out=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_fault_inside_an_agent_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugged_faulty.py").write_text(CORNER.replace("return {", "raise ValueError('my own') or {"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="my own"):
        failures.run(lambda: main(Args(agent="plugged_faulty:Corner", out=tmp_path / "out")))


def test_the_command_plays_what_rollout_plays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(Args(agent="random", episodes=5, seed=11, episode_steps=4, out=tmp_path, json=True))
    env = make_vector_env("IVT-Scenes-v0", num_envs=3, split="val", max_steps=4)
    agent = load_agent("random", seed=11)
    assert load_episodes(tmp_path) == rollout(env, agent, 5, seed=11, agent_name="random")
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_forced_episodes_never_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(Args(agent="centre", forced=True, out=tmp_path))
    (episode,) = load_episodes(tmp_path)
    assert [s.stop for s in episode.steps] == [False] * 3 and episode.truncated
    assert "out of steps" in capsys.readouterr().out


def test_the_view_reaches_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugged_looking.py").write_text(CORNER.replace("step = obs", 'observations["closeup"]; step = obs'))
    monkeypatch.syspath_prepend(tmp_path)
    main(Args(agent="plugged_looking:Corner", view="both", out=tmp_path))
    with pytest.raises(KeyError):  # the same agent does look: without the key it fails
        main(Args(agent="plugged_looking:Corner", view="overlay", out=tmp_path))


def test_everything_an_agent_said_is_shown() -> None:
    spoken = Step(
        proposal=None,
        stop=False,
        box=None,
        iou=0.0,
        reward=-0.1,
        invalid="not finite: [nan, nan, nan, nan]",
        text="I see\u2028it",
        parse_failure=True,
        stop_probability=0.25,
    )
    episode = Episode("a\nb", "p", "scenes", "val", "the \x07 bell", (0, 0, 1, 1), (3, 4), [spoken], (0, 0, 0.5, 0.5))
    shown = describe(episode, in_place_of="refcoco")
    for part in (
        "the \\x07 bell",
        "sample a\\nb, 4x3 pixels   IN PLACE OF refcoco",
        "start     0.000  0.000  0.500  0.500",
        "no usable box",
        "reward -0.100   P(stop) 0.25",
        "refused: not finite: [nan, nan, nan, nan]; the box stays",
        "no action could be read from the text",
        "| I see\n            | it",
    ):
        assert part in shown
