"""Agents for the grounding environments, and the learners that train them."""
