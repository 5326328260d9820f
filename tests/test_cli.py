"""``ivt`` answers for itself: help that fits a terminal, one line for a wrong word, no torch to look at data.

If one of these is false, a script takes a failure for success, a flag reaches another option than the one
that the training script documents, or everyone waits for torch to read a page of help.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from eval_layouts import write_ref_l4

from ivt_agents import cli
from ivt_env import __version__

LIGHT = [["data"], ["score"], ["view"], ["play"], ["agents"], ["envs"]]
SCRIPTS = {
    "rollout": "ivt_agents.play.rollout",
    "evaluate": "ivt_agents.evaluation.evaluate",
    "train-sft": "ivt_agents.sft.train",
    "train-grpo": "ivt_agents.grpo.train",
}
COMMANDS = [[], *LIGHT, *(["data", name] for name in ("fetch", "check", "convert", "show", "mix")), ["rollout"]]


def status_of(words):
    """What the shell would get."""
    try:
        return cli.main(words)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_fits_eighty_columns(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert status_of([*words, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(" ".join(["usage: ivt", *words]))
    assert "``" not in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["data", "nonsense"], ["data"], ["score"], [], ["-v"], ["view"], ["agents", "x"], ["envs", "--x"]],
)
def test_wrong_words_end_with_status_2_and_say_so(words, capsys):
    assert status_of(words) == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_version_is_that_of_the_package(capsys):
    assert status_of(["--version"]) == 0 and capsys.readouterr().out == f"ivt-env {__version__}\n"


def test_every_command_of_the_issue_is_there(capsys):
    status_of(["--help"])
    printed = capsys.readouterr().out
    for name in ("rollout", "evaluate", "view", "play", "data", "score", "train-sft", "train-grpo", "agents", "envs"):
        assert f"\n    {name} " in printed
    assert "exit status" in printed


def probe(code):
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_help_imports_neither_numpy_nor_gymnasium_nor_torch():
    code = (
        "import sys, contextlib, io; from ivt_agents import cli\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): cli.main(['--help'])\n"
        "print(sorted({'torch', 'gymnasium', 'numpy', 'PIL', 'rich', 'tyro'} & set(sys.modules)))"
    )
    assert probe(code) == "[]\n"


def test_the_light_commands_import_no_torch_and_no_client():
    code = (
        "import sys, contextlib, io; from ivt_agents import cli; import ivt_agents.play.by_name\n"
        f"for words in {[*LIGHT, ['rollout']]!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        cli.main([*words, '--help'])\n"
        "print(sorted({'torch', 'transformers', 'openai'} & set(sys.modules)))"
    )
    assert probe(code) == "[]\n"


def stand_in(monkeypatch, name, outcome=None):
    """The script's own ``Args``, and a ``main`` that only takes note of what it was called with."""
    got = []

    def main(args):
        got.append(args)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    module = __import__(SCRIPTS[name], fromlist=["Args"])
    monkeypatch.setattr(module, "main", main)
    return module, got


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train-grpo", ["--steps", "5", "--num-generations", "4", "--no-resume", "--learning-rate", "1e-4"]),
        ("train-sft", ["--steps", "5", "--single-shot", "--out", "x y"]),
        ("evaluate", ["--policies", "a=tiny", "b=random", "--samples", "7"]),
        ("rollout", ["--env", "IVT-Photos-v0", "--json", "--index", "3"]),
    ],
)
def test_flags_reach_the_script_as_they_would_without_ivt(name, words, monkeypatch):
    from ivt_agents.command import parse

    module, got = stand_in(monkeypatch, name)
    before = list(sys.argv)
    assert cli.main([name, *words]) == 0
    assert got == [parse(module.Args, words)] and got != [parse(module.Args, [])]
    assert sys.argv == before


def test_a_configuration_file_and_an_override_reach_the_training_script(monkeypatch, tmp_path):
    (tmp_path / "c.yaml").write_text("grpo:\n  steps: 7\n  num_generations: 4\nsft:\n  steps: 3\n")
    for name, steps in (("train-grpo", 7), ("train-sft", 3)):
        _, got = stand_in(monkeypatch, name)
        assert cli.main([name, "--config", str(tmp_path / "c.yaml")]) == 0
        assert cli.main([name, "--config", str(tmp_path / "c.yaml"), "--steps", "9"]) == 0
        assert [args.steps for args in got] == [steps, 9]


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(None, 0), (Path("runs/x"), 0), (True, 0), (2, 2), (ValueError("no such thing"), 2), (KeyboardInterrupt(), 130)],
    ids=repr,
)
def test_the_exit_status_of_a_script_says_how_it_went(outcome, status, monkeypatch, capsys):
    stand_in(monkeypatch, "rollout", outcome)
    assert cli.main(["rollout"]) == status
    errors = capsys.readouterr().err
    assert ("error: no such thing\n" in errors) == isinstance(outcome, ValueError)
    assert ("interrupted" in errors) == (status == 130)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    stand_in(monkeypatch, "train-sft", ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["train-sft"])


@pytest.mark.parametrize("name", ["rollout", "train-grpo"])
def test_a_wrong_flag_of_a_script_is_status_2(name, capsys):
    assert cli.main([name, "--stepps", "5"]) == 2
    assert "--stepps" in capsys.readouterr().err


def test_without_the_training_install_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ivt_agents.command", raising=False)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["train-grpo"]) == 2
    assert capsys.readouterr().err == 'error: tyro is not installed: pip install "ivt-env[train]"\n'


def test_evaluate_prints_its_results_as_json_and_everything_else_elsewhere(tmp_path, capsys):
    options = f"--out {tmp_path} --policies a=random b=centre --samples 6 --num-envs 3 --json"
    assert cli.main(["evaluate", *options.split()]) == 0
    output, errors = capsys.readouterr()
    assert json.loads(output) == json.loads((tmp_path / "results.json").read_text())
    assert "Acc@0.5 (%), without ground truth" in errors


def test_agents_lists_every_form_that_load_agent_takes(capsys, tmp_path):
    from ivt_agents.play import by_name as base

    (tmp_path / "sft" / "policy").mkdir(parents=True)
    (tmp_path / "sft" / "policy" / "policy.json").write_text("{}")
    assert cli.main(["agents", "--json", "--runs", str(tmp_path)]) == 0
    listed = json.loads(capsys.readouterr().out)
    heads = {row["spec"].partition(":")[0] for row in listed["agents"]}
    assert heads == {form.partition(":")[0] for form in base._FORMS} and all(row["what"] for row in listed["agents"])
    assert [row["spec"] for row in listed["policies"]] == [f"vlm:{tmp_path / 'sft' / 'policy'}"]
    assert cli.main(["agents", "--runs", str(tmp_path)]) == 0
    assert f"vlm:{tmp_path / 'sft' / 'policy'}" in capsys.readouterr().out


def test_envs_says_what_each_would_serve_and_where_it_looked(capsys, tmp_path):
    import ivt_env
    from ivt_env.data import DatasetFallbackWarning, load_dataset

    write_ref_l4(tmp_path)
    assert cli.main(["envs", "--json", "--data-root", str(tmp_path)]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)["environments"]}
    assert rows.keys() == ivt_env.IDS.keys()
    assert rows["IVT-RefL4-v0"]["looked_in"] == str(tmp_path)
    checked = 0
    for row in rows.values():
        for split, said in row["splits"].items():
            if said["serves"] is None:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DatasetFallbackWarning)
                assert load_dataset(row["dataset"], split, tmp_path).name == said["serves"]
            checked += 1
    assert checked > 15 and rows["IVT-RefL4-v0"]["splits"]["test"]["serves"] == "refl4"
    assert rows["IVT-RefCOCO-v0"]["splits"]["val"] == {"serves": "scenes", "from": None}
    assert cli.main(["envs", "--data-root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"from {tmp_path / 'refl4'}" in printed and f"not in {tmp_path}: EMBEDDED SCENES" in printed
    assert "ivt data fetch refcoco" in printed


def test_a_terminal_without_the_letters_gets_them_escaped(tmp_path):
    folder = tmp_path / "Ünï"
    write_ref_l4(folder)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "ivt_agents.cli", "data", "check", "refl4", "--data-root", str(folder)]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "\\xdcn\\xef" in ended.stdout and "NOT fit for use" in ended.stdout
    ended = subprocess.run([*words, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert json.loads(ended.stdout)["data_sets"][0]["folder"] == str(folder / "refl4")


def test_ctrl_c_ends_every_command_with_a_word_and_status_130(monkeypatch, capsys):
    def interrupted(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ivt_env.commands.data.load_dataset", interrupted)
    monkeypatch.setattr("ivt_env.commands.score.read_predictions", interrupted)
    for words in (["data", "show", "photos"], ["score", "a.jsonl", "--dataset", "photos", "--split", "test"]):
        assert cli.main(words) == 130
        assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize("words", [["ivt_agents.cli", "data", "check", "refl4"], ["ivt_agents.play.rollout", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, words):
    write_ref_l4(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    root = [] if "--help" in words else ["--data-root", str(tmp_path)]
    words = [sys.executable, "-m", *words, *root]
    ended = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ended.returncode == 141 and "roken pipe" not in ended.stderr and "Traceback" not in ended.stderr
