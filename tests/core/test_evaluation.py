"""`python -m emma_core eval` end to end on the playground: numbers against the libraries, going on, reuse, refusals."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from evaluation_world import (
    CLIP,
    DINO,
    PROMPTS,
    SUBJECTS,
    forget_scoring_models,
    make_world,
    scoring_models,
    tables_for,
    write_config,
)
from PIL import Image
from playground_world import load_world
from safetensors.torch import load_file, save_file
from test_training_backbones import save_folder, single_file

from emma_core.__main__ import main
from emma_core.base.backbones import load_backbone
from emma_core.base.config import BaseConfig
from emma_core.base.pipeline import Pipeline, Request, Sampling, generate
from emma_core.base.spec import SD15
from emma_core.encoders.loading import load_encoder
from emma_core.encoders.options import EncodeOptions
from emma_core.evaluation.generation import Drawer
from emma_core.evaluation.plan import sha256_of
from emma_core.evaluation.scorers import ClipScorer, DinoScorer
from emma_core.files.connector_file import load_connector
from emma_core.files.picture_file import open_picture, picture_tensor
from emma_core.model.addition import Addition
from emma_core.model.assembly import Assembly, Reference
from emma_core.model.connector import Connector
from emma_core.playground import PLAYGROUND_DIR
from emma_core.playground.autoencoder import Autoencoder
from emma_core.text.encoder import TextEncoder

FACE = PLAYGROUND_DIR / "emma-face.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    make_world(folder)
    assert main(["eval", str(folder / "eval.toml"), "--device", "cpu"]) == 0
    yield folder
    forget_scoring_models()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *found: pytest.fail("a connection"))


def lines_of(results: Path) -> list[dict]:
    return [json.loads(line) for line in (results / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def picture_of(results: Path, line: dict) -> Image.Image:
    return Image.open(results / "pictures" / f"{line['picture']}.png")


@pytest.fixture
def drawn(monkeypatch):
    """The batches that are drawn from now on."""
    batches: list = []
    draw = Drawer.draw
    monkeypatch.setattr(Drawer, "draw", lambda self, jobs: batches.append(list(jobs)) or draw(self, jobs))
    return batches


@pytest.fixture
def embedded(monkeypatch):
    """How many pictures are embedded from now on, by kind of model."""
    counts = {ClipScorer: 0, DinoScorer: 0}
    for kind in counts:
        def counting(self, pictures, kind=kind, embed=kind.embed_pictures):
            counts[kind] += len(pictures)
            return embed(self, pictures)
        monkeypatch.setattr(kind, "embed_pictures", counting)
    return counts


@torch.no_grad()
def test_cosines_are_those_of_the_libraries(world, tmp_path):
    clip, dino = scoring_models(tmp_path)
    clip.load_state_dict(load_file(world / "clip.safetensors"))
    dino.load_state_dict(load_file(world / "dino.safetensors"))
    clip_sees = open_clip.image_transform(32, is_train=False)
    dino_sees = timm.data.create_transform(**timm.data.resolve_model_data_config(dino), is_training=False)
    tokenize = open_clip.get_tokenizer(CLIP)

    def of_clip(picture):
        return F.normalize(clip.eval().encode_image(clip_sees(picture)[None]), dim=-1)[0]

    def of_dino(picture):
        return F.normalize(dino.eval()(dino_sees(picture)[None]), dim=-1)[0]

    lines = lines_of(world / "results")
    assert len(lines) == 2 * 2 * 2 * 2, "rows x references x prompts x models"
    for line in lines:
        picture = picture_of(world / "results", line).convert("RGB")
        reference = Image.open(world / "references" / line["reference"]).convert("RGB")
        if line["model"].startswith(CLIP):
            text_D = F.normalize(clip.encode_text(tokenize([line["prompt"]])), dim=-1)[0]
            wanted = {"CLIP-T": of_clip(picture) @ text_D, "CLIP-I": of_clip(picture) @ of_clip(reference)}
        else:
            wanted = {"DINO": of_dino(picture) @ of_dino(reference)}
        assert line["scores"] == pytest.approx({name: float(value) for name, value in wanted.items()}, abs=2e-4)


def test_pictures_are_those_of_the_modules_assembled(world):
    playground = load_world()
    of_row = {(line["row"], line["reference"], line["prompt"]): line for line in lines_of(world / "results")}
    for (row, reference, prompt), line in of_row.items():
        image_1HW3 = picture_tensor(open_picture(world / "references" / reference))
        conditions = ("style", "face") if row != "text only" else ()
        assembly = Assembly(playground.encode_reference(condition, image_1HW3) for condition in conditions)
        [wanted] = generate(playground.pipeline, [Request(prompt, assembly, seed=line["seed"])], Sampling(2, 4.0))
        found = np.asarray(picture_of(world / "results", line), dtype=np.float32) / 255
        assert np.abs(found - wanted.numpy()).max() <= 1.01 / 255, (row, reference, prompt)
    assert len({line["seed"] for line in of_row.values()}) == len(PROMPTS), "noise by prompt, the same in every row"
    plain, shown = (np.asarray(picture_of(world / "results", of_row[row, "bob/1.png", PROMPTS[0]]), dtype=np.float32)
                    for row in ("text only", "emma-style 1 + emma-face 1"))
    assert np.abs(plain - shown).max() > 10, "the modules show, so that the comparison can fail"


def test_results_are_the_means_and_name_models_by_digest(world):
    report = json.loads((world / "results" / "results.json").read_text())
    lines = lines_of(world / "results")
    assert list(report["rows"]) == ["text only", "emma-style 1 + emma-face 1"]
    assert [row["pictures"] for row in report["rows"].values()] == [2, 4], "text only is drawn once for all references"
    for row, found in report["rows"].items():
        for column, score in found["scores"].items():
            values = [line["scores"][column] for line in lines if line["row"] == row and column in line["scores"]]
            assert len(values) == 4 and score["mean"] == pytest.approx(np.mean(values))
            assert score["low"] <= score["mean"] <= score["high"]
    digests = {one["name"]: one["sha256"] for one in report["models"]}
    for name, path in ((CLIP, world / "clip.safetensors"), (FACE.name, FACE)):
        assert digests[name] == hashlib.sha256(path.read_bytes()).hexdigest()
    text = (world / "results" / "results.md").read_text(encoding="utf-8")
    assert "| text only | " in text and digests[DINO] in text and "plain cosines" in text and "steps = 2" in text
    assert str(world) not in text + json.dumps(report), "no folders"
    assert Image.open(world / "results" / "sheet.png").width > 3 * 160


def test_a_second_start_makes_nothing_again(world, drawn, embedded):
    before = {path.name: path.read_bytes() for path in (world / "results").iterdir() if path.is_file()}
    assert main(["eval", str(world / "eval.toml")]) == 0
    assert not drawn and not any(embedded.values())
    assert before == {path.name: path.read_bytes() for path in (world / "results").iterdir() if path.is_file()}


def test_another_strength_is_drawn_and_the_rest_is_kept(world, tmp_path, drawn, embedded):
    shutil.copytree(world / "results", tmp_path / "results")
    changed = ["eval", str(world / "eval.toml"), "--output.folder", str(tmp_path / "results"), "--modules.strengths"]
    assert main([*changed, "1", "0,0.5"]) == 0
    assert {job.row.name for batch in drawn for job in batch} == {"emma-face 0.5"} and sum(map(len, drawn)) == 4
    assert embedded[ClipScorer] == 4 + 2, "the new pictures and the references"
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert list(rows) == ["text only", "emma-style 1 + emma-face 1", "emma-face 0.5"]
    playground = load_world()
    line = next(line for line in lines_of(tmp_path / "results") if line["row"] == "emma-face 0.5")
    face = playground.encode_reference("face", picture_tensor(open_picture(world / "references" / line["reference"])))
    assembly = Assembly([Reference(face.module, face.features, 0.5)])
    [wanted] = generate(playground.pipeline, [Request(line["prompt"], assembly, seed=line["seed"])], Sampling(2, 4.0))
    found = np.asarray(picture_of(tmp_path / "results", line), dtype=np.float32) / 255
    assert np.abs(found - wanted.numpy()).max() <= 1.01 / 255


def test_another_way_of_adding_up_is_drawn_and_the_rest_is_kept(world, tmp_path, drawn):
    shutil.copytree(world / "results", tmp_path / "results")
    assert main(["eval", str(world / "eval.toml"), "--output.folder", str(tmp_path / "results"),
                 "--modules.adding", "predictions"]) == 0
    assert {job.row.name for batch in drawn for job in batch} == {"emma-style 1 + emma-face 1"}
    playground = load_world()
    line = next(line for line in reversed(lines_of(tmp_path / "results")) if line["row"] == "emma-style 1 + emma-face 1")
    image_1HW3 = picture_tensor(open_picture(world / "references" / line["reference"]))
    references = [playground.encode_reference(condition, image_1HW3) for condition in ("style", "face")]
    assembly = Assembly(references, Addition("predictions"))
    [wanted] = generate(playground.pipeline, [Request(line["prompt"], assembly, seed=line["seed"])], Sampling(2, 4.0))
    found = np.asarray(picture_of(tmp_path / "results", line), dtype=np.float32) / 255
    assert np.abs(found - wanted.numpy()).max() <= 1.01 / 255


def test_after_an_interrupt_only_the_rest_is_drawn(world, tmp_path, monkeypatch, drawn, capsys):
    arguments = ["eval", str(world / "eval.toml"), "--output.folder", str(tmp_path / "results")]
    counting = Drawer.draw

    def stopping(self, jobs):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return counting(self, jobs)

    monkeypatch.setattr(Drawer, "draw", stopping)
    assert main(arguments) == 130
    assert "Start again" in capsys.readouterr().err
    kept = sorted(path.name for path in (tmp_path / "results" / "pictures").iterdir())
    first = {f"{job.key}.png" for batch in drawn for job in batch}
    assert len(drawn) == 2 and set(kept) == first and len(first) == 4
    monkeypatch.setattr(Drawer, "draw", counting)
    assert main(arguments) == 0
    assert [len(batch) for batch in drawn] == [2, 2, 2] and not first & {f"{job.key}.png" for job in drawn[2]}
    assert (tmp_path / "results" / "results.json").read_bytes() == (world / "results" / "results.json").read_bytes()


def test_scores_go_on_after_a_torn_line(world, tmp_path, embedded):
    shutil.copytree(world / "results", tmp_path / "results")
    path = tmp_path / "results" / "scores.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert main(["eval", str(world / "eval.toml"), "--output.folder", str(tmp_path / "results")]) == 0
    assert embedded == {ClipScorer: 0, DinoScorer: 2}, "one picture and its reference"
    assert path.read_bytes() == (world / "results" / "scores.jsonl").read_bytes()


def test_another_scoring_model_scores_anew_and_draws_nothing(world, tmp_path, drawn, embedded):
    shutil.copytree(world / "results", tmp_path / "results")
    weights = load_file(world / "dino.safetensors")
    save_file({name: value * 1.1 for name, value in weights.items()}, tmp_path / "other.safetensors")
    assert main(["eval", str(world / "eval.toml"), "--output.folder", str(tmp_path / "results"), "--scores.dino_file",
                 str(tmp_path / "other.safetensors")]) == 0
    assert not drawn and embedded == {ClipScorer: 0, DinoScorer: 6 + 2}
    before, after = (json.loads((folder / "results" / "results.json").read_text())["rows"]["text only"]["scores"]
                     for folder in (world, tmp_path))
    assert before["CLIP-I"] == after["CLIP-I"] and before["DINO"] != after["DINO"]


def test_text_alone_can_be_judged_for_portraits(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("woman {subject}\n")
    tables = tables_for(world) | {
        "output": {"folder": str(tmp_path / "results")}, "plan": {"per_pair": 2, "protocol": "portrait"}, "modules": {},
        "prompts": {"file": str(tmp_path / "prompts.txt")}}
    assert main(["eval", str(write_config(tmp_path / "eval.toml", tables))]) == 0
    lines = lines_of(tmp_path / "results")
    assert {line["prompt"] for line in lines} == {f"woman {subject}" for subject in SUBJECTS}
    rows = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert {name: row["pictures"] for name, row in rows.items()} == {"text only": 4}, "a subject's pictures are its own"


def test_on_the_playground_its_own_encoder_judges_where_no_model_is_named(world, tmp_path):
    """Cosines of what the modules read; a picture judged by itself would have 1."""
    tables = tables_for(world) | {"output": {"folder": str(tmp_path / "results")}, "scores": {}}
    assert main(["eval", str(write_config(tmp_path / "eval.toml", tables))]) == 0
    encoder, lines = load_encoder(PLAYGROUND_DIR / "encoder.safetensors"), lines_of(tmp_path / "results")

    def features(picture: Image.Image):
        image_1HW3 = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)[None]
        return encoder.encode(image_1HW3, None, EncodeOptions(("global",)))[0].features

    columns = {"look": "global"}
    assert {column for line in lines for column in line["scores"]} == columns.keys()
    for line in lines:
        drawn = features(picture_of(tmp_path / "results", line))
        shown = features(Image.open(world / "references" / line["reference"]))
        for column, score in line["scores"].items():
            wanted = F.cosine_similarity(drawn[columns[column]].flatten(), shown[columns[column]].flatten(), dim=0)
            assert score == pytest.approx(float(wanted), abs=1e-4)
    assert "| | look | n |" in (tmp_path / "results" / "results.md").read_text()


@pytest.mark.parametrize(("arguments", "found"), [
    (["--output.folder", ""], "output.folder is not set"),
    (["--references.folder", ""], "references.folder and references.coco are both not set"),
    (["--references.coco", "a.json"], "references.folder and references.coco are both set"),
    (["--references.folder", "none"], "references.folder = 'none' is no folder"),
    (["--prompts.file", "none.txt"], "prompts.file = 'none.txt' cannot be read"),
    (["--modules.strengths", "1,1,1"], "'1,1,1'; wanted a number for all 2 modules"),
    (["--modules.strengths", "0"], "not all 0"), (["--modules.strengths", "1", "1,1"], "'1,1' twice"),
    (["--modules.files", "none.safetensors"], "modules.files = 'none.safetensors' does not exist"),
    (["--base.checkpoint", "none.safetensors", "--ella.file", "a"], "ella.text_encoder is not set: an ELLA and its"),
    (["--base.checkpoint", "none.safetensors", "--ella.text_encoder", "b"], "ella.file is not set: an ELLA and its"),
    (["--base.checkpoint", "none.safetensors", "--ella.file", "a", "--ella.text_encoder", "b"], "encoder.files is not set"),
    (["--base.checkpoint", "none.safetensors", "--ella.file", "a", "--ella.text_encoder", "b", "--encoder.files", "c"],
     "base.checkpoint = 'none.safetensors' does not exist"),
    (["--sampling.width_px", "100"], "100 x 128 px; wanted multiples of 8"),
    (["--scores.clip_file", ""], "scores.clip_file is not set, scores.clip_model is"),
    ([*(part for name in ("clip_model", "clip_file", "dino_model", "dino_file") for part in (f"--scores.{name}", "")),
      "--base.checkpoint", "none.safetensors", "--ella.file", "a", "--ella.text_encoder", "b", "--encoder.files", "c"],
     "no model to judge with"),
    (["--scores.clip_model", "ViT-Q-14"], "scores.clip_model: 'ViT-Q-14' is not a model of the installed open_clip; near it"),
    (["--scores.clip_model", "ViT-H-14", "--scores.clip_file", "none.bin"],
     "scores.clip_file = 'none.bin' does not exist; wanted the weights of ViT-H-14, and nothing is downloaded. Get "
     "open_clip_model.safetensors or open_clip_pytorch_model.bin from Hugging Face (laion/CLIP-ViT-H-14-laion2B-s32B-b79K or"),
    (["--scores.clip_model", "roberta-ViT-B-32"], "would download"),
    (["--scores.clip_model", "ViT-B-16-SigLIP"], "would download"),
    (["--scores.clip_model", "ViT-B-32"], "clip.safetensors is not both towers of open_clip's ViT-B-32"),
    (["--scores.dino_model", "vit_small_patch16_224.dino", "--scores.dino_file", "none.safetensors"],
     "Get model.safetensors from Hugging Face (timm/vit_small_patch16_224.dino), put it anywhere and name it in scores."),
    (["--scores.dino_model", "vit_small_patch16_224.dinoo"], "near it: vit_small_patch16_224.dino"),
    (["--scores.dino_model", "vit_small_patch16_224"], "the tag is missing"),
    (["--scores.dino_model", "hf-hub:timm/vit_small_patch16_224.dino"], "is not a model of the installed timm"),
    (["--scores.dino_model", "test_convnext.r160_in1k"], "has no class token"),
    (["--scores.dino_model", "vit_small_patch16_224.dino"], "Get model.safetensors from Hugging Face (timm/vit_small_patch16"),
])
def test_mistakes_are_told_in_one_line_before_anything_is_drawn(world, tmp_path, capsys, drawn, arguments, found):
    usual = ["eval", str(world / "eval.toml"), "--output.folder", str(tmp_path / "results")]
    assert main([*usual, *arguments]) == 1
    message = capsys.readouterr().err
    assert found in message and message.startswith("error: ") and "Traceback" not in message
    assert not drawn and not list(tmp_path.rglob("*.png"))


def test_a_reference_that_is_no_picture_is_named(world, tmp_path, capsys):
    shutil.copytree(world / "references", tmp_path / "references")
    (tmp_path / "references" / "ada" / "2.jpg").write_bytes(b"no picture")
    assert main(["eval", str(world / "eval.toml"), "--references.folder", str(tmp_path / "references"), "--output.folder",
                 str(tmp_path / "results")]) == 1
    assert "2.jpg is no picture that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(("layout", "prediction"), [("folder", "eps"), ("file", "v")])
def test_other_checkpoints_draw_with_the_files_that_are_named(world, tmp_path, layout, prediction):
    """A small model of the SD1.5 kind at random, with the playground's ELLA, T5 and encoder named as anyone's would be."""
    own = {name: PLAYGROUND_DIR / f"{name}.safetensors" for name in ("ella", "t5", "encoder", "emma-style")}
    connector = load_connector(own["ella"])
    folder = save_folder(tmp_path / "model", unet={"cross_attention_dim": connector.width})
    path = folder if layout == "folder" else single_file(folder, tmp_path / "model.safetensors", "v")
    tables = tables_for(world) | {
        "output": {"folder": str(tmp_path / "results")}, "base": {"checkpoint": str(path)}, "sampling": {
            "steps": 2, "guidance": 4.0, "width_px": 64, "height_px": 32}, "encoder": {"files": [str(own["encoder"])]},
        "ella": {"file": str(own["ella"]), "text_encoder": str(own["t5"])}, "modules": {"files": [str(own["emma-style"])]}}
    assert main(["eval", str(write_config(tmp_path / "eval.toml", tables)), "--device", "cpu"]) == 0
    backbone, playground = load_backbone(BaseConfig(checkpoint=str(path))), load_world()
    assert backbone.prediction == prediction
    pipeline = Pipeline(playground.pipeline.encode_text, connector, backbone.predict_noise,
                        lambda latent_B4hw: backbone.autoencoder.decode(latent_B4hw / SD15.latent_scale),
                        replace(SD15, prediction=prediction))
    lines = [line for line in lines_of(tmp_path / "results") if line["row"] == "emma-style 1"]
    for line in lines[:2]:
        style = playground.encode_reference("style", picture_tensor(open_picture(world / "references" / line["reference"])))
        request = Request(line["prompt"], Assembly([style]), seed=line["seed"])
        [wanted] = generate(pipeline, [request], Sampling(2, 4.0, 64, 32))
        found = np.asarray(picture_of(tmp_path / "results", line), dtype=np.float32) / 255
        assert found.shape == (32, 64, 3) and np.abs(found - wanted.numpy()).max() <= 1.01 / 255
    report = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {"role": "base.checkpoint", "name": path.name, "sha256": sha256_of(path)} in report["models"]


def test_lower_precision_is_near_and_is_another_picture(world, tmp_path, monkeypatch):
    """Only the UNet and the connector run in it: T5 and the autoencoder keep their own."""
    lowered = {}
    for kind, name in ((TextEncoder, "encode"), (Autoencoder, "decode"), (Connector, "project_text")):
        method = getattr(kind, name)

        def spying(self, *given, name=name, method=method):
            lowered.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return method(self, *given)

        monkeypatch.setattr(kind, name, spying)
    arguments = ["eval", str(world / "eval.toml"), "--output.folder", str(tmp_path / "results"), "--device", "cpu"]
    assert main([*arguments, "--sampling.precision", "bf16"]) == 0
    assert lowered == {"encode": {False}, "decode": {False}, "project_text": {True}}
    for exact, rough in zip(lines_of(world / "results"), lines_of(tmp_path / "results"), strict=True):
        pictures = [np.asarray(picture_of(folder / "results", line), dtype=np.float32)
                    for folder, line in ((world, exact), (tmp_path, rough))]
        assert exact["picture"] != rough["picture"] and 0 < np.abs(pictures[0] - pictures[1]).mean() < 8
