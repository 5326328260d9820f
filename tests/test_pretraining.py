"""Pretraining shows the model what it is asked later, and computes what the library computes.

Silent when false: a question that reads otherwise than the policy's prompt, or a pass that differs from the model
that is saved, gives weights that are worse for reasons that no loss curve shows.
"""

from __future__ import annotations

import json
import os
import resource
import signal

import numpy as np
import pytest
import torch

from ivt_agents.command import progress_bars
from ivt_agents.training.finite import NotFiniteError
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.pretrain import Args, pair_questions, questions, save, train
from ivt_agents.vlm.pretrain_model import GRID, SlotModel, patchify, words_of
from ivt_agents.vlm.pretrain_pool import (
    ANSWER,
    KINDS,
    LEGIBLE,
    QUESTIONS,
    SLOT,
    Drawing,
    cell_labels,
    empty_pool,
    search_views,
    standard_views,
)
from ivt_agents.vlm.tiny import build_model, number_ids, tiny_image_processor, tiny_tokenizer
from ivt_agents.vlm.turns import WHOLE
from ivt_env import boxes
from ivt_env.data.scenes import make_scene
from ivt_env.data.scenes.world import MARKS


def grid_of(count):
    return torch.tensor([[1, GRID, GRID]] * count)


ASKED = [("the red ring", (0.1, 0.2, 0.3, 0.4)), ("the blue star marked with a hoop", (0.0, 0.5, 0.2, 1.0))]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def words(tokenizer):
    return words_of(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = build_model(tokenizer, seed=1).eval()
    model.set_attn_implementation("eager")
    return model


def test_a_slot_reads_as_the_policys_prompt_and_answer(words, tokenizer):
    policy = load_policy("tiny")
    image = policy.dialogue.process([np.zeros((96, 96, 3), np.uint8)])[0]
    prompt = policy.dialogue.prompt("the red ring", None, [(image, WHOLE)])
    ids, length = words.slot(*ASKED[0])
    assert prompt.ids[-length:] == ids[:length]
    answer = policy.dialogue.completion(policy.codec.action_text(np.array(ASKED[0][1], np.float32), (96, 96)))
    assert ids[length:] == answer and len(answer) == ANSWER


def test_a_close_up_is_described_as_the_lessons_do(words, tokenizer):
    policy = load_policy("tiny")
    for looks, text in (
        ("orange circle marked with a plus", "An orange circle marked with a plus."),
        ("red ring", "A red ring."),
    ):
        assert words.description(looks) == policy.dialogue.completion(text) and len(words.description(looks)) <= ANSWER
    assert tokenizer.decode(words.describe).startswith("Describe image 2.<|im_end|>")
    assert len(words.describe) + ANSWER <= SLOT


def test_every_expression_of_the_scenes_fits_its_slot_and_is_read_back_as_it_was(words, tokenizer):
    assert {f"{space}{w}" for w in (*MARKS, "marked", "with") for space in ("", "Ġ")} <= tokenizer.get_vocab().keys()
    longest = 0
    for split in ("train", "test_distractors", "train_search"):
        for index in range(40):
            for question in make_scene(split, index).questions(QUESTIONS):
                ids, length = words.slot(question.text, (0, 0, 1, 1))
                wanted = f"Locate {question.text}. Current box: none.<|im_end|>\n<|im_start|>assistant\n"
                assert tokenizer(wanted)["input_ids"] == ids[:length]
                longest = max(longest, len(ids))
    assert SLOT - 8 <= longest <= SLOT


def test_images_are_cut_into_patches_as_the_image_processor_does():
    images = np.random.default_rng(0).integers(0, 255, (3, 96, 96, 3), dtype=np.uint8)
    wanted = tiny_image_processor()(images=list(images), return_tensors="pt")
    assert torch.equal(wanted["pixel_values"], patchify(torch.from_numpy(images)))
    assert torch.equal(wanted["image_grid_thw"], grid_of(3))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_pass_over_slots_equals_the_models_own_over_each_question_alone(model, tokenizer, words, attention, images):
    model.set_attn_implementation(attention)
    slots = SlotModel(model, tokenizer, len(ASKED), images)
    shown = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3 * images, 96, 96, 3), dtype=np.uint8))
    filled = torch.zeros(3, len(ASKED), SLOT, dtype=torch.long)
    lengths = torch.zeros(3, len(ASKED), dtype=torch.long)
    for number, asked in enumerate(ASKED):
        ids, lengths[:, number] = words.slot(*asked)
        filled[:, number, : len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        merged, deep = slots.see(shown)
        hidden, told = slots.answer(merged, deep, filled, lengths)
    own = model.model.visual(patchify(shown), grid_of(3 * images))
    assert (own.pooler_output - merged.flatten(0, 1)).abs().max() < 1e-4
    assert (own.deepstack_features[0] - deep[0].flatten(0, 1)).abs().max() < 1e-4
    for row in range(3):
        for number in range(len(ASKED)):
            ids = [*slots.prefix.tolist(), *filled[row, number].tolist()]
            length = len(slots.prefix) + int(lengths[row, number])
            ids = torch.tensor([ids[: length + ANSWER]])
            kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
            with torch.no_grad():
                alone = model.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=kinds,
                    pixel_values=patchify(shown[row * images : (row + 1) * images]),
                    image_grid_thw=grid_of(images),
                ).last_hidden_state[0]
            assert torch.equal(told[row, number], ids[0, length:])
            assert (alone[length - 1 : -1] - hidden[row, number]).abs().max() < 1e-4


def test_pairs_are_a_scene_and_a_close_up_of_it_and_questions_say_in_which_frame_they_are_answered(words, tokenizer):
    with Drawing(words, 8, 8, 1) as drawing:
        drawing.until(1.0)
        rng = np.random.default_rng(0)
        pairs = drawing.pool.sample_pairs(rng, 200, 0.3)
        asked, lengths = pair_questions(drawing.pool, pairs, 4, words, rng)
    kind, scene = pairs // 8, pairs % 8  # rows of one kind lie together
    assert (scene[:, 0] == scene[:, 1]).all() and len(set(scene[:, 0])) == 8
    search = kind[:, 0] == KINDS.index("search whole")
    assert 0.2 < search.mean() < 0.4 and (kind[~search] == [0, 1]).all() and set(kind[search, 1]) == {3, 4}
    assert (lengths[:, 0] > 0).all() and asked.shape == (200, 5, SLOT)
    for row in range(200):
        for number in range(5):
            length = int(lengths[row, number])
            question, answer = (tokenizer.decode(part) for part in asked[row, number].split([length, SLOT - length]))
            if length:
                assert question.startswith("Describe" if number == 4 else "Locate the ")
                assert answer.startswith(('{"bbox_2d": [', '{"image": 2, "bbox_2d": [', "A")[number // 2])
    told = lengths[:, 4] > 0
    assert torch.equal(told, torch.from_numpy(np.isin(kind[:, 1], [1, 3]))), "two objects have no one description"


def test_a_close_up_is_what_the_window_says_and_its_questions_are_about_what_it_shows():
    closeups = asked = 0
    for index in range(10):
        for view in (*standard_views("train", index), *search_views("train", index)):
            x1, y1, x2, y2 = (np.array(view.window) * view.scene.side).round().astype(int).tolist()
            assert x2 - x1 == y2 - y1 and 0 <= x1 < x2 <= view.scene.side and 0 <= y1 < y2 <= view.scene.side
            mean = view.scene.image()[y1:y2, x1:x2].mean((0, 1))
            assert np.abs(mean - view.image.mean((0, 1))).max() < 2
            closeups += view.window != (0, 0, 1, 1)
    with Drawing(words_of(tiny_tokenizer()), 12, 12, 1) as drawing:
        drawing.until(1.0)
        pool, number = drawing.pool, number_ids(tiny_tokenizer())
        for kind in range(len(KINDS)):
            for scene in range(12):
                row = pool.row(kind, scene)
                view = (search_views if kind >= 2 else standard_views)("train", scene)[kind - 2 if kind >= 2 else kind]
                assert np.array_equal(pool.images[row], view.image)
                for slot, length in zip(pool.slots[row], pool.lengths[row], strict=True):
                    if length:
                        box = [number.index(int(slot[length + k])) / 1000 for k in (1, 3, 5, 7)]
                        things = [boxes.clip(boxes.into_window(t.box, view.window)) for t in view.scene.things]
                        assert min(np.abs(t - box).max() for t in things) < 1e-3, "a box that is no object's"
                        asked += 1
                assert (pool.lengths[row] > 0).any(), "an image that nothing is asked about"
    assert closeups > 24 and asked > 150


def test_a_mark_is_a_label_of_the_cells_that_it_lies_in_and_only_where_it_is_legible():
    read = 0
    for index in range(24):
        for view in search_views("train", index):
            labels = cell_labels(view.scene.things, view.window)
            for cell in np.flatnonzero(labels[:, 8] >= 0):
                x, y = (cell % 6 + 0.5) / 6, (cell // 6 + 0.5) / 6
                kind = MARKS[int(labels[cell, 8])]
                (thing,) = [t for t in view.scene.things if t.mark.kind == kind]
                mark = boxes.into_window(np.array(thing.mark.box_px) / thing.image_side, view.window)
                assert (mark[2] - mark[0]) * 96 >= LEGIBLE
                assert mark[0] - 1 / 12 <= x <= mark[2] + 1 / 12 and mark[1] - 1 / 12 <= y <= mark[3] + 1 / 12
                read += 1
    assert read > 24


def test_cell_labels_put_every_object_somewhere_it_is():
    for index in range(25):
        scene = make_scene("train", index)
        labels = cell_labels(scene.things)
        found = {tuple(np.float32(v) for v in row[4:8]) for row in labels if row[0] > 0}
        known = {tuple(np.float32(v) for v in t.box) for t in scene.things}
        assert found <= known and len(found) >= 0.8 * len(known)


def test_scenes_come_while_others_are_waited_for_and_questions_that_there_are_come_first(words):
    with Drawing(words, 30, 30, 1) as drawing:
        drawing.until(0.5)
        assert 15 <= drawing.pool.drawn[0] < 30
        drawing.until(1.0)
        rng = np.random.default_rng(0)
        rows = drawing.pool.sample(rng, 64, (0.2,) * 5)
        _, lengths = questions(drawing.pool, rng, rows, 3)
        assert len({drawing.pool.images[row].tobytes() for row in rows}) > 30
        assert (lengths[:, 0] > 0).all(), "a question that there is not comes before one"


def test_a_folder_without_room_for_the_pool_is_named_before_anything_is_drawn(tmp_path, monkeypatch):
    """Without it, a process that draws is ended by SIGBUS in the middle, and the one that trains waits for ever."""
    pool = empty_pool(3, 2, str(tmp_path))
    size = sum(array.nbytes for array in (pool.images, pool.cells, pool.slots, pool.lengths))
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) >= size
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"5 scenes take 0.00 GB; TMPDIR says where.*ivt-pool-"):
            Drawing(None, 3, 2, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("ivt-pool-*"))


def test_a_process_that_draws_and_is_killed_ends_the_training(words):
    with Drawing(words, 1000, 0, 1) as drawing, pytest.raises(ChildProcessError, match="was killed; where memory"):
        os.kill(next(iter(drawing._workers._processes)), signal.SIGKILL)
        drawing.until(1.0)


SHRUNKEN = {"scenes": 16, "search_scenes": 8, "vision_steps": 3, "vision_batch": 2, "steps": 3, "batch": 2}
SHRUNKEN |= {"questions_per_image": 2, "pair_steps": 3, "pair_batch": 2, "questions_per_pair": 2}


def run(out, **options):
    args = Args(out=out, **{**SHRUNKEN, **options})
    words = words_of(tiny_tokenizer())
    with Drawing(words, 0, 12, 1, split="val") as held_out, Drawing(words, 16, 8, 1) as drawing:
        with progress_bars(note=True, disable=True) as progress:
            train(args, drawing, held_out, progress)
    return (out / "model.safetensors").read_bytes(), json.loads((out / "training.json").read_text())


def test_one_seed_gives_the_same_weights_twice_and_a_policy_that_loads(tmp_path):
    first, record = run(tmp_path / "a")
    assert first == run(tmp_path / "b")[0]
    assert first != run(tmp_path / "c", seed=1)[0]
    assert set(record["marks read"]["end"]) == {"search one", "search pair"}
    assert record["args"]["steps"] == 3
    assert sum(f.stat().st_size for f in (tmp_path / "a").iterdir()) <= 8_000_000
    assert load_policy(str(tmp_path / "a")).core is not None
    assert {entry["stage"] for entry in record["log"]} == {1, 2, 3}


def test_the_third_stage_goes_on_from_the_weights_of_the_first_two(tmp_path):
    _, before = run(tmp_path / "a")
    _, record = run(tmp_path / "b", model=tmp_path / "a")
    assert {entry["stage"] for entry in record["log"]} == {3} and record["before"] == before
    seen, then = (load_policy(str(tmp_path / name)).model.state_dict() for name in ("a", "b"))
    moved = {name for name in seen if not torch.equal(seen[name], then[name])} - {"lm_head.weight"}  # tied
    assert moved and all(n.startswith("model.language_model.") for n in moved), "the vision tower stays as it is"


def test_a_time_limit_becomes_a_number_of_steps_that_the_record_holds(tmp_path):
    _, record = run(tmp_path / "a", seconds=3.0)
    second = [entry["step"] for entry in record["log"] if entry["stage"] == 2]
    assert record["args"]["steps"] >= 1 and second[-1] == record["args"]["steps"] - 1


@pytest.mark.parametrize("stage", [{"vision_steps": 0, "lr": 1e30}, {"lr": 1e38}])
def test_what_is_not_finite_stops_either_stage_and_saves_nothing(tmp_path, stage):
    with pytest.raises(NotFiniteError, match=r"step [123]: .* is (nan|inf), so training stops.*give a lower --lr"):
        run(tmp_path / "run", **stage)
    assert not (tmp_path / "run").exists()


def test_the_third_stage_names_its_own_rate_where_it_diverges_and_keeps_what_was_saved(tmp_path):
    with pytest.raises(NotFiniteError, match=r"training stops.*give a lower --pair-lr"):
        run(tmp_path / "run", pair_lr=(1e30, 1e30))
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_weights_that_overflow_in_half_precision_are_not_saved(tmp_path):
    model, tokenizer = build_model(tiny_tokenizer(), seed=0), tiny_tokenizer()
    next(model.parameters()).data.view(-1)[0] = 1e5
    with pytest.raises(NotFiniteError, match="not finite in half precision"):
        save(model, tokenizer, Args(out=tmp_path / "run"), {})
    assert not (tmp_path / "run").exists()
