"""Strengths that change over the sampling count where the sampler's steps say."""

import math

import pytest
import torch
from reference_answers import relative_error
from small_models import small_connector, small_features, small_module, small_text

from emma_core import Assembly, Reference
from emma_core.errors import ReferenceMismatchError
from emma_core.model.assembly import tokens_over_schedule
from emma_core.model.strength_keyframes import StrengthKeyframe, StrengthKeyframes

SCHEDULE = (999.0, 900.0, 750.0, 600.0, 400.0, 200.0, 50.0, 0.0)
# (percent, strength, steps), in no order
KEYFRAMES = {
    "free": [(0.5, 0.3, 0), (0.0, 1.0, 0), (0.9, 2.0, 0)],
    "close together, each kept": [(0.3, 0.1, 1), (0.31, 0.2, 1), (0.32, 0.3, 1), (0.33, 0.4, 1)],
    "close together, kept longer": [(0.2, 0.1, 2), (0.25, 0.2, 3), (0.3, 0.3, 1)],
    "two at one place": [(0.0, 1.0, 0), (0.4, 0.5, 0), (0.4, 0.7, 0), (0.81, -1.0, 1)],
    "first late": [(0.6, 0.5, 0), (1.0, 9.0, 0)],
    "all before the end": [(0.0, 0.1, 5), (0.0, 0.2, 5), (0.05, 0.3, 1)],
}


def walk(keyframes, schedule):
    """What ComfyUI does with hook keyframes, written down step by step: {timestep: strength}."""
    ordered = sorted(keyframes, key=lambda keyframe: keyframe[0])
    begins = [math.inf if percent <= 0 else -math.inf if percent >= 1 else (1 - percent) * 999 for percent, _, _ in ordered]
    kept = [0 if begin > schedule[0] else steps for begin, (_, _, steps) in zip(begins, ordered, strict=True)]
    now, used, found = 0, 0, {}
    for timestep in schedule:
        if used >= kept[now]:
            for following in range(now + 1, len(ordered)):
                if begins[following] < timestep:
                    break
                now, used = following, 0
                if kept[now] > 0:
                    break
        used += 1
        found[timestep] = ordered[now][1]
    return found


def keyframes_of(name, schedule=SCHEDULE):
    return StrengthKeyframes([StrengthKeyframe(*one) for one in KEYFRAMES[name]], schedule)


@pytest.mark.parametrize("name", KEYFRAMES)
@pytest.mark.parametrize("schedule", [SCHEDULE, SCHEDULE[2:], SCHEDULE[::2], SCHEDULE[:1]])
def test_strengths_are_those_of_walking_the_schedule(name, schedule):
    wanted = walk(KEYFRAMES[name], schedule)
    found = keyframes_of(name, schedule).of_rows(torch.tensor(schedule))
    assert found.tolist() == pytest.approx(list(wanted.values()))


def test_examples_are_not_all_alike():
    """The kept steps matter for these schedules, so the walk above can tell."""
    assert list(walk(KEYFRAMES["close together, each kept"], SCHEDULE).values()) == [0.1] * 3 + [0.2, 0.3, 0.4, 0.4, 0.4]
    assert list(walk(KEYFRAMES["free"], SCHEDULE).values()) == [1.0] * 4 + [0.3, 0.3, 2.0, 2.0]


def test_between_steps_the_steps_before_count():
    keyframes = keyframes_of("close together, kept longer")
    before = [timestep for timestep in SCHEDULE if timestep > 650.0]
    assert keyframes.at(650.0) == walk(KEYFRAMES["close together, kept longer"], (*before, 650.0))[650.0]
    assert keyframes.at(650.0) != keyframes.at(50.0)


def test_without_a_schedule_no_steps_are_counted():
    keyframes = keyframes_of("close together, each kept", ())
    assert [keyframes.at(timestep) for timestep in (900.0, 689.0, 0.0)] == [0.1, 0.2, 0.4]
    assert keyframes.counts_steps and not keyframes_of("free").counts_steps


def test_no_keyframes_are_a_factor_of_one():
    assert StrengthKeyframes().of_rows(torch.tensor([999, 0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("numbers", [(math.nan, 1.0), (0.5, math.inf)])
def test_keyframes_that_are_not_finite_are_refused(numbers):
    with pytest.raises(ReferenceMismatchError, match="a keyframe at .* is not finite. Use numbers"):
        StrengthKeyframes([StrengthKeyframe(*numbers)])


@pytest.mark.parametrize("frames", [1, 3])
def test_tokens_have_the_strength_of_their_timestep(frames):
    """Per frame and over the sampling at once, against one call at one plain strength each."""
    connector, module = small_connector(), small_module()
    features = small_features(module, rows=frames)
    strength_F = torch.tensor([0.5, 1.0, -0.2])[:frames]
    pairs = [(0.0, 1.0, 0), (0.2, 0.0, 0), (0.5, 1.7, 0)]
    keyframes = StrengthKeyframes([StrengthKeyframe(*one) for one in pairs])
    reference = Reference(module, features, strength_F, keyframes=keyframes)
    timestep_T = torch.tensor([990.0, 700.0, 300.0])
    found = tokens_over_schedule(connector, small_text(), timestep_T, Assembly([reference]))
    for step, (timestep, factor) in enumerate(zip(timestep_T.tolist(), (1.0, 0.0, 1.7), strict=True)):
        for frame in range(frames):
            one = Reference(module, {name: tensor[frame:frame + 1] for name, tensor in features.items()},
                            factor * float(strength_F[frame]))
            wanted = connector.tokens(small_text(), timestep, Assembly([one]))[0]
            assert relative_error(found[step, frame], wanted) <= 1e-5


def test_an_assembly_counts_on_the_schedule_it_is_given():
    module = small_module()
    reference = Reference(module, small_features(module), 2.0, keyframes=keyframes_of("close together, each kept", ()))
    assembly = Assembly([reference])
    assert assembly.counts_steps and not Assembly([Reference(module, small_features(module))]).counts_steps
    bound = assembly.on_schedule(SCHEDULE).references[0]
    assert bound.weight_of_rows(torch.tensor([600.0, 400.0])).tolist() == pytest.approx([0.4, 0.6])
    assert assembly.references[0].weight_of_rows(torch.tensor([600.0])).tolist() == pytest.approx([0.8])


@pytest.mark.parametrize("shared", ["features", "strength", "neither"])
def test_a_row_of_a_reference_is_that_frame_alone(shared):
    module = small_module()
    strength = 0.7 if shared == "strength" else torch.tensor([0.1, 0.2, 0.3])
    features = small_features(module, rows=1 if shared == "features" else 3)
    reference = Reference(module, features, strength, 0.1, 0.8, StrengthKeyframes([StrengthKeyframe(0.0, 0.5)]))
    row = reference.of_row(2)
    assert row.rows == 1 and (row.start_percent, row.end_percent) == (0.1, 0.8)
    assert row.weight_of_rows(torch.tensor([500.0])).item() == pytest.approx(0.5 * (0.7 if shared == "strength" else 0.3))
    assert torch.equal(row.features["global"][0], features["global"][-1])
