"""A model behind an address is a policy like any other, and what was paid for is never lost or paid for again.

Silent when false: scores of a frame that the model does not use, answers of another model from a cache, a run of
hours that ends in a traceback, a bill that is twice as high.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer
from learner import base_policy
from scripted_server import PING, box_of
from server_processes import free_port, scripted, transformers_serve

from benchmarks import served as benchmark
from ivt_agents import cli
from ivt_agents.evaluation import evaluate, swaps
from ivt_agents.play.by_name import load_agent
from ivt_agents.play.chat import BudgetError, ServedError
from ivt_agents.play.served import FrameCheck, Served, ServedOptions
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.prompts import ImageSize, PromptError, load_prompts, shipped_prompts
from ivt_agents.vlm.tiny import weights_folder
from ivt_env import boxes
from ivt_env.data.scenes import Scenes
from ivt_env.episodes import load_episodes
from ivt_env.files import FileError
from ivt_env.rollouts import make_vector_env, rollout


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("ivt_agents.play.chat.FIRST_WAIT_S", 0.01)


def said(text, finish="stop", **more):
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish, **more}
    return {"choices": [choice], "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}}


def asked(body):
    """The text and the image of a request's last turn."""
    image, text = body["messages"][-1]["content"][-2:]
    return text["text"], image["image_url"]["url"]


@pytest.fixture
def chat():
    running = ChatServer()
    running.reply = lambda body: said(box_of(*asked(body)))
    yield running
    running.close()


def options(out, url, **changes):
    values = dict(policies=[f"m=openai:{url}#m"], prompt_file="tiny", split="val", samples=12, num_envs=8, out=out)
    return evaluate.Args(**(values | {"concurrency": 4} | changes))


def predictions(out, name="m"):
    lines = (out / "predictions" / f"{name}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def questions(chat):
    return [body for body in chat.chats if asked(body)[0] != PING]


# --- Everywhere where a policy is named ---------------------------------------------------------------------------


def test_evaluate_swaps_rollout_and_controls_take_a_served_model(chat, tmp_path, capsys):
    name = f"openai:{chat.url}#m"
    evaluate.main(options(tmp_path / "e", chat.url, forced=False))
    assert not (tmp_path / "e" / "answers").exists() and not list(tmp_path.glob("e/episodes/*.part.jsonl"))
    swaps.main(swaps.Args(policies=[f"m={name}"], prompt_file="tiny", split="val", samples=6, out=tmp_path / "s"))
    words = ["rollout", "--agent", name, "--prompt-file", "tiny", "--out", str(tmp_path / "r")]
    assert cli.main(words) == 0
    assert cli.main(["report", str(tmp_path / "e"), "--swaps", str(tmp_path / "s")]) == 0
    env = make_vector_env("IVT-Scenes-v0", 4, split="val", max_steps=2)
    served = Served(ServedOptions(prompt_file="tiny"))
    for spec in (f"medoid-3:{name}", f"second-shot:{name}", f"stop-after-1:{name}"):
        before = len(questions(chat))
        played = rollout(env, load_agent(spec, env=env, served=served), 4, 0, indices=range(4))
        assert all(e.steps[0].proposal is not None and e.steps[0].tokens for e in played), spec
        assert len(questions(chat)) - before >= 4
    assert {b["temperature"] for b in questions(chat)} == {0, 1.0}


def test_best_of_takes_the_answer_that_the_server_is_surest_of(chat):
    boxes_sent = iter([[100, 100, 200, 200], [300, 300, 400, 400], [500, 500, 600, 600]])
    sure = iter([-1.0, -0.1, -2.0])

    def reply(body):
        if asked(body)[0] == PING:
            return said("ready")
        assert body["logprobs"] is True
        return said(f'{{"bbox_2d": {next(boxes_sent)}}}', logprobs={"content": [{"logprob": next(sure), "token": "x"}]})

    chat.reply = reply
    env = make_vector_env("IVT-Scenes-v0", 1, split="val")
    served = Served(ServedOptions(prompt_file="tiny", concurrency=1))
    (episode,) = rollout(env, load_agent(f"best-of-3:openai:{chat.url}#m", served=served), 1, 0, indices=[0])
    assert episode.steps[0].proposal == pytest.approx((0.3, 0.3, 0.4, 0.4))
    assert episode.steps[0].confidence == pytest.approx(np.exp(-0.1)) and episode.steps[0].tokens == 300
    chat.reply = lambda body: said(box_of(*asked(body)))
    with pytest.raises(ServedError, match="gives no logprobs"):
        rollout(env, load_agent(f"best-of-3:openai:{chat.url}#m", served=served), 1, 0, indices=[1])


# --- A dead, wrong or failing server ------------------------------------------------------------------------------


def test_a_wrong_address_is_found_by_one_small_request_before_anything_is_lost(chat, tmp_path):
    """test_teachers.py tries more faults."""
    evaluate.main(options(tmp_path, chat.url, policies=["r=random"], forced=False))
    before = (tmp_path / "results.json").read_bytes()
    policies = ["first=random", f"m=openai:{chat.url}#m"]
    for fault, message in (((200, {}, b"null"), "does not say"), ("gone", "refused")):
        chat.seen.clear()
        chat.faults = [fault] * 2
        if fault == "gone":
            chat.close()
        with pytest.raises(ServedError, match=f"one small question first.*{message}"):
            evaluate.main(options(tmp_path, chat.url, policies=policies, overwrite=True))
        assert (tmp_path / "results.json").read_bytes() == before and len(chat.seen) <= 2


def test_a_failing_server_ends_with_status_2_one_line_and_the_command_that_goes_on(chat, tmp_path, capsys):
    answered, usual = threading.Semaphore(30), chat.handle

    def handle(handler, body):
        return usual(handler, body) if answered.acquire(blocking=False) else chat.send(handler, 500, b"down")

    chat.handle = handle
    words = f"evaluate --policies m=openai:{chat.url}#m --prompt-file tiny --split val --samples 20".split()
    words += ["--num-envs", "4", "--out", str(tmp_path / "e"), "--concurrency", "2"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "gave up after 6 attempts" in error and "answers are kept" in error and error.endswith("--resume")
    kept = list((tmp_path / "e" / "episodes").glob("*.part.jsonl"))
    assert kept and len(load_episodes(kept[0])) >= 4 and len(list((tmp_path / "e" / "answers").iterdir())) >= 10


def test_passing_troubles_change_no_score(chat, tmp_path, monkeypatch):
    evaluate.main(options(tmp_path / "calm", chat.url, forced=False))
    expected = predictions(tmp_path / "calm")
    chat.faults = [None, 429, 500, None, "broken", "cut", ("stall", 0.5), (429, {"Retry-After": "0"}), 500]
    usual = evaluate.Served.policy

    def impatient(self, address, **more):
        policy = usual(self, address, **more)
        policy.client._client = policy.client._client.with_options(timeout=0.2)
        return policy

    monkeypatch.setattr(evaluate.Served, "policy", impatient)
    evaluate.main(options(tmp_path / "rough", chat.url, forced=False))
    assert predictions(tmp_path / "rough") == expected and not chat.faults


def test_a_prompt_file_that_was_changed_is_not_gone_on_with(chat, tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("prompt: '{expression} {box}'\nframe: relative_1000\n")
    more = {"prompt_file": str(file), "forced": False, "concurrency": 1}
    with pytest.raises(BudgetError):
        evaluate.main(options(tmp_path / "e", chat.url, max_requests=4, **more))
    assert (tmp_path / "e" / "prompts.yaml").read_text() == file.read_text()
    file.write_text(file.read_text().replace("{box}", "{box}!"))
    with pytest.raises(FileError, match="are not those that .* was begun with"):
        evaluate.main(options(tmp_path / "e", chat.url, resume=True, **more))
    evaluate.main(options(tmp_path / "e", chat.url, overwrite=True, **more))
    assert "!" in (tmp_path / "e" / "prompts.yaml").read_text()


def test_the_caps_hold_and_the_next_run_goes_on(chat, tmp_path):
    for cap, message in (({"max_requests": 9}, "cap of 9 requests"), ({"max_tokens": 500}, "cap of 500 tokens")):
        out, before = tmp_path / message, len(chat.chats)
        with pytest.raises(BudgetError, match=f"{message}.*--max-.*--resume"):
            evaluate.main(options(out, chat.url, concurrency=1, forced=False, **cap))
        assert len(chat.chats) - before == (9 if "max_requests" in cap else 5)
        evaluate.main(options(out, chat.url, forced=False, resume=True))
        asked_for = Counter(json.dumps(b, sort_keys=True) for b in chat.chats[before:] if asked(b)[0] != PING)
        assert set(asked_for.values()) == {1}


def test_a_server_killed_at_random_moments_loses_nothing_and_is_paid_once(tmp_path):
    port, log, calm_log = free_port(), tmp_path / "paid.log", tmp_path / "calm.log"
    url, few = f"http://127.0.0.1:{port}/v1", {"samples": 24, "num_envs": 8}

    def ended(server):
        server.kill()
        server.wait()

    calm = scripted(port, 0.0, calm_log)
    evaluate.main(options(tmp_path / "calm", url, **few))
    ended(calm)
    total, out, finished = len(calm_log.read_text().split()), tmp_path / "killed", 0
    log.touch()
    # More may be answered before the server is gone.
    for moment in sorted(random.Random(5).sample(range(1, total - 24), 4)):
        server = scripted(port, 0.01, log)

        def kill(server=server, moment=moment):
            while len(log.read_text().split()) < moment and server.poll() is None:
                time.sleep(0.002)
            server.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        more = few | ({"resume": True} if (out / "config.json").exists() else {})
        with pytest.raises(ServedError, match="this goes on|one small question first"):
            evaluate.main(options(out, url, **more))
        killer.join()
        ended(server)
        now = sum(len(load_episodes(path)) for path in out.glob("episodes/*.part.jsonl"))
        now += sum(len(load_episodes(path.parent)) for path in out.glob("episodes/*/episodes.jsonl"))
        assert now >= finished, "finished episodes are on disk, and stay there"
        finished = now
    server = scripted(port, 0.0, log)
    evaluate.main(options(out, url, resume=True, **few))
    ended(server)
    paid = Counter(log.read_text().split())
    # An answer that was sent when the server was killed may be missing from its log: at most one for each thread.
    assert set(paid.values()) == {1} and set(paid) <= set(calm_log.read_text().split()) and len(paid) > 0.8 * total
    assert predictions(out) == predictions(tmp_path / "calm")
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "calm"))
    assert a["rows"] == b["rows"] and a["costs"] == b["costs"]


def test_sixteen_at_a_time_are_many_times_as_fast_as_one(tmp_path):
    """benchmarks/served.py measures it on 500 samples; here few, on a machine that may be busy."""
    port, seconds = free_port(), {}
    server = scripted(port, 0.2, tmp_path / "log")
    env = make_vector_env("IVT-Scenes-v0", 16, split="val", max_steps=1)
    for at_a_time in (1, 16):
        served = Served(ServedOptions(prompt_file="tiny", concurrency=at_a_time))
        agent = load_agent(f"openai:http://127.0.0.1:{port}/v1#m", served=served)
        start = time.monotonic()
        rollout(env, agent, 16, 0, indices=range(16))
        seconds[at_a_time] = time.monotonic() - start
    server.kill()
    server.wait()
    assert seconds[1] / seconds[16] > 4, seconds


def test_the_benchmark_of_it_runs(capsys):
    benchmark.main(benchmark.Args(samples=6, seconds=0.01, concurrency=(4,), forced=False))
    assert "the scores are equal" in capsys.readouterr().out


# --- What is asked, and what comes back ---------------------------------------------------------------------------


def test_every_shipped_prompt_file_gives_back_the_box_that_it_writes():
    assert len(shipped_prompts()) == 7
    for name in shipped_prompts():
        file = load_prompts(name)
        size = file.image.of(480, 640)
        box = [0.1, 0.25, 0.6, 0.75]
        text = file.codec.box_text(box, size)
        answer = text if file.codec.key is None else f'Yes: [{{"{file.codec.key}": {text}, "label": "x"}}]'
        action = file.codec.parse(answer)
        assert file.codec.decode(action.numbers, size) == pytest.approx(box, abs=2e-3), name
        assert file.codec.parse('It fits. {"stop": true}').stop and file.codec.parse("nothing").failed
        question = file.prompts.fill("the {box} cup", text, size=size)
        assert (text in question) == ("{box}" in file.prompts.text), name
        assert "the {box} cup" in question and "{width}" not in question


def test_gemini_answers_y_first_and_qwen_vl_in_tags():
    assert load_prompts("gemini").codec.parse('{"box_2d": [10, 20, 30, 40]}').numbers == (20, 10, 40, 30)
    tags = load_prompts("qwen-vl-v1").codec
    text = "<ref>cup</ref><box>(1,2),(3,4)</box> or <box>(100,200),(300,400)</box>"
    assert tags.parse(text).numbers == (100, 200, 300, 400) and tags.parse(text + ' {"stop": true}').stop
    assert tags.parse('{"stop": true} no, <box>(1,2),(3,4)</box>').numbers == (1, 2, 3, 4)
    assert tags.decode((0, 0, 999, 999), (1, 1)) == [0, 0, 1, 1]


def test_images_are_sent_at_the_size_that_the_frame_counts_in():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    size = load_prompts("qwen2.5-vl").image
    for height, width in np.random.default_rng(0).integers(20, 3000, (300, 2)).tolist():
        assert size.of(height, width) == smart_resize(height, width, 28, 3136, 12845056)
    assert ImageSize(max_pixels=10_000).of(200, 400) == (70, 141) and ImageSize().of(33, 77) == (33, 77)
    assert size.resize(np.zeros((480, 640, 3), np.uint8)).shape == (476, 644, 3)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[1]", "holds a list"),
        ("prompt: 'find {expression}'", "frame is not declared"),
        ("prompt: find it\nframe: relative_1000", "asks for {expression}"),
        ("prompt: '{expression}'\nframe: percent", "coordinate frame 'percent'"),
        ("+fames: 1", "unknown key 'fames'"),
        ("+answer: '[x1, y1, x2, x1]'", "once each"),
        ("+layout: long", "layout is 'long'"),
        ("+image: {side: 3}", "unknown key 'side'"),
        ("+image: {max_pixels: 0}", "max_pixels"),
        ("+overlay: {style: dots}", "style 'dots'"),
        ("prompt: '{expression} {looks}'\nframe: relative_1000", "overlay: {trail: true} only"),
        ("+prompt: x", "given twice"),
    ],
)
def test_a_wrong_prompt_file_is_refused_by_its_key(tmp_path, text, why):
    (tmp_path / "p.yaml").write_text(text.replace("+", "prompt: '{expression}'\nframe: relative_1000\n"))
    with pytest.raises(PromptError, match=rf"p\.yaml: .*{why}"):
        load_prompts(tmp_path / "p.yaml")
    with pytest.raises(PromptError, match="give one of gemini"):
        load_prompts("gemni")


def test_a_prompt_file_decides_what_is_drawn_asked_and_sent(chat, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "first: 'Find {expression}.'\nsystem: Be brief.\n"
        "prompt: 'Better than {box}? {expression}, {width} x {height}'\n"
        "layout: prefix\nview: both\noverlay: {style: outline, colour: [0, 255, 0]}\nframe: relative_1\n"
        "image: {max_pixels: 10000}\nmax_tokens: 33\n"
        "request: {max_tokens: null, max_completion_tokens: 34, top_p: 0.5}\n"
    )
    chat.reply = said('{"bbox_2d": [0.1, 0.1, 0.5, 0.5]}')
    out = tmp_path / "e"
    evaluate.main(options(out, chat.url, prompt_file=str(tmp_path / "mine.yaml"), samples=4, forced=False))
    first, later = (next(b for b in questions(chat) if len(b["messages"]) == n) for n in (2, 4))
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert first["messages"][1]["content"][-1]["text"].startswith("Find ")
    assert [m["role"] for m in later["messages"]] == ["system", "user", "assistant", "user"]
    assert later["messages"][3]["content"][-1]["text"].startswith("Better than [0.1, 0.1, 0.5, 0.5]?")
    assert later["messages"][3]["content"][-1]["text"].endswith("100 x 100")
    assert sum(part["type"] == "image_url" for part in later["messages"][3]["content"]) == 2
    assert (first["max_completion_tokens"], first["top_p"]) == (34, 0.5) and "max_tokens" not in first
    assert load_episodes(out / "episodes" / "m")[0].steps[0].proposal == pytest.approx((0.1, 0.1, 0.5, 0.5))


def test_an_answer_that_ran_into_its_limit_has_no_action_and_the_default_prompts_are_named(chat, tmp_path, capsys):
    chat.reply = said('{"bbox_2d": [100, 100, 500, 500]} and', finish="length")
    evaluate.main(options(tmp_path, chat.url, prompt_file=None, forced=False, samples=3))
    assert "is asked with the prompts qwen3-vl" in capsys.readouterr().err
    assert all(s.parse_failure for e in load_episodes(tmp_path / "episodes" / "m") for s in e.steps)


def test_a_frame_that_fits_much_worse_than_another_is_warned_of_with_numbers(chat, tmp_path, caplog):
    dataset, by_text = Scenes("val"), {}
    for index in range(52):
        by_text.setdefault(dataset[index].expression, dataset[index].box)

    def pixels(body):
        text = asked(body)[0]
        box = next((b for e, b in by_text.items() if f"Locate {e}. " in text), (0, 0, 1, 1))
        side = 256 if text.endswith("none.") else 384  # of the canvas that `tiny` asks for, and of the scenes
        return said(f'{{"bbox_2d": {[round(v * side) for v in box]}}}')

    chat.reply = pixels
    (tmp_path / "p.yaml").write_text("prompt: 'Locate {expression}. '\nframe: resized_pixels\n")
    for prompts, warned in (("tiny", True), (str(tmp_path / "p.yaml"), False)):
        caplog.clear()
        out, few = tmp_path / f"{warned}", {"samples": 52, "forced": False, "episode_steps": 1}
        evaluate.main(options(out, chat.url, prompt_file=prompts, **few))
        said_so = [r.message for r in caplog.records if "mean IoU" in r.message]
        assert len(said_so) == warned
        assert all("the first 50 boxes" in m and "(relative_1000)" in m and "as resized_pixels" in m for m in said_so)


def test_the_check_of_the_frame_sees_swapped_axes_and_needs_some_answers(caplog):
    env = make_vector_env("IVT-Scenes-v0", 1, split="val")
    (episode,) = rollout(env, load_agent("oracle", env=env), 1, 0, indices=[0])
    x1, y1, x2, y2 = (round(v * 1000) for v in episode.target)
    episode.steps[0].text = f'{{"bbox_2d": [{y1}, {x1}, {y2}, {x2}]}}'
    check = FrameCheck("m", load_prompts("qwen3-vl"), env.screen.side)
    for _ in range(9):
        check.see(episode)
    check.say()
    assert not caplog.messages
    check.see(episode)
    check.say()
    assert "as relative_1000, x and y swapped" in caplog.messages[-1]
    assert float(boxes.iou((y1, x1, y2, x2), (x1, y1, x2, y2))) < 0.8


def test_prompts_are_listed_shown_and_put_into_a_models_folder(tmp_path, capsys):
    assert cli.main(["prompts"]) == 0 and "qwen2.5-vl" in capsys.readouterr().out
    assert cli.main(["prompts", "gemini"]) == 0 and "box_2d" in capsys.readouterr().out
    folder = tmp_path / "model"
    shutil.copytree(weights_folder(), folder)
    (folder / "policy.json").unlink()
    load_policy(folder)
    assert "asked with the prompts qwen3-vl" in capsys.readouterr().err
    assert cli.main(["prompts", "tiny", "--into", str(folder)]) == 0
    wanted = load_prompts("tiny").prompts
    assert load_policy(folder).dialogue.prompts == load_prompts(folder / "policy.json").prompts == wanted
    assert cli.main(["prompts", "qwen3-vl", "--into", str(folder)]) == 2
    assert cli.main(["prompts", "gemini", "--into", str(folder), "--overwrite"]) == 2


# --- Results that travel ------------------------------------------------------------------------------------------


def test_the_line_of_each_sample_holds_what_was_said_and_is_scored_alike(chat, tmp_path, capsys):
    evaluate.main(options(tmp_path, chat.url))
    header, *rows = predictions(tmp_path)
    assert header == {"format": "xyxy", "frame": "relative"} and len(rows) == 12
    episodes = load_episodes(tmp_path / "episodes" / "m")
    for row, episode in zip(rows, episodes, strict=True):
        assert row["sample_id"] == episode.sample_id and row["texts"] == [s.text for s in episode.steps]
        assert len(row["boxes"]) == len(row["tokens"]) == len(episode.steps) and row["tokens"][0] == 100
    raw = json.loads((tmp_path / "predictions" / "m.jsonl").read_text().splitlines()[1])
    assert all(0 <= s < 60 for s in raw["seconds"])
    results = json.loads((tmp_path / "results.json").read_text())
    capsys.readouterr()
    words = ["score", str(tmp_path / "predictions" / "m.jsonl"), "--dataset", "scenes", "--split", "val"]
    assert cli.main([*words, "--samples", "12", "--resamples", "0", "--json"]) == 0
    scored = {r["metric"]: r["value"] for r in json.loads(capsys.readouterr().out)["rules"]["common"]["rows"]}
    row = next(r for r in results["rows"] if r["column"] == "learned_stop")
    for metric in ("Acc@0.5", "Acc@0.9"):
        assert scored[metric] == pytest.approx(row["scores"][metric]["value"])
    assert {"version", "commit", "date", "machine", "python", "args", "policies"} <= results.keys()
    assert results["costs"]["m"][0]["answers"] > 1


def test_a_report_refuses_swaps_of_other_policies_or_of_another_split(tmp_path, capsys):
    evaluate.main(evaluate.Args(policies=["a=random"], samples=5, forced=False, out=tmp_path / "e"))
    for name, more, why in (
        ("a=centre", {}, "swaps of a=centre, and the evaluation is of random"),
        ("a=random", {"split": "val"}, "swaps on scenes/val.*--split test"),
        ("b=random", {}, None),
    ):
        swaps.main(swaps.Args(policies=[name], samples=5, out=tmp_path / "s", overwrite=True, **more))
        capsys.readouterr()
        status = cli.main(["report", str(tmp_path / "e"), "--swaps", str(tmp_path / "s")])
        error = capsys.readouterr().err
        assert (status == 0) == (why is None)
        if why:
            assert re.search(why, error), error


# --- A real server ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The base address of transformers' own server with the tiny model."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(weights_folder(), folder / "tiny")
    with transformers_serve("tiny", folder) as url:
        yield url


def test_the_page_for_newcomers_shows_what_its_commands_print_without_torch(real, tmp_path):
    (tmp_path / "torch.py").write_text('raise ModuleNotFoundError("no torch", name="torch")\n')
    page = (Path(__file__).parents[1] / "docs" / "evaluate_your_vlm.md").read_text(encoding="utf-8")
    shown = re.findall(r"```console\n\$ ivt (.*)\n((?:.*\n)+?)```", page)
    assert len(shown) == 3
    for command, output in shown:
        words = shlex.split(command.replace("http://127.0.0.1:8000/v1", real))
        words = [sys.executable, "-m", "ivt_agents.cli", *words]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert [line.rstrip() for line in done.stdout.splitlines()] == [line.rstrip() for line in output.splitlines()]


def test_the_tiny_model_behind_transformers_own_server_scores_as_it_does_here(real, tmp_path):
    base_policy().save(tmp_path / "base")
    policies = [f"here={tmp_path / 'base'}", f"served=openai:{real}#tiny"]
    more = {"prompt_file": "tiny-base", "samples": 16, "num_envs": 16}
    evaluate.main(options(tmp_path / "e", real, policies=policies, **more))
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    scores = {
        name: {r["column"]: r["scores"] for r in results["rows"] if r["policy"] == name} for name in ("here", "served")
    }
    stated = {"confidence_gated", "verifier_gated"}  # a chat answer states no stop probability
    assert set(scores["here"]) - set(scores["served"]) == stated and len(scores["served"]) >= 6
    assert all(scores["here"][column] == found for column, found in scores["served"].items())
    assert predictions(tmp_path / "e", "served") == predictions(tmp_path / "e", "here")
