"""What EMMA Connector does to a MODEL: nothing to the given one, no work twice, refusals, memory, interruption."""

from __future__ import annotations

import dataclasses
from collections import Counter

import comfy.model_management
import comfy.supported_models
import pytest
import torch
from comfy.ldm.flux.model import FluxParams
from tiny_models import UNET, empty_latent, noise, wire
from token_check import CallSpy, check

# newer hosts ask for one size more
_NEW_FLUX = "txt_ids_dims" in {field.name for field in dataclasses.fields(FluxParams)}
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16, "context_in_dim": 64,
    "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 4, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6],
    "theta": 10000, "qkv_bias": True, "guidance_embed": False, **({"txt_ids_dims": []} if _NEW_FLUX else {}),
}
SD20 = {"model_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}
SDXL = {"model_channels": 64, "adm_in_channels": 2816, "context_dim": 2048, "use_linear_in_transformer": True}


@pytest.fixture(scope="module")
def modules(tiny):
    return tiny.module(), tiny.module("face", {"global": (20, 1), "local": (12, 1)}, seed=7)


@pytest.fixture(scope="module")
def assembly(tiny, modules):
    return tiny.assemble(*((module, tiny.reference(module)) for module in modules))


@pytest.fixture
def wired(tiny, model, ella, assembly, way):
    """Made anew for every test: no token is known yet."""
    return wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), assembly, way)


@pytest.fixture(scope="module")
def mismatch(pack_import):
    return pack_import("emma_core.errors").ConnectorMismatchError


@pytest.fixture
def token_work(monkeypatch, pack_import):
    """Numbers of timesteps of each batch of tokens that was computed."""
    payload = pack_import("host.payload")
    computed, original = [], payload.terms_over_schedule

    def counted(source, text_FND, timestep_T, assembly):
        computed.append(len(timestep_T))
        return original(source, text_FND, timestep_T, assembly)

    monkeypatch.setattr(payload, "terms_over_schedule", counted)
    return computed


def snapshot(model) -> dict:
    """Everything of a MODEL that a patch could leave a trace in."""
    return {
        "weights": {name: value.clone() for name, value in model.model.state_dict().items()},
        "options": repr(model.model_options), "wrappers": repr(model.wrappers), "callbacks": repr(model.callbacks),
        "patches": repr(model.patches), "object patches": repr(model.object_patches), "attachments": repr(model.attachments),
        "injections": repr(model.injections), "hook patches": repr(model.hook_patches),
        "additional models": dict(model.additional_models), "uuid": model.patches_uuid,
    }


def test_given_model_stays_as_it_was(tiny, ella, assembly, way, ksample):
    model, plain = tiny.model(), (tiny.clip_text(), tiny.clip_text(seed=36))
    before, samples_before = snapshot(model), ksample(model, *plain)
    wired = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), assembly, way)
    ksample(wired.model, wired.positive, wired.negative)
    after = snapshot(model)
    weights_before, weights_after = before.pop("weights"), after.pop("weights")
    assert after == before
    assert weights_after.keys() == weights_before.keys()
    assert all(torch.equal(weights_after[name], weights_before[name]) for name in weights_before)
    assert torch.equal(ksample(model, *plain), samples_before)


def test_given_conditioning_stays_as_it_was(tiny, model, ella, assembly):
    text, clip = tiny.text(), tiny.clip_text()
    copies = text[0][0].clone(), clip[0][0].clone()
    wire(tiny, model, ella, text, tiny.text(1, seed=8), assembly, clip_positive=clip)
    assert torch.equal(text[0][0], copies[0]) and torch.equal(clip[0][0], copies[1])
    assert text[0][1] == clip[0][1] == {"pooled_output": None}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_sde"])
def test_same_seed_gives_the_same_bits(tiny, model, ella, assembly, way, wired, ksample, sampler):
    first = ksample(wired.model, wired.positive, wired.negative, steps=4, sampler_name=sampler)
    assert torch.equal(ksample(wired.model, wired.positive, wired.negative, steps=4, sampler_name=sampler), first)
    for steps in (2, 7):
        ksample(wired.model, wired.positive, wired.negative, steps=steps, scheduler="normal", sampler_name="heun")
    assert torch.equal(ksample(wired.model, wired.positive, wired.negative, steps=4, sampler_name=sampler), first)
    fresh = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), assembly, way)
    assert torch.equal(ksample(fresh.model, fresh.positive, fresh.negative, steps=4, sampler_name=sampler), first)
    assert not torch.equal(ksample(fresh.model, fresh.positive, fresh.negative, steps=4, sampler_name=sampler, seed=12), first)


def test_references_change_the_picture(tiny, model, ella, assembly, ksample, wired):
    without = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8))
    assert not torch.equal(ksample(without.model, without.positive, without.negative),
                           ksample(wired.model, wired.positive, wired.negative))


def test_strength_zero_gives_the_bits_of_ella_alone(tiny, model, ella, modules, ksample, way):
    without = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8))
    silent = tiny.assemble(*((module, tiny.reference(module), 0.0) for module in modules))
    zero = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), silent, way)
    assert torch.equal(ksample(zero.model, zero.positive, zero.negative),
                       ksample(without.model, without.positive, without.negative))


def test_connecting_twice_is_harmless(tiny, model, ella, assembly, way, wired, ksample):
    twice = wire(tiny, wired.model, ella, tiny.text(), tiny.text(1, seed=8), assembly, way)
    with CallSpy(model.model.diffusion_model) as spy:
        samples = ksample(twice.model, twice.positive, twice.negative)
    check(spy.calls, twice.answers)
    assert torch.equal(samples, ksample(wired.model, wired.positive, wired.negative))
    assert len(twice.model.get_additional_models_with_key("emma")) == len(wired.model.get_additional_models_with_key("emma"))


def test_conditioning_of_another_connector_works_on_a_connected_model(tiny, model, wired, ksample):
    another = wire(tiny, model, tiny.ella(seed=51), tiny.text(5, seed=52), tiny.text(1, seed=53))
    with CallSpy(model.model.diffusion_model) as spy:
        ksample(wired.model, another.positive, another.negative)
    check(spy.calls, another.answers)


@pytest.mark.parametrize("frames", [1, 6])
def test_tokens_of_a_schedule_are_computed_once_per_entry(tiny, model, ella, modules, ksample, token_work, frames):
    module = modules[0]
    wired = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8),
                 tiny.assemble((module, tiny.reference(module, references=frames))))
    token_work.clear()  # the placeholders
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(frames), steps=20, scheduler="normal")
    assert token_work == [20, 20]
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(frames), steps=20, scheduler="normal", seed=2)
    assert token_work == [20, 20], "a second run of the same schedule computes nothing"


def test_context_windows_compute_nothing_more(model, ksample, windowed, wired, token_work):
    """Windows over the width stand for those over frames, which not every host can run."""
    with CallSpy(model.model.diffusion_model) as spy:
        ksample(windowed(wired.model, 4, 3), wired.positive, wired.negative, latent=empty_latent(1, 8), steps=5)
    check(spy.calls, wired.answers)
    assert len(spy.calls) == 3 * 5 * wired.evaluations
    assert token_work == [5, 5]


def test_evaluations_between_announced_sigmas_do_not_recompute_the_schedule(wired, ksample, token_work):
    ksample(wired.model, wired.positive, wired.negative, steps=5, sampler_name="dpmpp_sde")
    work = Counter(token_work)
    assert work[5] == 2 and set(work) == {1, 5} and work[1] == 2 * 4


def test_entries_outside_their_range_compute_nothing(run_node, wired, ksample, token_work):
    never = run_node("ConditioningSetTimestepRange", conditioning=wired.positive, start=0.99, end=1.0)[0]
    first = run_node("ConditioningCombine", conditioning_1=wired.negative, conditioning_2=never)[0]
    run_node("KSamplerAdvanced", model=wired.model, positive=first, negative=wired.negative, cfg=5.0, add_noise="enable",
             noise_seed=1, steps=6, sampler_name="euler", scheduler="normal", start_at_step=0,
             end_at_step=3, return_with_leftover_noise="enable", latent_image=empty_latent())
    assert len(token_work) == 1, "both entries of the negative share a payload, the positive never acts"


def test_unconnected_model_is_refused(pack_import, model, wired, ksample):
    error = pack_import("emma_core.errors").UnconnectedModelError
    with pytest.raises(error, match="the MODEL that samples it does not.* Wire the MODEL output of EMMA Connector into the"):
        ksample(model, wired.positive, wired.negative)


def test_unconnected_model_is_refused_for_the_negative_alone(pack_import, tiny, model, wired, ksample):
    with pytest.raises(pack_import("emma_core.errors").UnconnectedModelError, match="Wire the MODEL output"):
        ksample(model, tiny.clip_text(), wired.negative)


@pytest.mark.parametrize("which", ["positive", "negative"])
def test_a_t5_prompt_past_the_connector_is_refused(tiny, wired, ksample, mismatch, which):
    entries = {"positive": wired.positive, "negative": wired.negative, which: tiny.text()}
    with pytest.raises(mismatch, match="prompt of width 24 goes into the sampler straight.* reads width 64.*EMMA Connector"):
        ksample(wired.model, **entries)


@pytest.mark.parametrize("which", ["positive", "negative"])
def test_zeroed_conditioning_is_refused(run_node, wired, ksample, mismatch, which):
    entries = {"positive": wired.positive, "negative": wired.negative}
    entries[which] = run_node("ConditioningZeroOut", conditioning=entries[which])[0]
    with pytest.raises(mismatch, match=r"changed after EMMA Connector \(by Conditioning Average, Zero Out.*before EMMA"):
        ksample(wired.model, **entries)


@pytest.mark.parametrize("other", ["clip", "emma"])
def test_averaged_conditioning_is_refused(run_node, tiny, wired, ksample, mismatch, other):
    mixed_in = tiny.clip_text(8) if other == "clip" else wired.negative
    positive = run_node("ConditioningAverage", conditioning_to=wired.positive, conditioning_from=mixed_in,
                        conditioning_to_strength=0.6)[0]
    with pytest.raises(mismatch, match="changed after EMMA Connector"):
        ksample(wired.model, positive, wired.negative)


def test_edm_model_is_refused(run_node, tiny, model, ella, mismatch):
    edm = run_node("ModelSamplingContinuousEDM", model=model, sampling="eps", sigma_max=120.0, sigma_min=0.002)[0]
    with pytest.raises(mismatch, match=r"counts time from 1\.20, ELLA needs timesteps 0 to 999\. Remove the node"):
        wire(tiny, edm, ella, tiny.text(), tiny.text(1, seed=8))


def test_edm_after_the_connector_is_refused(run_node, wired, ksample, mismatch):
    edm = run_node("ModelSamplingContinuousEDM", model=wired.model, sampling="v_prediction", sigma_max=120.0,
                   sigma_min=0.002)[0]
    with pytest.raises(mismatch, match="ELLA needs timesteps 0 to 999"):
        ksample(edm, wired.positive, wired.negative)


@pytest.mark.parametrize(("family", "changes", "found"), [
    (comfy.supported_models.SD20, SD20, "of width 1024"),
    (comfy.supported_models.SDXL, SDXL, "of width 2048"),
    (comfy.supported_models.Flux, FLUX, "no cross-attention that ELLA's tokens could enter"),
])
def test_model_of_another_family_is_refused(tiny, ella, mismatch, family, changes, found):
    sizes = changes if family is comfy.supported_models.Flux else {**UNET, **changes}
    with pytest.raises(mismatch, match=f"{found}; the ELLA makes tokens of width 64"):
        wire(tiny, tiny.model(family=family, sizes=sizes), ella, tiny.text(), tiny.text(1, seed=8))


def test_message_for_the_released_width_names_sd15(tiny, model, mismatch):
    released = tiny.ella(width=768)
    with pytest.raises(mismatch, match=r"makes tokens of width 768\. Use a checkpoint of the Stable Diffusion 1\.5 family"):
        wire(tiny, model, released, tiny.text(), tiny.text(1, seed=8))


def is_loaded(patcher) -> bool:
    return any(patcher.is_clone(loaded) for loaded in comfy.model_management.loaded_models())


def test_connector_and_modules_are_loaded_and_unloaded_with_the_model(model, wired, ella, modules, ksample):
    parts = [model, ella.patcher, *(module.patcher for module in modules)]
    comfy.model_management.unload_all_models()
    assert not any(is_loaded(part) for part in parts)
    during = []
    watched = wired.model.clone()
    watched.set_model_unet_function_wrapper(lambda apply_model, arguments: (
        during.append([is_loaded(part) for part in parts]),
        apply_model(arguments["input"], arguments["timestep"], **arguments["c"]))[1])
    ksample(watched, wired.positive, wired.negative)
    assert during and all(all(loaded) for loaded in during)
    comfy.model_management.unload_all_models()
    assert not any(is_loaded(part) for part in parts)


@pytest.fixture
def loads_with_the_model(monkeypatch, model):
    """What each load call held in which the UNet was."""
    calls, original = [], comfy.model_management.load_models_gpu

    def watched(models, *arguments, **options):
        if any(part.is_clone(model) for part in models):
            calls.append(list(models))
        return original(models, *arguments, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched)
    return calls


def without_models(conditioning: list) -> list:
    return [[context, {key: value for key, value in options.items() if key != "additional_models"}]
            for context, options in conditioning]


def test_connector_and_modules_load_in_one_call_with_the_model(loads_with_the_model, wired, ella, modules, ksample):
    """The host sees what it needs together, and does not throw one out for another: the MODEL alone says so."""
    ksample(wired.model, without_models(wired.positive), without_models(wired.negative))
    assert len(loads_with_the_model) == 1
    for part in (ella.patcher, *(module.patcher for module in modules)):
        assert len({id(loaded) for loaded in loads_with_the_model[0] if part.is_clone(loaded)}) == 1


def test_conditioning_brings_its_own_connector_and_modules(tiny, loads_with_the_model, model, wired, ksample):
    """A MODEL connected for other prompts does not know them."""
    ella, module = tiny.ella(seed=51), tiny.module(seed=54)
    another = wire(tiny, model, ella, tiny.text(), tiny.text(1), tiny.assemble((module, tiny.reference(module))))
    ksample(wired.model, another.positive, another.negative)
    assert len(loads_with_the_model) == 1
    for part in (ella.patcher, module.patcher):
        assert len({id(loaded) for loaded in loads_with_the_model[0] if part.is_clone(loaded)}) == 1


def test_partly_loaded_connector_gives_the_same_tokens(tiny, ella):
    """Layers left out of a partial load go through the host's casting path; a patch on them still counts."""
    device = comfy.model_management.get_torch_device()
    text, timestep = tiny.text()[0][0], torch.tensor([321.0])
    connector = tiny.ella(seed=61)
    key = "connector.proj_in.weight"
    change = noise(connector.connector.state_dict()[key].shape, 62)
    whole, partial = connector.patcher.clone(), connector.patcher.clone()
    answers = {}
    for name, patcher, kept_bytes in (("plain", None, 0), ("whole", whole, 0), ("partial", partial, 5000)):
        if patcher is not None:
            patcher.add_patches({key: ("diff", (change,))}, 0.5)
            patcher.patch_model(device, lowvram_model_memory=kept_bytes)
        with torch.inference_mode():
            answers[name] = connector.connector.tokens(text, timestep)
        if patcher is not None:
            patcher.unpatch_model(device)
    torch.testing.assert_close(answers["partial"], answers["whole"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(answers["plain"], answers["whole"], rtol=1e-2)
    with torch.inference_mode():
        assert torch.equal(connector.connector.tokens(text, timestep), answers["plain"])


def test_half_precision_weights_compute_in_the_connectors_dtype(tiny, pack_import):
    """float16 files on a device that computes in float32."""
    stored = tiny.ella(seed=61).connector.half()
    stored._compute_dtype = torch.float32
    rounded = tiny.ella(seed=61).connector.half().float()
    text, timestep = tiny.text()[0][0], torch.tensor([321.0])
    with torch.inference_mode():
        tokens = stored.tokens(text, timestep)
        assert tokens.dtype == torch.float32
        torch.testing.assert_close(tokens, rounded.tokens(text, timestep), rtol=1e-5, atol=1e-5)


@pytest.fixture
def interrupted():
    comfy.model_management.interrupt_current_processing()
    yield comfy.model_management.InterruptProcessingException
    comfy.model_management.interrupt_current_processing(False)


def test_interrupt_stops_the_computing_of_tokens(wired, token_work, interrupted):
    payload = wired.positive[0][1]["model_conds"]["emma"].cond
    with pytest.raises(interrupted):
        payload.tokens(torch.tensor([500.0]), [], None)
    assert token_work == []
    tokens_1KW, *_ = payload.tokens(torch.tensor([500.0]), [], None)
    assert tokens_1KW.shape == (1, 8, 64), "the host clears the flag"


def test_interrupt_stops_the_connector_node(tiny, model, ella, interrupted):
    with pytest.raises(interrupted):
        wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8))
