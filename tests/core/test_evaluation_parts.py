"""Parts of an evaluation: COCO's boxes and masks, names of pictures, intervals, encoders, schedules, the configuration."""

import argparse
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from evaluation_world import tables_for, two_boxes
from PIL import Image, ImageDraw
from playground_world import load_world

from emma_core.base.pipeline import Request, Sampling, generate
from emma_core.commands import evaluate as command
from emma_core.encoders.matching import encoder_for
from emma_core.errors import EmmaWarning, ReferenceMismatchError, SettingsError
from emma_core.evaluation.coco import Segmentation, coco_captions, coco_references
from emma_core.evaluation.config import (
    EvalConfig,
    EvaluationError,
    ModulesConfig,
    PromptsConfig,
    ReferencesConfig,
    resolve_evaluation,
    rows_of,
)
from emma_core.evaluation.generation import Drawer
from emma_core.evaluation.plan import DrawingJob, Files, comparisons, sha256_of
from emma_core.evaluation.references import chosen, prompts_in, references_in
from emma_core.evaluation.report import RESAMPLES, crossed_interval
from emma_core.evaluation.scores import ScoreFile
from emma_core.files.module_file import load_module, save_module
from emma_core.files.picture_file import open_picture, picture_tensor
from emma_core.model.assembly import Assembly
from emma_core.playground import PLAYGROUND_DIR
from emma_core.settings import read_toml, sections, toml_of

STYLE = PLAYGROUND_DIR / "emma-style.safetensors"
TONE = PLAYGROUND_DIR / "references" / "face-light.png"


def run_lengths(mask_HW: np.ndarray) -> dict:
    """COCO's uncompressed run lengths: column by column, the first run of zeros."""
    counts, value = [0], 0
    for pixel in mask_HW.T.reshape(-1).tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask_HW.shape), "counts": counts}


@pytest.fixture
def object_HW():
    """A mask of 60 x 80, neither symmetric nor convex."""
    mask_HW = np.zeros((60, 80), dtype=np.uint8)
    mask_HW[22:40, 12:30] = 1
    mask_HW[30:40, 24:38] = 1
    mask_HW[25:28, 14:20] = 0
    return mask_HW


def coco(folder, segmentation, **changes) -> ReferencesConfig:
    path, images = two_boxes(folder, segmentation)
    return ReferencesConfig(coco=str(path), images=str(images), smallest_px=20, **changes)


def test_a_box_becomes_a_reference_with_its_part_of_the_mask(tmp_path, object_HW):
    [reference], left_out = coco_references(coco(tmp_path, run_lengths(object_HW)))
    assert left_out == "1 crowds and 1 boxes with a side below 20 px are left out"
    assert (reference.subject, reference.group, reference.name) == ("cat", "7.png", "7.png #1 (cat)")
    whole = np.asarray(Image.open(tmp_path / "pictures" / "7.png"))
    assert np.array_equal(np.asarray(reference.picture()), whole[20:45, 10:40]), "44.5 is rounded outwards"
    assert np.array_equal(np.asarray(reference.mask_picture()), 255 * object_HW[20:45, 10:40])


def test_polygons_cover_the_pixels_between_their_corners(tmp_path, object_HW):
    """Corners lie between pixels: [12, 30] covers the columns 12 to 29. Several polygons are united."""
    object_HW[25:28, 14:20] = 1
    polygons = [[12, 22, 30, 22, 30, 40, 12, 40], [24.0, 30.0, 38.0, 30.0, 38.0, 40.0, 24.0, 40.0]]
    [reference], _ = coco_references(coco(tmp_path, polygons))
    assert np.array_equal(np.asarray(reference.mask_picture()), 255 * object_HW[20:45, 10:40])
    triangle = np.asarray(Segmentation([[0, 0, 80, 0, 0, 60]], "triangle").drawn((80, 60))) > 0
    assert abs(triangle.mean() - 0.5) < 0.01 and triangle[1, 1] and not triangle[-2, -2]


def packed(counts: list[int]) -> str:
    """Run lengths as the COCO API writes them: differences, in groups of five bits behind each other."""
    letters = []
    for index, count in enumerate(counts):
        rest, more = count - (counts[index - 2] if index > 2 else 0), True
        while more:
            bits, rest = rest & 31, rest >> 5
            more = rest != (-1 if bits & 16 else 0)
            letters.append(chr(48 + bits + 32 * more))
    return "".join(letters)


def test_compressed_run_lengths_are_read_without_further_packages(tmp_path, object_HW):
    counts = run_lengths(object_HW)["counts"]
    assert min(counts) < 32 < max(counts) and any(b < a for a, b in zip(counts, counts[2:], strict=False)), "all kinds"
    [reference], _ = coco_references(coco(tmp_path, {"size": [60, 80], "counts": packed(counts)}))
    assert np.array_equal(np.asarray(reference.mask_picture()), 255 * object_HW[20:45, 10:40])


def test_a_large_polygon_mask_is_that_of_one_drawing(tmp_path):
    outline = [3.3, 2.9, 50.2, 700.6, -4.5, 1300.1, 58.8, 1399.9, 20.0, 640.4]
    fine = Image.new("L", (60 * 4, 1400 * 4))
    ImageDraw.Draw(fine).polygon([(x * 4, y * 4) for x, y in zip(outline[::2], outline[1::2], strict=True)], fill=255)
    wanted = fine.reduce(4).point(lambda level: 255 * (level >= 128))
    assert np.array_equal(np.asarray(Segmentation([outline], "a").drawn((60, 1400))), np.asarray(wanted))


@pytest.mark.parametrize(("segmentation", "found"), [
    ({"size": [80, 60], "counts": [4800]}, "of height and width .80, 60., the picture's are .60, 80."),
    ({"size": [60, 80], "counts": [10, 20]}, "cover 30 pixels of 4800"),
    ([[1, 2, 3]], "holds no polygons"), ([5], "holds no polygons"), ([["a", "b"]], "holds no polygons"),
    ([[1e300, 2, 3, 4]], "holds no polygons"), ([[float("nan")] * 6], "holds no polygons"),
    ([[1, 2]], "fewer than 3 corners"), ([[0, 0] * 120_000], "holds no polygons"),
    ({"size": [60, 80], "counts": [10**10, -(10**10) + 4800]}, "wanted whole numbers"),
    ({"size": [60, 80], "counts": [10**10]}, "cover 10000000000 pixels of 4800"),
    ({"size": 7, "counts": []}, "height and width 7"),
    ({"size": [60, 80], "counts": [True] * 4800}, "wanted whole numbers"),
    ({"size": [60, 80], "counts": None}, "run lengths None"),
    ({"size": [60, 80], "counts": "abc"}, "run lengths"), ({"size": [60, 80], "counts": "P" * 100}, "run lengths"),
    ({"size": [60, 80], "counts": [4800]}, "is all black"), ([], "has no mask"),
])
def test_unusable_segmentations_are_refused(tmp_path, segmentation, found):
    [reference], _ = coco_references(coco(tmp_path, segmentation))
    with pytest.raises(EvaluationError, match=found):
        reference.mask_picture()


@pytest.mark.parametrize("damaged", [
    b"\0" * 300, b"\xff\xfe", b"[" * 100_000, b"{}", b"7", b'{"model": "a", "picture": "b"}',
    b'{"model": 1, "picture": "b", "reference_sha256": "c", "prompt": "d", "scores": {"s": 0.5}}',
    b'{"model": "a", "picture": "b", "reference_sha256": "c", "prompt": "d", "scores": {"s": NaN}}',
    b'{"model": "a", "picture": "b", "reference_sha256": "c", "prompt": "d", "scores": {"s": 1' + b"0" * 5000 + b"}}",
])
def test_damaged_lines_of_a_score_file_are_told_of_and_computed_again(tmp_path, damaged):
    line = {"model": "a", "picture": "b", "reference_sha256": "c", "prompt": "whole", "scores": {"s": 0.5}}
    path = tmp_path / "scores.jsonl"
    path.write_bytes(damaged + b"\n" + json.dumps(line).encode() + b"\n" + b'{"model": "to')
    with pytest.warns(EmmaWarning, match="1 lines of scores.jsonl are damaged; what they held is computed again"):
        assert ScoreFile(path).known == {("a", "b", "c", "whole"): {"s": 0.5}}
    assert path.read_bytes().endswith(b"}\n"), "the torn last line is dropped"


def test_coco_files_that_do_not_fit_are_refused(tmp_path):
    config = coco(tmp_path, [])
    for changes, found in (({"smallest_px": 26}, "no annotation to use .1 crowds and 2 boxes with a side below 26 px"),
                           ({"categories": ("dog",)}, "no category 'dog'; it has cat, tie"),
                           ({"images": str(tmp_path)}, "1 pictures of instances.json are not in .* .such as 7.png."),
                           ({"coco": str(tmp_path / "none.json")}, "does not exist")):
        with pytest.raises(EvaluationError, match=found):
            coco_references(dataclasses.replace(config, **changes))
    [reference], _ = coco_references(config)
    Image.new("RGB", (60, 80)).save(tmp_path / "pictures" / "7.png")
    with pytest.raises(EvaluationError, match="7.png is 60 x 80 px, its annotations are for 80 x 60"):
        reference.picture()
    (tmp_path / "instances.json").write_text('{"images": [], "annotations": [{"id": 1}], "categories": []}')
    with pytest.raises(EvaluationError, match="not in COCO's format .KeyError: 'image_id'."):
        coco_references(config)
    (tmp_path / "instances.json").write_text('{"annotations": []}')
    with pytest.raises(EvaluationError, match="no list of images and of categories"):
        coco_references(config)


def test_the_first_caption_of_each_picture_is_a_prompt(tmp_path):
    annotations = [{"id": 9, "image_id": 1, "caption": "later"}, {"id": 2, "image_id": 1, "caption": " a\ncat "},
                   {"id": 5, "image_id": 2, "caption": "a dog"}, {"id": 6, "image_id": 3, "caption": "a dog"}]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": annotations}))
    assert coco_captions(PromptsConfig(captions=str(tmp_path / "captions.json"))) == ["a cat", "a dog"]


def test_folders_are_subjects_and_masks_lie_beside_pictures(tmp_path):
    (tmp_path / "ada" / "more").mkdir(parents=True)
    for name in ("ada/1.png", "ada/more/2.png", "alone.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    Image.new("L", (40, 20), 255).save(tmp_path / "ada" / "1.mask.png")
    found = references_in(ReferencesConfig(folder=str(tmp_path)))
    assert [(one.name, one.group, one.subject) for one in found] == [
        ("ada/1.png", "ada", "ada"), ("ada/more/2.png", "ada", "ada"), ("alone.png", "alone.png", "alone")]
    assert found[0].mask_picture().size == (20, 10), "scaled to the picture"
    with pytest.raises(EvaluationError, match="ada/more/2.png has no mask"):
        found[1].mask_picture()
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \na cat\n")
    assert prompts_in(PromptsConfig(file=str(tmp_path / "prompts.txt"))) == ["a cat", "a dog"]
    some = chosen(range(100), 5)
    assert some == chosen(range(100), 5) == sorted(set(some)) and len(some) == 5 and chosen("abc", 0) == [*"abc"]


@pytest.fixture
def pictures(tmp_path):
    """Two subjects with a picture and a mask each."""
    for subject, colour in (("ada", "red"), ("bob", "blue")):
        (tmp_path / "references" / subject).mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(tmp_path / "references" / subject / "1.png")
    return references_in(ReferencesConfig(folder=str(tmp_path / "references")))


def files(base="1", module="2", encoder="3") -> Files:
    return Files({"base.checkpoint": base}, {"modules.files m": module}, {"encoder.files 1": encoder})


def keys(pictures, prompts=("a {subject}", "b"), of=None, precision="fp32", **changes) -> dict[str, list[str]]:
    """Row name -> keys in order, references outermost."""
    given = {"plan.protocol": "portrait", "plan.per_pair": 2, "modules.files": ("m.safetensors",),
             **{name.replace("__", "."): value for name, value in changes.items()}}
    config = resolve_evaluation({}, given)
    found: dict[str, list[str]] = {}
    for one in comparisons(config, of or files(), precision, rows_of(config.modules), pictures, prompts):
        found.setdefault(one.job.row.name, []).append(one.job.key)
    return found


def test_every_pair_has_its_own_pictures_but_text_only_knows_no_reference(pictures):
    found = keys(pictures)
    assert len(set(found["m 1"])) == 2 * 2 * 2
    plain = found["text only"]
    assert plain[2:4] == plain[6:8] and len(set(plain)) == 6, "b is b, but a subject is in the prompt"
    assert len(set(keys(pictures, ["b"])["text only"])) == 2


@pytest.mark.parametrize("changes", [
    {"sampling__steps": 21}, {"sampling__guidance": 3.0}, {"sampling__width_px": 64}, {"sampling__negative": "blurry"},
    {"plan__seed": 77}, {"base__prediction": "v"}, {"precision": "bf16"}, {"of": files(base="x")},
])
def test_a_changed_setting_takes_no_old_picture(pictures, changes):
    for row, found in keys(pictures, **changes).items():
        assert not set(found) & set(keys(pictures)[row]), row


@pytest.mark.parametrize("changes", [
    {"references__mask": "always"}, {"of": files(module="x")}, {"of": files(encoder="x")}, {"modules__strengths": ("1.25",)},
])
def test_what_concerns_modules_alone_leaves_text_only(pictures, changes):
    before, after = keys(pictures), keys(pictures, **changes)
    assert before["text only"] == after["text only"]
    [changed] = [found for row, found in after.items() if row != "text only"]
    assert not set(changed) & set(before["m 1"])


def test_another_way_of_adding_up_is_another_picture_where_there_is_something_to_add(pictures):
    two = {"of": Files({"base.checkpoint": "1"}, {"modules.files m": "2", "modules.files n": "4"}, {"encoder.files 1": "3"}),
           "modules__files": ("m.safetensors", "n.safetensors"), "modules__strengths": ("1", "1,0")}
    before, after = keys(pictures, **two), keys(pictures, **two, modules__adding="predictions")
    assert {row: bool(set(before[row]) & set(after[row])) for row in before} == {
        "text only": True, "m 1 + n 1": False, "m 1": True}
    assert keys(pictures, **two, modules__adding="blocks") == before


def test_a_changed_reference_or_mask_is_another(pictures, tmp_path):
    before = keys(pictures)["m 1"]
    Image.new("L", (64, 64), 255).save(tmp_path / "references" / "ada" / "1.mask.png")
    Image.new("RGB", (64, 64), "green").save(tmp_path / "references" / "bob" / "1.png")
    after = keys(references_in(ReferencesConfig(folder=str(tmp_path / "references"))))["m 1"]
    assert not set(before) & set(after)
    assert set(before) < set(keys(pictures, plan__per_pair=3)["m 1"]), "more pictures of a pair keep the first ones"


def test_a_folder_is_known_by_its_weights(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a.safetensors").write_bytes(b"1")
    (tmp_path / "notes.txt").write_text("no weights")
    before = sha256_of(tmp_path)
    (tmp_path / "notes.txt").write_text("changed")
    assert sha256_of(tmp_path) == before
    (tmp_path / "unet" / "a.safetensors").write_bytes(b"2")
    assert sha256_of(tmp_path) != before


def literal_interval(score_RPK, groups, seed=0) -> tuple[float, float]:
    """Two loops over what was drawn."""
    names, chance = sorted(set(groups)), np.random.default_rng(seed)
    drawn_groups = chance.integers(len(names), size=(RESAMPLES, len(names)))
    drawn_prompts = chance.integers(score_RPK.shape[1], size=(RESAMPLES, score_RPK.shape[1]))
    means = []
    for some_groups, some_prompts in zip(drawn_groups, drawn_prompts, strict=True):
        rows = [row for group in some_groups for row, name in enumerate(groups) if name == names[group]]
        means.append(np.mean([score_RPK[row, column] for row in rows for column in some_prompts]))
    return tuple(np.quantile(means, [0.025, 0.975]))


def test_intervals_resample_groups_of_references_and_prompts():
    score_RPK = np.random.default_rng(3).normal(size=(5, 3, 2))
    groups = ["a", "b", "a", "c", "c"]
    found = crossed_interval(score_RPK, groups)
    assert (found.low, found.high) == pytest.approx(literal_interval(score_RPK, groups))
    assert found.mean == pytest.approx(score_RPK.mean())


@pytest.mark.parametrize("by", ["prompt", "reference"])
def test_many_pictures_of_few_prompts_or_references_are_few(by):
    """Scores that one side decides: a hundred of the other side make the interval no narrower."""
    score_RPK = np.zeros((2, 100, 4))
    score_RPK[1] = 1
    if by == "prompt":
        score_RPK = score_RPK.transpose(1, 0, 2)
    found = crossed_interval(score_RPK, [str(number) for number in range(len(score_RPK))])
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_rows_are_text_only_and_each_strength():
    rows = rows_of(ModulesConfig(("x/style.safetensors", "face.safetensors"), ("1", "0.5,0", "1,-0.25")))
    assert [(row.name, row.strengths) for row in rows] == [
        ("text only", ()), ("style 1 + face 1", (1, 1)), ("style 0.5", (0.5, 0)), ("style 1 + face -0.25", (1, -0.25))]
    assert [row.name for row in rows_of(ModulesConfig(("style.safetensors",)))] == ["text only", "style 1"]
    for modules, found in ((ModulesConfig(("a/m.safetensors", "b/m.safetensors")), "files of the same name"),
                           (ModulesConfig((), ("1",)), "modules.files is empty"),
                           (ModulesConfig(("m.safetensors",), ("much",)), "'much'; wanted a number"),
                           (ModulesConfig(("m.safetensors",), ("1", "1.00000001")), "'1.00000001' twice")):
        with pytest.raises(EvaluationError, match=found):
            rows_of(modules)


@pytest.fixture
def masked(tmp_path):
    """A picture with a mask of its upper half, the style module as if trained on masked references, and the same plain."""
    (tmp_path / "pictures").mkdir()
    picture = Image.open(TONE).convert("RGB")
    picture.save(tmp_path / "pictures" / "1.png")
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, picture.width, picture.height // 2))
    mask.save(tmp_path / "pictures" / "1.mask.png")
    module = load_module(STYLE)
    module.config = module.config.replace(encoder={**module.config.encoder, "masked": True})
    save_module(module, tmp_path / "masked.safetensors")
    return tmp_path


@pytest.mark.parametrize(("module", "choice", "is_masked"), [
    ("masked", "as trained", True), ("masked", "never", False), ("plain", "as trained", False), ("plain", "always", True)])
def test_masks_reach_the_encoder_of_modules_trained_so(masked, module, choice, is_masked):
    file = masked / "masked.safetensors" if module == "masked" else STYLE
    tables = tables_for(masked) | {"modules": {"files": [str(file)], "strengths": ["2"]}, "sampling": {"steps": 4},
                                   "references": {"folder": str(masked / "pictures"), "mask": choice}}
    config = resolve_evaluation(tables)
    [reference] = references_in(config.references)
    [_, row] = rows_of(config.modules)
    [found] = Drawer(config, torch.device("cpu")).draw([DrawingJob(row, "man cook", reference, 5, "key")])
    world = load_world()
    image_1HW3 = picture_tensor(open_picture(masked / "pictures" / "1.png"))
    mask_1HW = torch.zeros(image_1HW3.shape[:3])
    mask_1HW[:, :image_1HW3.shape[1] // 2] = 1
    seen = [dataclasses.replace(world.encode_reference("style", image_1HW3, mask), strength=2.0) for mask in (mask_1HW, None)]
    requests = [Request("man cook", Assembly([one]), seed=5) for one in seen]
    with_mask, without = generate(world.pipeline, requests, Sampling(4, 7.0)).numpy()
    levels = np.asarray(found, dtype=np.float32) / 255
    assert np.abs(levels - (with_mask if is_masked else without)).max() <= 1.01 / 255
    assert np.abs(with_mask - without).max() > 3 / 255


def test_each_module_gets_the_encoder_it_was_trained_with():
    encoder, module = load_world().encoder, load_module(STYLE)
    other = copy.copy(encoder)
    other.description = {**encoder.description, "fingerprint": "0"}
    assert encoder_for(module, [other, encoder]) is encoder
    with pytest.raises(ReferenceMismatchError, match="none of the 1 encoders is the one of emma-style.*this encoder is"):
        encoder_for(module, [other])
    narrow = copy.copy(encoder)
    narrow.feature_names = ("local",)
    with pytest.raises(ReferenceMismatchError, match="it gives local, not global"):
        encoder_for(module, [narrow])


def test_every_key_is_a_flag_and_flags_win_over_the_file(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parser.print_help()
    text = capsys.readouterr().out
    for section, kind in sections(EvalConfig).items():
        for entry in dataclasses.fields(kind):
            assert f"--{section}.{entry.name}" in text and len(entry.metadata["help"]) > 10, entry.name
    (tmp_path / "a.toml").write_text('[plan]\nseed = 5\nprotocol = "object"\n')
    flags = ["--plan.seed", "6", "--sampling.negative", "a \"sad\" 😢", "--modules.strengths", "1", "0,1"]
    config = command.config_of(parser.parse_args([str(tmp_path / "a.toml"), *flags]))
    assert (config.plan.seed, config.plan.protocol, config.modules.strengths) == (6, "object", ("1", "0,1"))
    (tmp_path / "b.toml").write_text(toml_of(config), encoding="utf-8")
    assert resolve_evaluation(read_toml(tmp_path / "b.toml")) == config
    with pytest.raises(SettingsError, match=r"\[plan\] has the unknown key 'seeds'"):
        resolve_evaluation({"plan": {"seeds": 5}})
