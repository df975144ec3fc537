"""Where a condition shows in a picture: the loss counts more there, so that its gradient tells more about the reference.

The least loss is the same with any weights. Shapes: latents 4 x h x w.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from .draws import TrainingSet

LEAST_WEIGHT = 0.2


def place_weights(data: TrainingSet) -> dict[int, torch.Tensor]:
    """Target index -> (1, h, w) weights of mean 1.

    Targets with the same captions and size differ only in what their references tell: their variance at a place says how
    much that is. A target that shares its captions with none has weight 1 everywhere.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for index in range(len(data)):
        groups[data.captions(index), data.bucket(index)].append(index)
    weights = {}
    for members in groups.values():
        latents = torch.stack([data.latent(index).float() for index in members])
        weight_1hw = torch.ones_like(latents[0, :1])
        if len(members) > 1:
            variance_1hw = latents.var(dim=0).mean(dim=0, keepdim=True)
            if variance_1hw.mean() > 0:
                weight_1hw = LEAST_WEIGHT + (1 - LEAST_WEIGHT) * variance_1hw / variance_1hw.mean()
        weights |= dict.fromkeys(members, weight_1hw)
    return weights
