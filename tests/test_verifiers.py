"""verifiers plays what this project plays: the same questions and images, the same boxes, the same scores.

Silent when false: a model that was trained or ranked there saw other images, or was asked in other words, than the one
that is evaluated here. verifiers has an environment of its own (`make long` makes it), and is only run from outside.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import ChatServer
from scripted_server import PING, box_of

from ivt_agents.play.by_name import load_agent
from ivt_agents.play.served import Served, ServedOptions
from ivt_env.rollouts import make_vector_env, rollout

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.prefix) / "verifiers" / "bin"
SAMPLES = 6

pytestmark = pytest.mark.skipif(not BIN.exists(), reason="needs verifiers: make .venv/verifiers/.installed")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def said(text, finish="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def reply(body):
    """The same for the same question; one in eight is cut off."""
    image, text = body["messages"][-1]["content"][-2:]
    url = image["image_url"]["url"]
    return said(box_of(text["text"], url), "length" if hash_of(url) % 8 == 0 else "stop")


def hash_of(text):
    return sum(text[-400:].encode())


@pytest.fixture
def chat():
    running = ChatServer()
    running.reply = reply
    yield running
    running.close()


def evaluated(url, out, *words):
    """Traces of verifiers' own evaluation command, in the samples' order."""
    command = [str(BIN / "vf-eval"), "ivt-grounding", "-m", "m", "--client.base-url", url, "-n", str(SAMPLES)]
    command += ["--env.taskset.split", "val", "--sampling.temperature", "0", "--no-push", "--no-rich"]
    command += ["-o", str(out), "--run.name", "run", *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = (out / "run" / "traces.jsonl").read_text().splitlines()
    traces = [trace for line in lines for trace in json.loads(line)["traces"]]
    return sorted(traces, key=lambda trace: trace["task"]["data"]["index"])


def assert_same(trace, episode):
    steps = episode.steps
    assert trace["ok"] and trace["info"]["sample_id"] == episode.sample_id
    assert trace["info"]["target"] == pytest.approx(episode.target, abs=1e-6)
    assert len(trace["info"]["boxes"]) == len(steps)
    for box, gain, step in zip(trace["info"]["boxes"], trace["info"]["gains"], steps, strict=True):
        assert gain == step.reward
        assert box == (None if step.proposal is None else pytest.approx(step.proposal, abs=1e-6))
    assert trace["rewards"]["iou_gain"]["score"] == sum(step.reward for step in steps)
    assert trace["metrics"] == {
        "final_iou": steps[-1].iou,
        "best_iou": max(step.iou for step in steps),
        "acc_0_5": steps[-1].iou >= 0.5,
        "stopped": steps[-1].stop,
        "unusable": sum(step.invalid is not None for step in steps),
    }


@pytest.mark.parametrize("layout", ["fresh", "prefix"])
def test_a_server_is_asked_the_same_as_by_this_project_and_its_answers_score_the_same(chat, tmp_path, layout):
    prompts = tmp_path / "prompts.yaml"
    text = (ROOT / "agents" / "prompts" / "tiny.yaml").read_text()
    prompts.write_text(text + f"layout: {layout}\nsystem: Be brief.\nrequest: {{top_k: 5}}\n")
    served = Served(ServedOptions(prompt_file=str(prompts), concurrency=1))
    shown = served.asked.shown
    env = make_vector_env("IVT-Scenes-v0", 1, split="val", **shown)
    agent = load_agent(f"openai:{chat.url}#m", env=env, served=served)
    episodes = rollout(env, agent, SAMPLES, 0, indices=range(SAMPLES))
    mine = [body for body in chat.chats if PING not in json.dumps(body)]
    chat.seen.clear()
    traces = evaluated(chat.url, tmp_path / "out", "--env.taskset.prompts", str(prompts))
    asked = {json.dumps(body, sort_keys=True) for body in chat.chats}
    assert asked == {json.dumps(body, sort_keys=True) for body in mine} and len(chat.chats) == len(mine)
    assert len(traces) == SAMPLES
    for trace, episode in zip(traces, episodes, strict=True):
        assert_same(trace, episode)
        heads = [node for node in trace["nodes"] if node.get("parent") is None]
        turns = [node for node in trace["nodes"] if node["message"]["role"] == "user"]
        assert len(heads) == 1 and sum(node["sampled"] for node in trace["nodes"]) == len(episode.steps)
        assert len({node.get("parent") for node in turns}) == (1 if layout == "fresh" else len(turns))
    ends = [(episode.steps[-1].stop, any(s.invalid for s in episode.steps)) for episode in episodes]
    assert {stop for stop, _ in ends} == {True, False} and any(invalid for _, invalid in ends), "nothing is compared"


def test_a_server_that_fails_gives_no_score_and_resume_asks_for_what_is_missing(chat, tmp_path):
    # Each request is tried three times.
    chat.faults = [None] * 4 + [500] * 6
    words = ("--max-concurrent", "1", "--env.taskset.prompts", "tiny", "--env.taskset.kwargs", '{"max_steps": 2}')
    traces = evaluated(chat.url, tmp_path / "out", *words)
    failed = [trace for trace in traces if not trace["ok"]]
    assert 1 <= len(failed) <= 2 and all(trace["rewards"] == trace["metrics"] == {} for trace in failed)
    assert "busy" in failed[0]["errors"][0]["message"]
    before = len(chat.chats)
    traces = evaluated(chat.url, tmp_path / "out", *words, "--resume")
    assert len(traces) == SAMPLES and all(trace["ok"] and trace["rewards"] for trace in traces)
    assert 0 < len(chat.chats) - before <= 2 * len(failed)


def test_it_loads_from_python_and_nothing_else_here_imports_verifiers():
    code = """if True:
    import sys, ivt_env, ivt_agents.cli, ivt_agents.play.served, ivt_agents.vlm.prompts
    assert "verifiers" not in sys.modules
    import ivt_grounding
    env = ivt_grounding.load_environment(split="val", env="IVT-Photos-v0", kwargs={"max_steps": 5})
    first, second = env.taskset.take(2)
    assert first.data.name == "IVT-Photos-v0/val#0" and second.data.index == 1 and first.key != second.key
    assert env.taskset.environment().max_steps == 5 and env.taskset.dataset.name == "photos"
    assert env.config.agent.runtime.type == "subprocess" and "target" not in first.data.model_dump_json()
    import pytest
    with pytest.raises(ValueError, match="no prompts 'gpt'"):
        ivt_grounding.load_environment(prompts="gpt")
    """
    run = subprocess.run([str(BIN / "python"), "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    for folder in ("ivt_env", "agents", "experiments", "benchmarks"):
        for path in (ROOT / folder).glob("**/*.py"):
            assert "import verifiers" not in path.read_text(encoding="utf-8"), path
