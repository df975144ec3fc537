"""Weights of the loss by place."""

import torch

from emma_core.training.places import place_weights


class Drawings:
    """Targets of (caption, group); a target's latent is 1 where its group says so."""

    def __init__(self, *targets: tuple[str, str]):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def bucket(self, index):
        return (16, 16)

    def group(self, index):
        return self.targets[index][1]

    def captions(self, index):
        return (self.targets[index][0],)

    def latent(self, index, flipped=False):
        latent_4hw = torch.zeros(4, 2, 2)
        latent_4hw[:, 0, 1] = {"light": 0.0, "dark": 2.0}[self.group(index)]
        latent_4hw[:, 1, 1] = float(index % 2)  # differs within a group alike
        return latent_4hw


def test_places_count_where_groups_of_one_caption_differ():
    data = Drawings(*(("man cook", tone) for tone in ("light", "light", "dark", "dark")), ("man pilot", "light"))
    weights = place_weights(data)
    for index in range(4):
        torch.testing.assert_close(weights[index], torch.tensor([[[0.2, 3.4], [0.2, 0.2]]]))
    assert torch.equal(weights[4], torch.ones(1, 2, 2))


def test_drawings_of_one_group_have_equal_weights():
    weights = place_weights(Drawings(*[("man cook", "dark")] * 4))
    assert all(torch.equal(weights[index], torch.ones(1, 2, 2)) for index in range(4))
