"""Sample sheets and thumbnails are drawn on the base's own noise schedule and prediction."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from emma_core import Assembly, Reference, load_connector, load_module
from emma_core.base.backbones import Backbone, load_playground
from emma_core.base.schedule import zero_terminal
from emma_core.drawing.contact_sheet import SheetRow, draw_contact_sheet
from emma_core.playground import PLAYGROUND_DIR
from emma_core.text.encoder import load_text_encoder
from emma_core.training.config import ReportConfig
from emma_core.training.sample_prompts import sample_prompts
from emma_core.training.samples import Sampler, pipeline_of_base

PROMPT, STEPS, GUIDANCE = "man cook", 4, 3.0
TIMESTEPS = (751, 501, 251, 1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """The playground as if it had been trained with zero terminal SNR, to predict the velocity."""
    model = load_playground()
    spec = replace(model.spec, prediction="v", alphas_cumprod_T=zero_terminal(model.spec.alphas_cumprod_T))
    return Backbone(model.unet, model.autoencoder, spec, "velocity", "")


@pytest.fixture(scope="module")
def trainer():
    module = load_module(PLAYGROUND_DIR / "emma-style.safetensors")
    return SimpleNamespace(
        result=lambda: module, student=SimpleNamespace(connector=load_connector(PLAYGROUND_DIR / "ella.safetensors")), step=3,
        accelerator=SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext),
        config=SimpleNamespace(train=SimpleNamespace(batch=4), module=SimpleNamespace(start="")))


@pytest.fixture(scope="module")
def texts() -> dict[str, torch.Tensor]:
    return dict(zip(("", PROMPT), load_text_encoder(PLAYGROUND_DIR / "t5.safetensors").encode(["", PROMPT]), strict=True))


@pytest.fixture(scope="module")
def sampler(backbone, texts, trainer) -> Sampler:
    generator = torch.Generator().manual_seed(7)
    features = {name: torch.randn(1, spec.dim, generator=generator) for name, spec in trainer.result().config.features.items()}
    shown = torch.rand(40, 64, 3, generator=generator)
    settings = ReportConfig(sample_steps=STEPS, guidance=GUIDANCE)
    return Sampler(pipeline_of_base(backbone, texts, {}), settings, [PROMPT], [features], (128, 128), [shown])


@torch.no_grad()
def drawn_literally(backbone: Backbone, texts, trainer, references: Assembly) -> torch.Tensor:
    """DDIM (arXiv 2010.02502, eq. 12 with sigma = 0) on the schedule of the base, of its velocity."""
    spec, connector = backbone.spec, trainer.student.connector
    kept_T = spec.alphas_cumprod_T.double()
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    latent = (1 - kept_T[TIMESTEPS[0]]).sqrt() * noise
    for timestep, following in zip(TIMESTEPS, (*TIMESTEPS[1:], None), strict=True):
        velocities = [backbone.predict_noise(latent.float(), torch.tensor([timestep]), connector.tokens(
            texts[prompt], torch.tensor([timestep]), assembly)) for prompt, assembly in (
            (PROMPT, references), ("", Assembly()))]
        velocity = velocities[1] + GUIDANCE * (velocities[0] - velocities[1])
        kept, kept_next = kept_T[timestep], 1.0 if following is None else kept_T[following]
        clean = kept.sqrt() * latent - (1 - kept).sqrt() * velocity
        rest = kept.sqrt() * velocity + (1 - kept).sqrt() * latent
        latent = kept_next ** 0.5 * clean + (1 - kept_next) ** 0.5 * rest
    picture_13HW = backbone.autoencoder.decode(latent.float() / spec.latent_scale)
    return ((picture_13HW[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0)


def shown(sampler: Sampler, trainer) -> Assembly:
    return Assembly([Reference(trainer.result(), {name: tensor[None] for name, tensor in sampler.references[0].items()})])


def test_a_thumbnail_is_drawn_on_the_schedule_of_the_base(sampler, backbone, texts, trainer):
    found, wanted = sampler.picture(trainer), drawn_literally(backbone, texts, trainer, shown(sampler, trainer))
    assert (found - wanted).abs().max() <= 1e-3


def test_a_sheet_is_drawn_on_the_schedule_of_the_base(sampler, backbone, texts, trainer):
    pictures = [drawn_literally(backbone, texts, trainer, references) for references in (Assembly(), shown(sampler, trainer))]
    rows = [SheetRow(PROMPT, [sampler.shown[0], *pictures])]
    wanted = draw_contact_sheet(["reference 1", "text only", "+ reference 1"], rows, 1, "after 3 updates")
    sheet = sampler.sheet(trainer)
    found = sheet.image()
    assert np.abs(np.asarray(found, dtype=float) - np.asarray(wanted, dtype=float)).max() <= 1
    assert sheet.thumbnail().shape == (85, 255, 3)
    tile = torch.from_numpy(np.array(Image.fromarray((pictures[1] * 255).round().byte().numpy()).resize((85, 85))) / 255)
    assert (sheet.thumbnail()[:, 170:] - tile).abs().mean() < 0.05 < (sheet.thumbnail()[:, :85] - tile).abs().mean()


def test_text_only_is_drawn_once_and_what_a_run_starts_from_before_it(sampler, trainer, monkeypatch):
    drawn = []
    monkeypatch.setattr(Sampler, "_drawn", lambda self, trainer, requests, connector=None: drawn.append(len(requests)) or
                        torch.zeros(len(requests), 4, 4, 3))
    fresh = replace(sampler, still={})
    started = SimpleNamespace(**{**vars(trainer), "step": 0, "config": SimpleNamespace(
        train=trainer.config.train, module=SimpleNamespace(start="module.safetensors"))})
    fresh.begin(started)
    assert list(fresh.sheet(started).columns) == ["text only", "at the start 1", "+ reference 1"] and len(drawn) == 3
    fresh.sheet(started)
    assert len(drawn) == 4, "a later sheet draws the reference alone"


@pytest.mark.parametrize("condition", ["style", "object", "face", "portrait"])
def test_prompts_of_the_samples_are_no_captions(condition):
    first = sample_prompts(condition, False, ())
    assert len(set(first)) == 4
    others = sample_prompts(condition, False, {first[0].upper()})
    assert first[0] not in others and others[:3] == first[1:]
    assert all(len(prompt.split()) == 2 for prompt in sample_prompts(condition, True, ()))
