"""Every command of the README, of CONTRIBUTING and of the documentation does what a reader expects: it runs.

Silent when false: the first line that a stranger copies ends in an error. A command that is new to a page is either
run here (with smaller numbers), or marked with the reason why it is not; in both cases its own parser reads it.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import ivt_agents.command
from ivt_agents import cli
from ivt_agents.grpo import train as grpo
from ivt_agents.sft import train as sft

ROOT = Path(__file__).resolve().parent.parent
# The console blocks of these pages are run by test_docs, those of the last by test_served.
TRANSCRIPTS = ("own_agent.md", "sb3.md", "viewer.md", "evaluate_your_vlm.md")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
]

SFT = "--samples 6 --per-device-train-batch-size 2 --gradient-accumulation-steps 1 --steps 1 --eval-samples 2"
SFT += " --report-to none"
GRPO = "--prompts 2 --num-generations 2 --episode-steps 3 --eval-samples 2 --report-to none"

# In this order, in one folder: what the command is run with besides what the page says.
RUN = {
    "python train_sft.py": SFT,
    "python train_sft.py --demonstrations traces.jsonl --out runs/taught": SFT,
    "ivt train-sft --first-answers policy": f"{SFT} --out runs/own-first",
    "python train_grpo.py": f"{GRPO} --steps 1",
    "python train_grpo.py --resume": f"{GRPO} --steps 2",
    "python train_grpo.py --env IVT-Photos-v0 --steps 5 --out runs/photos": GRPO,
    "ivt train-grpo --loss-type gspo --advantage return_to_go": f"{GRPO} --steps 1 --model tiny --out runs/gspo",
    "ivt train-grpo --layout prefix": f"{GRPO} --steps 1 --model tiny --out runs/prefix",
    "ivt rollout --agent my_agent:MyAgent --env IVT-Photos-v0": "",
    "ivt rollout --agent vlm:tiny --episodes 5 --out runs/tiny": "",
    "ivt evaluate --policies mine=my_agent:MyAgent base=random": "--samples 6",
    "ivt evaluate --policies base=tiny grpo=runs/grpo/policy": "--samples 4 --out runs/evaluated",
    "python -m ivt_agents.evaluation.swaps --policies mine=my_agent:MyAgent": "--samples 4",
    "ivt report runs/evaluation --swaps runs/swaps": "",
    "ivt view runs/rollout": "",
    "ivt view runs/tiny": "",
    "ivt --help": "",
    "ivt envs": "",
    "ivt agents": "",
    "ivt prompts": "",
    "ivt prompts gemini": "",
    "ivt data check screens": "",
    "ivt data show screens --split test --number 6 --columns 2 --side 1200": "--side 200",
    "python -m experiments.paper --config configs/paper_scenes.yaml --dry-run": "",
}

NETWORK = "downloads gigabytes; test_fetch_command fetches from a server of its own"
DATA = "needs a real data set on disk; test_fetch_command, test_checks and test_data_table run it on small ones"
SCORED = "needs published predictions and their data set; test_score_command runs it on small ones"
OWN = "needs files of the reader's; test_converters and test_data_custom run it on small ones"
HUB = "asks the hub for a model's configuration; test_large_models and test_footprint do it with small ones"
HOURS = "takes more than an hour, or a GPU; test_paper runs it small"
NOT_HERE = {
    "ivt train-sft": "is python train_sft.py",
    "ivt train-grpo": "is python train_grpo.py",
    "ivt train-sft --single-shot --steps 500": "takes minutes; test_controls trains a small one",
    "make train": "takes long; test_study reads each of its commands and runs those that play",
    "make test": "runs tests",
    "make long": "runs this test",
    "make docs": "test_docs builds them",
    "ivt play": "waits for a person; test_play and test_play_browser play",
    'pip install -e ".[train]"': "installs",
    'pip install -e ".[train,quantize]"': "installs",
    "ivt data fetch refcocog --split val": NETWORK,
    "ivt data fetch refcocog": NETWORK,
    "ivt data fetch refadv": NETWORK,
    "ivt data fetch refl4": NETWORK,
    "ivt data fetch screenspotpro": NETWORK,
    "ivt data check screenspotpro": DATA,
    "ivt evaluate --policies q=openai:http://127.0.0.1:8000/v1#m --env IVT-ScreenSpotPro-v0 --split test": DATA,
    "ivt data check refcocog": DATA,
    "ivt data check refcocog refl4 --no-images": DATA,
    "ivt data show refcocog --split val": DATA,
    "ivt data convert refcocog": DATA,
    "ivt data convert refcoco --split testA --out testa --name testa": DATA,
    "ivt data mix --seed 0": "needs three real data sets on disk; test_mixture draws from small ones",
    "ivt score predictions.jsonl --dataset refl4 --split test --layout refl4": SCORED,
    "ivt score predictions.json --layout refl4 --dataset refl4 --split test": SCORED,
    "ivt score mine.jsonl --format xyxy --frame px --dataset refl4 --split test": SCORED,
    "ivt data convert instances.json --from coco --images images --out my-set --name my-set"
    " --expression-key caption": OWN,
    "ivt data convert project.json --from label-studio --images media/upload/1 --out my-set --name my-set": OWN,
    "ivt data check custom --data-root my-set": OWN,
    "ivt data show custom --data-root my-set": OWN,
    "ivt data render-screens pages --out mine --name my-pages": "needs a browser; test_screens renders small pages",
    "ivt data render-screens build/pages --out build/screens --name web-pages": "takes minutes; test_screens",
    "python -m experiments.screen_pages --episodes runs/evaluation --out build/pages": "needs SQLite's documentation",
    "python -m experiments.screens --out runs/screens": "takes long; test_screens_experiment runs it small",
    "ivt evaluate --env IVT-Screens-v0 --split test --policies ocr=ocr": "takes hours; test_ocr plays a part",
    "ivt score points.jsonl --dataset screenspotpro --split test --format xy --frame px": "test_gui scores small ones",
    'pip install -e ".[screens]"': "installs",
    'pip install -e ".[train,ocr]"': "installs",
    "ivt train-sft --teacher 'openai:http://127.0.0.1:8000/v1#MODEL'": "needs a served model; test_teachers",
    "ivt train-sft --teacher openai:http://127.0.0.1:8000/v1 --teacher-max-requests 6000"
    " --teacher-max-tokens 5000000": "needs a served model; test_teachers",
    "ivt prompts qwen3-vl --into FOLDER": "writes into a model's folder; test_served",
    "ivt train-grpo --report-to wandb": "needs an account; test_trackers runs the package offline",
    "accelerate launch --num_processes 2 train_grpo.py": "needs two GPUs; test_accelerate_configs",
    "torchrun --standalone --nproc_per_node 2 train_grpo.py": "takes two cores; test_grpo runs it small",
    "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 16 --num_machines 2 --machine_rank 0"
    " --main_process_ip 10.0.0.1 --main_process_port 29500 train_grpo.py --out /shared/runs/grpo --prompts 32": "needs"
    " two machines with eight GPUs each",
    "python train_grpo.py --model Qwen/Qwen3-VL-4B-Instruct --lora-r 64 --dry-run": HUB,
    "ivt train-grpo --config configs/paper_qwen3vl_4b.yaml --model Qwen/Qwen3-VL-4B-Instruct --dry-run"
    " --gpu-memory-gb 80": HUB,
    "python -m experiments.paper --config configs/paper_qwen3vl_4b.yaml --dry-run": HUB,
    "python -m experiments.paper --config configs/paper_qwen3vl_4b.yaml --out runs/paper4b": HOURS,
    "python -m experiments.paper --out runs/paper": HOURS,
    "python benchmarks/growth.py": "takes 20 minutes; test_growth runs it small",
    "python benchmarks/against_trl.py --prompts 8": "takes minutes; test_against_trl runs it small",
    "python benchmarks/against_trl.py --prompts 8 --rounds 2 --checkpointing": "takes minutes; test_against_trl",
    "python -m ivt_agents.sb3.train": "takes 90 seconds; test_docs runs it small",
    "ivt evaluate --policies random=random centre=centre ppo=sb3:runs/sb3": "plays what that trained",
    "ivt rollout --agent sb3:runs/sb3 --episodes 5": "plays what that trained; test_docs",
    "python -m ivt_env.server --port 8765": "serves until it is stopped; test_server",
    "OUT=runs/gpu benchmarks/gpu.sh": "needs a GPU",
    "OUT=runs/gpu benchmarks/gpu.sh --small": "takes minutes",
    "OUT=runs/gpu benchmarks/gpu.sh step decode": "needs a GPU",
    "python examples/train_with_trl.py": "takes a minute; test_trl runs it",
    "python examples/train_with_trl.py --rollout": "takes a minute; test_trl runs it",
}

BY_HELP = {
    "ivt_env.server": "ivt_env/server/__main__.py",
    "experiments.screens": "experiments/screens.py",
    "experiments.screen_pages": "experiments/screen_pages.py",
}
"""Modules whose parser is argparse's, and where it stands."""


def commands_of(text: str) -> list[str]:
    """The commands of a page's shell blocks, as they are typed; a ``console`` block shows output, too."""
    found = []
    for kind, block in re.findall(r"^```(sh|bash|shell|console)\b[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        if kind == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in lines:
            typed = re.sub(r"(^|\s+)#\s.*$", "", line).strip()
            found += [one.strip() for one in re.split(r"\s*(?:&&|;)\s*", typed) if one.strip()]
    return [re.sub(r"\s+", " ", one) for one in found if not re.fullmatch(r"export \w+=\S+", one)]


def shown(page: Path) -> str:
    """A page without what test_docs runs."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```console\n.*?^```", "", text, flags=re.S | re.M) if page.name in TRANSCRIPTS else text


DOCUMENTED = sorted({command for page in PAGES for command in commands_of(shown(page))})


def test_every_documented_command_is_run_or_marked_and_nothing_else_is():
    known = [*RUN, *NOT_HERE]
    new = [command for command in DOCUMENTED if command not in known]
    assert not new, f"run it here, or mark it with the reason why it cannot be: {new}"
    assert [command for command in known if command not in DOCUMENTED] == [], "no page holds these any more"
    assert len(known) == len(set(known)) > 50 and all(NOT_HERE.values())


def test_commands_are_found_in_every_form_of_a_block():
    text = "```sh\na --b 'c d'   # said\nx \\\n    --y && z; w\n# only words\nexport A=b\n```\n"
    text += "```console\n$ p q\nout\n```\n"
    assert commands_of(text) == ["a --b 'c d'", "x --y", "z", "w", "p q"]


def execute(words: list[str], monkeypatch) -> int:
    """Run a command in this process as the shell would; its exit status."""
    try:
        if words[0] == "ivt":
            return cli.main(words[1:])
        assert words[0] == "python", words
        if words[1] == "-m":
            monkeypatch.setattr(sys, "argv", words[2:])
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 2
    return 0


def read_only(words: list[str], monkeypatch) -> None:
    """Read a command by its own parser, and its options by their own checks; nothing is run."""
    words = words[1:] if re.fullmatch(r"[A-Z_]+=\S+", words[0]) else words
    if words[0] == "python" and words[1] in ("train_sft.py", "train_grpo.py", "evaluate.py"):
        words = ["ivt", words[1].removesuffix(".py").replace("_", "-"), *words[2:]]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["pip", "install"]:
        extras = re.fullmatch(r"(?:ivt-env|\.)\[(.+)\]", words[-1])[1].split(",")
        assert all(re.search(rf"^{e} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for e in extras), words
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        read_only(["python", launch.training_script, *launch.training_script_args], monkeypatch)
    elif words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        read_only(["python", launch.training_script, *launch.training_script_args], monkeypatch)
    elif words[0] == "ivt" and not cli.COMMANDS[words[1]].script:
        assert cli.build_parser(words[1]).parse_args(words[1:]).command == words[1]
    elif words[0] == "benchmarks/gpu.sh":
        text = (ROOT / words[0]).read_text()
        assert all(re.search(rf"{re.escape(word)}\b", text) for word in words[1:]), words
    elif words[1].startswith(("examples/", "benchmarks/")) or words[2:3] and words[2] in BY_HELP:
        # Their parsers know them by their help alone.
        options = [word for word in words if word.startswith("--")]
        source = ROOT / (words[1] if words[1] != "-m" else BY_HELP[words[2]])
        assert all(o in source.read_text() or o[2:].replace("-", "_") in source.read_text() for o in options), words
    else:
        seen: list[object] = []

        def parse_and_check(main: Callable, args: type, argv: list[str] | None = None, section: str | None = None):
            seen.append(ivt_agents.command.parse(args, argv, section))

        monkeypatch.setattr(ivt_agents.command, "run_command", parse_and_check)
        for module in [name for name in sys.modules if name.startswith(("ivt_agents.", "experiments."))]:
            if hasattr(sys.modules[module], "run_command"):
                monkeypatch.setattr(sys.modules[module], "run_command", parse_and_check)
        if words[0] == "ivt":
            script = cli.COMMANDS[words[1]]
            parse_and_check(print, importlib.import_module(script.module).Args, words[2:], script.section)
        else:
            assert execute(words, monkeypatch) == 0, words
        assert len(seen) == 1, words
        if isinstance(seen[0], sft.Args):
            sft.check_options(seen[0])
        if isinstance(seen[0], grpo.Args):
            grpo.check_options(seen[0])


@pytest.mark.parametrize("command", NOT_HERE)
def test_a_command_that_is_not_run_here_is_one_that_its_parser_takes(command, monkeypatch, capsys):
    monkeypatch.setattr("ivt_agents.training.options.check_tracker", lambda name: None)  # packages of other extras
    monkeypatch.chdir(ROOT)  # the configuration files that it names lie there
    read_only(shlex.split(command), monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reader's folder: the agent of the README in it, and no data set on the machine."""
    made = tmp_path_factory.mktemp("reader")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    agent = re.search(r"```python\n# my_agent.py\n(.*?)```", page, re.DOTALL)
    (made / "my_agent.py").write_text(agent[1], encoding="utf-8")
    shutil.copytree(ROOT / "configs", made / "configs")
    return made


@pytest.mark.parametrize("command", RUN)
def test_a_documented_command_runs(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("IVT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    traces = folder / "runs" / "sft" / "demonstrations.jsonl"
    if traces.exists():
        shutil.copy(traces, folder / "traces.jsonl")
    smaller = dict(samples=6, per_device_train_batch_size=2, gradient_accumulation_steps=1, steps=1, report_to="none")
    train = importlib.import_module("ivt_agents.sft.train").main
    monkeypatch.setattr(sft, "main", lambda args: train(dataclasses.replace(args, **smaller)))
    assert execute(shlex.split(f"{command} {RUN[command]}"), monkeypatch) == 0, capsys.readouterr().err[-3000:]
