"""Train EMMA Module without an ELLA: every family learns from four pictures, and its MODEL stays as it is."""

from __future__ import annotations

import comfy.model_management
import folder_paths
import pytest
import torch
from model_families import FAMILIES
from tiny_models import noise

PICTURES = 4


class Many(list):
    """Several values on one input, as a list output of another node gives them."""


@pytest.fixture(scope="module")
def encoder(pack_import):
    return pack_import("host.encoders").load_playground_reference_encoder()


@pytest.fixture
def train(run_node, tiny, encoder, monkeypatch, tmp_path):
    """`train(family, steps=...)`: the node as the host calls it, on four pictures with a text and a reference each."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def run(family, **changes):
        latent = family.latent(PICTURES)["samples"]
        settings = {
            "model": family.patcher(tiny.patcher_for), "latents": {"samples": noise(latent.shape, 31)},
            "positive": Many(family.conditioning(40 + index) for index in range(PICTURES)),
            "reference_image": noise((PICTURES, 64, 64, 3), 32).sigmoid(), "encoder": encoder, "name": "run",
            "condition": "style", "steps": 20, "batch": 2, "accumulate": 1, "rate": 2e-3, "gate_rate": 20.0, "seed": 3,
            "precision": "fp32", "timestep_power": 1.0, "inverse_snr": 0.0, "average": 0.0, "checkpoint_every": 100, **changes,
        }
        settings = {key: value if isinstance(value, Many) else [value] for key, value in settings.items()}
        return run_node("EMMATrainModule", **{key: list(value) for key, value in settings.items()})

    return run


@pytest.fixture(scope="module")
def denoisers(pack_import):
    return pack_import("host.denoiser")


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("timestep", [20, 999])
def test_the_denoiser_is_the_hosts_apply_model(tiny, pack_import, denoisers, name, timestep):
    """Its answer turned into a picture is the host's denoised picture, at its sigma, told the same beside the tokens."""
    family = FAMILIES[name]
    model = family.patcher(tiny.patcher_for)
    latent, timestep_1 = noise(family.latent()["samples"].shape[1:], 33), torch.tensor([timestep])
    texts = pack_import("host.own_text").OwnTexts(model, [*family.conditioning(4)], [latent], ["conditioning 1"])
    context, beside = texts.tokens(0), texts.beside(0, latent)
    denoiser = denoisers.HostDenoiser(model, torch.device("cpu"), torch.float32)
    sampling, sigma = model.get_model_object("model_sampling"), denoiser.sigma_T[timestep_1]
    noised = sampling.noise_scaling(sigma, noise(latent.shape, 34)[None], latent[None])
    comfy.model_management.load_models_gpu([model])
    with torch.no_grad():
        wanted = model.model.apply_model(noised.clone(), sigma, c_crossattn=context, **beside)
        kept = denoiser.alphas_cumprod_T[timestep_1]
        size = (sigma.square() + (1 - sigma).square()).sqrt() if family.time == "flow" else (sigma.square() + 1).sqrt()
        predicted = denoiser.predict_noise(noised / size, timestep_1, context, beside)
    found = noised - sigma * predicted
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    share = ((1 - sigma) / size) if family.time == "flow" else 1 / size
    torch.testing.assert_close(kept.sqrt(), share, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_checkpointing_keeps_the_gradients(tiny, pack_import, denoisers, name):
    family = FAMILIES[name]
    model = family.patcher(tiny.patcher_for)
    latent = noise(family.latent()["samples"].shape[1:], 33)
    texts, gradients = pack_import("host.own_text").OwnTexts(model, [*family.conditioning(4)], [latent], ["conditioning 1"]), []
    for checkpointing in (False, True):
        denoiser = denoisers.HostDenoiser(model, torch.device("cpu"), torch.float32, checkpointing)
        context = texts.tokens(0).clone().requires_grad_()
        predicted = denoiser.predict_noise(latent[None], torch.tensor([700]), context, texts.beside(0, latent))
        gradients += torch.autograd.grad(predicted.square().sum(), context)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_twenty_updates_lower_the_loss_with_reference_and_the_model_stays(train, tiny, pack_import, monkeypatch, name):
    family = FAMILIES[name]
    training, gains = pack_import("host.training"), []
    real = training.gain_of_reference
    monkeypatch.setattr(training, "gain_of_reference", lambda trainer: gains.append(real(trainer, 16)) or gains[-1])
    model = family.patcher(tiny.patcher_for)
    before = weights(model)
    module, loss_map, report = train(family, model=model)
    after = weights(model)
    assert all(torch.equal(after[key], value) for key, value in before.items()) and len(after) == len(before)
    assert len(loss_map["loss"]) == 20 and "20 updates" in report
    with_reference, alone = ([mean for mean in gains[0][which] if mean is not None]
                             for which in ("with reference", "text only"))
    assert sum(with_reference) < sum(alone), "the reference tells something of the four pictures"
    config = module.module.config
    assert (config.source.family, config.time.kind, config.layers, config.width) == (family.name, family.time, 4, 512)
    assert config.training["steps"] == 20 and "blocks" not in config.training["recipe"]


def test_the_module_that_was_trained_samples(train, tiny, ksample):
    family = FAMILIES["sdxl"]
    model = family.patcher(tiny.patcher_for)
    module = train(family, model=model)[0]
    features = {"global": noise((1, 1, module.module.config.features["global"].dim), 70)}
    reference = tiny.reference(module)
    assembly = tiny.assemble((module, type(reference)(features, dict(module.module.config.encoder))))
    connected = tiny.connecting.connect(model, None, family.conditioning(4), family.conditioning(8), assembly, None, None)
    assert not torch.equal(ksample(*connected), ksample(model, family.conditioning(4), family.conditioning(8)))


def test_without_a_rate_the_model_is_untouched_bit_for_bit(train):
    module = train(FAMILIES["sdxl"], rate=0.0, steps=2)[0]
    assert all(block.attn_gate == 0 and block.ffn_gate == 0 for block in module.module.blocks)


def test_a_teacher_on_own_tokens(train, tiny):
    """The same UNet under another prompt teaches; the same draws without a rate stay where they are."""
    family = FAMILIES["sdxl"]
    model = family.patcher(tiny.patcher_for)
    shared = {"model": model, "teacher_model": model, "teacher_positive": family.conditioning(60), "steps": 30,
              "positive": family.conditioning(40), "timestep_power": 0.3}
    learning, still = (sum(train(family, rate=rate, name=str(rate), **shared)[1]["loss"][-10:]) for rate in (5e-3, 0.0))
    assert learning < 0.8 * still


def test_a_canceled_run_goes_on_bit_for_bit(train, monkeypatch):
    import comfy.utils

    family = FAMILIES["flux"]
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)
    whole, losses, _ = train(family, name="whole", steps=5)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, *rest, **more: (
        comfy.model_management.interrupt_current_processing(True) if value == 3 else None))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(family, steps=5)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    comfy.model_management.interrupt_current_processing(False)
    resumed, again, _ = train(family, steps=5)
    assert again["loss"] == losses["loss"]
    assert all(torch.equal(value, resumed.module.state_dict()[key]) for key, value in whole.module.state_dict().items())


def test_latents_of_another_vae_are_refused(train, pack_import):
    with pytest.raises(pack_import("emma_core.errors").TrainingDataError, match=r"wanted \(pictures, 16, height, width\)"):
        train(FAMILIES["flux"], latents={"samples": noise((PICTURES, 4, 8, 8), 31)})


def test_a_start_of_another_family_is_refused(train, tiny, pack_import):
    start = tiny.token_module(FAMILIES["sd15"])
    with pytest.raises(pack_import("emma_core.errors").TrainingConfigError, match="on the own tokens of sd15"):
        train(FAMILIES["sdxl"], start=start)
