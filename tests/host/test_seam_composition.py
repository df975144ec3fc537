"""EMMA conditioning goes through stock nodes: every entry keeps its own tokens, and other patches of the MODEL work on."""

from __future__ import annotations

import comfy.hooks
import pytest
import torch
from tiny_models import WIDTH, TinyWorld, noise, wire
from token_check import Call, CallSpy, Constant, check, judge

pytestmark = pytest.mark.usefixtures("added_literally")


@pytest.fixture(scope="module")
def one(tiny: TinyWorld, model, ella, way):
    """A prompt with two references."""
    return wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), way)


@pytest.fixture(scope="module")
def other(tiny: TinyWorld, one, ella, way):
    """Another prompt with four other references, one of which says what is drawn, on the same MODEL."""
    thing = tiny.module("object", {"global": (20, 1), "local": (12, 1)}, seed=7)
    assembly = tiny.assemble((thing, tiny.reference(thing, seed=31), 1.3), *(
        (module, tiny.reference(module, seed=seed)) for seed in (41, 42, 43) for module in (tiny.module(seed=seed),)))
    return wire(tiny, one.model, ella, tiny.text(4, seed=32), tiny.text(1, seed=8), assembly, way)


@pytest.fixture(scope="module")
def mismatch(pack_import):
    return pack_import("emma_core.errors").ConnectorMismatchError


@pytest.fixture
def both(one, other):
    """Answers where both prompts are positive entries."""
    return {0: [*one.answers[0], *other.answers[0]], 1: one.answers[1]}


def left_half() -> torch.Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    return mask


def lora(model, names: str = "attn2.to_v.weight") -> dict:
    """Weight differences for some layers, in the host's own terms."""
    keys = [key for key in model.model_state_dict() if key.endswith(names)]
    return {key: ("diff", (0.5 * noise(model.model_state_dict()[key].shape, index),)) for index, key in enumerate(keys)}


def test_combine(spy, run_node, ksample, one, other, both):
    positive = run_node("ConditioningCombine", conditioning_1=one.positive, conditioning_2=other.positive)[0]
    ksample(other.model, positive, one.negative)
    check(spy.calls, both)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_sde"])
def test_areas(spy, run_node, ksample, one, other, both, sampler):
    place = {"width": 32, "height": 64, "y": 0, "strength": 1.0}
    left = run_node("ConditioningSetArea", conditioning=one.positive, x=0, **place)[0]
    right = run_node("ConditioningSetArea", conditioning=other.positive, x=32, **place)[0]
    positive = run_node("ConditioningCombine", conditioning_1=left, conditioning_2=right)[0]
    ksample(other.model, positive, one.negative, sampler_name=sampler)
    check(spy.calls, both)


@pytest.mark.parametrize("bounds", ["default", "mask bounds"])
def test_masks(spy, run_node, ksample, one, other, both, bounds):
    settings = {"strength": 0.9, "set_cond_area": bounds}
    left = run_node("ConditioningSetMask", conditioning=one.positive, mask=left_half(), **settings)[0]
    right = run_node("ConditioningSetMask", conditioning=other.positive, mask=1 - left_half(), **settings)[0]
    positive = run_node("ConditioningCombine", conditioning_1=left, conditioning_2=right)[0]
    ksample(other.model, positive, one.negative)
    check(spy.calls, both)


def test_timestep_ranges(spy, run_node, ksample, one, other, both):
    early = run_node("ConditioningSetTimestepRange", conditioning=one.positive, start=0.0, end=0.35)[0]
    late = run_node("ConditioningSetTimestepRange", conditioning=other.positive, start=0.35, end=1.0)[0]
    positive = run_node("ConditioningCombine", conditioning_1=early, conditioning_2=late)[0]
    ksample(other.model, positive, one.negative, steps=6, scheduler="normal")
    check(spy.calls, both)
    timesteps = {True: [], False: []}
    for call in spy.calls:
        for group, entry in judge([call], both).met:
            if group == 0:
                timesteps[entry < len(one.answers[0])].append(call.timestep_B[0].item())
    assert min(timesteps[True]) > max(timesteps[False])


def test_default_conditioning_fills_the_rest(spy, run_node, ksample, one, other, both):
    left = run_node("ConditioningSetMask", conditioning=one.positive, mask=left_half(), strength=1.0,
                    set_cond_area="default")[0]
    positive = run_node("ConditioningSetDefaultCombine", cond=left, cond_DEFAULT=other.positive)[0]
    ksample(other.model, positive, one.negative)
    check(spy.calls, both)


def test_concatenated_tokens_stay_behind_ours(spy, run_node, tiny, ksample, one):
    appended = tiny.clip_text(9)
    positive = run_node("ConditioningConcat", conditioning_to=one.positive, conditioning_from=appended)[0]
    ksample(one.model, positive, one.negative)
    check(spy.calls, {0: [answer.followed_by(appended[0][0]) for answer in one.answers[0]], 1: one.answers[1]})


@pytest.mark.parametrize("first", ["emma", "clip"])
def test_our_tokens_behind_others_are_refused(run_node, tiny, ksample, one, other, mismatch, first):
    """Behind another conditioning they would stay at one timestep."""
    positive = run_node("ConditioningConcat", conditioning_to=one.positive if first == "emma" else tiny.clip_text(9),
                        conditioning_from=other.positive)[0]
    for negative in (one.negative, tiny.clip_text(9)):
        with pytest.raises(mismatch, match="were appended to another conditioning.*Concatenate before EMMA Connector"):
            ksample(other.model, positive, negative)


def test_ella_plus_clip(spy, tiny, ksample, model, ella, way):
    """The checkpoint's own CLIP tokens follow the connector's, at their own values."""
    wired = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), way,
                 clip_positive=tiny.clip_text(), clip_negative=tiny.clip_text(seed=33))
    ksample(wired.model, wired.positive, wired.negative)
    check(spy.calls, wired.answers)
    assert {len(call.context_BSW) for call in spy.calls[::wired.evaluations]} == {2}, "equal lengths sample in one pass"
    assert all(call.context_BSW.shape[1:] == (8 + 77, WIDTH) for call in spy.calls)


def test_clip_for_each_of_several_prompts(spy, tiny, ksample, model, ella):
    texts = [*tiny.text(), *tiny.text(5, seed=34)]
    wired = wire(tiny, model, ella, texts, tiny.text(1, seed=8),
                 clip_positive=[*tiny.clip_text(), *tiny.clip_text(seed=35)], clip_negative=tiny.clip_text(seed=33))
    ksample(wired.model, wired.positive, wired.negative)
    check(spy.calls, wired.answers)


def test_one_clip_serves_several_prompts(spy, tiny, ksample, model, ella):
    texts = [*tiny.text(), *tiny.text(5, seed=34)]
    wired = wire(tiny, model, ella, texts, tiny.text(1, seed=8), clip_positive=tiny.clip_text())
    ksample(wired.model, wired.positive, wired.negative)
    check(spy.calls, wired.answers)


def test_clip_negative_passes_untouched(spy, tiny, ksample, one):
    negative = tiny.clip_text(seed=36)
    ksample(one.model, one.positive, negative)
    check(spy.calls, {0: one.answers[0], 1: [Constant(negative[0][0])]})
    plain = [call.context_BSW for call in spy.calls if call.groups == (1,)]
    assert plain and all(torch.equal(context_BSW, negative[0][0]) for context_BSW in plain)


def test_clip_alone_samples_as_on_the_original(tiny, ksample, model, one):
    positive, negative = tiny.clip_text(), tiny.clip_text(seed=36)
    assert torch.equal(ksample(one.model, positive, negative), ksample(model, positive, negative))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_sde"])
def test_controlnet_gets_the_same_tokens(spy, run_node, tiny, ksample, one, sampler):
    controlnet = tiny.controlnet()
    image = noise((1, 64, 64, 3), 37).sigmoid()
    positive, negative = run_node(
        "ControlNetApplyAdvanced", positive=one.positive, negative=one.negative, control_net=controlnet, image=image,
        strength=0.7, start_percent=0.0, end_percent=1.0)
    with CallSpy(controlnet.control_model) as control_spy:
        controlled = ksample(one.model, positive, negative, sampler_name=sampler)
    check(spy.calls, one.answers)
    assert len(control_spy.calls) == len(spy.calls)
    for control, call in zip(control_spy.calls, spy.calls, strict=True):
        assert torch.equal(control.context_BSW, call.context_BSW)
        assert torch.equal(control.timestep_B, call.timestep_B)
    assert not torch.equal(controlled, ksample(one.model, one.positive, one.negative, sampler_name=sampler))


def test_lora_on_the_model_before_or_after(spy, tiny, ksample, model, ella, one):
    after = one.model.clone()
    after.add_patches(lora(model), 0.8)
    before = model.clone()
    before.add_patches(lora(model), 0.8)
    wired = wire(tiny, before, ella, tiny.text(), tiny.text(1, seed=8))
    plain = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8))
    patched = ksample(wired.model, wired.positive, wired.negative)
    assert torch.equal(patched, ksample(after, wired.positive, wired.negative))
    assert not torch.equal(patched, ksample(plain.model, wired.positive, wired.negative))
    check(spy.calls, wired.answers)


def test_lora_hooks_on_one_entry(spy, run_node, ksample, model, one, other, both):
    weights = {}
    for key, (_, (difference,)) in lora(model).items():
        name = key.removesuffix(".weight")
        weights |= {f"{name}.lora_up.weight": difference, f"{name}.lora_down.weight": torch.eye(difference.shape[1])}
    hooks = comfy.hooks.create_hook_lora(lora=weights, strength_model=1.0, strength_clip=0.0)
    hooked = run_node("ConditioningSetProperties", cond_NEW=one.positive, strength=1.0, set_cond_area="default", hooks=hooks)[0]
    with_hooks = run_node("ConditioningCombine", conditioning_1=hooked, conditioning_2=other.positive)[0]
    without = run_node("ConditioningCombine", conditioning_1=one.positive, conditioning_2=other.positive)[0]
    samples = ksample(other.model, with_hooks, one.negative)
    check(spy.calls, both)
    assert not torch.equal(samples, ksample(other.model, without, one.negative))


FREE_U = {"b1": 1.4, "b2": 1.6, "s1": 0.9, "s2": 0.2}


@pytest.mark.parametrize(("node", "settings"), [
    ("FreeU", FREE_U), ("FreeU_V2", FREE_U), ("PerturbedAttentionGuidance", {"scale": 3.0}),
    ("RescaleCFG", {"multiplier": 0.7}), ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}),
    ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
    ("ModelSamplingDiscrete", {"sampling": "lcm", "zsnr": False}),
])
def test_model_patches_before_or_after(spy, run_node, tiny, ksample, model, ella, one, way, node, settings):
    """Each changes the picture, in either order by the same, and the tokens stay right."""
    patched_model = run_node(node, model=model, **settings)[0]
    before = wire(tiny, patched_model, ella, tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), way)
    after = run_node(node, model=one.model, **settings)[0]
    patched = ksample(before.model, before.positive, before.negative)
    positive_alone = [call for call in spy.calls if call.groups == (0,)]
    of_its_own = before.evaluations if node == "PerturbedAttentionGuidance" else 0
    assert len(positive_alone) == 3 * (before.evaluations - 1 + of_its_own)
    assert torch.equal(patched, ksample(after, before.positive, before.negative))
    assert not torch.equal(patched, ksample(one.model, before.positive, before.negative))
    check(spy.calls, before.answers)


def test_another_packs_function_wrapper_sees_the_tokens(one, ksample):
    seen = []

    def wrapper(apply_model, arguments):
        seen.append((arguments["timestep"].clone(), arguments["c"]["c_crossattn"].clone()))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    wrapped = one.model.clone()
    wrapped.set_model_unet_function_wrapper(wrapper)
    ksample(wrapped, one.positive, one.negative)
    sampling = wrapped.get_model_object("model_sampling")
    calls = [Call(sampling.timestep(sigma_B).float(), (1, 0)[-len(sigma_B):], context_BSW) for sigma_B, context_BSW in seen]
    check(calls, one.answers)
