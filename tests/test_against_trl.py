"""The update is checked against TRL's: the same rollouts, the same options, the same loss and gradients.

If this is false, training still runs and still improves something: a clip bound on the wrong side, a KL
term without its ratio, an observation token in the loss or a normalisation that counts padding changes
the size or the direction of each update by some per cent and raises no error. TRL's trainer is another
implementation of the same formulas, with another layout (one padded row a rollout, masked; here packed
turns), so an agreement to 1e-5 leaves no room for such a slip on one side.

Conventions that had to be matched, because they differ by intention:

- One row of TRL is a whole rollout. Losses that average over a *sequence* first (grpo, gspo) divide by the
  tokens of the rollout there and by those of one answer here, so they are the same for rollouts of one
  answer only, and a test says that they differ for longer ones.
- dr_grpo's constant is rows x ``max_completion_length`` there, and episodes x actions x token limit here.
- TRL never samples an image placeholder, but scores with the whole vocabulary; here the scorer leaves
  out what the sampler leaves out. The comparison scores with the whole vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from learner import base_policy, small_policy, small_trainer, trl_config
from trl import GRPOTrainer

from ivt_agents.grpo.collect import collect
from ivt_agents.grpo.losses import CLIPS, denominator
from ivt_agents.trl.environment import TRLGrounding, episode_reward, processor_for, rows
from ivt_agents.vlm.codec import BoxCodec, parse_action
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.prompts import images_of
from ivt_agents.vlm.turns import Turn
from ivt_env.rollouts import make_vector_env

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:You are using")

LIMIT = 1e-5
Rollouts = list[list[Turn]]


def policy_with_whole_vocabulary(lora: bool) -> Any:
    policy = small_policy(lora)
    policy.layout = "prefix"
    policy.sampling = replace(policy.sampling, suppressed=())
    with torch.no_grad():  # a fresh adapter's B is zero, and so is the gradient of its A
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    return policy


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    """Eight conversations; their old log-probabilities are moved, so that the clip binds on both sides."""
    policy = policy_with_whole_vocabulary(lora=True)
    env = make_vector_env("IVT-Scenes-v0", 8, split="train")
    policy.generator.manual_seed(5)
    turns = collect(env, policy, [3, 4], 4).turns
    noise = np.random.default_rng(0)
    for turn in (t for episode in turns for t in episode):
        turn.log_probs = [float(v + noise.uniform(-0.6, 0.6)) for v in turn.log_probs]
    assert [len(episode) for episode in turns] == [3] * 8, "else nothing is said about later turns"
    return turns


def reference_of(turn: Turn) -> list[float]:
    """Made-up log-probabilities of a reference, the same for both sides."""
    return [v - 0.3 + 0.1 * (token % 7) for v, token in zip(turn.log_probs, turn.completion, strict=True)]


def trl_trainer(folder, policy: Any, **options: object) -> GRPOTrainer:
    limit = policy.sampling.max_new_tokens
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "scale_rewards": "none"}
    settings |= {"max_completion_length": 3 * limit, "generation_kwargs": {"max_new_tokens": limit}}
    reward = options.pop("reward_funcs", episode_reward)
    factory = options.pop("environment_factory", None)
    return GRPOTrainer(
        model=copy.deepcopy(policy.model),
        reward_funcs=reward,
        args=trl_config(folder, **(settings | options)),
        train_dataset=Dataset.from_list(rows(range(8))),
        processing_class=processor_for(policy),
        environment_factory=factory,
    )


def as_trl(rollouts: Rollouts, advantages: list[list[float]], pad: int, image_token: int) -> dict[str, Any]:
    """Conversations as TRL's trainer holds them: prompts padded left, the rest right, sampled tokens marked.

    Args:
        rollouts: the turns of each conversation; each prompt begins with the turn before it.
        advantages: of each turn.
        pad: fills up.
        image_token: id of an image placeholder.
    """
    fields = ("tool_mask", "old_per_token_logps", "ref_per_token_logps", "advantages")
    ends = [turns[-1].prompt.ids + turns[-1].completion for turns in rollouts]
    firsts = [len(turns[0].prompt.ids) for turns in rollouts]
    most, longest = max(firsts), max(len(e) - f for e, f in zip(ends, firsts, strict=True))
    count = len(rollouts)
    ids = torch.full((count, most + longest), pad)
    mask = torch.zeros(count, most + longest, dtype=torch.long)
    values = {name: torch.zeros(count, longest) for name in fields}
    for i, (turns, end, first) in enumerate(zip(rollouts, ends, firsts, strict=True)):
        ids[i, most - first : most - first + len(end)] = torch.tensor(end)
        mask[i, most - first : most - first + len(end)] = 1
        for turn, advantage in zip(turns, advantages[i], strict=True):
            assert end[: len(turn.prompt.ids)] == turn.prompt.ids, "a conversation that does not grow"
            at = slice(len(turn.prompt.ids) - first, len(turn.prompt.ids) - first + len(turn.completion))
            assert end[first:][at] == turn.completion
            values["tool_mask"][i, at] = 1
            values["old_per_token_logps"][i, at] = torch.tensor(turn.log_probs)
            values["ref_per_token_logps"][i, at] = torch.tensor(reference_of(turn))
            values["advantages"][i, at] = advantage
    if all(len(set(a)) == 1 for a in advantages):
        values["advantages"] = torch.tensor([a[0] for a in advantages])
    images = [p for turns in rollouts for p in turns[-1].prompt.images]
    return values | {
        "prompt_ids": ids[:, :most],
        "prompt_mask": mask[:, :most],
        "completion_ids": ids[:, most:],
        "completion_mask": mask[:, most:],
        "num_items_in_batch": values["tool_mask"].sum(),
        "pixel_values": torch.cat([p.patches for p in images]),
        "image_grid_thw": torch.tensor([p.grid for p in images]),
        "num_images": [len(turns[-1].prompt.images) for turns in rollouts],
        "mm_token_type_ids": (ids == image_token).long(),
    }


Found = tuple[float, dict[str, torch.Tensor]]


def by_trl(folder, policy: Any, rollouts: Rollouts, advantages: list[list[float]], loss: str, beta: float) -> Found:
    low, high = CLIPS[loss]
    options: dict[str, Any] = {"loss_type": loss, "epsilon": low, "epsilon_high": high, "beta": beta}
    if loss == "gspo":
        options |= {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    if loss == "cispo":  # its bound is on the weight itself, not on the distance from 1
        options["epsilon_high"] = 1 + high
    trainer = trl_trainer(folder, policy, **options)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss_value = trainer._compute_loss(
        trainer.model, as_trl(rollouts, advantages, policy.tokenizer.pad_token_id, policy.image_token)
    )
    loss_value.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss_value.detach()), gradients


def by_us(
    folder, policy: Any, rollouts: Rollouts, advantages: list[list[float]], loss: str, beta: float, **options: object
) -> Found:
    low, high = CLIPS[loss]
    settings = {"loss_type": loss, "epsilon": low, "epsilon_high": high, "beta": beta}
    settings |= {"per_device_train_batch_size": 7, "max_grad_norm": 1e9}
    trainer = small_trainer(folder, policy, **(settings | options))
    if beta:
        trainer.reference = lambda turns: torch.tensor([v for t in turns for v in reference_of(t)])
    turns = [t for episode in rollouts for t in episode]
    flat = [a for row in advantages for a in row]
    gradients: dict[str, torch.Tensor] = {}
    named = [(n, p) for n, p in policy.model.named_parameters() if p.requires_grad]
    trainer.optimizer.step = lambda *_, **__: gradients.update({n: p.grad.clone() for n, p in named})
    tokens = sum(len(t.completion) for t in turns)
    capacity = len(rollouts) * 3 * policy.sampling.max_new_tokens
    metrics = trainer._update(turns, flat, turns[0], denominator(loss, tokens, len(turns), capacity), True)
    return metrics["train/loss"], gradients


def difference(a: Found, b: Found) -> float:
    """Largest difference of the losses and of any entry of any gradient."""
    assert a[1].keys() == b[1].keys() and a[1]
    return max(abs(a[0] - b[0]), *(float((g - b[1][n]).abs().max()) for n, g in a[1].items()))


def size(found: Found) -> float:
    return max(float(g.abs().max()) for g in found[1].values())


def per_rollout(rollouts: Rollouts) -> list[list[float]]:
    """Trajectory credit: one value for all answers of a rollout."""
    values = np.linspace(-1, 1, len(rollouts))
    return [[float(v)] * len(turns) for v, turns in zip(values, rollouts, strict=True)]


def per_step(rollouts: Rollouts) -> list[list[float]]:
    return [[float(v) for v in np.random.default_rng(i).normal(size=len(t))] for i, t in enumerate(rollouts)]


CASES = [
    ("dapo", True, 0.1, per_step),
    ("dr_grpo", True, 0.1, per_rollout),
    ("cispo", True, 0.0, per_rollout),
    ("dapo", False, 0.0, per_rollout),
]


@pytest.mark.parametrize(("loss", "lora", "beta", "credit"), CASES)
def test_loss_and_gradients_of_whole_conversations_agree(tmp_path, rollouts, loss, lora, beta, credit):
    policy = policy_with_whole_vocabulary(lora)
    arguments = (policy, rollouts, credit(rollouts), loss, beta)
    theirs, ours = by_trl(tmp_path / "trl", *arguments), by_us(tmp_path / "us", *arguments)
    assert set(ours[1]) == {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert all(float(g.abs().max()) > 0 for g in ours[1].values()) and size(ours) > 100 * LIMIT
    assert difference(ours, theirs) < LIMIT


@pytest.mark.parametrize(("loss", "beta"), [("grpo", 0.1), ("gspo", 0.0)])
def test_losses_that_average_over_a_sequence_agree_for_rollouts_of_one_answer(tmp_path, rollouts, loss, beta):
    policy = policy_with_whole_vocabulary(True)
    # Later turns, so that the prompts hold earlier answers, which must stay out of the loss.
    single = [[turns[i % 3]] for i, turns in enumerate(rollouts)]
    arguments = (policy, single, per_rollout(single), loss, beta)
    theirs, ours = by_trl(tmp_path / "trl", *arguments), by_us(tmp_path / "us", *arguments)
    assert size(ours) > 100 * LIMIT
    assert difference(ours, theirs) < LIMIT


def test_for_longer_rollouts_their_sequence_is_another_one(tmp_path, rollouts):
    policy = policy_with_whole_vocabulary(True)
    arguments = (policy, rollouts, per_rollout(rollouts), "grpo", 0.0)
    assert difference(by_us(tmp_path / "us", *arguments), by_trl(tmp_path / "trl", *arguments)) > 10 * LIMIT


def test_the_comparison_notices_a_wrong_clip_advantage_kl_or_token(tmp_path, rollouts):
    """Else an agreement would say nothing."""
    policy = policy_with_whole_vocabulary(True)
    right = per_rollout(rollouts)
    theirs = by_trl(tmp_path / "trl", policy, rollouts, right, "dapo", 0.1)

    def ours(name: str, played: Rollouts = rollouts, credit=right, beta: float = 0.1, **options: object) -> Found:
        return by_us(tmp_path / name, policy, played, credit, "dapo", beta, **options)

    assert difference(ours("right"), theirs) < LIMIT
    wrong = {
        "epsilon_high": ours("a", epsilon_high=0.2),
        "epsilon": ours("b", epsilon=0.28),
        "advantage": ours("c", credit=[[a + 0.05 for a in row] for row in right]),
        "no kl": ours("d", beta=0.0),
        "an answer is missing": ours("e", [rollouts[0][1:], *rollouts[1:]], [right[0][1:], *right[1:]]),
    }
    for name, found in wrong.items():
        assert difference(found, theirs) > 10 * LIMIT, name


class Recorded(TRLGrounding):
    """Remembers what it was asked to play."""

    def reset(self, index: int, **_: Any) -> list[dict[str, Any]]:
        self._index, self._texts, self.images = index, [], []
        return super().reset(index)

    def _shown(self, observation: dict[str, Any]) -> list[dict[str, Any]]:
        shown = super()._shown(observation)
        self.images.append(shown[0]["image"])
        return shown

    def answer(self, text: str) -> list[dict[str, Any]]:
        """Play one action.

        Args:
            text: The answer.
        """
        self._texts.append(text)
        return super().answer(text)


def test_trl_plays_the_environment_and_its_tokens_are_those_of_the_prefix_layout(tmp_path):
    """Else the two trainers would be timed on different conversations, or rewarded for other actions."""
    policy = load_policy("tiny", temperature=1.0, max_new_tokens=40, layout="prefix")
    # The base does not know the question that counts looks, and fills the limit with numbers.
    policy.dialogue.prompts = replace(policy.dialogue.prompts, text=policy.dialogue.prompts.first)
    seen: dict[str, Any] = {}

    def reward(completions, environments, completion_ids, **_: Any):
        totals = episode_reward(completions, environments)
        seen.update(environments=list(environments), ids=completion_ids, totals=totals)
        return totals

    trainer = trl_trainer(
        tmp_path,
        policy,
        reward_funcs=reward,
        environment_factory=lambda: Recorded(policy, "IVT-Scenes-v0", max_steps=3),
        max_tool_calling_iterations=2,
        max_completion_length=600,
        max_steps=1,
    )
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: seen.setdefault("batch", generate(rows))
    trainer.train()
    assert trainer.state.global_step == 1 and len(seen["ids"]) == 8
    every_image_reaches_the_model(policy, seen["environments"], seen["batch"])
    env = make_vector_env("IVT-Scenes-v0", 1, split="train", max_steps=3)
    compared = 0
    for environment, ids, total in zip(seen["environments"], seen["ids"], seen["totals"], strict=True):
        if not all(environment._texts):
            continue  # TRL puts no end of turn behind an answer that was cut off
        replayed, earned = replay(env, policy, environment._index, environment._texts, ids)
        assert replayed == ids and earned == pytest.approx(total, abs=1e-6)
        compared += len(environment._texts) == 3
    assert compared >= 3 and max(seen["totals"]) > 0


def every_image_reaches_the_model(policy: Any, environments: list[Recorded], batch: dict[str, Any]) -> None:
    """TRL drops all pixels of a batch, without a word, where the runs of image tokens do not match its images."""
    # The image behind the last answer that was played was shown to nobody where the conversation ended there.
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    tokens = (ids == policy.image_token).sum(1).tolist()
    pixels = iter(batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist()))
    turns = 0
    for environment, count, row in zip(environments, batch["num_images"], tokens, strict=True):
        shown = policy.image_processor(images=environment.images[: int(count)], return_tensors="pt")
        assert row == int(shown["image_grid_thw"].prod(-1).sum()) // policy.image_processor.merge_size**2
        for one in shown["pixel_values"].split(shown["image_grid_thw"].prod(-1).tolist()):
            assert torch.equal(one, next(pixels))
        assert int(count) >= len(environment._texts)
        turns += int(count)
    assert next(pixels, None) is None and turns > len(environments)


def replay(env, policy: Any, index: int, texts: list[str], ids: list[int]) -> tuple[list[int], float]:
    """Play texts by this project's own means; returns the ids behind the first prompt and the total reward."""
    observations, _ = env.reset(seed=0, options={"index": [index]})
    prompt, turn, total, first = None, None, 0.0, 0
    for text in texts:
        shown = images_of(observations, 0)
        encoded = policy.dialogue.process([image for image, _ in shown])
        views = [(one, window) for one, (_, window) in zip(encoded, shown, strict=True)]
        box = observations["box"][0]
        question = (observations["expression"][0], box if box.any() else None, views)
        prompt = policy.dialogue.following(turn, *question) if turn else policy.dialogue.prompt(*question)
        first = first or len(prompt.ids)
        at = len(prompt.ids) - first
        end = next(i for i in range(at, len(ids)) if ids[i] in policy.sampling.end_ids)
        turn = Turn(prompt, ids[at : end + 1], [0.0] * (end + 1 - at), finished=True)
        assert policy.text(turn) == text
        action = parse_action(text)
        proposal = policy.dialogue.box_of(action, prompt) or [np.nan] * 4
        step = {"box": np.array([proposal], dtype=np.float32), "stop": np.array([int(action.stop)])}
        observations, reward, *_ = env.step(step)
        total += float(reward[0])
    assert turn is not None
    return [*turn.prompt.ids[first:], *turn.completion], total


def test_a_stop_ends_the_rollout_and_anything_else_is_played():
    """A stop that called the tool would never end; an unreadable answer that did not would end for nothing."""
    policy = load_policy("tiny")
    processor = processor_for(policy)

    def called(text: str, finished: bool = True) -> list[str] | None:
        ids = policy.dialogue.completion(text)
        message = processor.tokenizer.parse_response(ids if finished else ids[:-1])
        return [call["function"]["arguments"]["text"] for call in message.get("tool_calls", [])] or None

    assert called('{"stop": true}') is None and called('It fits. {"stop": true}') is None
    assert called('{"bbox_2d": [1, 2, 3, 4]}') == ['{"bbox_2d": [1, 2, 3, 4]}']
    assert called("a square") == ["a square"]
    assert called('{"stop": true}', finished=False) == [""] and called('{"bbox_2d": [1, 2', finished=False) == [""]


def test_an_unreadable_answer_costs_a_step_and_a_played_out_episode_refuses_more():
    environment = TRLGrounding(base_policy(), "IVT-Scenes-v0", split="train", max_steps=2)
    image, question = environment.reset(index=3, prompt=[])
    assert image["image"].size[0] > 16 and "Current box: none" in question["text"]
    _, question = environment.answer("a square")
    assert "Current box: none" in question["text"]
    after, question = environment.answer('{"bbox_2d": [100, 200, 600, 700]}')
    assert "Current box: [100, 200, 600, 700]" in question["text"]
    assert np.asarray(after["image"]).tolist() != np.asarray(image["image"]).tolist(), "the box is not drawn"
    with pytest.raises(RuntimeError, match="max_tool_calling_iterations"):
        environment.answer('{"stop": true}')


def test_the_last_answer_is_played_by_the_reward_and_only_once():
    environment = TRLGrounding(load_policy("tiny"), "IVT-Scenes-v0", split="train", max_steps=3)
    environment.reset(index=3)
    box = '{"bbox_2d": [100, 200, 600, 700]}'
    messages = [{"role": "assistant", "content": box}]
    (total,) = episode_reward([messages], [environment])
    assert (total,) == tuple(episode_reward([messages], [environment])) and environment._played == 1


def test_what_the_adapter_cannot_express_is_refused():
    policy = load_policy("tiny")
    with pytest.raises(ValueError, match="only the whole image"):
        TRLGrounding(policy, "IVT-Scenes-v0", view="closeup")
    policy.codec = BoxCodec("resized_pixels")
    with pytest.raises(ValueError, match="0..1000"):
        TRLGrounding(policy, "IVT-Scenes-v0")


def test_a_model_that_trl_saved_is_a_policy_again(tmp_path):
    policy = load_policy("tiny")
    processor = processor_for(policy)
    policy.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    assert again.tokenizer("Locate a square")["input_ids"] == policy.tokenizer("Locate a square")["input_ids"]
