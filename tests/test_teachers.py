"""A teacher costs money and time: nothing is asked twice, the cap holds, and the key stays where it is.

A text that holds numbers or names the hidden target would be trained on in silence, so what may become
a trace is tested as closely as how it is fetched.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from chat_server import GOOD, ChatServer, answer
from harvesting import make_drafts
from PIL import Image

from ivt_agents.play.chat import AnswerCache, Budget, BudgetError, ChatClient, ServedError, Usage
from ivt_agents.play.on_split import play
from ivt_agents.sft import train as train_sft
from ivt_agents.sft.demonstrations import Demonstration, load_demonstrations, save_demonstrations
from ivt_agents.sft.harvest import write_traces
from ivt_agents.sft.lessons import teach_to_look
from ivt_agents.sft.teacher import load as teachers
from ivt_agents.sft.teacher.load import ServedTeacher, TeacherError, load_teacher, trace_request, unusable_reason
from ivt_agents.sft.teacher.template import critique
from ivt_agents.training.folder import RunError
from ivt_agents.vlm.codec import parse_action
from ivt_agents.vlm.load import load_policy
from ivt_env.data.scenes import Scenes
from ivt_env.rendering import Surroundings

KEY = "sk-test-7f3a9c-never-to-be-seen"


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    running = ChatServer()
    yield running
    running.close()


@pytest.fixture(scope="module")
def dataset():
    return Scenes("val")


@pytest.fixture(scope="module")
def drafts(dataset):
    return make_drafts(dataset, 5)


def teacher_of(chat, model="#m", timeout_s=5.0, **budget):
    """One request after the other, so that a test can say which is the one that fails."""
    usage = Usage(Budget(**budget, options="--teacher-max"))
    return ServedTeacher(ChatClient(chat.url + model, usage, concurrency=1, attempts=4, timeout_s=timeout_s))


def written(teacher, requests):
    texts = {}
    teacher.write(requests, texts.__setitem__)
    return [texts[place] for place in range(len(requests))]


def harvest(tmp_path, drafts, dataset, teacher, name="harvest.jsonl", **options):
    return write_traces(drafts, dataset, teacher, tmp_path / name, AnswerCache(tmp_path / "cache"), **options)


# --- What is sent ---------------------------------------------------------------------------------


def test_the_request_holds_the_drawn_image_the_expression_and_the_key_in_its_header(chat, dataset, drafts):
    draft = next(d for d in drafts if d.trace)
    written(teacher_of(chat), [trace_request(dataset, draft.index, draft.shown)])
    ((path, headers, body),) = chat.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}" and body["model"] == "m"
    image, text = body["messages"][1]["content"]
    sample = dataset[draft.index]
    assert sample.expression in text["text"] and critique(draft.shown, sample.box) in text["text"]
    encoded = image["image_url"]["url"].removeprefix("data:image/png;base64,")
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).astype(int)
    plain = dataset.image(sample).astype(int)
    assert sent.shape == plain.shape
    differs = np.abs(sent - plain).sum(-1) > 0
    ys, xs = np.nonzero(differs)
    both = np.array([draft.shown, sample.box])
    height, width = plain.shape[:2]
    assert np.allclose(
        [xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height],
        [*both[:, :2].min(0), *both[:, 2:].max(0)],
        atol=0.01,
    ), "both boxes are drawn, and nothing else"
    numbers = [str(round(v * 1000)) for v in (*sample.box, *draft.shown)]
    assert not any(n in text["text"] for n in numbers if len(n) > 1), "the teacher is not shown coordinates"


def test_large_images_are_sent_smaller():
    class Large:
        def __getitem__(self, index):
            return Scenes("train")[0]

        def image(self, sample):
            return np.zeros((1000, 2000, 3), np.uint8)

    assert trace_request(Large(), 0, (0.1, 0.1, 0.5, 0.5)).image.shape == (384, teachers.IMAGE_SIDE, 3)


def test_a_server_of_one_model_needs_no_name_and_of_several_does(chat, dataset, drafts, tmp_path):
    harvest(tmp_path, drafts[:2], dataset, teacher_of(chat, model=""))
    assert chat.chats[0]["model"] == "one"
    chat.models = ["one", "two"]
    with pytest.raises(ServedError, match="serves 2 models \\(one, two\\): name one"):
        harvest(tmp_path, drafts[:3], dataset, teacher_of(chat, model=""))


def test_without_a_key_no_header_is_sent(chat, dataset, drafts, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    harvest(tmp_path, drafts[:2], dataset, teacher_of(chat))
    assert "Authorization" not in chat.seen[0][1]


# --- What comes back ------------------------------------------------------------------------------


def test_the_teachers_words_take_the_place_of_the_templates_and_boxes_stay(chat, dataset, drafts, tmp_path):
    made = harvest(tmp_path, drafts, dataset, teacher_of(chat))
    assert [(d.index, d.shown, d.answer) for d in made] == [(d.index, d.shown, d.answer) for d in drafts]
    assert [d.trace for d in made] == [GOOD if d.trace else "" for d in drafts]
    assert load_demonstrations(tmp_path / "harvest.jsonl", dataset) == made
    assert len(chat.chats) == sum(bool(d.trace) for d in drafts), "first answers need no words"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (", , , , , ,", "no sentence"),
        ("Up.", "no sentence"),
        ("x" * 301, "longer than 300"),
        ('Move it. {"bbox_2d": [1, 2, 3, 4]}', "JSON"),
        ("Move it to [120, 40, 300, 90].", "JSON or markup"),
        ("<think>hm</think> Move left.", "markup"),
        ("Too low.<|im_end|>", "markup"),
        ("The box should start at 120 and end at 340.", "numbers"),
        ("Shift by 0.2 of the width.", "numbers"),
        ("Make it 5% wider.", "numbers"),
        ("Move it 8 pixels up.", "numbers"),
        ("The corner is at (1, 2).", "numbers"),
        ("I'm sorry, I can't help with that.", "refusal"),
        ("As an AI I see nothing.", "refusal"),
        ("Move toward the green outline.", "green outline"),
    ],
)
def test_a_text_that_may_not_become_a_trace_is_named(text, reason):
    assert reason in (unusable_reason(text) or "")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "Wrong cup: the expression means the 2nd one from the left, beside the green box of cereal"[:75],
        "It cuts off the giraffe's head; extend it upward, and trim the right side.",
        "I can see that it is too wide.",
    ],
)
def test_plain_remarks_are_used(text):
    assert unusable_reason(text) is None
    assert parse_action(f'{text}\n{{"stop": true}}').stop


def test_quotation_marks_and_line_breaks_are_tidied():
    assert teachers.tidy(' "Too low;\n move up." ') == "Too low; move up."


def test_an_unusable_text_costs_its_demonstration_only_and_is_counted(chat, dataset, drafts, tmp_path, caplog):
    chat.faults = [None, answer('{"bbox_2d": [1, 2, 3, 4]}'), answer(None)]
    with caplog.at_level(logging.WARNING):
        made = harvest(tmp_path, drafts, dataset, teacher_of(chat))
    assert len(made) == len(drafts) - 2
    assert "2 of 10 texts could not be used" in caplog.text and "holds JSON" in caplog.text and "empty" in caplog.text


def test_a_teacher_that_is_mostly_unusable_is_an_error(chat, dataset, tmp_path):
    chat.reply = answer("I'm sorry, I can't do that.")
    with pytest.raises(TeacherError, match="20 of 20 texts.*limit 20%.*not fit"):
        harvest(tmp_path, make_drafts(dataset, 15), dataset, teacher_of(chat))
    assert len(chat.chats) == 20


# --- Servers in trouble ---------------------------------------------------------------------------


def test_a_passing_trouble_is_tried_again_and_a_silent_server_times_out(chat, dataset, drafts, tmp_path):
    chat.faults = [500, 503, 429, None, "broken", "cut", ("stall", 2.0)]
    made = harvest(tmp_path, drafts[:3], dataset, teacher_of(chat, timeout_s=0.5))
    assert [bool(d.trace) for d in made] == [False, True, True] and not chat.faults
    assert len(chat.chats) == 2 + 6


def test_after_the_last_attempt_it_says_what_is_kept_and_the_next_run_goes_on(chat, dataset, drafts, tmp_path):
    chat.faults = [None, 500, 500, 500, 500]
    with pytest.raises(ServedError, match="gave up after 4 attempts.*500.*2 of 15 demonstrations.*kept.*run again"):
        harvest(tmp_path, drafts, dataset, teacher_of(chat))
    before = len(chat.chats)
    assert len(harvest(tmp_path, drafts, dataset, teacher_of(chat))) == len(drafts)
    assert len(chat.chats) - before == 9


def test_a_server_that_is_not_there_is_named(dataset, drafts, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    gone = ChatServer()
    gone.close()
    with pytest.raises(ServedError, match="127.0.0.1.*gave up after 4 attempts.*refused"):
        harvest(tmp_path, drafts[:2], dataset, teacher_of(gone))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (400, "400 Bad Request.*busy"),
        ((429, {"Retry-After": "3600"}), "429.*asks to wait 3600"),
        ((302, {"Location": "http://127.0.0.1:1/elsewhere"}), "302"),
        ((429, {}, b'{"error": {"code": "insufficient_quota"}}'), "insufficient_quota"),
        ({"choices": []}, "does not say what an answer costs"),
        ({"choices": [], "usage": {"total_tokens": 5}}, "no choices"),
    ],
)
def test_what_no_second_try_can_mend_is_an_error_at_once(chat, dataset, drafts, tmp_path, fault, message):
    chat.faults = [fault]
    with pytest.raises(ServedError, match=message):
        harvest(tmp_path, drafts[:2], dataset, teacher_of(chat))
    assert len(chat.chats) == 1


# --- The key --------------------------------------------------------------------------------------


def test_a_wrong_or_missing_key_is_a_clear_error_at_once(chat, dataset, drafts, tmp_path, caplog, monkeypatch):
    chat.key = "another"
    with caplog.at_level(logging.DEBUG), pytest.raises(ServedError) as error:
        harvest(tmp_path, drafts, dataset, teacher_of(chat))
    assert "401, the key in OPENAI_API_KEY was refused" in str(error.value) and len(chat.chats) == 1
    assert "Incorrect API key provided: [key]" in str(error.value)
    assert KEY not in str(error.value) and KEY not in caplog.text
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ServedError, match="OPENAI_API_KEY is not set"):
        harvest(tmp_path, drafts, dataset, teacher_of(chat))


def test_the_key_is_in_no_file_no_message_and_no_representation(chat, dataset, drafts, tmp_path, caplog):
    chat.faults = [500, (429, {"Retry-After": "0"}), answer(f"The key is {KEY[:3]} {{}}")]
    teacher = teacher_of(chat)
    with caplog.at_level(logging.DEBUG):
        harvest(tmp_path, drafts, dataset, teacher)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 10 and not any(KEY.encode() in p.read_bytes() for p in files)
    assert KEY not in caplog.text and KEY not in repr(teacher) + teacher.name
    assert chat.seen[0][1]["Authorization"].endswith(KEY), "it was really used"


def test_a_key_that_no_header_can_hold_and_one_in_the_address_are_refused_without_showing_them(monkeypatch, caplog):
    for address in ("http://me:secret@127.0.0.1/v1", "http://127.0.0.1/v1?key=secret"):
        with pytest.raises(ServedError, match="put the key into OPENAI_API_KEY") as error:
            load_teacher(f"openai:{address}")
        assert "secret" not in str(error.value)
    for key in ("sk-with\nnewline", "sk-ünicode"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ServedError, match="value not shown") as error:
            ChatClient("http://127.0.0.1:1/v1")
        assert "sk-" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ChatClient("http://example.invalid/v1")
    assert "without encryption" in caplog.text and KEY not in caplog.text


# --- Cost and resuming ----------------------------------------------------------------------------


def test_a_second_run_sends_no_request(chat, dataset, drafts, tmp_path):
    first = harvest(tmp_path, drafts, dataset, teacher_of(chat))
    sent = len(chat.seen)
    again = harvest(tmp_path, drafts, dataset, teacher_of(chat), "elsewhere.jsonl")
    assert again == first and len(chat.seen) == sent == 10
    assert (tmp_path / "elsewhere.jsonl").read_bytes() == (tmp_path / "harvest.jsonl").read_bytes()


def test_another_model_prompt_or_image_is_asked_anew(chat, dataset, drafts, tmp_path, monkeypatch):
    harvest(tmp_path, drafts[:2], dataset, teacher_of(chat), "a.jsonl")
    harvest(tmp_path, drafts[:2], dataset, teacher_of(chat, model="#other"), "b.jsonl")
    monkeypatch.setattr(teachers, "QUESTION", teachers.QUESTION + " Be kind.")
    harvest(tmp_path, drafts[:2], dataset, teacher_of(chat), "c.jsonl")
    monkeypatch.setattr(teachers, "_TARGET", teachers.Overlay(style="outline", colour=(0, 220, 90), width=5))
    harvest(tmp_path, drafts[:2], dataset, teacher_of(chat), "d.jsonl")
    assert len(chat.chats) == 4


def test_a_damaged_cache_file_is_asked_for_again(chat, dataset, drafts, tmp_path):
    harvest(tmp_path, drafts, dataset, teacher_of(chat))
    next((tmp_path / "cache").glob("*.json")).write_text("{")
    assert harvest(tmp_path, drafts, dataset, teacher_of(chat), "again.jsonl")[1].trace == GOOD
    assert len(chat.chats) == 11


@pytest.mark.parametrize(
    ("budget", "sent", "message"),
    [
        ({"max_requests": 4}, 4, "cap of 4 requests is reached .--teacher-max-requests"),
        ({"max_tokens": 250}, 3, "cap of 250 tokens is reached: 300 used .--teacher-max-tokens"),
    ],
)
def test_the_cap_stops_with_a_clear_message_and_what_is_done_is_kept(
    chat, dataset, drafts, tmp_path, budget, sent, message
):
    with pytest.raises(BudgetError, match=message) as error:
        harvest(tmp_path, drafts, dataset, teacher_of(chat, **budget))
    assert len(chat.chats) == sent and "kept in" in str(error.value) and "--demonstrations" in str(error.value)
    kept = load_demonstrations(tmp_path / "harvest.jsonl", dataset)
    assert sum(bool(d.trace) for d in kept) == sent
    # The next run, with its own budget, goes on behind them.
    assert len(harvest(tmp_path, drafts, dataset, teacher_of(chat))) == len(drafts) and len(chat.chats) == 10


def test_retries_count_against_the_cap_and_one_that_allows_nothing_is_refused(chat, dataset, drafts, tmp_path):
    chat.faults = [500, 500, 500]
    with pytest.raises(BudgetError, match="cap of 2 requests"):
        harvest(tmp_path, drafts, dataset, teacher_of(chat, max_requests=2))
    assert len(chat.chats) == 2
    with pytest.raises(ServedError, match="0 requests allows nothing"):
        Budget(max_requests=0)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from harvesting import make_drafts
from ivt_agents.play.chat import AnswerCache, ChatClient
from ivt_agents.sft.harvest import write_traces
from ivt_agents.sft.teacher.load import ServedTeacher
from ivt_env.data.scenes import Scenes
dataset, folder = Scenes("val"), Path(sys.argv[2])
teacher = ServedTeacher(ChatClient(sys.argv[1] + "#m", concurrency=1))
write_traces(make_drafts(dataset, 12), dataset, teacher, folder / "harvest.jsonl", AnswerCache(folder / "cache"))
"""


def test_a_killed_harvest_goes_on_and_every_demonstration_is_there_once(chat, dataset, tmp_path):
    chat.pause_s = 0.05
    path = tmp_path / "harvest.jsonl"
    command = [sys.executable, "-c", CHILD, chat.url, str(tmp_path), str(Path(__file__).parent)]
    root = Path(__file__).parent.parent
    child = subprocess.Popen(command, cwd=root)  # the key is in the environment, from the fixture
    until = time.monotonic() + 60
    while time.monotonic() < until and (not path.exists() or path.read_bytes().count(b"\n") < 10):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = path.read_bytes().count(b"\n")
    assert 10 <= kept < 36
    with path.open("a") as file:
        file.write('{"dataset": "scenes", "spl')  # what a kill in the middle of a write leaves behind
    subprocess.run(command, cwd=root, check=True)
    drafts = make_drafts(dataset, 12)
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    assert len(lines) == len(drafts) == 36
    expected = [[d.index, list(d.shown or ()), list(d.answer or ())] for d in drafts]
    assert [[x["index"], x["shown"] or [], x["answer"] or []] for x in lines] == expected
    assert len(chat.chats) <= 24 + 1, "only the request in flight may be asked twice"


def test_the_file_of_another_harvest_is_refused(chat, dataset, drafts, tmp_path):
    harvest(tmp_path, drafts, dataset, teacher_of(chat))
    with pytest.raises(TeacherError, match="was begun by.*#m.*not by.*#other.*remove it"):
        harvest(tmp_path, drafts, dataset, teacher_of(chat, model="#other"))
    with pytest.raises(TeacherError, match="3 demonstrations that this run does not ask for"):
        harvest(tmp_path, drafts[3:], dataset, teacher_of(chat))


# --- The whole command ----------------------------------------------------------------------------


def test_unknown_teachers_are_refused():
    for name in ("openai:", "hf:", "gpt", "openai:ftp://x/v1"):
        with pytest.raises((TeacherError, ServedError), match="openai:"):
            load_teacher(name)


def test_the_local_teacher_runs_and_its_useless_words_are_caught(dataset, drafts, tmp_path):
    """The tiny model knows no remarks: it answers with a box, which must never become a trace."""
    teacher = load_teacher("hf:tiny")
    requests = [trace_request(dataset, d.index, d.shown) for d in drafts if d.trace][:3]
    texts = written(teacher, requests)
    assert len(texts) == 3 and texts == written(teacher, requests) and all(isinstance(t, str) for t in texts)
    assert [written(teacher, [r])[0] for r in requests] == texts, "a batch answers as one by one"
    made = harvest(tmp_path, drafts, dataset, teacher)
    usable = [d for d in drafts if not d.trace]
    assert [d for d in made if not d.trace] == usable
    assert all(unusable_reason(d.trace) is None for d in made if d.trace)


def small(out, **changes):
    values = dict(
        gradient_accumulation_steps=1,
        out=out,
        samples=12,
        steps=2,
        per_device_train_batch_size=4,
        eval_samples=0,
        report_to="none",
    )
    return train_sft.main(train_sft.Args(**(values | changes)))


def test_the_training_command_takes_a_model_teacher(chat, tmp_path):
    folder = small(tmp_path / "run", teacher=f"openai:{chat.url}#m", teacher_cache=tmp_path / "cache")
    rows = [json.loads(x) for x in (tmp_path / "run" / "demonstrations.jsonl").read_text().splitlines()]
    search = {r["index"] for r in rows if r["index"] % 3 == 2}
    assert {(r["trace"] == GOOD) for r in rows if r["index"] not in search and r["answer"]} == {True}
    assert search and not any(r["trace"] == GOOD for r in rows if r["index"] in search or not r["answer"])
    assert (folder / "policy.json").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["teacher"] == f"openai:{chat.url}#m"
    sent = len(chat.seen)
    small(tmp_path / "again", teacher=f"openai:{chat.url}#m", teacher_cache=tmp_path / "cache")
    assert len(chat.seen) == sent + 1, "the small question that comes first, and nothing that was answered before"
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gone", "gave up after 2 attempts.*refused"),
        (401, "401, the key in OPENAI_API_KEY"),
        (404, "404 Not Found"),
        ("two models", "serves 2 models.*name one"),
        ((200, {}, b"<html>hello</html>"), "gave up after 2 attempts.*not JSON"),
    ],
)
def test_a_teacher_that_cannot_answer_is_found_before_anything_is_done(chat, tmp_path, monkeypatch, fault, message):
    monkeypatch.setattr(train_sft, "load_policy", lambda *_, **__: pytest.fail("a model was loaded first"))
    address = f"openai:{chat.url}#m"
    if fault == "gone":
        chat.close()
    elif fault == "two models":
        chat.models, address = ["one", "two"], f"openai:{chat.url}"
    else:
        chat.faults = [fault, fault]
    with pytest.raises(ServedError, match=f"one small question first.*({message})"):
        small(tmp_path / "run", teacher=address, teacher_cache=tmp_path / "cache")
    assert not (tmp_path / "run").exists() and len(chat.seen) <= 2


def test_the_template_writes_just_what_the_lessons_are_and_asks_nobody(tmp_path):
    small(tmp_path / "run", first_answers="policy")
    dataset, student = Scenes("train"), load_policy("tiny")
    indices = [int(i) for i in np.random.default_rng((0, 1)).choice(len(dataset), size=12, replace=False)]
    played = play(student, "IVT-Scenes-v0", "train", indices, ignore_stop=True, max_steps=1, **student.shown)
    first, around = [e.steps[0].box for e in played], Surroundings(**student.shown["closeup"])
    rng = np.random.default_rng((0, 2))
    expected = teach_to_look(dataset, indices, first, rng, student.view, around, counted=True)
    save_demonstrations(tmp_path / "expected.jsonl", expected)
    assert (tmp_path / "run" / "demonstrations.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_a_stop_and_what_is_seen_in_a_search_scene_keep_the_templates_words(chat, tmp_path):
    """The teacher sees the target, and would say that it lies where the student has not looked yet."""
    dataset = Scenes("train")
    stop = Demonstration("scenes", "train", 0, "train-0", dataset[0].box, None, "A red ring. The box fits.")
    away = Demonstration("scenes", "train", 2, "train-2", (0.1, 0.1, 0.2, 0.2), dataset[2].siblings[0], "Wrong place.")
    assert harvest(tmp_path, [stop, away], dataset, teacher_of(chat)) == [stop, away] and not chat.seen


def test_a_teacher_that_would_have_nothing_to_do_is_refused(tmp_path):
    with pytest.raises(RunError, match="--single-shot: no traces would be written"):
        small(tmp_path / "run", teacher="hf:tiny", single_shot=True)
    assert not (tmp_path / "run").exists()
