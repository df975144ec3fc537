"""Advanced-ControlNet on conditioning of EMMA Connector: its ControlNets and the UNet see the same tokens."""

from __future__ import annotations

import importlib

import peers
import pytest
import torch
from sd15_layout import SD15_UNET, controlnet
from tiny_models import empty_latent, noise, wire
from token_check import CallSpy, check

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def advanced_controlnet(host_nodes, pack, host_path):
    with peers.loaded(host_nodes, host_path, "ComfyUI-Advanced-ControlNet") as (root,):
        yield root


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model(sizes=SD15_UNET)


@pytest.fixture(scope="module")
def wired(tiny, model, way):
    return wire(tiny, model, tiny.ella(), tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), way)


@pytest.fixture
def apply(run_node, wired):
    """Apply Advanced ControlNet to both prompts; (positive, negative)."""

    def run(control_net, image=None, **settings):
        image = noise((1, 64, 64, 3), 37).sigmoid() if image is None else image
        usual = {"strength": 0.7, "start_percent": 0.0, "end_percent": 1.0}
        return run_node("ACN_AdvancedControlNetApply_v2", positive=wired.positive, negative=wired.negative,
                        control_net=control_net, image=image, **{**usual, **settings})

    return run


@pytest.fixture
def weights(run_node):
    return run_node("ACN_ScaledSoftControlNetWeights", base_multiplier=0.8, uncond_multiplier=0.5)[0]


def check_control(control_calls, calls) -> None:
    """Each call of the ControlNet saw what the UNet then saw."""
    assert control_calls
    for control in control_calls:
        assert any(torch.equal(control.timestep_B, call.timestep_B) and torch.equal(control.context_BSW, call.context_BSW)
                   for call in calls)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_sde"])
def test_applied_with_weights(spy, ksample, wired, apply, weights, sampler):
    control_net = controlnet()
    positive, negative = apply(control_net, weights_override=weights)
    with CallSpy(control_net.control_model) as control_spy:
        samples = ksample(wired.model, positive, negative, sampler_name=sampler)
    check(spy.calls, wired.answers)
    assert len(control_spy.calls) == len(spy.calls)
    check_control(control_spy.calls, spy.calls)
    assert not torch.equal(samples, ksample(wired.model, *apply(control_net), sampler_name=sampler)), "the weights act"


def test_timestep_keyframes(spy, run_node, ksample, wired, apply, weights):
    """Off at first, then on, then on with other weights."""
    control_net = controlnet()
    keyframes = None
    for start, settings in ((0.0, {"strength": 0.0}), (0.3, {"strength": 1.0}), (0.7, {"cn_weights": weights})):
        keyframes = run_node("TimestepKeyframe", start_percent=start, prev_timestep_kf=keyframes, **settings)[0]
    positive, negative = apply(control_net, timestep_kf=keyframes)
    with CallSpy(control_net.control_model) as control_spy:
        ksample(wired.model, positive, negative, steps=STEPS, scheduler="normal")
    verdict = check(spy.calls, wired.answers)
    check_control(control_spy.calls, spy.calls)
    timesteps = {call.timestep_B[0].item() for call in control_spy.calls}
    assert timesteps < set(verdict.timesteps) and max(timesteps) < max(verdict.timesteps)


def test_mask_and_latent_keyframes(spy, run_node, ksample, wired, apply):
    """Strengths for the pictures of a batch."""
    control_net = controlnet()
    keyframes = run_node("LatentKeyframe", batch_index=0, strength=0.2)[0]
    keyframes = run_node("LatentKeyframe", batch_index=2, strength=1.0, prev_latent_kf=keyframes)[0]
    positive, negative = apply(control_net, latent_kf_override=keyframes, mask_optional=torch.ones(1, 64, 64))
    with CallSpy(control_net.control_model) as control_spy:
        ksample(wired.model, positive, negative, latent=empty_latent(3))
    check(spy.calls, wired.answers)
    check_control(control_spy.calls, spy.calls)


@pytest.mark.parametrize("kind", ["reference_attn", "reference_attn+adain"])
def test_reference_controlnet(spy, run_node, ksample, wired, apply, advanced_controlnet, kind):
    """It runs the UNet once more in every step, to read its own picture: with the same tokens."""
    control = importlib.import_module(f"{advanced_controlnet.__name__}.adv_control.control_reference")
    control_net = run_node("ACN_ReferenceControlNet", reference_type=kind, style_fidelity=0.5, ref_weight=1.0)[0]
    picture = control.ReferencePreprocWrapper(condhint=noise((1, 4, 8, 8), 38))
    positive, negative = apply(control_net, image=picture)
    samples = ksample(wired.model, positive, negative)
    verdict = check(spy.calls, wired.answers)
    assert verdict.total == 2 * 3 * wired.evaluations
    assert not torch.equal(samples, ksample(wired.model, wired.positive, wired.negative))
