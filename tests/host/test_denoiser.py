"""The host's UNet as a denoiser: its predictions are the host's own, gradients pass, and other models are refused."""

from __future__ import annotations

import comfy.model_management
import comfy.model_sampling
import pytest
import torch
from model_variants import made_in_inference_mode, with_lora, with_velocity
from tiny_models import WIDTH, noise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def denoiser_of(pack_import):
    """`HostDenoiser`."""
    return pack_import("host.denoiser").HostDenoiser


@pytest.fixture(scope="module")
def errors(pack_import):
    return pack_import("emma_core.errors")


@pytest.mark.parametrize(("prepare", "prediction"), [(lambda model: model, "eps"), (with_lora, "eps"), (with_velocity, "v")])
@pytest.mark.parametrize("timesteps", [(0, 0), (1, 500), (999, 20)])
def test_denoiser_is_the_hosts_apply_model(denoiser_of, tiny, prepare, prediction, timesteps):
    """Our prediction turned into a picture is the host's own denoised picture, at its sigma."""
    model = prepare(tiny.model())
    timestep_B = torch.tensor(timesteps)
    noised, context = noise((2, 4, 8, 8), 33), noise((2, 9, WIDTH), 34)
    denoiser = denoiser_of(model, CPU, torch.float32)
    assert denoiser.prediction == prediction
    with torch.no_grad():
        predicted = denoiser.predict_noise(noised, timestep_B, context)
    comfy.model_management.load_models_gpu([model])
    sampling = model.get_model_object("model_sampling")
    sigma = sampling.sigmas[timestep_B]
    scaled = noised * (sigma ** 2 + 1).sqrt()[:, None, None, None]
    with torch.no_grad():
        wanted = model.model.apply_model(scaled, sigma, c_crossattn=context)
    kept = denoiser.alphas_cumprod_T[timestep_B][:, None, None, None]
    if prediction == "eps":
        found = (noised - (1 - kept).sqrt() * predicted) / kept.sqrt()
    else:
        found = kept.sqrt() * noised - (1 - kept).sqrt() * predicted
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_lora_changes_what_the_denoiser_predicts(denoiser_of, tiny):
    noised, context = noise((1, 4, 8, 8), 33), noise((1, 9, WIDTH), 34)
    model = tiny.model()
    plain, patched = (denoiser_of(one, CPU, torch.float32).predict_noise(noised, torch.tensor([500]), context)
                      for one in (model, with_lora(model)))
    assert (plain - patched).abs().max() > 1e-3 * plain.abs().max()


def test_alphas_are_those_of_sd15(denoiser_of, tiny):
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    found = denoiser_of(tiny.model(), CPU, torch.float32).alphas_cumprod_T
    torch.testing.assert_close(found.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_the_context_of_a_model_made_in_a_node(denoiser_of, tiny, checkpointing):
    """The gradient is the slope of the prediction, with or without checkpointing."""
    with torch.inference_mode():  # as the host runs nodes
        model = made_in_inference_mode(tiny)
        with torch.inference_mode(False), torch.enable_grad():
            denoiser = denoiser_of(model, CPU, torch.float64, checkpointing)
            context = noise((1, 9, WIDTH), 34).double().requires_grad_()
            noised, timestep, direction = noise((1, 4, 8, 8), 33), torch.tensor([700]), noise((1, 9, WIDTH), 35).double()
            (slope,) = torch.autograd.grad(denoiser.predict_noise(noised, timestep, context).double().square().sum(), context)

            def value(step: float) -> float:
                with torch.no_grad():
                    predicted = denoiser.predict_noise(noised, timestep, context + step * direction)
                return predicted.double().square().sum().item()

    measured = (value(1e-3) - value(-1e-3)) / 2e-3
    assert (slope * direction).sum().item() == pytest.approx(measured, rel=1e-2)


def test_checkpointing_keeps_patches_that_know_their_block(denoiser_of, tiny):
    """The second pass sees the block that the first saw: gradients are those without checkpointing."""
    factors, gradients = {"input": 1.0, "middle": 2.0, "output": 3.0}, []
    model = tiny.model().clone()
    model.set_model_attn2_output_patch(lambda output, options: output * factors[options["block"][0]])
    for checkpointing in (False, True):
        context = noise((1, 9, WIDTH), 34).requires_grad_()
        denoiser = denoiser_of(model, CPU, torch.float32, checkpointing)
        predicted = denoiser.predict_noise(noise((1, 4, 8, 8), 33), torch.tensor([700]), context)
        gradients += torch.autograd.grad(predicted.square().sum(), context)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_attention_without_backward_pass_is_not_used(denoiser_of, tiny, monkeypatch):
    import comfy.ldm.modules.attention

    def no_backward(q, *arguments, **options):
        raise AssertionError("the host's attention was called")

    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", comfy.ldm.modules.attention.wrap_attn(no_backward))
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention_masked",
                        comfy.ldm.modules.attention.wrap_attn(no_backward))
    context = noise((1, 9, WIDTH), 34).requires_grad_()
    predicted = denoiser_of(tiny.model(), CPU, torch.float32).predict_noise(
        noise((1, 4, 8, 8), 33), torch.tensor([700]), context)
    assert torch.autograd.grad(predicted.sum(), context)[0].abs().max() > 0


def test_patch_without_gradients_is_refused(denoiser_of, tiny, errors):
    model = tiny.model()
    model.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda chosen, q, k, v, *rest, **more: torch.zeros_like(q).detach())
    denoiser = denoiser_of(model, CPU, torch.float32)
    assert not any(value.requires_grad for value in denoiser.network.parameters())
    with pytest.raises(errors.TrainingError, match="lets no gradients through its cross-attention"):
        denoiser.predict_noise(noise((1, 4, 8, 8), 33), torch.tensor([7]), noise((1, 9, WIDTH), 34).requires_grad_())


@pytest.mark.parametrize(("kind", "name"), [("X0", "X0"), ("EDM", "EDM")])
def test_other_predictions_are_refused_by_name(denoiser_of, tiny, errors, kind, name):
    class Other(comfy.model_sampling.ModelSamplingDiscrete, getattr(comfy.model_sampling, kind)):
        pass

    model = tiny.model().clone()
    model.add_object_patch("model_sampling", Other(model.model.model_config))
    with pytest.raises(errors.TrainingConfigError, match=rf"\(BaseModel, EPS\) predicts by {name}; wanted EPS, V_PRED"):
        denoiser_of(model, CPU, torch.float32)


def test_a_flow_model_is_refused_beside_an_ella(tiny, pack_import, errors):
    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    model = tiny.model().clone()
    model.add_object_patch("model_sampling", Flow(model.model.model_config))
    with pytest.raises(errors.TrainingConfigError, match=r"is a flow model \(CONST\); wanted EPS or V_PREDICTION beside"):
        pack_import("host.denoiser").context_width_of(model)


def test_sampling_without_timesteps_is_refused(denoiser_of, tiny, run_node, errors):
    model = run_node("ModelSamplingContinuousEDM", model=tiny.model(), sampling="v_prediction", sigma_max=120.0,
                     sigma_min=0.002)[0]
    with pytest.raises(errors.TrainingConfigError, match="does not count timesteps 0 to 999"):
        denoiser_of(model, CPU, torch.float32)
