"""The playground's evaluation: what is compared with what, and how intervals are made."""

import argparse
import copy
import json

import numpy as np
import pytest
import torch
from emoji_people import small_data

from emma_core.base.pipeline import Sampling
from emma_core.evaluation.report import crossed_interval
from emma_core.files.connector_file import save_connector
from emma_core.files.module_file import save_module
from emma_core.model.assembly import Assembly, Reference, tokens_over_schedule
from emma_core.playground import PLAYGROUND_DIR
from lab.playground import evaluate
from lab.playground.assembling import averaged, sequential, strongest, strongest_balanced
from lab.playground.evaluate import (
    ALL,
    BOTH,
    Generation,
    Line,
    Score,
    bootstrapped,
    choose_trials,
    hits_of,
    lines_to_generate,
    replaced,
    shuffled_trials,
    table,
)
from lab.playground.judge import Judge, load_judge, save_judge, verdicts
from lab.playground.trial_sheet import draw_trials

CLASSES = {"vendor": 4, "tone": 3, "caption": 4}


def test_trials_aim_at_held_out_pictures_with_references_from_the_train_split():
    data = small_data()
    trials = choose_trials(data, 4, seed=0)
    assert sorted(data.rows[trial.target].vendor for trial in trials) == sorted({row.vendor for row in data.rows})
    for trial in trials:
        target, style, face, thing = (data.rows[position]
                                      for position in (trial.target, trial.style, trial.face, trial.object))
        assert target.split != "train" and style.split == face.split == thing.split == "train"
        assert style.vendor == target.vendor and face.tone == target.tone and face.vendor != target.vendor
        assert target.emoji not in (style.emoji, face.emoji)
        assert thing.emoji == target.emoji and thing.vendor != target.vendor


def test_more_trials_than_held_out_pictures_have_other_references_and_other_noise():
    data = small_data()
    trials = choose_trials(data, 12, seed=0)
    assert [trial.seed for trial in trials] == list(range(12))
    assert len({trial.target for trial in trials}) == 4
    assert len({(trial.target, trial.style, trial.face, trial.object) for trial in trials}) > 8
    assert choose_trials(data, 4, seed=0) == trials[:4]


def test_an_unseen_style_has_lines_where_the_data_have_it():
    data = small_data()
    strange = [type(row)(**{**vars(row), "vendor": "openmoji", "split": "unseen"}) for row in data.rows if row.vendor == "noto"]
    more = type(data)(np.concatenate([data.images_NHWC, data.images_NHWC[:len(strange)]]), [*data.rows, *strange])
    trials = choose_trials(more, 6, seed=0, split="unseen")
    assert {(more.rows[trial.target].split, more.rows[trial.style].split) for trial in trials} == {("unseen", "unseen")}
    assert {more.rows[position].split for trial in trials for position in (trial.face, trial.object)} == {"train"}
    assert choose_trials(more, 6, seed=0) == choose_trials(data, 6, seed=0)
    names = [line.name for line in lines_to_generate((1.0,), {}, unseen=True)]
    assert "+ style, unseen" in names and not any("unseen" in line.name for line in lines_to_generate((1.0,), {}))


def data_with_two_held_out():
    """The light farmer is held out as well."""
    data = small_data()
    for position, row in enumerate(data.rows):
        if row.role == "farmer" and row.tone == "light":
            data.rows[position] = type(row)(**{**vars(row), "split": "heldout-triple"})
    return data


def test_shuffled_references_are_of_another_vendor_tone_and_caption():
    data = data_with_two_held_out()
    trials = choose_trials(data, 8, seed=0)
    for trial, misled in zip(trials, shuffled_trials(trials, data.rows, seed=0), strict=True):
        target = data.rows[trial.target]
        assert misled.target == trial.target
        assert misled.seed == trial.seed
        assert data.rows[misled.style].vendor != target.vendor and data.rows[misled.face].tone != target.tone
        assert data.rows[misled.object].caption != target.caption


def test_every_condition_alone_and_together_controls_and_variants_have_a_line(tmp_path):
    (tmp_path / "emma-style.safetensors").touch()
    lines = {line.name: line for line in lines_to_generate((1.0, 1.5), {"ours": tmp_path})}
    assert lines["text only"].strengths == {} and lines["+ style"].strengths == {"style": 1.0}
    assert lines["assembled, strength 1.5"].strengths == {"style": 1.5, "face": 1.5}
    assert lines["assembled, shuffled references"].shuffled and lines["assembled, gates zero"].gates == 0
    assert {line.assemble for line in lines.values()} == {
        "sum", "average", "one after the other", "strongest gate", "strongest gate, balanced"}
    assert not lines["category only + object"].told and lines["+ face"].told
    assert lines["ours: + style"].folder == tmp_path and "ours: assembled" not in lines


@pytest.fixture(scope="module")
def world():
    return evaluate.load_world()


@pytest.fixture(scope="module")
def prompt(world):
    """Text and one reference of each condition."""
    generator = torch.Generator().manual_seed(0)
    references = [world.encode_reference(condition, torch.rand(1, 128, 128, 3, generator=generator))
                  for condition in ("style", "face")]
    return world.pipeline.encode_text(["man cook"])[0], references


TIMESTEPS = torch.tensor([951.0, 300.0])


@pytest.mark.parametrize("count", [0, 1])
def test_no_module_and_one_are_assembled_alike_in_every_way(world, prompt, count):
    text, references = prompt
    assembly = Assembly(references[:count])
    wanted = tokens_over_schedule(world.pipeline.connector, text, TIMESTEPS, assembly)
    for way in (averaged, sequential, strongest, strongest_balanced):
        found = way(world.pipeline.connector, text, TIMESTEPS, assembly)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_two_modules_are_assembled_as_each_way_says(world, prompt):
    text, (style, face) = prompt
    connector = world.pipeline.connector
    both = Assembly([style, face])
    summed = tokens_over_schedule(connector, text, TIMESTEPS, both)
    halves = Assembly([Reference(one.module, one.features, 0.5) for one in (style, face)])
    assert torch.equal(averaged(connector, text, TIMESTEPS, both), tokens_over_schedule(connector, text, TIMESTEPS, halves))
    ways = [summed, averaged(connector, text, TIMESTEPS, both), sequential(connector, text, TIMESTEPS, both),
            sequential(connector, text, TIMESTEPS, Assembly([face, style])), strongest(connector, text, TIMESTEPS, both),
            strongest_balanced(connector, text, TIMESTEPS, both)]
    for number, one in enumerate(ways):
        assert all(not torch.allclose(one, other, rtol=1e-3) for other in ways[number + 1:])
    nothing = evaluate.with_gates(face.module, 0.0)
    alone = tokens_over_schedule(connector, text, TIMESTEPS, Assembly([style]))
    for way in (sequential, strongest, strongest_balanced):
        found = way(connector, text, TIMESTEPS, Assembly([style, Reference(nothing, face.features)]))
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_the_balanced_strongest_gate_does_not_mind_how_large_a_module_s_gates_are(world, prompt):
    text, (style, face) = prompt
    louder = Reference(evaluate.with_gates(face.module, 3.0), face.features)

    def tokens_of_style(way, other):
        """Where the other module acts on none of the style's tokens: its attention and feed-forward give nothing."""
        silent = Reference(silenced(other.module), other.features)
        return way(world.pipeline.connector, text, TIMESTEPS, Assembly([style, silent]))

    torch.testing.assert_close(tokens_of_style(strongest_balanced, louder), tokens_of_style(strongest_balanced, face))
    assert not torch.allclose(tokens_of_style(strongest, louder), tokens_of_style(strongest, face), rtol=1e-3)


def silenced(module):
    """A copy that takes tokens by its gates and does nothing with them."""
    module = copy.deepcopy(module)
    module.attention = module.feed_forward = lambda *arguments: torch.zeros(())
    return module


def test_without_gates_the_picture_is_that_of_the_text(world):
    data = small_data()
    generation = Generation(world, data, evaluate.Sampling(steps=2, width_px=32, height_px=32))
    trials = choose_trials(data, 3, seed=0)
    plain = generation.pictures(trials, Line("text only", {}))
    assert torch.equal(plain, generation.pictures(trials, Line("zero", BOTH, gates=0.0)))
    assert not torch.equal(plain, generation.pictures(trials, Line("both", BOTH)))
    assert not torch.equal(plain, generation.pictures(trials, Line("category", {}, told=False)))


def test_a_variant_replaces_modules_and_connector(world, tmp_path):
    module = evaluate.with_gates(world.modules["style"], 3.0)
    save_module(module, tmp_path / "emma-style.safetensors")
    found = replaced(world, Line("variant", {}, folder=tmp_path))
    assert set(found.modules) == {"style"} and found.pipeline.connector is world.pipeline.connector
    assert torch.equal(found.modules["style"].blocks[0].attn_gate, module.blocks[0].attn_gate)
    save_connector(world.pipeline.connector, tmp_path / "ella.safetensors", torch.float32)
    assert replaced(world, Line("variant", {}, folder=tmp_path)).pipeline.connector is not world.pipeline.connector


def test_the_sheet_of_trials_shows_references_target_and_every_line(world):
    data = small_data()
    trials = choose_trials(data, 2, seed=0)
    sheet = draw_trials(Generation(world, data, Sampling(steps=1)), data, trials)
    pixels = torch.from_numpy(np.asarray(sheet).copy())
    wanted = torch.from_numpy(data.images_NHWC[trials[1].target].copy())

    def cell(row, column):  # the middle of a cell, away from frames and titles
        step, margin = 172, 40
        left, top = 12 + column * step + (12 if column >= 3 else 0), 40 + row * 198 + 26
        return pixels[top + margin:top + 160 - margin, left + margin:left + 160 - margin].float()

    middle = wanted[wanted.shape[0] // 4:-wanted.shape[0] // 4, wanted.shape[1] // 4:-wanted.shape[1] // 4].float()
    assert torch.allclose(cell(1, 2).mean((0, 1)), middle.mean((0, 1)), atol=3), "the third picture of a row is the target"
    made = [cell(1, column) for column in range(3, 8)]
    assert all(not torch.equal(one, other) for index, one in enumerate(made) for other in made[:index])


def test_a_run_goes_on_with_the_lines_that_are_missing(monkeypatch, tmp_path, capsys):
    data = data_with_two_held_out()
    monkeypatch.setattr(evaluate, "load", lambda folder: data)
    torch.manual_seed(0)
    save_judge(Judge(CLASSES).eval(), tmp_path / "judge.safetensors")
    options = argparse.Namespace(data=tmp_path, judge=tmp_path / "judge.safetensors", out=tmp_path / "out", steps=1,
                                 guidance=2.0, pictures=8, seed=5, strengths=(1.0,), variant=[], split="heldout-triple",
                                 playground=PLAYGROUND_DIR,
                                 rows=["real pictures", "text only"])
    evaluate.evaluate(options)
    options.rows = ["text only", "+ style"]
    scores = evaluate.evaluate(options)
    printed = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert printed == list(scores) == ["real pictures", "text only", "+ style"]
    assert list(json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]) == list(scores)
    options.pictures, options.rows = 9, ["text only"]
    assert list(evaluate.evaluate(options)) == ["text only"], "other trials are another run"


def test_intervals_resample_base_emoji():
    """Sixteen pictures of two emoji know less than sixteen emoji: the interval is that of two."""
    hits = np.array([True] * 8 + [False] * 8)
    two = bootstrapped(hits, ["a"] * 8 + ["b"] * 8)
    many = bootstrapped(hits, [str(number) for number in range(16)])
    assert (two.mean, two.low, two.high) == (0.5, 0.0, 1.0)
    assert many.mean == 0.5 and 0.2 < many.low < 0.35 and 0.65 < many.high < 0.8


def test_certain_hits_have_no_interval():
    assert bootstrapped(np.array([True, True]), ["a", "b"]) == Score(1.0, 1.0, 1.0)


def test_a_hit_of_all_three_needs_each_of_them():
    torch.manual_seed(0)
    judge, image = Judge(CLASSES).eval(), torch.rand(5, 3, 64, 64) * 2 - 1
    found = verdicts(judge, image)
    wanted = {label: value.clone() for label, value in found.items()}
    wanted["tone"][0] = (wanted["tone"][0] + 1) % 3
    wanted["caption"][1] = (wanted["caption"][1] + 1) % 4
    hits = hits_of(judge, image, wanted)
    assert hits["vendor"].all()
    assert hits["tone"].tolist() == [False, True, True, True, True]
    assert hits[ALL].tolist() == [False, False, True, True, True]


def test_a_saved_judge_gives_the_same_verdicts(tmp_path):
    torch.manual_seed(1)
    judge, image = Judge(CLASSES).eval(), torch.rand(6, 3, 128, 128) * 2 - 1
    save_judge(judge, tmp_path / "judge.safetensors")
    loaded = load_judge(tmp_path / "judge.safetensors")
    for label, scores in judge(image).items():
        torch.testing.assert_close(loaded(image)[label], scores, rtol=0, atol=0)


def test_the_table_shows_mean_and_interval():
    score = Score(0.5, 0.25, 0.75)
    lines = table({"text only": {"vendor": score, "tone": score, "caption": score, ALL: score}}).splitlines()
    assert lines[0] == "| | vendor | tone | caption | all three |"
    assert lines[2].startswith("| text only | 0.50 (0.25 to 0.75) |")


@pytest.mark.parametrize("size", [64, 128])
def test_the_judge_sees_pictures_of_any_size(size):
    found = verdicts(Judge(CLASSES).eval(), torch.zeros(2, 3, size, size))
    assert {label: tuple(value.shape) for label, value in found.items()} == dict.fromkeys(CLASSES, (2,))


def test_with_one_prompt_an_interval_is_that_of_one_way():
    score_R, groups = np.random.default_rng(4).normal(size=9), [*"aabbccdde"]
    one_way, crossed = bootstrapped(score_R, groups), crossed_interval(score_R[:, None, None], groups)
    assert (crossed.mean, crossed.low, crossed.high) == pytest.approx((one_way.mean, one_way.low, one_way.high))
