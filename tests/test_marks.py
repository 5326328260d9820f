"""The whole image of a search scene, as small as the tiny model takes it in, does not tell which mark an object has.

Silent when false: a policy that never looks could find the target, and a second look would be worth nothing. A small
network is trained to read the marks, once from what a first look shows of each object and once from a close-up.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from ivt_env.data.scenes import make_scene
from ivt_env.data.scenes.world import MARKS
from ivt_env.rendering import Surroundings

BICUBIC = Image.Resampling.BICUBIC
AROUND = Surroundings(margin=0.5, smallest=0.1, square=True)


def looks(split, count):
    """Both looks at every object of the first scenes, (N, 3, 24, 24) each, and the marks (N,)."""
    first, close, kinds = [], [], []
    for index in range(count):
        scene = make_scene(split, index)
        image = Image.fromarray(scene.image())
        small = image.resize((256, 256), BICUBIC).resize((96, 96), BICUBIC)
        for thing in scene.things:
            x, y = (round(48 * (low + high)) for low, high in zip(thing.box[:2], thing.box[2:], strict=True))
            cut = small.crop((x - 8, y - 8, x + 8, y + 8))
            first.append(np.asarray(cut.resize((24, 24), Image.Resampling.NEAREST)))
            window = tuple(AROUND.window(thing.box, (768, 768)) * 768)
            shown = image.resize((96, 96), BICUBIC, box=window)
            close.append(np.asarray(shown.resize((48, 48), BICUBIC).crop((12, 12, 36, 36))))
            kinds.append(MARKS.index(thing.mark.kind))
    pixels = [torch.from_numpy(np.stack(one)).permute(0, 3, 1, 2) / 255 for one in (first, close)]
    scaled = [(one - one.mean((2, 3), keepdim=True)) / one.std((1, 2, 3), keepdim=True) for one in pixels]
    return scaled, torch.tensor(kinds)


def read(pixels, kinds, others, other_kinds):
    """The share of the marks of other scenes that a small network reads once it was trained on these."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width in ((3, 16), (16, 32)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, len(MARKS))]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(250):
        some = torch.randint(len(pixels), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(pixels[some]), kinds[some]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((network(others).argmax(1) == other_kinds).float().mean())


def test_a_mark_of_10_pixels_is_chance_at_a_first_look_and_is_read_in_a_close_up():
    (first, close), kinds = looks("train_search_10", 250)
    (other_first, other_close), other_kinds = looks("val_search_10", 80)
    chance = float(torch.bincount(other_kinds).max()) / len(other_kinds)
    assert read(first, kinds, other_first, other_kinds) < chance + 0.06
    assert read(close, kinds, other_close, other_kinds) > chance + 0.4
