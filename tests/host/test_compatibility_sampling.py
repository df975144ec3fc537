"""Ways of sampling that people build from stock nodes: second passes, schedules of their own, LCM, inpainting models."""

from __future__ import annotations

import comfy.supported_models
import pytest
import torch
from tiny_models import UNET, empty_latent, noise
from token_check import CallSpy, check

pytestmark = pytest.mark.usefixtures("added_literally")


@pytest.fixture
def picture():
    return noise((1, 64, 64, 3), 82).sigmoid()


@pytest.fixture
def left_half():
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    return mask


@pytest.mark.parametrize(("node", "settings"), [
    ("LatentUpscale", {"width": 96, "height": 128, "crop": "disabled"}), ("LatentUpscaleBy", {"scale_by": 2.0}),
])
def test_second_pass_at_another_size(spy, run_node, ksample, wired, node, settings):
    first = ksample(wired.model, wired.positive, wired.negative)
    larger = run_node(node, samples={"samples": first}, upscale_method="bilinear", **settings)[0]
    passes = len(spy.calls)
    ksample(wired.model, wired.positive, wired.negative, latent=larger, denoise=0.5, steps=4)
    check(spy.calls[:passes], wired.answers)
    assert check(spy.calls[passes:], wired.answers).total == 4 * wired.evaluations


@pytest.fixture
def custom(run_node, wired):
    """SamplerCustom with sigmas and a sampler."""
    return lambda sigmas, sampler: run_node(
        "SamplerCustom", model=wired.model, add_noise=True, noise_seed=11, cfg=6.0, positive=wired.positive,
        negative=wired.negative, sampler=sampler, sigmas=sigmas, latent_image=empty_latent())


SCHEDULERS = [
    ("AlignYourStepsScheduler", {"model_type": "SD1", "steps": 7, "denoise": 1.0}),
    ("GITSScheduler", {"coeff": 1.2, "steps": 5, "denoise": 1.0}),
    ("VPScheduler", {"steps": 5, "beta_d": 14.0, "beta_min": 0.1, "eps_s": 0.001}),
    ("LaplaceScheduler", {"steps": 5, "sigma_max": 14.6, "sigma_min": 0.03, "mu": 0.0, "beta": 0.5}),
    ("PolyexponentialScheduler", {"steps": 5, "sigma_max": 14.6, "sigma_min": 0.03, "rho": 1.0}),
]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_sde"])
@pytest.mark.parametrize(("node", "settings"), SCHEDULERS, ids=[node for node, _ in SCHEDULERS])
def test_schedules_of_other_nodes(spy, run_node, custom, wired, node, settings, sampler):
    """Their sigmas lie between the model's own."""
    sigmas = run_node(node, **settings)[0]
    assert not torch.isin(sigmas[1:], wired.model.get_model_object("model_sampling").sigmas).any()
    custom(sigmas, run_node("KSamplerSelect", sampler_name=sampler)[0])
    verdict = check(spy.calls, wired.answers)
    assert verdict.total >= settings["steps"] - 1


def test_split_sigmas(spy, run_node, custom, wired):
    sigmas = run_node("AlignYourStepsScheduler", model_type="SD1", steps=6, denoise=1.0)[0]
    high, low = run_node("SplitSigmas", sigmas=sigmas, step=2)
    sampler = run_node("KSamplerSelect", sampler_name="euler")[0]
    for part in (high, low):
        custom(part, sampler)
    assert check(spy.calls, wired.answers).total == 6 * wired.evaluations


@pytest.mark.parametrize("place", ["before", "after"])
def test_lcm(spy, run_node, ksample, connect, wired, model, place):
    """Its sampling knows every twentieth timestep only."""
    patch = {"sampling": "lcm", "zsnr": False}
    if place == "before":
        sampled = connect(run_node("ModelSamplingDiscrete", model=model, **patch)[0])
        patched = sampled.model
    else:
        sampled, patched = wired, run_node("ModelSamplingDiscrete", model=wired.model, **patch)[0]
    ksample(patched, sampled.positive, sampled.negative, sampler_name="lcm", scheduler="sgm_uniform", steps=4, cfg=1.5)
    verdict = check(spy.calls, sampled.answers)
    assert verdict.total == 4 * sampled.evaluations and verdict.timesteps[0] == 999


def test_lcm_that_grows_while_sampling(spy, run_node, custom, wired):
    sampler = run_node("SamplerLCMUpscale", scale_ratio=2.0, scale_steps=-1, upscale_method="bilinear")[0]
    sigmas = run_node("BasicScheduler", model=wired.model, scheduler="sgm_uniform", steps=4, denoise=1.0)[0]
    samples = custom(sigmas, sampler)[0]["samples"]
    assert samples.shape == (1, 4, 16, 16)
    check(spy.calls, wired.answers)


def test_vae_encode_for_inpaint(spy, run_node, ksample, wired, vae, picture, left_half):
    latent = run_node("VAEEncodeForInpaint", vae=vae, pixels=picture, mask=left_half, grow_mask_by=6)[0]
    ksample(wired.model, wired.positive, wired.negative, latent=latent)
    check(spy.calls, wired.answers)


@pytest.fixture(scope="module")
def inpaint_model(tiny):
    """MODEL whose UNet also reads the mask and the masked picture: 9 channels."""
    return tiny.model(sizes={**UNET, "in_channels": 9})


@pytest.mark.parametrize("noise_mask", [True, False])
def test_inpainting_model(run_node, ksample, connect, inpaint_model, vae, picture, left_half, noise_mask):
    wired = connect(inpaint_model)
    samples = []
    for mask in (left_half, 1 - left_half):
        positive, negative, latent = run_node(
            "InpaintModelConditioning", positive=wired.positive, negative=wired.negative, vae=vae, pixels=picture, mask=mask,
            noise_mask=noise_mask)
        with CallSpy(inpaint_model.model.diffusion_model) as spy:
            samples.append(ksample(wired.model, positive, negative, latent=latent))
        check(spy.calls, wired.answers)
    assert not torch.equal(*samples), "the mask reaches the UNet"


def test_inpainting_model_without_its_conditioning(ksample, connect, inpaint_model):
    """The host gives it an empty picture, as with any prompt."""
    wired = connect(inpaint_model)
    with CallSpy(inpaint_model.model.diffusion_model) as spy:
        ksample(wired.model, wired.positive, wired.negative)
    check(spy.calls, wired.answers)


def test_instruct_pix2pix_model(run_node, tiny, ksample, connect, vae, picture):
    model = tiny.model(family=comfy.supported_models.SD15_instructpix2pix, sizes={**UNET, "in_channels": 8})
    wired = connect(model)
    positive, negative, latent = run_node("InstructPixToPixConditioning", positive=wired.positive, negative=wired.negative,
                                          vae=vae, pixels=picture)
    with CallSpy(model.model.diffusion_model) as spy:
        ksample(wired.model, positive, negative, latent=latent)
    check(spy.calls, wired.answers)
