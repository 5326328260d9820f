"""Wrappers that bring the environment to other kinds of agents."""

from ivt_env.wrappers.sb3 import HashedText, SB3Wrapper
from ivt_env.wrappers.text import TextActions, visible_image

__all__ = ["HashedText", "SB3Wrapper", "TextActions", "visible_image"]
