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

    Groups are what a reference tells. Of targets with the same captions and size, the mean of each group is taken: how much
    these differ at a place says how much the reference tells about it. Where the captions occur in one group only, every
    place has weight 1.
    """
    sharing: dict[tuple, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index in range(len(data)):
        sharing[data.captions(index), data.bucket(index)][data.group(index)].append(index)
    weights = {}
    for groups in sharing.values():
        means = torch.stack([torch.stack([data.latent(index).float() for index in members]).mean(0)
                             for members in groups.values()])
        weight_1hw = torch.ones_like(means[0, :1])
        if len(groups) > 1:
            variance_1hw = means.var(dim=0).mean(dim=0, keepdim=True)
            if variance_1hw.mean() > 0:
                weight_1hw = LEAST_WEIGHT + (1 - LEAST_WEIGHT) * variance_1hw / variance_1hw.mean()
        weights |= dict.fromkeys((index for members in groups.values() for index in members), weight_1hw)
    return weights
