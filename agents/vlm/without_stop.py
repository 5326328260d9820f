"""Policies that never stop: a fixed number of refinements, as in the paper (arXiv 2606.13156)."""

from __future__ import annotations

from dataclasses import replace

from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.prompts import Prompts

_OFFER = (
    'If it fits the object, answer {"stop": true}. Otherwise say briefly what is wrong with it, if anything, and answer'
)
_INSTEAD = "Say briefly what is wrong with it, if anything, and answer"


def without_stop(prompts: Prompts) -> Prompts:
    """The same question without the offer to stop; ValueError for an offer in words that are not known here."""
    text = prompts.text.replace(_OFFER, _INSTEAD)
    if "stop" in text.lower():
        raise ValueError(
            f"the policy's question offers a stop in words of its own: {prompts.text!r}. Write one without it into"
            " policy.json of the model's folder"
        )
    return replace(prompts, text=text)


def forbid_stop(policy: VLMPolicy) -> None:
    """Make a policy play without the stop, in place; its weights stay.

    It is not asked for one. Where the stop is one token it cannot be sampled, in rollouts and in the scores of an
    update alike, and no probability of it is stated. A stop that is spelt out is an unusable answer: the box stays.
    """
    policy.may_stop = False
    policy.dialogue.prompts = without_stop(policy.dialogue.prompts)
    stop = policy.sampling.stop_id
    if stop is not None:
        policy.sampling = replace(policy.sampling, suppressed=(*policy.sampling.suppressed, stop), stop_id=None)
