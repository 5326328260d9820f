"""What the policy sees with: a small network that looks for what the words ask for.

The words choose what to look for, by attention over the image's places; what is handed on is *where* the
attention lies and how far it spreads (expected coordinates: Levine et al., arXiv 1504.00702, section 5.1), in
the scales of the action. So a box round what is looked at is a linear function of the features, and the policy
starts as just that: it has to learn what to look at, not how to draw a box round it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from ivt_env.wrappers.sb3 import SMALLEST


class WordsLookAtImage(BaseFeaturesExtractor):
    """Features (N, F) of a batch of observations of ``SB3Wrapper`` with the view ``overlay``."""

    def __init__(self, observation_space: spaces.Dict, channels: int = 24, heads: int = 4, words: int = 16) -> None:
        """``heads`` are the things looked for at once, ``words`` the numbers of the text that are handed on."""
        text_size = observation_space["expression"].shape[0]  # type: ignore[index]
        step_size = observation_space["step"].shape[0]  # type: ignore[index]
        super().__init__(observation_space, features_dim=4 * heads + words + 4 + step_size)
        self.channels, self.heads = channels, heads
        self.pixels = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, channels, 3, padding=1), nn.ReLU()
        )
        self.queries = nn.Linear(text_size, heads * channels)
        # Whatever differs from the rest of the image, to begin with.
        self.salience = nn.Parameter(torch.full((heads, channels), 3.0))
        self.words = nn.Linear(text_size, words)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Features (N, F): centre and size of what each head looks at, words, box, step."""
        image = observations["image"]  # (N, 3, side, side)
        # Without its mean colour: a plain ground is then close to zero, and so are its features.
        seen = self.pixels(image - image.mean((2, 3), keepdim=True))  # (N, C, h, w)
        n, _, height, width = seen.shape
        # A vector of length 1 in many places is made of small numbers: brought to unit variance first.
        text = observations["expression"] * math.sqrt(observations["expression"].shape[1])
        queries = 0.5 * self.queries(text).view(n, self.heads, self.channels) + self.salience
        weights = (queries @ seen.flatten(2)).softmax(-1)  # (N, K, h * w)
        x = (torch.arange(width, device=seen.device) + 0.5) / width * 2 - 1
        y = (torch.arange(height, device=seen.device) + 0.5) / height * 2 - 1
        places = torch.stack([x.repeat(height), y.repeat_interleave(width)], -1)  # (h * w, 2)
        mean = weights @ places  # (N, K, 2), -1..1 as in the action
        variance = (weights @ places**2 - mean**2).clamp_min(1e-4)
        # A side w of the image, evenly looked at, has the variance (2 w)^2 / 12 in these coordinates.
        side = (3 * variance).sqrt()
        looked = torch.cat([mean, 1 - 2 * side.log() / math.log(SMALLEST)], -1).flatten(1)  # (N, K * 4)
        rest = [self.words(text).relu(), observations["box"], observations["step"]]
        return torch.cat([looked, *rest], -1)


POLICY_OPTIONS: dict[str, Any] = {
    "features_extractor_class": WordsLookAtImage,
    "net_arch": {"pi": [], "vf": [64, 64]},
    "log_std_init": -1.2,
}
"""What makes the policy, in training and when it is loaded. No layer between features and action: see above."""


def make_policy(observation_space: spaces.Dict, action_space: spaces.Box) -> MultiInputActorCriticPolicy:
    """A policy with fresh weights, to load trained ones into."""
    return MultiInputActorCriticPolicy(observation_space, action_space, lambda _: 0.0, **POLICY_OPTIONS)


def begin_with_what_is_seen(policy: ActorCriticPolicy) -> None:
    """Start the policy as a box round the middle of what the first head looks at; all else weighs next to nothing."""
    weight, bias = policy.action_net.weight, policy.action_net.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    with torch.no_grad():
        weight[:4, :4] += torch.eye(4)
        # 0.4 of its width and height: at first the attention lies on several things.
        bias[2:4] += 2 * math.log(0.4) / -math.log(SMALLEST)
