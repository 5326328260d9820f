"""Iterative visual grounding as an environment of verifiers: propose a box, see it drawn, refine it or stop.

    vf-eval ivt-grounding -m MODEL --client.base-url http://127.0.0.1:8000/v1 -n 20

``GroundingTaskset`` says which samples are played, ``GroundingEnv`` plays them, ``GroundingHarness`` asks the model.
Written for verifiers 0.4.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Self

import numpy as np
import openai
import verifiers.v1 as vf
from pydantic import Field, model_validator

import ivt_env
from ivt_agents.play.chat import SentImage, user_turn
from ivt_agents.vlm.prompts import DEFAULT, PromptFile, load_prompts
from ivt_env import env as grounding
from ivt_env.data import load_dataset
from ivt_env.data.sample import Dataset
from ivt_env.game import GOOD

_TLS = ssl.create_default_context()
"""Made once: it takes longer than a request."""

__all__ = ["GroundingEnv", "GroundingHarness", "GroundingTaskset", "load_environment"]


class GroundingConfig(vf.TasksetConfig):
    """What is played; the options ``--env.taskset.*``."""

    env: str = "IVT-Scenes-v0"
    """A registered id."""
    data_root: str | None = None
    """Folder of real data sets; None: the variable IVT_DATA, then the user's cache. An absent data set is an error."""
    split: str = "test"
    prompts: str = DEFAULT
    """What the model is asked and how it writes boxes: a shipped prompt file, or a file."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """More keywords of the environment, for example {"max_steps": 6}."""

    @model_validator(mode="after")
    def playable(self) -> Self:
        """Refuse what there is not, before anything is loaded."""
        if self.env not in ivt_env.IDS:
            raise ValueError(f"no environment {self.env!r}; there are {', '.join(ivt_env.IDS)}")
        load_prompts(self.prompts)
        return self


class GroundingData(vf.TaskData):
    """One sample. Its image is drawn when it is played."""

    index: int
    """Within the split."""
    fresh: bool
    """Each step has a prompt of its own; false: one growing conversation."""
    request: dict[str, Any] = Field(default_factory=dict)
    """What else a request holds. The run's own sampling options go before it."""


class GroundingTask(vf.Task[GroundingData]):
    """Rewards and metrics are recorded by the environment, which keeps the score."""


class GroundingTaskset(vf.Taskset[GroundingTask, GroundingConfig]):
    """The samples of a split, in their order."""

    @cached_property
    def asked(self) -> PromptFile:
        """What the model is asked."""
        return load_prompts(self.config.prompts)

    @cached_property
    def dataset(self) -> Dataset:
        """The split that is played."""
        name = ivt_env.IDS[self.config.env]["dataset"]
        return load_dataset(name, self.config.split, self.config.data_root, strict=True)

    def load(self) -> Iterator[GroundingTask]:
        """A task for each sample."""
        asked = self.asked
        request = {"max_tokens": asked.max_tokens} | dict(asked.request)
        for index in range(len(self.dataset)):
            data = GroundingData(
                name=f"{self.config.env}/{self.config.split}#{index}",
                system_prompt=asked.system or None,
                index=index,
                fresh=asked.layout == "fresh",
                request={key: value for key, value in request.items() if value is not None},
            )
            yield GroundingTask(data, self.config.task)

    def environment(self) -> grounding.GroundingEnv:
        """A new environment that shows what the prompt file says."""
        own = {k: v for k, v in ivt_env.IDS[self.config.env].items() if k not in ("dataset", "split")}
        return grounding.GroundingEnv(dataset=self.dataset, **(own | self.asked.shown | self.config.kwargs))


class GroundingEnvConfig(vf.EnvConfig):
    """One player. Nothing that it writes is run, so that no sandbox is needed."""

    agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())


class GroundingEnv(vf.Env[GroundingEnvConfig]):
    """Plays an episode: the environment is the user, who shows an image and asks for a box."""

    taskset: GroundingTaskset

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        """Until a stop, or the limit of steps; the reward is the sum of the gains in IoU."""
        env, asked = self.taskset.environment(), self.taskset.asked
        observation, info = env.reset(options={"index": task.data.index})
        rewards, boxes, stopped, unusable, over = [], [], False, 0, False
        async with agents.agent.interaction(task) as interaction:
            trace = interaction.trace
            while not over:
                question = asked.question({key: [value] for key, value in observation.items()}, 0)
                turn = user_turn(question.text, question.images)
                parts = [part.part() if isinstance(part, SentImage) else part for part in turn["content"]]
                segment = await interaction.turn([turn | {"content": parts}])
                if segment.terminated:  # a failure, or a limit of the run
                    break
                # An answer that was cut off is none, even where an action could be read from it.
                cut = trace.calls[-1].finish_reason == "length"
                box, stop = question.read("" if cut else segment.last_reply)
                action = {"box": np.array([np.nan] * 4 if box is None else box, np.float32), "stop": int(stop)}
                observation, reward, stopped, truncated, info = env.step(action)
                over = stopped or truncated
                rewards.append(float(reward))
                boxes.append(box)
                unusable += "invalid" in info
        if not trace.ok:
            return  # what a server left undone is no score
        trace.record_reward("iou_gain", sum(rewards))
        trace.record_metrics(
            {
                "final_iou": info["iou"],
                "best_iou": info["best_iou"],
                "acc_0_5": info["iou"] >= GOOD,
                "stopped": stopped,
                "unusable": unusable,
            }
        )
        target = [float(v) for v in info["target"]]
        trace.info |= {"sample_id": info["sample_id"], "target": target, "boxes": boxes, "gains": rewards}


class GroundingHarness(vf.Harness[vf.HarnessConfig]):
    """Sends each turn to the model, behind those before it or, in the fresh layout, by itself."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        """One request."""
        assert isinstance(data, GroundingData) and isinstance(data.prompt, list)
        said = data.prompt[-1:] if data.fresh else data.prompt
        system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
        messages: Any = [*system, *(message.model_dump(exclude_none=True) for message in said)]
        http = openai.DefaultAsyncHttpxClient(verify=_TLS)
        async with openai.AsyncOpenAI(base_url=endpoint, api_key=secret, timeout=None, http_client=http) as client:
            try:
                await client.chat.completions.create(model=ctx.model, messages=messages, extra_body=data.request)
            except openai.OpenAIError as error:
                return vf.ProgramResult(exit_code=1, stdout="", stderr=str(error))
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


def load_environment(**taskset: Any) -> GroundingEnv:
    """The environment with these options of ``GroundingConfig``."""
    found = vf.load_environment(vf.resolve_env_config({"taskset": {"id": "ivt_grounding", **taskset}}))
    assert isinstance(found, GroundingEnv)
    return found
