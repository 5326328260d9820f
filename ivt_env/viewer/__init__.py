"""A page for a browser that shows episodes: what an agent proposed, step by step."""

from ivt_env.viewer.page import write_page

__all__ = ["write_page"]
