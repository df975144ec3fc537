"""Latents to distil on: those that a teacher's sampling visits come out of a draw as they were, each with its reference."""

from __future__ import annotations

import pytest
import torch

from emma_core.base.schedule import add_noise, alphas_cumprod
from emma_core.training.config import resolve
from emma_core.training.draws import BatchRow
from lab.playground.trajectories import OfTheirReferences, OnPaths, Samples, interval, pairs, visited

COUNT, STEPS = 6, 4
SHAPE = (4, 2, 2)


class Pictures:
    """Prepared pictures: each has two captions, and the next two are its references."""

    def __len__(self):
        return COUNT

    def bucket(self, index):
        return 16, 16

    def captions(self, index):
        return f"caption {index}", f"another caption {index}"

    def references(self, index):
        return (index + 1) % COUNT, (index + 2) % COUNT

    @property
    def variant_keys(self):
        return {index: ("key",) for index in range(COUNT)}

    def variants(self, reference):
        return 1

    def text(self, caption):
        return torch.zeros(1, 3, 8)

    def mark(self):
        return "pictures"


@pytest.fixture
def samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    rows = [BatchRow(index, False, f"caption {index}", (index + 2) % COUNT, 0, 1.0) for index in range(COUNT)]
    return Samples(rows, list(torch.randn((COUNT, *SHAPE), generator=generator)),
                   list(torch.randn((COUNT, STEPS, *SHAPE), generator=generator)))


def test_the_sampler_visits_equal_strides_from_the_last_timestep():
    assert visited(4).tolist() == [999, 749, 499, 249]


def test_a_draw_on_paths_gives_the_very_latents_that_were_visited(samples):
    data, kept_T = OfTheirReferences(samples, Pictures()), alphas_cumprod()
    config = resolve({}, "small-card", {"train.batch": COUNT, "data.flip": False})
    draws = OnPaths(data, config, lambda caption: 3, paths=samples.paths, kept_T=kept_T)
    found = set()
    for _ in range(20):
        batch = draws.draw()
        noised_B4hw = add_noise(torch.stack([data.latent(row.target) for row in batch.rows]), batch.noise_B4hw,
                                kept_T[batch.timestep_B])
        steps = [visited(STEPS).tolist().index(timestep) for timestep in batch.timestep_B.tolist()]
        wanted_B4hw = torch.stack([samples.paths[row.target][step] for row, step in zip(batch.rows, steps, strict=True)])
        torch.testing.assert_close(noised_B4hw, wanted_B4hw, rtol=1e-4, atol=1e-4)
        found |= set(steps)
        assert all(row.reference == samples.rows[row.target].reference for row in batch.rows)
    assert found == set(range(STEPS))


def test_pairs_are_of_one_picture_and_the_same_for_the_same_seed():
    rows = pairs(Pictures(), 40, 3)
    assert rows == pairs(Pictures(), 40, 3) != pairs(Pictures(), 40, 4)
    assert all(row.caption in Pictures().captions(row.target) and row.reference in Pictures().references(row.target)
               for row in rows)


def test_an_interval_is_around_the_mean_and_narrow_for_equal_samples():
    mean, low, high = (float(word.strip("()")) for word in interval(torch.arange(100.0).numpy()).replace("to ", "").split())
    assert low < mean == 49.5 < high and 5 < high - low < 20
    assert interval(torch.full((9,), 0.25).numpy()) == "0.250 (0.250 to 0.250)"
