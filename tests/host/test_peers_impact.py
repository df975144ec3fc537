"""Impact Pack around EMMA's tokens: detailers, iterative upscaling and regional sampling give each call those of its prompt."""

from __future__ import annotations

from dataclasses import replace

import peers
import pytest
import torch
from tiny_models import empty_latent, noise, side_by_side, wire
from token_check import CallSpy, check

SAMPLING = {"seed": 11, "steps": 3, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
DETAILER = {**SAMPLING, "guide_size": 64, "guide_size_for": True, "max_size": 128, "denoise": 0.6, "feather": 5,
            "noise_mask": True, "force_inpaint": True, "wildcard": "", "cycle": 1, "noise_mask_feather": 0}


@pytest.fixture(scope="module", autouse=True)
def impact_pack(host_nodes, pack, host_path):
    with peers.loaded(host_nodes, host_path, "ComfyUI-Impact-Pack") as (root,):
        yield root


@pytest.fixture
def picture_1HW3():
    return noise((1, 128, 128, 3), 82).sigmoid()


@pytest.fixture
def two_segments(run_node):
    """SEGS of two squares."""
    mask = torch.zeros(1, 128, 128)
    mask[:, 20:50, 20:50] = 1
    mask[:, 80:120, 70:110] = 1
    return run_node("MaskToSEGS", mask=mask, combined=False, crop_factor=1.5, bbox_fill=False, drop_size=10)[0]


@pytest.fixture
def detail(run_node, two_segments, picture_1HW3, vae):
    """Detailer (SEGS) on two squares of a picture."""
    return lambda wired, clip=None, **settings: run_node(
        "DetailerForEach", image=picture_1HW3, segs=two_segments, model=wired.model, clip=clip, vae=vae,
        positive=wired.positive, negative=wired.negative, **{**DETAILER, **settings})[0]


@pytest.mark.parametrize("settings", [{}, {"cycle": 2}, {"sampler_name": "dpmpp_sde"}], ids=str)
def test_each_segment_has_its_tokens(detail, model, wired, picture_1HW3, settings):
    with CallSpy(model.model.diffusion_model) as spy:
        found_1HW3 = detail(wired, **settings)
    check(spy.calls, wired.answers)
    assert len(spy.calls) >= 2 * SAMPLING["steps"]
    assert not torch.equal(found_1HW3[:, 20:50, 20:50], picture_1HW3[:, 20:50, 20:50])
    assert not torch.equal(found_1HW3[:, 80:120, 70:110], picture_1HW3[:, 80:120, 70:110])


def test_soft_masks_by_differential_diffusion(detail, run_node, model, wired):
    """The pack's own call of that node fails on these hosts; it makes none if the MODEL has it already."""
    soft = replace(wired, model=run_node("DifferentialDiffusion", model=wired.model)[0])
    with CallSpy(model.model.diffusion_model) as spy:
        detail(soft, noise_mask_feather=20)
    check(spy.calls, wired.answers)


def test_masked_prompts_are_cut_with_the_segments(detail, run_node, tiny, ella, wired):
    other = wire(tiny, wired.model, ella, tiny.text(4, seed=32), tiny.text(1, seed=8))
    with CallSpy(wired.model.model.diffusion_model) as spy:
        detail(replace(other, positive=side_by_side(run_node, wired, other, 128)))
    check(spy.calls, {0: [*wired.answers[0], *other.answers[0]], 1: wired.answers[1]})


def test_iterative_upscale(run_node, model, wired, vae):
    upscaler, = run_node("PixelKSampleUpscalerProvider", scale_method="bilinear", model=wired.model, vae=vae, **SAMPLING,
                         positive=wired.positive, negative=wired.negative, denoise=0.5, use_tiled_vae=False)
    with CallSpy(model.model.diffusion_model) as spy:
        latent, _ = run_node("IterativeLatentUpscale", samples=empty_latent(), upscale_factor=2.0, steps=2, temp_prefix="",
                             upscaler=upscaler)
    check(spy.calls, wired.answers)
    assert latent["samples"].shape[-2:] == (16, 16)


def test_regional_sampler(run_node, tiny, model, ella, wired, vae):
    """A prompt for the whole and one for its left half, each with its own connected MODEL."""
    other = wire(tiny, model, ella, tiny.text(4, seed=32), tiny.text(1, seed=8))

    def sampler(one):
        pipe = run_node("ToBasicPipe", model=one.model, clip=None, vae=vae, positive=one.positive, negative=one.negative)[0]
        return run_node("KSamplerAdvancedProvider", cfg=7.0, sampler_name="euler", scheduler="normal", sigma_factor=1.0,
                        basic_pipe=pipe)[0]

    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    region, = run_node("RegionalPrompt", mask=mask, advanced_sampler=sampler(other))
    with CallSpy(model.model.diffusion_model) as spy:
        run_node("RegionalSampler", seed=11, seed_2nd=0, seed_2nd_mode="ignore", steps=6, base_only_steps=2, denoise=1.0,
                 samples=empty_latent(), base_sampler=sampler(wired), regional_prompts=region, overlap_factor=10,
                 restore_latent=True, additional_mode="ratio between", additional_sampler="AUTO", additional_sigma_ratio=0.3,
                 unique_id=None)
    check(spy.calls, {0: [*wired.answers[0], *other.answers[0]], 1: wired.answers[1]})
