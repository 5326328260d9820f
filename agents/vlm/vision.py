"""The vision tower: what it makes of a batch's images, each encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from ivt_agents.vlm.turns import EncodedImage


def encode_images(model: Any, images: Sequence[EncodedImage], keep: bool) -> BaseModelOutputWithDeepstackFeatures:
    """The vision tower's output for a batch's images, in order; each distinct object is encoded once.

    ``keep`` stores the result on the images and uses what is stored: right only while the vision tower is frozen.
    """
    distinct = list({id(p): p for p in images}.values())
    missing = [p for p in distinct if not (keep and p.features is not None)]
    made: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
    if missing:
        device = model.device
        patches = torch.cat([p.patches for p in missing]).to(device)
        grids = torch.tensor([p.grid for p in missing], device=device)
        out = model.get_image_features(patches, grids, return_dict=True)
        layers = getattr(out, "deepstack_features", None) or []
        for k, image in enumerate(missing):
            made[id(image)] = (out.pooler_output[k], [layer[k] for layer in layers])
            if keep:
                image.features = out.pooler_output[k].detach()
                image.deepstack = [layer[k].detach() for layer in layers]
    for image in distinct:
        if id(image) not in made:
            assert image.features is not None and image.deepstack is not None
            made[id(image)] = (image.features, image.deepstack)
    rows = [made[id(p)] for p in images]
    depth = len(rows[0][1])
    return BaseModelOutputWithDeepstackFeatures(
        pooler_output=[features for features, _ in rows],
        deepstack_features=[[layers[d] for _, layers in rows] for d in range(depth)],
    )
