"""Ways to add modules up over the steps: literal arithmetic, evaluations counted, and the core's own pictures.

Shapes: B pictures, latents 4 x h x w.
"""

import argparse

import numpy as np
import pytest
import torch
from emoji_people import small_data

from emma_core.base.pipeline import Sampling
from emma_core.model.addition import PREDICTIONS, TOKENS, Addition
from emma_core.playground import PLAYGROUND_DIR
from lab.playground import adding_up
from lab.playground.adding_up import EACH, FACE, LINES, STYLE, Sampler
from lab.playground.adding_ways import (
    TEXT,
    Shown,
    above,
    alternating,
    at_steps,
    in_predictions,
    keeping_corrections,
    keeping_differences,
    mean_of,
    projected,
    taking_turns,
    together,
)
from lab.playground.ceiling import KNOTS, PAIRS, Offsets, OffsetSampler, pair_of
from lab.playground.cosines import COLUMNS, measured
from lab.playground.evaluate import Generation, Line, choose_trials
from lab.playground.judge import Judge, save_judge
from lab.playground.world import load_world


class Answers:
    """Predictions that are drawn once for each thing shown at each step; counts what is asked."""

    def __init__(self):
        self.asked = []

    def of(self, step, shown):
        generator = torch.Generator().manual_seed(hash((step, shown)) % 2**31)
        return torch.randn(2, 4, 3, 3, generator=generator)

    def at(self, step):
        def ask(*each):
            self.asked.append(each)
            return [self.of(step, shown) for shown in each]
        return ask


def test_predictions_are_base_plus_differences():
    answers, base = Answers(), Shown((("object", 1.0),))
    found = in_predictions(EACH, base)(0, 951, answers.at(0))
    base_B4hw, style_B4hw, face_B4hw = (answers.of(0, shown) for shown in (base, base + STYLE, base + FACE))
    torch.testing.assert_close(found, style_B4hw + face_B4hw - base_B4hw)


def test_turns_keep_the_other_modules_difference():
    answers, way = Answers(), taking_turns(EACH)
    torch.testing.assert_close(way(0, 951, answers.at(0)), in_predictions(EACH)(0, 951, answers.at(0)))
    kept_B4hw = answers.of(0, FACE) - answers.of(0, TEXT)
    torch.testing.assert_close(way(1, 901, answers.at(1)), answers.of(1, STYLE) + kept_B4hw)
    kept_B4hw = answers.of(1, STYLE) - answers.of(1, TEXT)
    torch.testing.assert_close(way(2, 851, answers.at(2)), answers.of(2, FACE) + kept_B4hw)
    assert [len(each) for each in answers.asked] == [3, 3, 2, 2]


def test_kept_differences_and_corrections_are_those_of_the_last_fresh_step():
    answers, way = Answers(), keeping_differences(EACH, {0, 2})
    for step in range(4):
        found, fresh = way(step, 951, answers.at(step)), step - step % 2
        differences = [answers.of(fresh, shown) - answers.of(fresh, TEXT) for shown in EACH]
        torch.testing.assert_close(found, answers.of(step, TEXT) + sum(differences))
    answers, both = Answers(), STYLE + FACE
    way = keeping_corrections(EACH, {0}, both)
    full_B4hw = in_predictions(EACH)(0, 951, answers.at(0))
    torch.testing.assert_close(way(0, 951, answers.at(0)), full_B4hw)
    torch.testing.assert_close(way(1, 901, answers.at(1)), answers.of(1, both) + full_B4hw - answers.of(0, both))


def test_means_and_turns_of_single_modules():
    answers = Answers()
    torch.testing.assert_close(mean_of(EACH)(0, 951, answers.at(0)), (answers.of(0, STYLE) + answers.of(0, FACE)) / 2)
    way = alternating(EACH)
    assert torch.equal(way(4, 751, answers.at(4)), answers.of(4, STYLE))
    assert torch.equal(way(5, 701, answers.at(5)), answers.of(5, FACE))


def test_projected_differences_have_nothing_along_each_other_and_half_counts_what_is_shared_once():
    answers = Answers()
    text_B4hw = answers.of(0, TEXT)
    first_B4hw, second_B4hw = (answers.of(0, shown) - text_B4hw for shown in EACH)

    def inner(one_B4hw, other_B4hw):
        return (one_B4hw * other_B4hw).sum((1, 2, 3))

    whole_B4hw = projected(EACH, 1.0)(0, 951, answers.at(0)) - text_B4hw
    # (a - along b) + (b - along a): its part along a is |a|^2 less <a,b>^2 / |b|^2
    wanted_B = inner(first_B4hw, first_B4hw) - inner(first_B4hw, second_B4hw) ** 2 / inner(second_B4hw, second_B4hw)
    torch.testing.assert_close(inner(whole_B4hw, first_B4hw), wanted_B, rtol=1e-4, atol=1e-4)

    class Twice(Answers):
        def of(self, step, shown):
            return super().of(step, STYLE if shown == FACE else shown)

    same = Twice()
    torch.testing.assert_close(projected(EACH, 0.5)(0, 951, same.at(0)), same.of(0, STYLE))


def test_a_limit_parts_the_timesteps_and_a_set_the_steps():
    answers = Answers()
    for way in (above(800, together(STYLE), together(FACE)), at_steps({3}, together(STYLE), together(FACE))):
        assert torch.equal(way(3, 801, answers.at(3)), answers.of(3, STYLE))
        assert torch.equal(way(4, 751, answers.at(4)), answers.of(4, FACE))


@pytest.fixture(scope="module")
def generation():
    return Generation(load_world(), small_data(), Sampling(steps=3, width_px=32, height_px=32))


def sampler_of(generation):
    return Sampler(generation, told=True)


@pytest.mark.parametrize("name, addition, evaluations", [
    ("blocks", Addition(), 6),
    ("tokens", Addition(TOKENS), 6),
    ("predictions", Addition(PREDICTIONS), 12),
    ("predictions above 900", Addition(PREDICTIONS, 0.1), 6),
    ("predictions above 700", Addition(PREDICTIONS, 0.3), 6),
])
def test_the_cores_ways_give_the_cores_pictures(generation, name, addition, evaluations):
    """Timesteps 667, 334 and 1: no limit of the table reaches below 700; up to the UNet's bfloat16 here."""
    trials = choose_trials(generation.data, 2, seed=0)
    sampler = sampler_of(generation)
    found = sampler.pictures(trials, LINES[name].begin())
    wanted = generation.pictures(trials, Line("", {"style": 1.25, "face": 1.0}, addition=addition))
    other = generation.pictures(trials, Line("", {"style": 1.25}))
    assert sampler.evaluations == evaluations
    assert (found - wanted).square().mean() < 0.05 * (found - other).square().mean()


def test_a_run_goes_on_with_the_pictures_that_are_missing(monkeypatch, tmp_path, capsys):
    data = small_data()
    monkeypatch.setattr(adding_up, "load", lambda folder: data)
    monkeypatch.setattr(adding_up, "Sampling", lambda: Sampling(steps=1))
    monkeypatch.setattr(adding_up, "PICTURES_AT_ONCE", 2)
    torch.manual_seed(0)
    save_judge(Judge({"vendor": 4, "tone": 3, "caption": 4}).eval(), tmp_path / "judge.safetensors")
    options = argparse.Namespace(data=tmp_path, judge=tmp_path / "judge.safetensors", out=tmp_path / "out", pictures=3, seed=5,
                                 split="heldout-triple", playground=PLAYGROUND_DIR, lines=["blocks", "predictions"])
    adding_up.measure(options)
    first = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in first.splitlines()] == ["blocks (2)", "predictions (4)"]
    missing, kept = sorted((tmp_path / "out").glob("blocks-*"))
    missing.unlink()
    np.savez(kept, evaluations=2, **{label: np.array([True]) for label in ("vendor", "tone", "caption", "all three")})
    adding_up.measure(options)
    again = capsys.readouterr().out
    assert missing.is_file() and again != first, "the file that was there is believed"
    assert again.splitlines()[1] == first.splitlines()[1]


def test_offsets_of_a_pair_go_straight_from_knot_to_knot():
    offsets = Offsets()
    with torch.no_grad():
        offsets.offset_PSKW[3, 1], offsets.offset_PSKW[3, 2] = 1.0, 3.0
    context_BKW = torch.zeros(4, *offsets.offset_PSKW.shape[2:])
    spacing = 1000 / (KNOTS - 1)
    timestep_B = torch.tensor([1.0, 1.5, 2.0, 1.5]) * spacing
    found = offsets(context_BKW, timestep_B, torch.tensor([3, 3, 3, 4]))
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([1.0, 2.0, 3.0, 0.0]), rtol=1e-5, atol=1e-5)
    assert len(PAIRS) == 20


def test_cosines_and_sizes_are_of_what_the_modules_change(generation):
    trials = choose_trials(generation.data, 2, seed=0)
    sampler = sampler_of(generation)
    found_TBX = measured(sampler, trials)
    assert found_TBX.shape == (3, 2, len(COLUMNS)) and sampler.evaluations == 15
    changed = [sampler.tokens_of(trials[1], shown)[0] - sampler.tokens_of(trials[1], TEXT)[0] for shown in (STYLE, FACE)]
    wanted = torch.nn.functional.cosine_similarity(changed[0].flatten(), changed[1].flatten(), dim=0)
    torch.testing.assert_close(found_TBX[0, 1, 0], wanted)
    # |a|^2 + |b|^2 + 2 cos |a| |b| = |a + b|^2, all in parts of |a + b|
    style_TB, face_TB, cosine_TB = found_TBX[..., 2], found_TBX[..., 3], found_TBX[..., 1]
    whole_TB = style_TB**2 + face_TB**2 + 2 * cosine_TB * style_TB * face_TB
    torch.testing.assert_close(whole_TB, torch.ones(3, 2), rtol=1e-3, atol=1e-3)


def test_a_trial_is_shown_the_offset_of_what_it_is_aimed_at(generation):
    offsets = Offsets()
    trial = choose_trials(generation.data, 1, seed=0)[0]
    with torch.no_grad():
        offsets.offset_PSKW[pair_of(generation.data.rows[trial.target])] = 0.5
    plain_TKW = sampler_of(generation).tokens_of(trial, TEXT)
    torch.testing.assert_close(OffsetSampler(generation, offsets).tokens_of(trial, TEXT), plain_TKW + 0.5)
