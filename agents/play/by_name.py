"""What an agent is, and how a command line names one."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ivt_agents.play.controls import CONTROL_FORMS, control_of
from ivt_agents.play.scripted import CentreAgent, OracleAgent, RandomAgent, StopAfter
from ivt_agents.play.served import Served
from ivt_env import failures
from ivt_env.data.checked import closest
from ivt_env.rollouts import Agent
from ivt_env.vector_env import GroundingVectorEnv

BUILT_IN = ("random", "centre", "oracle", "ocr")
"""The agents that go by a bare name."""

_FORMS = (
    *BUILT_IN,
    "stop-after-K:AGENT",
    "vlm:FOLDER",
    "sb3:FOLDER",
    "openai:URL#MODEL",
    "pixels-K:vlm:FOLDER",
    *CONTROL_FORMS,
    "module:Class",
)
_NAMES, _THERE_ARE = [form.partition(":")[0] for form in _FORMS], f"there are {', '.join(_FORMS)}"
_TRAINED = {
    "vlm": ("ivt_agents.vlm.load", "load_policy", "the training install, ivt-env[train]"),
    "sb3": ("ivt_agents.sb3.load", "load_sb3", "Stable-Baselines3, ivt-env[sb3]"),
}


def load_agent(
    spec: str, *, env: GroundingVectorEnv | None = None, seed: int = 0, served: Served | None = None, **options: Any
) -> Agent:
    """The agent that ``spec`` names.

    ======================= ========================================================================
    ``random``              uniformly drawn boxes; stops by chance
    ``centre``              one box around the centre, then stops
    ``oracle``              reads the target box; needs ``env``
    ``ocr``                 reads the text of a screen; needs the extra ``ocr``
    ``stop-after-K:SPEC``   the agent ``SPEC``, stopped after K proposals: ``stop-after-1:random``
    ``vlm:FOLDER``          a vision-language model: a checkpoint folder or a model id
    ``sb3:FOLDER``          a PPO of Stable-Baselines3: the folder of ``python -m ivt_agents.sb3.train``
    ``openai:URL#MODEL``    a vision-language model behind an OpenAI-compatible address
    ``pixels-K:vlm:FOLDER`` a vision-language model with K times the pixels that an image may have
    ``medoid-N:VLM``        N sampled first answers, proposes the box that agrees most with the others
    ``best-of-N:VLM``       N sampled first answers, proposes that of the most confident one
    ``second-shot:VLM``     a greedy first answer, then a sampled one that does not know of it
    ``module:Class``        your own: made as ``Class()``; the current directory is searched too
    ======================= ========================================================================

    ``VLM`` is ``vlm:FOLDER``, ``pixels-K:vlm:FOLDER`` or ``openai:URL#MODEL``. The three in front of it are controls
    of equal compute (``docs/controls.md``); they sample at temperature 1, or at T as ``medoid-N@T:VLM``.

    ``env`` is the vector environment that will be played, for the oracle alone; ``seed`` is for what is drawn at
    random; ``served`` says how models behind an address are asked (None: the defaults, and no cache); ``options`` are
    those of the agent itself (``stop_probability``, ``noise``, what ``load_policy`` takes). A ``module:Class`` gets
    none of them. ValueError for a spec that names no agent, or a class that is none.
    """
    head, colon, rest = spec.partition(":")
    if spec == "random":
        return RandomAgent(seed=seed, **options)
    if spec == "centre":
        return CentreAgent(**options)
    if spec == "oracle":
        if env is None:
            raise ValueError("agent 'oracle' reads the target box, so it needs the environment: env=...")
        return OracleAgent(env, seed=seed, **options)
    if spec == "ocr":
        from ivt_agents.play.ocr import OCRAgent

        return OCRAgent(**options)
    if head.startswith("stop-after-"):
        if not re.fullmatch(r"stop-after-[0-9]+:.+", spec):
            told = "say after how many proposals, and who proposes, like 'stop-after-1:random'"
            raise ValueError(f"agent {spec!r}: {told}")
        proposer = load_agent(rest, env=env, seed=seed, served=served, **options)
        return StopAfter(proposer, int(head.removeprefix("stop-after-")))
    if head.startswith("pixels-"):
        if not re.fullmatch(r"pixels-[0-9]+(\.[0-9]+)?:vlm:.+", spec):
            raise ValueError(f"agent {spec!r}: say how many times the pixels, and of which model: 'pixels-2:vlm:tiny'")
        return load_agent(rest, seed=seed, pixels=float(head.removeprefix("pixels-")), **options)
    control = control_of(head)
    if control is not None:
        if not re.match(r"((pixels-[^:]+:)?vlm|openai):.", rest):
            raise ValueError(
                f"agent {spec!r}: {head} samples answers of a model: write '{head}:vlm:FOLDER' or"
                f" '{head}:openai:URL#MODEL'"
            )
        if "temperature" in options:
            raise ValueError(f"agent {spec!r}: its temperature is part of its name, like 'medoid-8@0.7:vlm:tiny'")
        return control(cast(Any, load_agent(rest, seed=seed, served=served, **options)))
    if head == "openai" and rest:
        return (served or Served()).policy(rest, seed=seed, **options)
    if head in _TRAINED and rest:
        module, name, needs = _TRAINED[head]
        try:
            load: Callable[..., Agent] = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ValueError(f"agent {spec!r} needs {needs}: {error}") from error
        return load(rest, seed=seed, **options)
    if colon and rest and head not in (*_TRAINED, "openai"):
        if options:
            raise ValueError(f"agent {spec!r} is made without arguments: no {', '.join(sorted(options))}")
        return _load_class(spec, head, rest)
    raise ValueError(f"no agent {spec!r}{closest(head, _NAMES)}; {_THERE_ARE}")


def _load_class(spec: str, module_name: str, class_name: str) -> Agent:
    """Import and instantiate ``module:Class``. What the module itself raises is passed on as it is."""
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"no agent {spec!r}: {module_name!r} is not a module name; {_THERE_ARE}")
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))  # last: a file here must not hide an installed package
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"agent {spec!r}: {module_name} cannot be imported: {error}") from error
        # A name like this is as likely a slip in a built-in one.
        near = closest(module_name, _NAMES[len(BUILT_IN) :])
        raise ValueError(f"agent {spec!r}: no module {error.name!r} here or installed{near}; {_THERE_ARE}") from error
    failures.PLUGGED_IN.add(module.__name__)
    agent_class = getattr(module, class_name, None)
    if not inspect.isclass(agent_class):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        held = f"; {module_name} has {', '.join(classes)}" if classes else f"; {module_name} has no class"
        raise ValueError(f"agent {spec!r}: no class {class_name!r}{closest(class_name, classes)}{held}")
    missing = [name for name in ("act", "reset") if not callable(getattr(agent_class, name, None))]
    if missing:
        raise ValueError(
            f"agent {spec!r} has no method {' and no method '.join(missing)}: "
            "an agent has act(observations) and reset(mask)"
        )
    try:
        inspect.signature(agent_class).bind()
    except TypeError as error:
        raise ValueError(f"agent {spec!r} is made as {class_name}(), without arguments: {error}") from error
    return cast(Agent, agent_class())
