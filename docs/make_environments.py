"""Write a page for every registered environment, from the code: ``python docs/make_environments.py``.

Spaces, arguments, defaults and rewards are read from the classes, the words from their docstrings, so a page cannot
say what the code does not. What is known to nobody but a person (what an id is for, its example, its history) stands
in this file. A test compares the pages with what this writes.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gymnasium import spaces

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ivt_env  # noqa: E402
from ivt_agents.command import run_command  # noqa: E402
from ivt_env import rendering, rewards  # noqa: E402
from ivt_env.data import splits  # noqa: E402
from ivt_env.env import GroundingEnv  # noqa: E402
from ivt_env.grounding import action_space, observation_space  # noqa: E402

ABOUT = {
    "IVT-Scenes-v0": "Procedural pictures of coloured shapes, embedded and without an end: to learn, to test and to "
    "compare on a laptop. A score on them says how the loop behaves, and nothing about photographs.",
    "IVT-Photos-v0": "Five embedded photographs with 16 expressions: to see that the parts fit together. They are too "
    "few to measure anything.",
    "IVT-RefCOCOg-v0": "RefCOCOg: long expressions about objects in COCO photographs.",
    "IVT-RefCOCO-v0": "RefCOCO: short expressions, places allowed, about objects in COCO photographs.",
    "IVT-RefCOCOplus-v0": "RefCOCO+: expressions that speak of looks and not of places.",
    "IVT-RefL4-v0": "Ref-L4: long and various expressions over 365 classes, for evaluation.",
    "IVT-RefAdv-v0": "Ref-Adv-s: cases that take reasoning, for evaluation.",
    "IVT-Mixed-v0": "The paper's mixture of RefCOCOg, Ref-Adv-s and Ref-L4: 2,400 / 510 / 505 samples.",
    "IVT-Custom-v0": "A data set of your own, as JSON lines.",
}

HISTORY = {env_id: ["v0: first version (ivt-env 0.1.0)."] for env_id in ABOUT}
"""A new version of an id is made whenever scores under the old one would no longer compare."""

REAL = """\
Without the data on this machine the embedded scenes are served in its place, with one loud warning, and
`info["dataset"]` says so; `strict=True` makes the absence an error. (`no-such-folder` stands for a machine without
the data, so that this example shows the same everywhere.)

```pycon
>>> import gymnasium as gym, ivt_env
>>> env = gym.make("{id}", split="{split}", data_root="no-such-folder")
>>> observation, info = env.reset(seed=0)
>>> info["dataset"]
'scenes'
>>> gym.make("{id}", split="{split}", data_root="no-such-folder", strict=True)
Traceback (most recent call last):
ivt_env.data.sample.DataMissingError: ...
```
"""

CUSTOM = """\
Nothing ever takes the place of your own data: where it is absent, that is an error.

```pycon
>>> import json, shutil
>>> import gymnasium as gym, ivt_env
>>> from pathlib import Path
>>> folder = Path("my-set")
>>> (folder / "images").mkdir(parents=True)
>>> photos = Path(ivt_env.__file__).parent / "assets" / "photos"
>>> _ = shutil.copy(photos / "chelsea.jpg", folder / "images")
>>> declared = {"name": "my-set", "box": "xyxy", "frame": "px"}
>>> _ = (folder / "dataset.json").write_text(json.dumps(declared))
>>> line = {"image": "chelsea.jpg", "expression": "the cat's nose", "bbox": [233, 227, 288, 265]}
>>> _ = (folder / "train.jsonl").write_text(json.dumps(line))
>>> env = gym.make("IVT-Custom-v0", data_root="my-set")
>>> observation, info = env.reset(seed=0)
>>> observation["expression"], info["dataset"]
("the cat's nose", 'my-set')
>>> gym.make("IVT-Custom-v0", data_root="no-such-folder")
Traceback (most recent call last):
ivt_env.data.sample.DataMissingError: ...
```
"""

EMBEDDED = """\
```pycon
>>> import gymnasium as gym, ivt_env
>>> env = gym.make("{id}", split="test")
>>> observation, info = env.reset(options={{"index": {index}}})
>>> observation["expression"]
{expression!r}
>>> observation["image"].shape, observation["extent"].tolist(), int(observation["step"])
({shape}, {extent}, 0)
>>> observation, reward, terminated, truncated, info = env.step({{"box": {box}, "stop": 0}})
>>> round(float(reward), 3), terminated, truncated
({reward}, False, False)
>>> observation, reward, terminated, truncated, info = env.step({{"box": [0, 0, 0, 0], "stop": 1}})
>>> float(reward), terminated, round(info["iou"], 3)
(0.0, True, {reward})
```
"""


@dataclass
class Args:
    """Write the pages of the environments."""

    out: Path = Path(__file__).parent / "environments"
    """Folder of the pages."""


def main(args: Args) -> None:
    """Write one page for each id, and their index."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (args.out / name).write_text(text, encoding="utf-8")
        print(args.out / name)


def pages() -> dict[str, str]:
    """File name and text of every page.

    Raises:
        ValueError: for a registered id that this file knows nothing about, or the other way round.
    """
    if set(ABOUT) != set(ivt_env.IDS):
        raise ValueError(f"ids without a text, or texts without an id: {sorted(set(ABOUT) ^ set(ivt_env.IDS))}")
    return {"index.md": index()} | {f"{env_id}.md": page(env_id) for env_id in ivt_env.IDS}


def index() -> str:
    """The list of the environments."""
    rows = [
        f"| [{env_id}]({env_id}.md) | {ABOUT[env_id]} | [{kwargs['dataset']}](../data/{kwargs['dataset']}.md) |"
        for env_id, kwargs in ivt_env.IDS.items()
    ]
    names = "\n".join(ivt_env.IDS)
    return (
        "# Environments\n\nAll ids share one class, one game and one set of arguments; they differ in the data "
        "that they serve. `ivt envs` says what each would serve on this machine.\n\n"
        "| id | what it is for | data |\n| --- | --- | --- |\n"
        + "\n".join(rows)
        + f"\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"
    )


def page(env_id: str) -> str:
    """The page of one registered id."""
    kwargs = ivt_env.IDS[env_id]
    sections = docstring_sections()
    settings = ", ".join(f"`{key}={value!r}`" for key, value in kwargs.items())
    canvas, max_steps = default("canvas", kwargs), default("max_steps", kwargs)
    parts = [
        f"# {env_id}",
        ABOUT[env_id],
        sections["Description"],
        f"The data: [{kwargs['dataset']}](../data/{kwargs['dataset']}.md).",
        "```python\nimport gymnasium as gym\nimport ivt_env\n\n" + f'env = gym.make("{env_id}")\n```',
        "## Action space",
        action_table(),
        "`box` is relative to the whole picture, also where a close-up is shown. With `stop=1` the episode ends with "
        "the box in force, and `box` is ignored.",
        "## Observation space",
        f'With the default view, `view="overlay"`, and S = `canvas` = {canvas}:',
        observation_table(canvas, max_steps),
        "## Rewards",
        reward_section(),
        "## Starting state",
        sections["Starting state"],
        "## Episode end",
        sections["Episode end"],
        "## Arguments",
        argument_table(kwargs),
        "Options of `overlay`:",
        dataclass_table(rendering.Overlay),
        "## Example",
        example(env_id),
        "## Vectorised",
        vectorised(env_id),
        "## Registered configuration",
        f"`{env_id}` sets {settings}. Everything else has the defaults above.",
        "## Version history",
        "\n".join(f"- {line}" for line in HISTORY[env_id]),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def docstring_sections() -> dict[str, str]:
    """The Markdown sections of ``GroundingEnv``'s docstring, by heading."""
    text = inspect.getdoc(GroundingEnv) or ""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {heading.strip(): body.strip() for heading, body in zip(parts[1::2], parts[2::2], strict=True)}


def table_column(section: str, keys: int, meaning: int) -> dict[str, str]:
    """Two columns of a table in the docstring: what stands in backticks in the first, and what it means."""
    found = {}
    for line in docstring_sections()[section].splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) > max(keys, meaning) and "`" in cells[keys]:
            found |= {key: cells[meaning] for key in re.findall(r"`([^`]+)`", cells[keys])}
    return found


def default(name: str, kwargs: dict[str, Any]) -> Any:
    """What an argument is when nobody gives it: the id's value, else the class's."""
    return kwargs.get(name, inspect.signature(GroundingEnv.__init__).parameters[name].default)


def action_table() -> str:
    """Num, action, minimum and maximum of every number of an action."""
    space = action_space()
    box, stop = space["box"], space["stop"]
    assert isinstance(box, spaces.Box) and isinstance(stop, spaces.Discrete)
    edges = ("left edge, x1", "top edge, y1", "right edge, x2", "bottom edge, y2")
    rows = [f"| `box[{i}]` | {edge} | {box.low[i]:g} | {box.high[i]:g} | {box.dtype} |" for i, edge in enumerate(edges)]
    rows.append(f"| `stop` | 0 propose `box`, 1 stop | {stop.start} | {stop.start + stop.n - 1} | Discrete({stop.n}) |")
    head = (
        f"`Dict({', '.join(space.spaces)})`:\n\n| num | action | min | max | type |\n| --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(rows)


def observation_table(canvas: int, max_steps: int) -> str:
    """Key, space and meaning of every part of an observation, in the order of the space."""
    meanings = table_column("Observation space", 0, 2)
    every = observation_space("both", canvas, max_steps)
    if set(meanings) != set(every.spaces):
        raise ValueError(f"GroundingEnv documents {sorted(meanings)} and has {sorted(every.spaces)}")
    rows = []
    for key, meaning in meanings.items():
        rows.append(f"| `{key}` | `{space_text(every[key])}` | {meaning} |")
    return "| key | space | meaning |\n| --- | --- | --- |\n" + "\n".join(rows)


def space_text(space: spaces.Space[Any]) -> str:
    """A space in one line."""
    if isinstance(space, spaces.Box):
        return f"Box({space.low.min():g}, {space.high.max():g}, {space.shape}, {space.dtype})"
    return "Text" if "xpression" in type(space).__name__ else str(space)


def reward_section() -> str:
    """The formula and the options."""
    return (
        "With the defaults an action earns the gain in IoU with the target b*,\n\n"
        "    r_t = phi(b_t) - phi(b_(t-1)),    phi(b) = IoU(b, b*),    phi(no box) = 0,\n\n"
        "and a stop earns 0. The gains add up to the IoU of the last box, so nothing can be won by a bad first box "
        'that is mended later (no discount). Options of `reward`, for example `reward={"kind": "final"}`:\n\n'
        + dataclass_table(rewards.RewardConfig)
    )


def dataclass_table(cls: type) -> str:
    """Name, default and meaning of every field; the meaning is the text below the field in the source."""
    meanings = field_texts(cls)
    rows = [f"| `{field.name}` | `{field.default!r}` | {meanings[field.name]} |" for field in fields(cls)]
    return "| option | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows)


def field_texts(cls: type) -> dict[str, str]:
    """The docstring that follows each field of a dataclass; a field without one takes an empty text."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = str(after.value.value) if said else ""  # type: ignore[union-attr]
        texts[node.target.id] = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return texts


def argument_table(kwargs: dict[str, Any]) -> str:
    """Every argument with the default that holds for this id."""
    types, meanings = table_column("Arguments", 0, 1), table_column("Arguments", 0, 3)
    names = [name for name in inspect.signature(GroundingEnv.__init__).parameters if name != "self"]
    if set(meanings) != set(names):
        raise ValueError(f"GroundingEnv documents {sorted(meanings)} and takes {sorted(names)}")
    served = ", ".join(f"`{name}`" for name in splits(kwargs["dataset"]))
    meanings["split"] = f"which part of the data: {served}"
    rows = [f"| `{name}` | {types[name]} | `{default(name, kwargs)!r}` | {meanings[name]} |" for name in names]
    return "| name | type | default here | meaning |\n| --- | --- | --- | --- |\n" + "\n".join(rows)


def example(env_id: str) -> str:
    """An example that the tests run."""
    if env_id == "IVT-Custom-v0":
        return CUSTOM
    if env_id not in ("IVT-Scenes-v0", "IVT-Photos-v0"):
        return REAL.format(id=env_id, split=ivt_env.IDS[env_id].get("split", "val"))
    env = GroundingEnv(**ivt_env.IDS[env_id], split="test")
    observation, _ = env.reset(options={"index": 1})
    x1, y1, x2, y2 = env.sample.box
    # A box that is a little too wide, in two decimals.
    box = [round(x1 - (x2 - x1) / 5, 2), round(y1, 2), round(x2, 2), round(y2, 2)]
    reward = round(float(env.step({"box": box, "stop": 0})[1]), 3)
    return EMBEDDED.format(
        id=env_id,
        index=1,
        expression=observation["expression"],
        shape=observation["image"].shape,
        extent=observation["extent"].tolist(),
        box=box,
        reward=reward,
    )


def vectorised(env_id: str) -> str:
    """How many episodes are played at once."""
    return (
        "`GroundingVectorEnv` steps many episodes in one process and decodes a picture once for all that share it. "
        "Gymnasium's own modes (`sync`, `async`) give the same observations and rewards.\n\n"
        f'```python\nenvs = gym.make_vec("{env_id}", num_envs=8, vectorization_mode="vector_entry_point")\n```\n\n'
        "Autoreset modes: `NextStep` (default), `SameStep` and `Disabled`, with which a group of episodes ends "
        "undisturbed and `ivt_env.rollouts.rollout` plays."
    )


if __name__ == "__main__":
    run_command(main, Args)
