"""What the modules of the second world are asked for, and what travels to another machine."""

import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab.miniature import evaluate
from lab.miniature.dataset import TRAIN, UNSEEN_SPLIT, Pictures, Row, build, load
from lab.miniature.pack import PART_BYTES, join, slim_packages, split, write_tar
from lab.miniature.styles import LEARNT, UNSEEN
from lab.miniature.trials import TELLS, choose_trials
from lab.playground.evaluate import shuffled_trials

FAMILIES = {style.word: style.family for style in (*LEARNT, *UNSEEN)}


@pytest.fixture(scope="module")
def data():
    """Twelve people in two tones and six things by all sets; every fifth person held out, of two families."""
    rows = []
    for style in (*LEARNT, *UNSEEN):
        for number in range(12):
            for tone in ("light", "dark"):
                heldout = number % 5 == 0 and style.family in ("noto", "twemoji")
                split = UNSEEN_SPLIT if style in UNSEEN else "heldout-triple" if heldout else TRAIN
                rows.append(Row(f"c{number}", (f"woman {number}",), "People & Body", "person-role", "", "woman", tone,
                                style.word, split))
        split = UNSEEN_SPLIT if style in UNSEEN else TRAIN
        rows += [Row(f"t{number}", (f"thing {number}",), "Objects", "tool", "", "", "", style.word, split)
                 for number in range(6)]
    empty = np.zeros((len(rows), 2, 2, 3), np.uint8)
    return Pictures(empty, empty.transpose(0, 3, 1, 2), rows)


@pytest.mark.parametrize("split", ["heldout-triple", UNSEEN_SPLIT])
def test_references_tell_what_they_should_and_nothing_else(data, split):
    trials = choose_trials(data, 16, seed=1, split=split)
    assert len(trials) == 16
    for trial in trials:
        target, style, face, thing = (data.rows[getattr(trial, name)] for name in ("target", "style", "face", "object"))
        assert target.split == split
        assert style.style == target.style and style.concept != target.concept
        assert face.tone == target.tone and face.concept != target.concept
        assert FAMILIES[face.style] != FAMILIES[target.style] != FAMILIES[thing.style] and thing.concept == target.concept
        assert {face.split, thing.split} == {TRAIN}


def test_things_of_unseen_styles_are_of_every_such_set_and_shown_by_it(data):
    trials = choose_trials(data, 12, seed=1, split=UNSEEN_SPLIT, toned=False)
    targets = [data.rows[trial.target] for trial in trials]
    assert {row.style for row in targets} == {style.word for style in UNSEEN} and {row.tone for row in targets} == {""}
    for trial, target in zip(trials, targets, strict=True):
        style = data.rows[trial.style]
        assert style.style == target.style and style.concept != target.concept and trial.face == trial.target
    assert choose_trials(data, 12, seed=1, toned=False) == []


def test_shuffled_references_tell_something_else(data):
    trials = choose_trials(data, 16, seed=1)
    assert len(trials) == 16
    for trial, misled in zip(trials, shuffled_trials(trials, data.rows, seed=2, tells=TELLS), strict=True):
        target = data.rows[trial.target]
        assert misled.target == trial.target and misled.seed == trial.seed
        assert data.rows[misled.style].style != target.style
        assert data.rows[misled.object].concept != target.concept


def test_packed_sources_give_the_very_same_pictures(miniature_packages, miniature_data, tmp_path):
    write_tar(slim_packages(miniature_packages), tmp_path / "sources.tar.xz")
    with tarfile.open(tmp_path / "sources.tar.xz") as tar:
        tar.extractall(tmp_path / "packages", filter="data")
    build(tmp_path / "packages", tmp_path / "data")
    first, second = load(miniature_data), load(tmp_path / "data")
    assert first.rows == second.rows
    assert np.array_equal(first.images_NHWC, second.images_NHWC)


def test_a_folder_comes_back_from_its_parts(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    content = np.random.default_rng(0).bytes(PART_BYTES + 1000)
    (folder / "inner" / "weights").write_bytes(content)
    parts = split(folder, tmp_path / "parts")
    assert len(parts) == 2 and all(path.stat().st_size <= PART_BYTES for path in parts)
    join(tmp_path / "parts", tmp_path / "back")
    assert (tmp_path / "back" / "inner" / "weights").read_bytes() == content


class ColourClip:
    """Pictures by their mean colour; words by the colour that they name."""

    def image_features(self, image_B3SS):
        return torch.nn.functional.normalize((image_B3SS.mean((2, 3)) + 1).float(), dim=-1)

    def text_features(self, ids_B):
        return torch.eye(3)[ids_B]


def test_likeness_is_highest_to_the_pictures_own_style_and_words(monkeypatch):
    names = ["red", "green", "blue"]
    monkeypatch.setattr(evaluate.Likeness, "_ids", lambda self, texts: torch.tensor([names.index(text) for text in texts]))
    colours = torch.eye(3)
    rows = [SimpleNamespace(style=style) for style in "abc" for _ in range(4)]
    images_NHWC = (colours.repeat_interleave(4, 0)[:, None, None] * 255).byte().expand(-1, 8, 8, -1).numpy()
    likeness = evaluate.Likeness(ColourClip(), None, SimpleNamespace(rows=rows, images_NHWC=images_NHWC), "cpu")
    image_B3SS = colours[:, :, None, None].expand(-1, -1, 8, 8) * 2 - 1
    of_style, of_words = likeness.of(image_B3SS, list("abc"), names)
    other_style, other_words = likeness.of(image_B3SS, list("bca"), ["green", "blue", "red"])
    assert of_style.tolist() == of_words.tolist() == pytest.approx([2 / 3] * 3)
    assert other_style.tolist() == other_words.tolist() == pytest.approx([-1 / 3] * 3)
