"""Which pictures are references of which, and the lists that the trainer reads."""

import json
import random

import numpy as np
import pytest
from emoji_people import small_data
from PIL import Image

from emma_core.training.config import DataConfig
from emma_core.training.examples import read_examples
from lab.playground.pairs import CONDITIONS, ReferencePicker
from lab.playground.training_data import write_training_data


@pytest.mark.parametrize("condition", CONDITIONS)
def test_references_share_only_what_the_condition_names(condition):
    data = small_data()
    picker, chance = ReferencePicker(data.rows, data.positions("train")), random.Random(0)
    seen = set()
    for row in data.rows:
        for _ in range(20):
            reference = data.rows[picker.pick(condition, row, chance)]
            same = {"style": reference.vendor == row.vendor, "face": reference.tone == row.tone,
                    "object": reference.emoji == row.emoji}
            assert reference.split == "train" and same["object"] == (condition == "object")
            assert same[condition]
            seen.add(same["face" if condition in ("style", "object") else "style"])
    assert seen == {True, False}


def test_object_references_are_of_another_family_of_vendors():
    """Both fluent sets have one geometry: one must not be the reference of the other."""
    data = small_data()
    picker, chance = ReferencePicker(data.rows, data.positions("train")), random.Random(0)
    found = {(row.vendor, data.rows[picker.object(row, chance)].vendor) for row in data.rows for _ in range(20)}
    fluent = {"fluent-emoji", "fluent-emoji-flat"}
    others = {"noto": {"twemoji", *fluent}, "twemoji": {"noto", *fluent}, **{name: {"noto", "twemoji"} for name in fluent}}
    assert found == {(vendor, other) for vendor, names in others.items() for other in names}


def test_face_references_of_evaluation_are_never_the_targets_vendor():
    data = small_data()
    picker, chance = ReferencePicker(data.rows, data.positions("train")), random.Random(0)
    assert all(data.rows[picker.face(row, chance, other_vendor=True)].vendor != row.vendor
               for row in data.rows for _ in range(20))


def test_the_trainer_reads_every_picture_with_references_of_the_train_split(tmp_path):
    data = small_data()
    write_training_data(data, tmp_path)
    heldout_pictures = {f"{row.vendor}/{row.caption.replace(' ', '-')}-{row.tone}.png" for row in data.rows
                        if row.split != "train"}
    for condition, group in (("style", "vendor"), ("face", "tone"), ("object", "caption")):
        for name, splits in ((condition, ("train",)), (f"{condition}-heldout", ("heldout-pair", "heldout-triple"))):
            rows = [row for row in data.rows if row.split in splits]
            data_config = DataConfig(jsonl=str(tmp_path / f"{name}.jsonl"), resolution_px=32, bucket_step_px=8)
            examples, problems = read_examples(data_config)
            assert not any(problem.fatal for problem in problems)
            assert [example.group for example in examples] == [getattr(row, group) for row in rows]
            told = condition != "object"
            assert all((row.caption in example.captions) == told for row, example in zip(rows, examples, strict=True))
            assert all(("person" in example.captions) != told for example in examples)
            references = {reference.relative_to(tmp_path / "pictures").as_posix() for example in examples
                          for reference in example.references}
            assert references and not references & heldout_pictures
    line = json.loads((tmp_path / "style.jsonl").read_text().splitlines()[0])
    assert np.array_equal(np.asarray(Image.open(tmp_path / line["image"])), data.images_NHWC[0])
