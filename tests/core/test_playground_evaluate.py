"""The playground's evaluation: what is compared with what, and how intervals are made."""

import numpy as np
import pytest
import torch
from emoji_people import small_data

from emma_core.playground.evaluate import (
    ALL,
    Score,
    bootstrapped,
    choose_trials,
    hits_of,
    rows_to_generate,
    shuffled_trials,
    table,
)
from emma_core.playground.judge import Judge, load_judge, save_judge, verdicts

CLASSES = {"vendor": 4, "tone": 3, "caption": 4}


def test_trials_aim_at_held_out_pictures_with_references_from_the_train_split():
    data = small_data()
    trials = choose_trials(data, 4, seed=0)
    assert sorted(data.rows[trial.target].vendor for trial in trials) == sorted({row.vendor for row in data.rows})
    for trial in trials:
        target, style, face = (data.rows[position] for position in (trial.target, trial.style, trial.face))
        assert target.split != "train" and style.split == face.split == "train"
        assert style.vendor == target.vendor and face.tone == target.tone and face.vendor != target.vendor
        assert target.emoji not in (style.emoji, face.emoji)


def test_shuffled_references_are_of_another_vendor_and_tone():
    data = small_data()
    for position, row in enumerate(data.rows):
        if row.role == "farmer" and row.tone == "light":
            data.rows[position] = type(row)(**{**vars(row), "split": "heldout-triple"})
    trials = choose_trials(data, 8, seed=0)
    for trial, misled in zip(trials, shuffled_trials(trials, data.rows, seed=0), strict=True):
        target = data.rows[trial.target]
        assert misled.target == trial.target
        assert data.rows[misled.style].vendor != target.vendor and data.rows[misled.face].tone != target.tone


def test_rows_hold_each_condition_alone_and_together():
    assert rows_to_generate((1.0, 1.5)) == {
        "text only": {}, "+ style": {"style": 1.0}, "+ face": {"face": 1.0},
        "assembled, strength 1": {"style": 1.0, "face": 1.0}, "assembled, strength 1.5": {"style": 1.5, "face": 1.5}}


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
