"""Policies that never stop: the loop with a fixed number of refinements.

The paper's policies (arXiv 2606.13156) always make T refinements. A policy that could stop would be
another one, so the stop is taken out of what is asked and of what can be sampled.
"""

from __future__ import annotations

from dataclasses import replace

from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.prompts import Prompts

_OFFER = (
    'If it fits the object, answer {"stop": true}. Otherwise say briefly what is wrong with it, if anything, and answer'
)
_INSTEAD = "Say briefly what is wrong with it, if anything, and answer"


def without_stop(prompts: Prompts) -> Prompts:
    """The same question without the offer to stop; unchanged where a question holds no such offer.

    Args:
        prompts: of a policy.

    Raises:
        ValueError: where the question offers a stop in words that are not known here.
    """
    text = prompts.text.replace(_OFFER, _INSTEAD)
    if "stop" in text.lower():
        raise ValueError(
            f"the policy's question offers a stop in words of its own: {prompts.text!r}. Write one without it into"
            " policy.json of the model's folder"
        )
    return replace(prompts, text=text)


def forbid_stop(policy: VLMPolicy) -> None:
    """Make a policy play without the stop, in place.

    It is not asked for one, and where the stop is one token it cannot be sampled any more, in rollouts and in the
    scores of an update alike, and no probability of it is stated. Where it is spelt out all the same, that is an
    answer without a usable action, in training and in evaluation: the box stays.

    Args:
        policy: changed in what it asks, samples and understands; its weights stay.
    """
    policy.may_stop = False
    policy.dialogue.prompts = without_stop(policy.dialogue.prompts)
    stop = policy.sampling.stop_id
    if stop is not None:
        policy.sampling = replace(policy.sampling, suppressed=(*policy.sampling.suppressed, stop), stop_id=None)
