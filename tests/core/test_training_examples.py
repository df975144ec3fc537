"""Reading a training set: what is found, which references belong to what, and every problem in one go."""

import json
from pathlib import Path

import pytest
from PIL import Image

from emma_core.errors import TrainingConfigError, TrainingDataError
from emma_core.training.config import DataConfig
from emma_core.training.examples import Example, PictureSet, describe, read_examples, require

SIZE = (64, 64)


def draw(path: Path, colour: str = "red", size: tuple[int, int] = SIZE, caption: str | None = "a drawing") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if path.name.endswith(".mask.png") else "RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def config(**changes) -> DataConfig:
    return DataConfig(**{"resolution_px": 64, "workers": 2} | changes)


def lines(path: Path, *entries) -> DataConfig:
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries), encoding="utf-8")
    return config(jsonl=str(path))


def texts(problems) -> dict[str, str]:
    return {problem.where: ("! " if problem.fatal else "") + problem.text for problem in problems}


@pytest.fixture
def people(tmp_path):
    draw(tmp_path / "ann/1.png", "red", caption="a woman\n\n  a smiling woman \n")
    draw(tmp_path / "ann/2.JPG", "blue")
    draw(tmp_path / "bob/x/1.webp", "green")
    draw(tmp_path / "bob/x/2.bmp", "black", size=(96, 64))
    draw(tmp_path / "bob/x/2.mask.png", "white", size=(192, 128), caption=None)
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs/a.png").write_bytes(b"")
    return tmp_path


def test_a_folder_is_read_with_groups_captions_and_masks(people):
    examples, problems = read_examples(config(folder=str(people)))
    assert problems == []
    assert [(example.name, example.group) for example in examples] == [
        ("ann/1.png", "ann"), ("ann/2.JPG", "ann"), ("bob/x/1.webp", "bob/x"), ("bob/x/2.bmp", "bob/x")]
    assert examples[0].captions == ("a woman", "a smiling woman")
    assert [example.mask for example in examples] == [None, None, None, people / "bob/x/2.mask.png"]
    require(examples, problems)


def test_the_caption_extension_is_respected(tmp_path):
    draw(tmp_path / "a.png", caption="not this").with_suffix(".caption").write_text("this")
    examples, _ = read_examples(config(folder=str(tmp_path), caption_extension=".caption"))
    assert examples[0].captions == ("this",)


def test_json_lines_are_read_relative_to_the_file(tmp_path):
    for name in ("a", "b", "r"):
        draw(tmp_path / f"pictures/{name}.png", (name == "a" and "red") or "blue", caption=None)
    draw(tmp_path / "m.mask.png", "white", caption=None)
    data = lines(tmp_path / "set.jsonl", "", {
        "image": "pictures/a.png", "captions": ["one", " two "], "group": "g", "reference": "pictures/r.png",
        "mask": "m.mask.png",
    }, {"image": "pictures/b.png", "caption": "three", "references": ["pictures/a.png", "pictures/r.png"]})
    examples, problems = read_examples(data)
    pictures = tmp_path / "pictures"
    assert problems == [] and examples == [
        Example("pictures/a.png", pictures / "a.png", ("one", "two"), "g", (pictures / "r.png",), tmp_path / "m.mask.png",
                (None,)),
        Example("pictures/b.png", pictures / "b.png", ("three",), "", (pictures / "a.png", pictures / "r.png"), None,
                (None, None))]


def test_all_problems_of_json_lines_are_told_with_their_lines(tmp_path):
    draw(tmp_path / "a.png", caption=None)
    data = lines(tmp_path / "set.jsonl", '{"image": ', "[1]", {"caption": "x"}, {"image": "a.png", "prompt": "x"},
                 {"image": "a.png", "caption": "x", "captions": ["y"]}, {"image": 3}, {"image": "a.png", "captions": "x"},
                 {"image": "none.png", "caption": "x"}, {"image": "a.png", "caption": "x", "reference": "gone.png"},
                 {"image": "./a.png", "caption": "x", "mask": "gone.png", "group": "b"})
    (tmp_path / "set.jsonl").write_bytes((tmp_path / "set.jsonl").read_bytes() + b'\n{"image": "\xff"}')
    examples, problems = read_examples(data)
    found = texts(problems)
    assert examples == [] and found["set.jsonl line 1"].startswith("! is not JSON (Expecting value at line 1, character")
    assert found["set.jsonl line 2"] == "! is [1]; wanted an object with the key image"
    assert found["set.jsonl line 3"] == "! has no key image"
    assert found["set.jsonl line 4"].startswith("! has the unknown key 'prompt'; known are image, caption")
    assert found["set.jsonl line 5"] == "! has both caption and captions; give one of them"
    assert found["set.jsonl line 6"] == "! has image = 3; wanted text"
    assert found["set.jsonl line 7"] == "! has captions = 'x'; wanted a list of texts"
    assert found["set.jsonl line 11"].startswith("! is not UTF-8")
    assert found["none.png"] == "! does not exist; check the name"
    assert found["a.png"] == "! its reference gone.png does not exist; check the name"
    assert found["./a.png"] == "! its mask gone.png does not exist; check the name"
    with pytest.raises(TrainingDataError, match=r"11 problems in the training data:\n- set.jsonl.*(\n- .*){10}\nCorrect"):
        require(examples, problems)


def test_fatal_problems_of_a_folder_leave_the_other_pictures(people):
    whole = (people / "ann/1.png").read_bytes()
    (people / "ann/empty.png").write_bytes(b"")
    (people / "ann/cut.png").write_bytes(whole[:len(whole) - 30])
    (people / "ann/page.jpg").write_text("<html>")
    draw(people / "ann/latin.png", "yellow").with_suffix(".txt").write_bytes("café".encode("latin-1"))
    draw(people / "ann/masked.png", "pink")
    draw(people / "ann/masked.mask.png", "white", size=(64, 32), caption=None)
    draw(people / "ann/blank.png", "gray")
    (people / "ann/blank.mask.png").write_bytes(b"")
    noise = Image.effect_noise((200, 200), 90)
    noise.save(people / "ann/half.jpg")
    (people / "ann/half.jpg").write_bytes((people / "ann/half.jpg").read_bytes()[:4000])
    examples, problems = read_examples(config(folder=str(people)))
    found = {where: text for where, text in texts(problems).items() if text.startswith("!")}
    assert len(examples) == 4 and found.keys() == {f"ann/{name}" for name in (
        "empty.png", "cut.png", "page.jpg", "latin.png", "masked.png", "blank.png", "half.jpg")}
    assert found["ann/empty.png"] == "! is empty (0 bytes); get the file again"
    assert found["ann/cut.png"].startswith("! cannot be decoded (")
    assert found["ann/half.jpg"].startswith("! cannot be decoded (image file is truncated")
    assert found["ann/page.jpg"].startswith("! is no picture that can be read")
    assert found["ann/latin.png"] == "! its caption file latin.txt is not UTF-8 (byte 3); save it as UTF-8"
    assert found["ann/masked.png"].startswith("! its mask is 64 x 32 px, another shape than the picture's 64 x 64")
    assert found["ann/blank.png"] == "! its mask blank.mask.png is empty (0 bytes); get the file again"


def test_notes_do_not_stop_training(people):
    draw(people / "ann/silent.png", "pink", caption=" \n")
    draw(people / "ann/tiny.png", "gray", size=(20, 40))
    draw(people / "ann/twin.png", "red")
    (people / "ann/lost.txt").write_text("no picture")
    draw(people / "ann/lost.mask.png", "white", caption=None)
    draw(people / "cat/only.png", "cyan")
    examples, problems = read_examples(config(folder=str(people)))
    assert texts(problems) == {
        "ann/lost.txt": "belongs to no picture: there is none of this name",
        "ann/lost.mask.png": "belongs to no picture: there is none of this name",
        "ann/silent.png": "has no caption: the empty caption is used",
        "ann/tiny.png": "is 20 x 40 px, tiny: wanted 64 px at least; it becomes 64 x 64",
        "cat/only.png": "is alone in its group 'cat': it will be its own reference, cropped",
        "ann/twin.png": "has the same content as ann/1.png"}
    require(examples, problems)
    _, alone = read_examples(config(folder=str(people), own_reference=True))
    assert "cat/only.png" not in texts(alone)
    _, large = read_examples(config(folder=str(people), resolution_px=128))
    assert texts(large)["ann/1.png"] == "is 64 x 64 px, enlarged to 128 x 128; use a larger one if there is"


def test_a_group_that_is_a_link_is_learnt_from(people, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    draw(elsewhere / "1.png", "pink")
    (people / "cleo").symlink_to(elsewhere, target_is_directory=True)
    (people / "ann/back").symlink_to(people, target_is_directory=True)
    (people / "ann/gone.png").symlink_to(people / "none.png")
    examples, problems = read_examples(config(folder=str(people)))
    assert [example.name for example in examples if example.group == "cleo"] == ["cleo/1.png"] and len(examples) == 5
    assert texts(problems)["ann/back"] == "a link to a folder that it is in, so not followed"
    assert texts(problems)["ann/gone.png"] == "no plain file (a broken link, a pipe), so not read"


@pytest.mark.parametrize("ending", ["gif", "tif", "tiff", "avif", "jfif", "jp2", "ppm", "tga", "dib"])
def test_pictures_of_every_kind_that_pillow_reads_are_learnt_from(tmp_path, ending):
    Image.new("RGB", SIZE, "red").save(tmp_path / f"a.{ending}")
    examples, _ = read_examples(config(folder=str(tmp_path)))
    assert [(example.name, example.size_px) for example in examples] == [(f"a.{ending}", SIZE)]


@pytest.mark.parametrize("name", ["1.TXT", "1.png.txt", "1.png.TXT", "1.caption", "1.png.caption", "1.CAPTION"])
def test_captions_are_found_under_their_usual_names(tmp_path, name):
    draw(tmp_path / "1.png", caption=None)
    (tmp_path / name).write_text("a caption")
    examples, problems = read_examples(config(folder=str(tmp_path)))
    assert examples[0].captions == ("a caption",) and name not in texts(problems)


def test_captions_of_hugging_faces_image_folders_are_read(tmp_path):
    """metadata.jsonl, paths relative to it, beside other columns; a caption file of a picture's own wins."""
    for name in ("a.png", "b.png", "x/c.png", "x/d.png", "x/e.png"):
        draw(tmp_path / name, caption=None)
    (tmp_path / "b.txt").write_text("its own")
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": " of the table "}, {"file_name": "b.png", "text": "lost"},
          {"file_name": "./x/c.png", "caption": "one below", "width": 3})
    lines(tmp_path / "x/metadata.jsonl", {"file_name": "d.png", "text": "ein Käse"},
          {"file_name": "../../etc/passwd", "text": "a"}, {"file_name": "e.png", "text": "a", "caption": "b"},
          {"file_name": "e.png", "text": 3}, {"text": "a"}, "{", "[1]")
    examples, problems = read_examples(config(folder=str(tmp_path)))
    captions = {example.name: example.captions for example in examples}
    assert captions == {"a.png": ("of the table",), "b.png": ("its own",), "x/c.png": ("one below",), "x/d.png": ("ein Käse",),
                        "x/e.png": ("",)}
    told = [(problem.where, problem.text) for problem in problems if "metadata" in problem.where]
    lacking = "not used: its file_name is no picture here that lacks a caption"
    assert told == [("metadata.jsonl", f"line 2 {lacking}"), ("x/metadata.jsonl", f"line 2 {lacking}"),
                    ("x/metadata.jsonl", "line 3 not used: it has both text and caption; wanted one of them"),
                    ("x/metadata.jsonl", "line 4 not used: it has neither text nor caption; wanted one of them"),
                    ("x/metadata.jsonl", "line 5 and 1 more not used: it has no file_name"),
                    ("x/metadata.jsonl", "line 6 not used: it is not JSON (Expecting property name enclosed in double quotes "
                                         "at line 1, character 2)")]


def test_every_file_that_is_not_used_is_named_with_the_reason(people):
    other = ["ann/1.caption", "ann/1.png.txt", "ann/none.caption", "ann/1.cap", "metadata.csv", "film.mp4", "ann/._1.png"]
    for name in (*other, *(f"{number}.psd" for number in range(9))):
        (people / name).write_bytes(b"x")
    examples, problems = read_examples(config(folder=str(people)))
    found = texts(problems)
    assert len(examples) == 4 and examples[0].captions[0] == "a woman"
    assert found["ann/1.cap"] == "not read: caption files end in .txt here (data.caption_extension)"
    assert found["ann/1.caption, ann/1.png.txt"] == "another caption file of its picture is read"
    assert found["ann/none.caption"] == "belongs to no picture: there is none of this name"
    assert "only metadata.jsonl is" in found["metadata.csv"] and found["ann/._1.png"] == "hidden, so not read"
    assert found["0.psd, 1.psd, 2.psd, 3.psd, 4.psd and 5 more"] == "neither a picture nor its caption or mask, so not read"


def test_a_picture_that_this_pillow_cannot_read_is_named(people, monkeypatch):
    monkeypatch.setattr("emma_core.training.folder.readable_suffixes", lambda: frozenset({".png", ".jpg", ".webp", ".bmp"}))
    (people / "ann/3.heic").write_bytes(b"x")
    examples, problems = read_examples(config(folder=str(people)))
    assert len(examples) == 4 and "pip install pillow-heif" in texts(problems)["ann/3.heic"]


@pytest.mark.parametrize("run", ["run", "."])
def test_what_a_run_wrote_is_not_learnt_from(people, run):
    for name in ("samples/00000002.png", "loss.png"):
        draw(people / run / name, caption=None)
    (people / run / "log.jsonl").write_text("{}")
    examples, problems = read_examples(config(folder=str(people)))
    assert len(examples) == 4
    assert any(text == "what a training run wrote, so not learnt from" and "loss.png" in where
               for where, text in texts(problems).items())


def test_a_set_of_nothing_is_refused(tmp_path):
    for data, text in ((config(folder=str(tmp_path)), "holds no example; wanted pictures"),
                       (config(folder=str(tmp_path / "none")), "is no folder"),
                       (config(jsonl=str(tmp_path / "none.jsonl")), "cannot be read: .* wanted a JSON-lines file")):
        with pytest.raises(TrainingDataError, match=text):
            require(*read_examples(data))
    with pytest.raises(TrainingDataError, match="no picture to learn from"):
        require([], [])


def test_one_source_is_wanted(tmp_path):
    with pytest.raises(TrainingConfigError, match="data.folder, data.jsonl, data.shards: none is given; wanted one of them"):
        read_examples(config())
    for keys in (("folder", "jsonl"), ("jsonl", "shards"), ("folder", "shards")):
        with pytest.raises(TrainingConfigError, match=f"data.{keys[0]} and data.{keys[1]} are given; wanted one"):
            read_examples(config(**dict.fromkeys(keys, "a")))


def example(name: str, group: str = "", *references: str) -> Example:
    return Example(name, Path(name), ("",), group, tuple(map(Path, references)))


def test_references_are_given_ones_or_the_group_or_the_picture_itself():
    examples = [example("a", "g"), example("b", "g"), example("c", "g", "x", "a", "x"), example("d", "alone"),
                example("e", "", "d"), example("a", "g")]
    pictures, with_own = PictureSet.of(examples), PictureSet.of(examples, own_reference=True)
    assert [pictures.references(index) for index in range(6)] == [(1, 2), (0, 2), (6, 0), (3,), (3,), (1, 2)]
    assert [with_own.references(index) for index in range(6)] == [(0, 1, 2), (0, 1, 2), (6, 0), (3,), (3,), (0, 1, 2)]
    assert [path.name for path in pictures.pictures] == ["a", "b", "c", "d", "e", "a", "x"]
    assert pictures.used() == [0, 1, 2, 3, 6]
    assert [pictures.only_itself(index) for index in range(6)] == [False, False, False, True, False, False]


def test_references_that_are_no_targets_bring_the_masks_beside_them(tmp_path):
    draw(tmp_path / "a.png"), draw(tmp_path / "x.png", "blue"), draw(tmp_path / "x.mask.png", "white", caption=None)
    data = lines(tmp_path / "set.jsonl", {"image": "a.png", "caption": "x", "reference": "x.png"})
    examples, problems = read_examples(data)
    assert problems == [] and PictureSet.of(examples).masks == (None, tmp_path / "x.mask.png")
    draw(tmp_path / "x.mask.png", "white", (64, 32), caption=None)
    assert texts(read_examples(data)[1]) == {
        "a.png": "! its reference's mask is 64 x 32 px, another shape than the reference's 64 x 64; draw it on the reference"}


def test_notes_of_the_same_words_are_one_line(tmp_path):
    for number in range(5):
        draw(tmp_path / f"{number}.png", f"#0000{number}0", (40, 40), "x")
    draw(tmp_path / "large.png", caption=" ")
    data = config(folder=str(tmp_path), bucket_step_px=32)
    shared, alone = describe(*read_examples(data), data).splitlines()[-2:]
    assert alone.startswith("  note  large.png: has no caption")
    assert shared.startswith("  note  0.png, 1.png, 2.png, 2 more: is 40 x 40 px")


def test_the_description_counts_what_is_there(people):
    draw(people / "cat/only.png", "cyan", caption=" ")
    (people / "cut.png").write_bytes(b"x")
    data = config(folder=str(people), bucket_step_px=32)
    assert describe(*read_examples(data), data).splitlines() == [
        "pictures: 5 to learn from, 0 that are references alone, 1 with a mask",
        "groups: 3 (ann: 2, bob/x: 2, cat: 1)",
        "sizes in pixels: 64 x 64: 5",
        "captions: 6, 4 distinct, 1 empty, 2 words in the median",
        "references: given for 0, others of the group for 4, the picture itself for 1",
        "problems: 1 that stop training, 2 to know of",
        "  stop  cut.png: is no picture that can be read; save it as PNG or JPEG",
        "  note  cat/only.png: has no caption: the empty caption is used",
        "  note  cat/only.png: is alone in its group 'cat': it will be its own reference, cropped"]
