"""Runs without an ELLA from the command line: SDXL and SD1.5 with their own text encoders, as a folder and as a single file."""

import json
import warnings

import numpy as np
import pytest
import torch
from checkpoints_with_text import as_single_file, save_checkpoint
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from small_models import fill_
from test_own_text import padded
from test_training_backbones import SCHEDULE, kohya_lora, lora_layers
from training_world import fresh_accelerate
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from emma_core import load_module
from emma_core.__main__ import main
from emma_core.files.module_file import save_module
from emma_core.model.assembly import Assembly, Reference
from emma_core.playground import PLAYGROUND_DIR
from emma_core.training.checkpoints import checkpoints, load_checkpoint

ENCODER = str(PLAYGROUND_DIR / "encoder.safetensors")
SIDE = 64
SMALL = ["--preset", "small-card", "--data.resolution_px", str(SIDE), "--data.bucket_step_px", "32",
         "--data.reference_crops", "0", "--data.workers", "0", "--train.precision", "fp32", "--train.batch", "2",
         "--train.accumulate", "1", "--train.warmup", "1", "--report.log_every", "1",
         "--report.sample_steps", "2", "--encoder.file", ENCODER, "--module.inner", "64",
         "--module.layers", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sdxl") / "small")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd15") / "small", sdxl=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two groups of two pictures, one of them wide."""
    folder = tmp_path_factory.mktemp("pictures")
    for group, colour in (("red", "#c03030"), ("blue", "#3030c0")):
        (folder / group).mkdir()
        for index, size in enumerate(((96, 96), (160, 96))):
            picture = Image.new("RGB", size, "white")
            ImageDraw.Draw(picture).ellipse((20 + 10 * index, 16, 80, 84), fill=colour)
            picture.save(folder / group / f"{index}.png")
            (folder / group / f"{index}.txt").write_text(("a ball", "a ball at the left")[index])
    return folder


def train(checkpoint, pictures, out, *more) -> int:
    with fresh_accelerate(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(["train", *SMALL, "--base.checkpoint", str(checkpoint), "--data.folder", str(pictures),
                     "--output.folder", str(out), *more])


def bytes_under(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def learnt(sdxl, pictures, tmp_path_factory):
    """20 updates on SDXL's tokens."""
    before, out = bytes_under(sdxl), tmp_path_factory.mktemp("learnt")
    assert train(sdxl, pictures, out, "--train.steps", "20", "--train.rate", "5e-3", "--report.save_every", "10",
                 "--report.sample_every", "20") == 0
    assert bytes_under(sdxl) == before
    return out


def test_twenty_updates_on_sdxls_tokens_lower_the_loss_by_the_reference(learnt):
    gain = json.loads((learnt / "log.jsonl").read_text().splitlines()[-1])
    pairs = [(shown, plain) for shown, plain in zip(gain["with reference"], gain["text only"], strict=True) if plain]
    assert sum(shown for shown, _ in pairs) < 0.999 * sum(plain for _, plain in pairs)
    config = load_module(learnt / "emma-module.safetensors").config
    assert (config.source.family, config.source.width, config.time.kind) == ("sdxl", 192, "ddpm")
    assert config.file_metadata["modelspec.thumbnail"].startswith("data:image/jpeg")
    assert Image.open(learnt / "samples" / "00000020.png").width > 3 * SIDE


def test_twenty_updates_on_sd15s_tokens_lower_the_loss_by_the_reference(sd15, pictures, tmp_path):
    single = as_single_file(sd15, tmp_path / "single.safetensors")
    assert train(single, pictures, tmp_path / "out", "--train.steps", "20", "--train.rate", "5e-3") == 0
    gain = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    pairs = [(shown, plain) for shown, plain in zip(gain["with reference"], gain["text only"], strict=True) if plain]
    assert sum(shown for shown, _ in pairs) < 0.999 * sum(plain for _, plain in pairs)
    assert load_module(tmp_path / "out" / "emma-module.safetensors").config.source.family == "sd15"


def test_a_run_that_is_interrupted_is_gone_on_with_bit_for_bit(learnt, sdxl, pictures, tmp_path, monkeypatch):
    from emma_core.training.trainer import Trainer

    update = Trainer.update

    def interrupted(self, buckets):
        if self.step == 7:
            raise KeyboardInterrupt
        return update(self, buckets)

    settings = ["--train.steps", "20", "--train.rate", "5e-3", "--report.save_every", "10", "--report.sample_every", "20"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", interrupted)
        assert train(sdxl, pictures, tmp_path, *settings) == 130
    assert checkpoints(tmp_path)[-1].name == "checkpoint-00000007.pt"
    assert train(sdxl, pictures, tmp_path, *settings) == 0
    found, wanted = (load_checkpoint(checkpoints(folder)[-1])["learning"] for folder in (tmp_path, learnt))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def test_a_single_file_trains_as_the_folder_does(learnt, sdxl, pictures, tmp_path):
    single = as_single_file(sdxl, tmp_path / "single.safetensors")
    assert train(single, pictures, tmp_path / "out", "--train.steps", "2", "--train.rate", "5e-3", "--output.thumbnail",
                 "false") == 0
    first, same = (json.loads((folder / "log.jsonl").read_text().splitlines()[0]) for folder in (tmp_path / "out", learnt))
    assert first["loss"] == pytest.approx(same["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def strong(learnt, tmp_path_factory):
    """A module of that kind that changes much."""
    module = load_module(learnt / "emma-module.safetensors")
    fill_(module, 3)
    path = tmp_path_factory.mktemp("strong") / "strong.safetensors"
    save_module(module, path)
    return path


@torch.no_grad()
def literal(folder, prompt, negative, seed, features=None, module=None, steps=2, guidance=3.0) -> np.ndarray:
    """The picture by diffusers' and transformers' own parts, one evaluation at a time."""
    unet, vae = UNet2DConditionModel.from_pretrained(folder / "unet"), AutoencoderKL.from_pretrained(folder / "vae")
    first = CLIPTextModel.from_pretrained(folder / "text_encoder")
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    scheduler = DDIMScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=True, clip_sample=False)
    scheduler.set_timesteps(steps)
    noise = torch.randn((1, 4, SIDE // 8, SIDE // 8), generator=torch.Generator().manual_seed(seed))
    latent = scheduler.add_noise(torch.zeros_like(noise), noise, scheduler.timesteps[:1])
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32)
    for timestep in scheduler.timesteps:
        said = []
        for text in (prompt, negative):
            told = second(padded(text, 0), output_hidden_states=True)
            left = first(padded(text, 49407), output_hidden_states=True).hidden_states[-2]
            tokens = torch.cat([left, told.hidden_states[-2]], -1)
            if module is not None and text == prompt:
                source = module.source
                tokens = source.tokens(tokens, timestep[None].float(), Assembly([Reference(module.module, features)]))
            beside = {"text_embeds": told.text_embeds, "time_ids": sizes}
            said.append(unet(latent, timestep, tokens, added_cond_kwargs=beside).sample)
        latent = scheduler.step(said[1] + guidance * (said[0] - said[1]), timestep, latent).prev_sample
    picture = vae.decode(latent / vae.config.scaling_factor).sample.clamp(-1, 1)
    return ((picture[0].permute(1, 2, 0) + 1) / 2 * 255).round().byte().numpy()


DRAW = ["--sampling.steps", "2", "--sampling.guidance", "3", "--sampling.width_px", str(SIDE), "--sampling.height_px",
        str(SIDE), "--sampling.negative", "blurred", "--seed", "4", "--device", "cpu"]


def drawn(checkpoint, out, *more) -> np.ndarray:
    assert main(["generate", "a red fox", *DRAW, "--base.checkpoint", str(checkpoint), "--out", str(out), *more]) == 0
    [path] = out.glob("*.png")
    return np.array(Image.open(path))


def test_generate_draws_what_a_literal_computation_draws(sdxl, tmp_path):
    found, wanted = drawn(sdxl, tmp_path / "out"), literal(sdxl, "a red fox", "blurred", 4)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1 and wanted.std() > 5


class Act:
    """A module and the tokens that it acts on."""

    def __init__(self, path, spec):
        self.module, self.source = load_module(path), spec.own_tokens


def test_generate_draws_with_a_module_what_a_literal_computation_draws(sdxl, strong, pictures, tmp_path):
    from emma_core.base.recognition import recognised
    from emma_core.encoders.loading import load_encoders
    from emma_core.encoders.matching import encode_for_module, encoder_for
    from emma_core.files.picture_file import open_picture, picture_tensor

    reference = pictures / "red" / "0.png"
    act = Act(strong, recognised(sdxl))
    encoder = encoder_for(act.module, load_encoders([ENCODER], None))
    shown, _ = encode_for_module(encoder, act.module.config, picture_tensor(open_picture(reference)), None)
    wanted = literal(sdxl, "a red fox", "blurred", 4, shown.features, act)
    found = drawn(sdxl, tmp_path / "out", "--encoder.files", ENCODER, "--module", str(strong), str(reference))
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    assert np.abs(wanted.astype(int) - literal(sdxl, "a red fox", "blurred", 4).astype(int)).mean() > 1


def test_prompts_of_several_lengths_are_drawn_together_as_alone(sdxl, tmp_path):
    long = "fox " * 100
    both = ["generate", "a red fox", long, *DRAW, "--base.checkpoint", str(sdxl)]
    assert main([*both, "--out", str(tmp_path / "both")]) == 0
    found = np.array(Image.open(next((tmp_path / "both").glob("a-red-fox*.png"))))
    assert np.abs(found.astype(int) - literal(sdxl, "a red fox", "blurred", 4).astype(int)).max() <= 1


def text_lora(folder, seed: int = 8) -> dict[str, torch.Tensor]:
    """kohya's names: the UNet's attention, and one layer of each text encoder."""
    tensors = kohya_lora(lora_layers(UNet2DConditionModel.from_pretrained(folder / "unet")), seed)
    generator = torch.Generator().manual_seed(seed)
    for tower, width in (("te1", 64), ("te2", 128)):
        key = f"lora_{tower}_text_model_encoder_layers_0_mlp_fc1"
        tensors |= {f"{key}.lora_down.weight": torch.randn(4, width, generator=generator),
                    f"{key}.lora_up.weight": torch.randn(2 * width, 4, generator=generator), f"{key}.alpha": torch.tensor(2.0)}
    return tensors


def test_a_lora_of_the_base_changes_its_text_encoders_too(sdxl, tmp_path):
    from emma_core.base.config import BaseConfig, EllaConfig
    from emma_core.base.own_text import load_own_text
    from emma_core.base.parts import load_base_parts
    from emma_core.base.recognition import recognised

    tensors = text_lora(sdxl)
    save_file(tensors, tmp_path / "a.safetensors")
    parts = load_base_parts(BaseConfig(str(sdxl), lora=str(tmp_path / "a.safetensors")), EllaConfig(), torch.float32,
                            torch.device("cpu"))
    wanted = load_own_text(sdxl, recognised(sdxl), torch.float32)
    for number, tower in enumerate(wanted.towers):
        key = f"lora_te{number + 1}_text_model_encoder_layers_0_mlp_fc1"
        change = 0.5 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        tower.layers["text_model.encoder.layers.0.mlp.fc1"].weight += change
    assert torch.allclose(parts.text_encoder.encode(["fox"])[0], wanted.encode(["fox"])[0], atol=1e-5)
    assert torch.allclose(parts.pooled(["fox"])[0], wanted.pooled(["fox"])[0], atol=1e-5)


def test_a_lora_teaches_by_its_text_encoders_too(sdxl, pictures, tmp_path, monkeypatch):
    """The target is what a base with the whole LoRA merged into it predicts of the caption."""
    from emma_core.base.config import BaseConfig, EllaConfig
    from emma_core.base.own_text import beside_text, sizes_of
    from emma_core.base.parts import load_base_parts
    from emma_core.training.student import Student

    save_file(text_lora(sdxl), tmp_path / "a.safetensors")
    seen = []
    taught = Student._taught
    monkeypatch.setattr(Student, "_taught", lambda self, data, batch, noised, timestep, device: seen.append(
        (batch.rows, noised.clone(), timestep.clone(), taught(self, data, batch, noised, timestep, device))) or seen[-1][-1])
    assert train(sdxl, pictures, tmp_path / "out", "--train.steps", "1", "--teacher.lora", str(tmp_path / "a.safetensors"),
                 "--output.thumbnail", "false", "--objective.drop_text", "0", "--objective.drop_both", "0") == 0
    merged = load_base_parts(BaseConfig(str(sdxl), lora=str(tmp_path / "a.safetensors")), EllaConfig(), torch.float32,
                             torch.device("cpu"))
    rows, noised, timestep, found = seen[0]
    # of targets 0 to 3: two in each group, the second one wide
    was = [[((96, 96), (64, 64)), ((160, 96), (64, 64))][row.target % 2] for row in rows]
    beside = beside_text(torch.cat(merged.pooled([row.caption for row in rows])), sizes_of(was))
    tokens = torch.cat(merged.text_encoder.encode([row.caption for row in rows]))
    wanted = merged.backbone.predict_noise(noised, timestep, tokens, beside)
    assert torch.allclose(found, wanted, atol=1e-4)
    plain = load_base_parts(BaseConfig(str(sdxl)), EllaConfig(), torch.float32, torch.device("cpu"))
    same_text = merged.backbone.predict_noise(noised, timestep, torch.cat(plain.text_encoder.encode([r.caption for r in rows])),
                                              beside)
    assert (found - same_text).abs().max() > 1e-2


def refused(capsys, *arguments) -> str:
    assert main(list(arguments)) == 1
    return capsys.readouterr().err


def test_wrong_pairings_are_refused_before_anything_is_loaded(sdxl, sd15, strong, pictures, tmp_path, capsys, monkeypatch):
    import emma_core.base.parts as parts

    monkeypatch.setattr(parts, "load_backbone", lambda *given: pytest.fail("a model was loaded"))
    style, ella = str(PLAYGROUND_DIR / "emma-style.safetensors"), str(PLAYGROUND_DIR / "ella.safetensors")
    t5, picture = str(PLAYGROUND_DIR / "t5.safetensors"), str(pictures / "red" / "0.png")
    draw = ["generate", "fox", "--device", "cpu", "--out", str(tmp_path / "out")]
    own, shown = ["--encoder.files", ENCODER], ["--module", str(strong), picture]
    found = "strong.safetensors acts on the tokens of sdxl (width 192, ddpm time); base.checkpoint is sd15 (width 64)"
    assert found in refused(
        capsys, *draw, "--base.checkpoint", str(sd15), *own, *shown)
    assert "emma-style.safetensors was made for an ELLA, and ella.file is not set" in refused(
        capsys, *draw, "--base.checkpoint", str(sdxl), *own, "--module", style, picture)
    assert "strong.safetensors acts on the own tokens of sdxl (width 192), and there is an ELLA" in refused(
        capsys, *draw, *shown)
    assert "reads a pooled text vector that no ELLA gives" in refused(
        capsys, *draw, "--base.checkpoint", str(sdxl), "--ella.file", ella, "--ella.text_encoder", t5)
    assert "ella.text_encoder is set, but ella.file is not" in refused(
        capsys, *draw, "--base.checkpoint", str(sd15), "--ella.text_encoder", t5)
    setting = ["--base.checkpoint", str(sdxl), "--data.folder", str(pictures), "--output.folder", str(tmp_path / "run")]
    assert "emma-style.safetensors was made for an ELLA" in refused(
        capsys, "train", *SMALL, *setting, "--module.start", style)
    assert "reads a pooled text vector that no ELLA gives" in refused(
        capsys, "train", "ella", *SMALL, *setting, "--ella.text_encoder", t5)
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_a_checkpoint_without_text_encoders_is_refused_before_anything_is_loaded(tmp_path, capsys):
    unet = str(PLAYGROUND_DIR / "unet.safetensors")
    assert "holds no model.diffusion_model.* weights" in refused(capsys, "generate", "fox", "--base.checkpoint", unet)


def test_inspect_says_which_kind_a_module_is_and_draws_its_gates(sdxl, strong, tmp_path, capsys):
    assert main(["inspect", str(strong), "--checkpoint", str(sdxl), "--gate-map", str(tmp_path / "gates.png")]) == 0
    assert "own tokens   of sdxl (width 192, ddpm time), no ELLA; width 64, 2 blocks, 1 heads" in capsys.readouterr().out
    assert Image.open(tmp_path / "gates.png").width > 77 * 10
    assert "name such a checkpoint with --checkpoint" in refused(capsys, "inspect", str(strong), "--gate-map",
                                                                 str(tmp_path / "b.png"))


def test_sdxl_trains_around_1024_pixels_if_nothing_is_said(sdxl, sd15):
    from emma_core.training.config import resolve

    assert resolve({"base": {"checkpoint": str(sdxl)}}).data.resolution_px == 1024
    assert resolve({"base": {"checkpoint": str(sd15)}}).data.resolution_px == 512


def test_eval_draws_what_generate_draws(sdxl, strong, pictures, tmp_path):
    from emma_core.evaluation.config import ReferencesConfig, resolve_evaluation, rows_of
    from emma_core.evaluation.generation import Drawer, files_of
    from emma_core.evaluation.plan import DrawingJob
    from emma_core.evaluation.references import references_in

    config = resolve_evaluation({}, {
        "base.checkpoint": str(sdxl), "modules.files": (str(strong),), "encoder.files": (ENCODER,), "sampling.steps": 2,
        "sampling.guidance": 3.0, "sampling.width_px": SIDE, "sampling.height_px": SIDE, "sampling.negative": "blurred"})
    assert set(files_of(config).base) == {"base.checkpoint"}
    reference = next(one for one in references_in(ReferencesConfig(folder=str(pictures))) if one.name == "red/0.png")
    job = DrawingJob(rows_of(config.modules)[1], "a red fox", reference, 4, "key")
    [found] = Drawer(config, torch.device("cpu")).draw([job])
    shown = ["--module", str(strong), str(pictures / "red" / "0.png")]
    wanted = drawn(sdxl, tmp_path / "out", "--encoder.files", ENCODER, *shown)
    assert np.abs(np.array(found).astype(int) - wanted.astype(int)).max() <= 1
