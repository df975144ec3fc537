"""What a module's strength 1 stands for, found by drawing at several strengths."""

import pytest
import torch

from emma_core.training.calibration import STRENGTHS, best_of, calibrate, likeness_of


def features(value):
    """A picture's mean colour as its features."""
    return {"global": value.mean(dim=(0, 1))[None]}


def test_the_strength_whose_pictures_are_most_like_their_references_is_chosen():
    wanted = [{"global": torch.tensor([[1.0, 0.5, 0.0]])}, {"global": torch.tensor([[0.0, 0.5, 1.0]])}]

    def draw(strength):
        """Grey at 0, the reference's colour at 1.25, past it above."""
        share = 1 - abs(strength - 1.25)
        colour_B3 = torch.stack([0.5 + share * (one["global"][0] - 0.5) for one in wanted])
        return colour_B3[:, None, None].expand(2, 4, 4, 3)

    found = calibrate(draw, lambda image_BHW3: [features(image) for image in image_BHW3], wanted)
    assert found.strength == 1.25 and found.pictures == 2
    assert found.likeness[1.25] == pytest.approx(1.0) and list(found.likeness) == list(STRENGTHS)
    assert found.metadata["strength"] == 1.25 and "1.25: 1.000" in found.metadata["by"]


def test_a_gain_that_chance_explains_leaves_the_strength_as_trained():
    generator = torch.Generator().manual_seed(0)
    noise_SB = torch.randn(len(STRENGTHS), 16, generator=generator)
    assert STRENGTHS[best_of(noise_SB)] == 1.0
    sure_SB = 0.1 * noise_SB + torch.tensor(STRENGTHS)[:, None]
    assert STRENGTHS[best_of(sure_SB)] == 1.5


def test_likeness_looks_at_directions_of_mean_vectors_of_every_feature():
    one = {"global": torch.tensor([[1.0, 0.0]]), "local": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    louder = {name: 3 * tensor for name, tensor in one.items()}
    turned = {"global": torch.tensor([[0.0, 1.0]]), "local": one["local"].flip(0)}
    torch.testing.assert_close(likeness_of([louder, turned], [one, one]), torch.tensor([1.0, 0.5]))
