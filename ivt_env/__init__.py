"""Gymnasium environments for iterative visual grounding.

>>> import gymnasium as gym, ivt_env
>>> env = gym.make("IVT-Scenes-v0")

Importing the package registers the ids; torch is never imported.
"""

from __future__ import annotations

from typing import Any

from ivt_env import failures  # noqa: F401  first: the others take a moment, in which Ctrl-C is quiet

# isort: split
import gymnasium as gym

__version__ = "0.1.0"

IDS: dict[str, dict[str, Any]] = {
    "IVT-RefCOCOg-v0": {"dataset": "refcocog"},
    "IVT-RefCOCO-v0": {"dataset": "refcoco"},
    "IVT-RefCOCOplus-v0": {"dataset": "refcocoplus"},
    "IVT-RefL4-v0": {"dataset": "refl4", "split": "test"},
    "IVT-RefAdv-v0": {"dataset": "refadv", "split": "test"},
    "IVT-Mixed-v0": {"dataset": "mixed"},
    "IVT-Custom-v0": {"dataset": "custom"},
    "IVT-Scenes-v0": {"dataset": "scenes", "canvas": 384},
    "IVT-Photos-v0": {"dataset": "photos"},
    "IVT-Screens-v0": {"dataset": "screens"},
    "IVT-ScreenSpot-v0": {"dataset": "screenspot", "split": "test"},
    "IVT-ScreenSpotV2-v0": {"dataset": "screenspotv2", "split": "test"},
    "IVT-ScreenSpotPro-v0": {"dataset": "screenspotpro", "split": "test"},
    "IVT-UIVision-v0": {"dataset": "uivision", "split": "test"},
    "IVT-UIVisionLayout-v0": {"dataset": "uivisionlayout", "split": "test"},
    "IVT-MMBenchGUI-v0": {"dataset": "mmbenchgui", "split": "test"},
    "IVT-OSWorldG-v0": {"dataset": "osworldg", "split": "test"},
}
"""Every registered id and the keywords that it sets."""

for _id, _kwargs in IDS.items():
    gym.register(
        _id,
        entry_point="ivt_env.env:GroundingEnv",
        vector_entry_point="ivt_env.vector_env:GroundingVectorEnv",
        kwargs=_kwargs,
    )
