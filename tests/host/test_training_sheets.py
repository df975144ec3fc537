"""Sample sheets of Train EMMA Module: the command line's, of prompts that are no captions, by the copy that trains."""

from __future__ import annotations

import inspect

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from model_families import FAMILIES
from PIL import Image
from tiny_models import noise

SIDE_PX = 64


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The folder `people` of the input folder: two groups of two pictures."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for index, name in enumerate(("ada/1", "ada/2", "bob/1", "bob/2")):
        path = tmp_path / "input" / "people" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE_PX, SIDE_PX), (60 * index, 90, 200)).save(path)
        path.with_suffix(".txt").write_text(f"picture {index}", encoding="utf-8")
    return tmp_path / "output" / "emma_training" / "run"


@pytest.fixture
def node(host_nodes, run_node, tiny, vae, clips, pack_import, folder, monkeypatch):
    """`node(...)`: the whole output of Train EMMA Module on that folder, in 4 updates with a sheet after 2."""
    config = pack_import("emma_core.training.config")
    monkeypatch.setattr(config.ReportConfig.__init__, "__defaults__", tuple(
        3 if value == 20 else value for value in config.ReportConfig.__init__.__defaults__))  # steps of a picture
    encoder = pack_import("host.encoders").load_playground_reference_encoder()

    def run(own: bool = False, **changes):
        given = {"folder": "people", "vae": vae, "clip": clips[own], "resolution": SIDE_PX, "use_masks": False, "flip": False,
                 "reference_crops": 1, "own_reference": False}
        loaded = run_node("EMMALoadTrainingFolder", **{key: [value] for key, value in given.items()})[0]
        settings = {"model": tiny.model(), "encoder": encoder, "name": "run", "condition": "style", "steps": 4, "batch": 2,
                    "accumulate": 1, "rate": 1e-3, "gate_rate": 5.0, "seed": 3, "precision": "fp32", "timestep_power": 1.0,
                    "inverse_snr": 0.0, "average": 0.0, "checkpoint_every": 100, "training_set": loaded, "sample_every": 2,
                    **({} if own else {"ella": tiny.ella()}), **changes}
        with torch.inference_mode():
            return host_nodes.NODE_CLASS_MAPPINGS["EMMATrainModule"].execute(
                **{key: [value] for key, value in settings.items()})

    return run


@pytest.mark.parametrize("own", [False, True], ids=["ella", "own tokens"])
def test_sheets_are_drawn_on_the_way_and_the_last_one_is_shown_and_the_thumbnail(node, folder, own, monkeypatch):
    previews = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)  # later hosts skip quick updates
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **more: (
        previews.append((value, preview)) if total == 4 and preview else None))
    made = node(own)
    assert made.ui == {"images": [{"filename": "00000004.png", "subfolder": "emma_training/run/samples", "type": "output"}]}
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["00000002.png", "00000004.png"]
    [(step, (kind, sheet, _))] = previews
    assert step == 2 and kind == "JPEG" and sheet.tobytes() == Image.open(folder / "samples" / "00000002.png").tobytes()
    assert sheet.width > 5 * 160, "two references, text only, and with each of them"
    assert "modelspec.thumbnail" in made.result[0].module.config.file_metadata


def test_what_learns_does_not_depend_on_sheets(node, folder):
    drawn, plain = node(), node(sample_every=0, name="plain")
    assert drawn.result[1] == plain.result[1] and plain.ui is None and not (folder.parent / "plain" / "samples").exists()
    for name, value in plain.result[0].module.state_dict().items():
        assert torch.equal(drawn.result[0].module.state_dict()[name], value)


def test_prompts_of_before_draw_none_and_new_nodes_do(host_nodes):
    made = host_nodes.NODE_CLASS_MAPPINGS["EMMATrainModule"]
    last = made.GET_SCHEMA().inputs[-1]
    assert (last.id, last.default) == ("sample_every", 500)
    assert inspect.signature(made.execute).parameters["sample_every"].default == (0,)


def test_cancel_while_a_sheet_is_drawn_ends_the_run_and_it_goes_on(node, folder, pack_import, monkeypatch):
    drawing = pack_import("host.sheets")._Drawing
    decode = drawing._decode

    def pressed(self, latent):
        comfy.model_management.interrupt_current_processing(True)
        return decode(self, latent)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "_decode", pressed)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            node()
    comfy.model_management.interrupt_current_processing(False)
    assert (folder / "checkpoint-00000002.pt").exists()
    resumed, whole = node(), node(name="whole")
    assert resumed.result[1] == whole.result[1]


def sampler_of(pack_import, monkeypatch, node, **settings):
    """The sampler of a run, which ends there, and its trainer."""
    training, found = pack_import("host.training"), []
    real = training.sampler_for
    monkeypatch.setattr(training, "sampler_for", lambda *parts: found.append(real(*parts)) or found[-1])
    begin = training.begin
    monkeypatch.setattr(training, "begin", lambda *parts: found.append(begin(*parts)) or found[-1])
    node(steps=1, **settings)
    return found[1], found[0]


def test_text_alone_is_what_the_host_samples(node, tiny, vae, clips, pack_import, monkeypatch, run_node):
    """On the MODEL's own tokens: DDIM at the same timesteps by the host's own sampler, decoded by its VAE."""
    model = tiny.model()
    sampler, trainer = sampler_of(pack_import, monkeypatch, node, own=True, model=model)
    with torch.inference_mode(False):
        found = sampler.sheet(trainer).picture_RCHW3[0, 0]
    encode = pack_import("host.training_folder").text_of
    positive, negative = (encode(clips[1], prompt) for prompt in (sampler.prompts[0], ""))
    settings = sampler.settings
    latent = {"samples": torch.zeros(1, 4, SIDE_PX // 8, SIDE_PX // 8)}
    sampled = run_node("KSampler", model=model, positive=positive, negative=negative, seed=0, steps=settings.sample_steps,
                       cfg=settings.guidance, sampler_name="ddim", scheduler="ddim_uniform", denoise=1.0,
                       latent_image=latent)[0]["samples"]
    with torch.inference_mode():
        wanted = vae.decode(sampled)[0]
    assert (found - wanted).abs().max() <= 5e-3 * (1 + wanted.std())


@pytest.mark.parametrize("name", ["flux", "wan", "sdxl"])
def test_what_is_drawn_with_is_the_network_of_its_family(name, tiny, pack_import):
    """A prediction is turned into the picture that the host's own denoising gives, whatever the network predicts."""
    family = FAMILIES[name]
    model = family.patcher(tiny.patcher_for)
    sheets, latent = pack_import("host.sheets"), noise(family.latent()["samples"].shape[1:], 33)
    texts = pack_import("host.own_text").OwnTexts(model, [*family.conditioning(4)], [latent], ["a"])
    denoiser = pack_import("host.denoiser").HostDenoiser(model, torch.device("cpu"), torch.float32)
    drawing = sheets._Drawing(model, None, denoiser, sheets._spec(denoiser, latent, (8 * latent.shape[-1],) * 2), {}, None)
    flat = latent.reshape(latent.shape[0], *latent.shape[-2:])[None]
    timestep = torch.tensor([700])
    kept, told = denoiser.alphas_cumprod_T[timestep], texts.beside(0, latent)
    with torch.no_grad():
        predicted = drawing._predict(flat, timestep, texts.tokens(0), told)
        comfy.model_management.load_models_gpu([model])
        sigma = denoiser.sigma_T[timestep]
        size = (sigma.square() + (1 - sigma).square()).sqrt() if family.time == "flow" else (sigma.square() + 1).sqrt()
        wanted = model.model.apply_model(size * latent[None], sigma, c_crossattn=texts.tokens(0), **told)
    clean = kept.sqrt() * flat - (1 - kept).sqrt() * predicted
    if drawing.spec.prediction == "eps":
        clean = (flat - (1 - kept).sqrt() * predicted) / kept.sqrt()
    np.testing.assert_allclose(clean.numpy(), wanted.reshape(clean.shape).numpy(), rtol=1e-3, atol=1e-3)
