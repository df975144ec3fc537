"""The second world's pictures and captions: matched by code point, held out by family, named sometimes."""

import json
import random

import numpy as np
import pytest

from lab.emoji.icons import EmojiPackageError
from lab.miniature.captions import STYLE_SHARE, TONE_SHARE, captions_of, full_caption
from lab.miniature.concepts import select_concepts
from lab.miniature.dataset import PAIR, TRAIN, TRIPLE, UNSEEN_SPLIT, halved, load, split_of
from lab.miniature.feed import drawing_weights
from lab.miniature.icons import codepoints_by_name, read_json, with_tone
from lab.miniature.lists import write_lists
from lab.miniature.styles import LEARNT, UNSEEN


@pytest.fixture(scope="module")
def data(miniature_data):
    return load(miniature_data)


def test_every_set_is_found_by_code_points_though_half_bring_names_only(data):
    assert {row.style for row in data.rows} == {style.word for style in (*LEARNT, *UNSEEN)}
    toned = [row for row in data.rows if row.tone == "dark" and row.concept == "1f469-200d-1f373"]
    assert {row.style for row in toned} == {style.word for style in (*LEARNT, *UNSEEN)}


def test_flags_are_left_out(data):
    assert not any("flag" in name for row in data.rows for name in row.names)


def test_old_and_new_names_of_one_emoji_meet(miniature_packages):
    by_name = codepoints_by_name(miniature_packages, read_json(miniature_packages, "emoji-datasource-google/emoji.json"))
    assert by_name["hotbeverage"] == by_name["coffee"] == "2615"


def test_the_tone_comes_behind_the_first_code_point():
    assert with_tone("1f469-200d-1f373", "1f3ff") == "1f469-1f3ff-200d-1f373"


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(EmojiPackageError, match="was not found: install its package with npm"):
        read_json(tmp_path, "@iconify-json/noto/icons.json")


def test_synonyms_stand_beside_the_usual_name():
    entry = {"name": "COOK", "unified": "1F469-200D-1F373", "short_name": "female-cook", "short_names": ["female-cook"],
             "category": "People & Body", "subcategory": "person-role", "skin_variations": {}}
    concept, = select_concepts([entry], {"1f469-200d-1f373": "woman-cook"})
    assert {"woman cook", "woman chef", "female cook"} <= set(concept.names)
    assert (concept.role, concept.gender) == ("cook", "woman")


def test_sets_of_one_family_hold_out_the_same_pictures(data):
    splits = {}
    for row in data.rows:
        family = next(style.family for style in (*LEARNT, *UNSEEN) if style.word == row.style)
        splits.setdefault((row.concept, row.tone, family), set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())


def test_nothing_of_an_unseen_style_is_trained_on(data):
    words = {style.word for style in UNSEEN}
    assert {row.split for row in data.rows if row.style in words} == {UNSEEN_SPLIT}


def test_shares_held_out_are_as_written(miniature_packages):
    from dataclasses import replace

    concept, = select_concepts([{"name": "CAT", "unified": "1F408", "short_name": "cat", "short_names": ["cat"],
                                 "category": "Animals & Nature", "subcategory": "animal-mammal"}], {})
    splits = [split_of(replace(concept, codepoints=str(number)), LEARNT[2], "dark") for number in range(4000)]
    assert splits.count(PAIR) / 4000 == pytest.approx(0.04, abs=0.01)
    assert splits.count(TRIPLE) / 4000 == pytest.approx(0.096, abs=0.015)
    assert split_of(replace(concept, codepoints="0"), LEARNT[2], "") in (TRAIN, PAIR)


def test_captions_name_style_and_tone_sometimes(data):
    row = next(row for row in data.rows if row.tone == "dark" and row.style == "twemoji")
    chance = random.Random(1)
    captions = [captions_of(row, chance) for _ in range(3000)]
    assert sum("twemoji style" in text for text in captions) / 3000 == pytest.approx(STYLE_SHARE, abs=0.03)
    assert sum("dark" in text for text in captions) / 3000 == pytest.approx(TONE_SHARE, abs=0.03)
    assert full_caption(row) == f"{row.names[0]}, dark skin, twemoji style"


def test_a_picture_without_a_tone_is_never_said_to_have_one(data):
    row = next(row for row in data.rows if not row.tone)
    chance = random.Random(1)
    assert not any("skin" in captions_of(row, chance) for _ in range(500))


def test_concepts_are_drawn_alike_however_many_pictures_they_have(data):
    rows = [row for row in data.rows if row.split == TRAIN]
    weights = drawing_weights(rows)
    of = {concept: sum(weight for weight, row in zip(weights, rows, strict=True) if row.concept == concept)
          for concept in ("1f408", "1f469-200d-1f373")}
    assert of["1f408"] == pytest.approx(3.0)  # everyday
    assert of["1f469-200d-1f373"] == pytest.approx(6.0)  # a role, and in tones


def test_small_pictures_are_means_of_four(data):
    assert np.array_equal(data.small_N3SS[0], halved(np.asarray(data.images_NHWC[0])))
    block_223 = np.array([[[0] * 3, [100] * 3], [[50] * 3, [50] * 3]], dtype=np.uint8)
    assert halved(block_223).tolist() == [[[50]], [[50]], [[50]]]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def lists(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("lists")
    write_lists(data, out)
    return out


def picture_key(name):
    """pictures/<style>/<concept>-<tone>.png -> style, concept, tone"""
    style, file = name.split("/")[1:]
    tones = ("medium-light", "medium-dark", "light", "medium", "dark")
    tone = next((tone for tone in tones if file.endswith(f"-{tone}.png")), "")
    return style, file.removesuffix(".png").removesuffix(f"-{tone}"), tone


def test_a_style_reference_is_another_thing_of_the_same_set(lists):
    for line in lines_of(lists / "style.jsonl"):
        style, concept, _ = picture_key(line["image"])
        shown = [picture_key(name) for name in line["references"]]
        assert shown and all(other[0] == style and other[1] != concept for other in shown)
        assert not any("style" in caption for caption in line["captions"])


def test_a_face_reference_is_another_person_of_the_same_tone(lists):
    lines = lines_of(lists / "face.jsonl")
    assert lines
    for line in lines:
        _, concept, tone = picture_key(line["image"])
        shown = [picture_key(name) for name in line["references"]]
        assert tone and all(other[2] == tone and other[1] != concept for other in shown)
        assert not any("skin" in caption for caption in line["captions"])


def test_an_object_reference_is_the_same_thing_by_another_hand_and_the_prompt_does_not_name_it(lists, data):
    families = {style.word: style.family for style in (*LEARNT, *UNSEEN)}
    names = {row.concept: row.names for row in data.rows}
    for line in lines_of(lists / "object.jsonl"):
        style, concept, _ = picture_key(line["image"])
        shown = [picture_key(name) for name in line["references"]]
        assert all(other[1] == concept and families[other[0]] != families[style] for other in shown)
        assert not any(name in caption for caption in line["captions"] for name in names[concept])


def test_nothing_held_out_or_unseen_is_in_a_list_to_learn_from(lists, data):
    allowed = {(row.style, row.concept, row.tone) for row in data.rows if row.split == TRAIN}
    for name in ("ella", "style", "face", "object", "portrait"):
        for line in lines_of(lists / f"{name}.jsonl"):
            assert {picture_key(one) for one in (line["image"], *line.get("references", ()))} <= allowed
