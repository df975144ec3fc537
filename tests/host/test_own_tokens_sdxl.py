"""References on SDXL's own tokens go through stock nodes, before EMMA Connector and after it."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.samplers
import pytest
import torch
from context_windows import NO_WINDOWS
from model_families import FAMILIES, WIDTH
from text_input import LiteralAnswer, TextEntry, TextSpy, check_text
from tiny_models import empty_latent, fill_, noise
from token_check import CallSpy

SDXL = FAMILIES["sdxl"]
FRAMES = 4
WHOLE = {"strength": 1.0, "set_cond_area": "default"}


@dataclass(frozen=True)
class Connected:
    """What EMMA Connector gave, and the answers to it."""

    model: object
    positive: list
    negative: list
    answer: LiteralAnswer

    @property
    def entries(self):
        """Of the conditioning as it is."""
        return {0: [self.entry(text) for text, _ in self.positive], 1: [TextEntry(text) for text, _ in self.negative]}

    def entry(self, tokens_CSD, kept_S=None):
        """The answer to other tokens than its own."""
        return TextEntry(tokens_CSD, self.answer, kept_S)


@pytest.fixture(scope="module")
def model(tiny):
    return SDXL.patcher(tiny.patcher_for)


@pytest.fixture(scope="module")
def connect(tiny, model, pack_import):
    """EMMA Connector without an ELLA."""
    weights_of = pack_import("emma_core.files.module_file").module_tensors

    def run(*members, positive=None, negative=None, model=model, addition=None):
        assembly = tiny.assemble(*members)
        connected = tiny.connecting.connect(model, None, positive or SDXL.conditioning(4), negative or SDXL.conditioning(8),
                                            assembly, None, None, addition)
        return Connected(*connected, LiteralAnswer(assembly.references, model.get_model_object("model_sampling"), "ddpm",
                                                   weights_of))

    return run


@pytest.fixture(scope="module")
def style(tiny):
    return tiny.token_module(SDXL)


@pytest.fixture(scope="module")
def subject(tiny):
    return tiny.token_module(SDXL, "object", {"global": (20, 1), "local": (12, 1)}, seed=7)


@pytest.fixture(scope="module")
def one(tiny, connect, style):
    """A prompt with a reference."""
    return connect((style, tiny.reference(style)))


@pytest.fixture(scope="module")
def other(tiny, connect, one, subject):
    """Another prompt with another reference, on the same MODEL."""
    return connect((subject, tiny.reference(subject, seed=31), 1.3), positive=SDXL.conditioning(32), model=one.model)


@pytest.fixture
def spy(model):
    with TextSpy(model.model.diffusion_model) as spy:
        yield spy


@pytest.fixture
def both(one, other):
    return {0: [*one.entries[0], *other.entries[0]], 1: one.entries[1]}


def left_half() -> torch.Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    return mask


# --- regions, ranges, mixing ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["areas", "masks", "mask bounds", "combine", "default"])
def test_regions_keep_their_own_references(spy, run_node, ksample, one, other, both, kind):
    left, right = one.positive, other.positive
    if kind == "areas":
        place = {"width": 32, "height": 64, "y": 0, "strength": 1.0}
        left = run_node("ConditioningSetArea", conditioning=left, x=0, **place)[0]
        right = run_node("ConditioningSetArea", conditioning=right, x=32, **place)[0]
    elif kind != "combine":
        settings = {"strength": 0.9, "set_cond_area": "mask bounds" if kind == "mask bounds" else "default"}
        left = run_node("ConditioningSetMask", conditioning=left, mask=left_half(), **settings)[0]
        if kind != "default":
            right = run_node("ConditioningSetMask", conditioning=right, mask=1 - left_half(), **settings)[0]
    if kind == "default":
        positive = run_node("ConditioningSetDefaultCombine", cond=left, cond_DEFAULT=right)[0]
    else:
        positive = run_node("ConditioningCombine", conditioning_1=left, conditioning_2=right)[0]
    ksample(other.model, positive, one.negative, sampler_name="dpmpp_sde")
    check_text(spy.calls, both)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_prompt_that_changes_while_sampling(spy, run_node, tiny, ksample, connect, style, place):
    """Two texts in two parts of the time, connected together or one by one."""
    early, late = SDXL.conditioning(4), SDXL.conditioning(32)

    def parts(early, late):
        first = run_node("ConditioningSetTimestepRange", conditioning=early, start=0.0, end=0.35)[0]
        second = run_node("ConditioningSetTimestepRange", conditioning=late, start=0.35, end=1.0)[0]
        return run_node("ConditioningCombine", conditioning_1=first, conditioning_2=second)[0]

    member = (style, tiny.reference(style))
    if place == "before":
        wired = connect(member, positive=parts(early, late))
        positive = wired.positive
    else:
        wired, second = connect(member, positive=early), connect(member, positive=late)
        positive = parts(wired.positive, second.positive)
    ksample(wired.model, positive, wired.negative, steps=6, scheduler="normal")
    check_text(spy.calls, {0: [wired.entry(early[0][0]), wired.entry(late[0][0])], 1: wired.entries[1]})


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("node", ["ConditioningConcat", "ConditioningAverage", "ConditioningZeroOut"])
def test_nodes_that_change_the_tokens(spy, run_node, tiny, ksample, connect, one, style, node, place):
    """References act on whatever tokens there are: Concat, Average and Zero Out, before the connector and behind it."""
    def changed(conditioning):
        given = {"ConditioningZeroOut": {"conditioning": conditioning}}.get(node, {
            "conditioning_to": conditioning, "conditioning_from": SDXL.conditioning(32)})
        share = {"conditioning_to_strength": 0.6} if node == "ConditioningAverage" else {}
        return run_node(node, **given, **share)[0]

    wired = connect((style, tiny.reference(style)), positive=changed(SDXL.conditioning(4))) if place == "before" else one
    positive = wired.positive if place == "before" else changed(one.positive)
    ksample(wired.model, positive, wired.negative)
    tokens_1SD = positive[0][0]
    repeated = 2 if node == "ConditioningConcat" else 1  # so the host makes one length of two
    assert tokens_1SD.shape[1] == 9 * repeated
    check_text(spy.calls, {0: [wired.entry(tokens_1SD)], 1: [TextEntry(wired.negative[0][0].repeat(1, repeated, 1))]})


def test_a_zeroed_negative_stays_zero(spy, run_node, ksample, one):
    negative = run_node("ConditioningZeroOut", conditioning=one.negative)[0]
    ksample(one.model, one.positive, negative)
    check_text(spy.calls, {0: one.entries[0], 1: [TextEntry(torch.zeros(1, 9, WIDTH))]})


def test_the_same_tokens_made_anew_are_not_computed_anew(run_node, monkeypatch, pack_import, ksample, one):
    """Regions, windows and caches of other packs copy tensors: what counts are their values."""
    module = pack_import("host.own_tokens")
    made, real = [], module.terms_over_schedule
    monkeypatch.setattr(module, "terms_over_schedule", lambda *arguments: made.append(1) or real(*arguments))
    fresh = [[text.clone(), options] for text, options in one.positive]
    for conditioning in (one.positive, fresh):
        ksample(one.model, conditioning, one.negative, steps=3, sampler_name="heun", seed=len(made))
    assert len(made) <= 1


# --- lists ---------------------------------------------------------------------------------------------------------

def test_a_reference_for_each_picture_of_a_batch(spy, tiny, ksample, connect, style):
    wired = connect((style, tiny.reference(style, references=FRAMES), torch.linspace(0.2, 1.4, FRAMES)))
    ksample(wired.model, wired.positive, wired.negative, empty_latent(FRAMES))
    check_text(spy.calls, wired.entries)


@pytest.mark.parametrize("references", [1, FRAMES])
def test_a_prompt_for_each_picture_of_a_batch(spy, tiny, ksample, connect, style, references):
    """As Encode Prompt List gives it, each with its own pooled vector."""
    texts = torch.cat([noise((1, 9, WIDTH), 50 + row) for row in range(FRAMES)])
    positive = [[texts, {**SDXL.options, "pooled_output": noise((FRAMES, 1280), 60)}]]
    wired = connect((style, tiny.reference(style, references=references)), positive=positive)
    ksample(wired.model, wired.positive, wired.negative, empty_latent(FRAMES))
    check_text(spy.calls, wired.entries)
    pooled = [call.others["y"][:, :1280] for call in spy.calls]
    assert all(any(torch.equal(half, positive[0][1]["pooled_output"]) for half in each.split(FRAMES)) for each in pooled)


def test_prompts_of_unequal_lengths_keep_their_padding(spy, tiny, ksample, connect, style):
    """Zeros behind the shorter text stay zeros, and the text's tokens are those that it has alone."""
    short_1SD, long_1SD = noise((1, 6, WIDTH), 70), noise((1, 9, WIDTH), 71)
    positive = [[torch.cat([torch.nn.functional.pad(short_1SD, (0, 0, 0, 3)), long_1SD]), dict(SDXL.options)]]
    wired = connect((style, tiny.reference(style)), positive=positive)
    ksample(wired.model, wired.positive, wired.negative, empty_latent(2))
    for call in spy.calls:
        rows = call.context_BSD[2 * call.groups.index(0):][:2]
        alone = wired.answer.at(short_1SD[0], float(call.sigma_B[0]), float(call.timestep_B[0]))
        assert torch.allclose(rows[0, :6], alone, atol=1e-4) and not rows[0, 6:].any()
        whole = wired.answer.at(long_1SD[0], float(call.sigma_B[0]), float(call.timestep_B[0]))
        assert torch.allclose(rows[1], whole, atol=1e-4)


def test_another_number_of_references_is_refused(tiny, ksample, connect, style, pack_import):
    wired = connect((style, tiny.reference(style, references=3)))
    with pytest.raises(pack_import("emma_core.errors").ReferenceMismatchError, match="3 per-frame references.* has 2 frames"):
        ksample(wired.model, wired.positive, wired.negative, empty_latent(2))


@pytest.mark.parametrize("prompts", [1, FRAMES])
def test_context_windows_get_their_frames(
    tiny, ksample, connect, model, style, windowed, windows_run_over_the_batch, prompts
):
    if not windows_run_over_the_batch:
        pytest.xfail(NO_WINDOWS)
    texts = torch.cat([noise((1, 9, WIDTH), 50 + row) for row in range(prompts)])
    positive = [[texts, {**SDXL.options, "pooled_output": noise((prompts, 1280), 60)}]]
    wired = connect((style, tiny.reference(style, references=FRAMES)), positive=positive)
    in_windows = windowed(wired.model, 3, 0, causal_window_fix=False)
    with TextSpy(model.model.diffusion_model) as spy:
        ksample(in_windows, wired.positive, wired.negative, empty_latent(FRAMES))
    frames = [[1, 2, 3] if number % 2 else [0, 1, 2] for number in range(len(spy.calls))]
    check_text(spy.calls, wired.entries, frames)


class PerRowGuider(comfy.samplers.CFGGuider):
    """Evaluates the model at another sigma for every row, as the host's training samplers do."""

    factors_B = torch.tensor([1.0, 0.5, 0.11])

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        entries = [self.conds["positive"], self.conds["negative"]]
        return comfy.samplers.calc_cond_batch(self.inner_model, entries, x, timestep * self.factors_B, model_options)[0]


@pytest.mark.parametrize("references", [1, 3])
def test_another_sigma_for_every_row(spy, tiny, connect, style, references):
    wired = connect((style, tiny.reference(style, references=references)))
    guider = PerRowGuider(wired.model)
    guider.set_conds(wired.positive, wired.negative)
    with torch.inference_mode():
        guider.sample(noise((3, 4, 8, 8), 13), torch.zeros(3, 4, 8, 8), comfy.samplers.sampler_object("euler"),
                      torch.tensor([8.0, 3.0, 1.0, 0.0]), seed=1)
    rows = [replace_sigma(call) for call in spy.calls]
    check_text(rows, wired.entries)
    assert all(len(call.timestep_B[:3].unique()) == 3 for call in spy.calls)


def replace_sigma(call):
    """DDPM's answers depend on the timesteps of the rows; their sigmas only decide what acts, which here is all."""
    return type(call)(call.sigma_B[:1], call.timestep_B, call.groups, call.context_BSD, call.others)


# --- patches, hooks, ControlNet ------------------------------------------------------------------------------------

def controlnet():
    """CONTROL_NET of the small SDXL."""
    names = ("image_size", "in_channels", "model_channels", "channel_mult", "num_res_blocks", "transformer_depth",
             "transformer_depth_middle", "context_dim", "num_heads", "use_spatial_transformer", "legacy", "adm_in_channels",
             "num_classes")
    network = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init,
                                         **{name: SDXL.sizes[name] for name in names})
    return comfy.controlnet.ControlNet(fill_(network, 6), load_device=comfy.model_management.get_torch_device())


def test_controlnet_gets_the_same_tokens(spy, run_node, ksample, one):
    control = controlnet()
    positive, negative = run_node(
        "ControlNetApplyAdvanced", positive=one.positive, negative=one.negative, control_net=control,
        image=noise((1, 64, 64, 3), 37).sigmoid(), strength=0.7, start_percent=0.0, end_percent=1.0)
    with CallSpy(control.control_model) as control_spy:
        controlled = ksample(one.model, positive, negative, sampler_name="dpmpp_sde")
    check_text(spy.calls, one.entries)
    assert len(control_spy.calls) == len(spy.calls)
    for seen, call in zip(control_spy.calls, spy.calls, strict=True):
        assert torch.equal(seen.context_BSW, call.context_BSD)
    assert not torch.equal(controlled, ksample(one.model, one.positive, one.negative, sampler_name="dpmpp_sde"))


def lora(model) -> dict:
    """Weight differences for the values of every cross-attention, in the host's own terms."""
    keys = [key for key in model.model_state_dict() if key.endswith("attn2.to_v.weight")]
    return {key: ("diff", (0.5 * noise(model.model_state_dict()[key].shape, index),)) for index, key in enumerate(keys)}


def test_lora_on_the_model_before_or_after(spy, tiny, ksample, connect, model, one, style):
    after, before = one.model.clone(), model.clone()
    after.add_patches(lora(model), 0.8)
    before.add_patches(lora(model), 0.8)
    wired = connect((style, tiny.reference(style)), model=before)
    patched = ksample(wired.model, wired.positive, wired.negative)
    assert torch.equal(patched, ksample(after, wired.positive, wired.negative))
    assert not torch.equal(patched, ksample(one.model, wired.positive, wired.negative))
    check_text(spy.calls, wired.entries)


def test_lora_hooks_with_keyframes_on_one_region(spy, run_node, ksample, model, one, other, both):
    weights = {}
    for key, (_, (difference,)) in lora(model).items():
        name = key.removesuffix(".weight")
        weights |= {f"{name}.lora_up.weight": difference, f"{name}.lora_down.weight": torch.eye(difference.shape[1])}
    keyframes = run_node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)[0]
    keyframes = run_node("CreateHookKeyframe", strength_mult=0.2, start_percent=0.5, prev_hook_kf=keyframes)[0]
    hooks = run_node("SetHookKeyframes", hooks=comfy.hooks.create_hook_lora(weights, 1.0, 0.0), hook_kf=keyframes)[0]
    hooked = run_node("ConditioningSetProperties", cond_NEW=one.positive, hooks=hooks, **WHOLE)[0]
    positive = run_node("ConditioningCombine", conditioning_1=hooked, conditioning_2=other.positive)[0]
    samples = ksample(other.model, positive, one.negative, steps=6, scheduler="normal")
    check_text(spy.calls, both)
    plain = run_node("ConditioningCombine", conditioning_1=one.positive, conditioning_2=other.positive)[0]
    assert not torch.equal(samples, ksample(other.model, plain, one.negative, steps=6, scheduler="normal"))


@pytest.mark.parametrize(("node", "settings"), [
    ("PerturbedAttentionGuidance", {"scale": 3.0}), ("RescaleCFG", {"multiplier": 0.7}),
    ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
])
def test_model_patches_before_or_after(spy, run_node, tiny, ksample, connect, model, one, style, node, settings):
    before = connect((style, tiny.reference(style)), model=run_node(node, model=model, **settings)[0])
    after = run_node(node, model=one.model, **settings)[0]
    patched = ksample(before.model, before.positive, before.negative)
    assert torch.equal(patched, ksample(after, before.positive, before.negative))
    assert not torch.equal(patched, ksample(one.model, before.positive, before.negative))
    check_text(spy.calls, before.entries)


@pytest.mark.parametrize("way", ["tokens", "predictions"])
def test_references_added_up_elsewhere(spy, tiny, ksample, pack_import, connect, style, subject, way):
    """One evaluation with all of them, or one for each: style and face say how the object is drawn."""
    addition = pack_import("emma_core.model.addition").Addition(way)
    faces = tiny.token_module(SDXL, "face", {"global": (20, 2)}, seed=17)
    members = [(style, tiny.reference(style)), (faces, tiny.reference(faces)), (subject, tiny.reference(subject), 0.7)]
    wired = connect(*members, addition=addition)
    ksample(wired.model, wired.positive, wired.negative, sampler_name="euler", cfg=4.0)
    base, with_style, with_face = (connect(*group) for group in (members[2:], [members[0], members[2]], members[1:]))
    tokens_SD = SDXL.conditioning(4)[0][0][0]
    if way == "predictions":
        check_text(spy.calls, {0: [one.entry(tokens_SD[None]) for one in (base, with_style, with_face)], 1: base.entries[1]})
        assert [call.groups for call in spy.calls].count((0,)) == 2 * 3
        return
    for call in spy.calls:
        moment = float(call.sigma_B[0]), float(call.timestep_B[0])
        wanted = sum(one.answer.at(tokens_SD, *moment) for one in (with_style, with_face)) - base.answer.at(tokens_SD, *moment)
        assert torch.allclose(call.of_group(0), wanted, atol=1e-3)


# --- ways of sampling ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", ["before", "after"])
def test_lcm(spy, run_node, tiny, ksample, connect, model, one, style, place):
    patch = {"sampling": "lcm", "zsnr": False}
    if place == "before":
        wired = connect((style, tiny.reference(style)), model=run_node("ModelSamplingDiscrete", model=model, **patch)[0])
        sampled = wired.model
    else:
        wired, sampled = one, run_node("ModelSamplingDiscrete", model=one.model, **patch)[0]
    ksample(sampled, wired.positive, wired.negative, sampler_name="lcm", scheduler="sgm_uniform", steps=4, cfg=1.5)
    assert check_text(spy.calls, wired.entries).total == 4


def test_lightning(spy, ksample, one):
    """Few steps, spaced to the end, without guidance: the positive alone."""
    ksample(one.model, one.positive, one.negative, sampler_name="euler", scheduler="sgm_uniform", steps=4, cfg=1.0)
    assert check_text(spy.calls, {0: one.entries[0]}).total == 4


def test_image_to_image(spy, ksample, one):
    ksample(one.model, one.positive, one.negative, {"samples": noise((1, 4, 8, 8), 12)}, steps=4, denoise=0.5,
            sampler_name="dpmpp_2m_sde")
    assert max(check_text(spy.calls, one.entries).timesteps) < 900


def test_inpainting(spy, ksample, one):
    ksample(one.model, one.positive, one.negative, {"samples": noise((1, 4, 8, 8), 12), "noise_mask": left_half()},
            sampler_name="heun")
    check_text(spy.calls, one.entries)


def test_inpainting_model(run_node, tiny, ksample, connect, style, vae):
    """The mask and the masked picture travel beside the tokens."""
    model = FAMILIES["sdxl inpainting"].patcher(tiny.patcher_for)
    wired = connect((style, tiny.reference(style)), model=model)
    samples = []
    for mask in (left_half(), 1 - left_half()):
        positive, negative, latent = run_node(
            "InpaintModelConditioning", positive=wired.positive, negative=wired.negative, vae=vae,
            pixels=noise((1, 64, 64, 3), 37).sigmoid(), mask=mask, noise_mask=True)
        with TextSpy(model.model.diffusion_model) as spy:
            samples.append(ksample(wired.model, positive, negative, latent))
        check_text(spy.calls, wired.entries)
    assert not torch.equal(*samples), "the mask reaches the UNet"


def test_split_sampling(spy, run_node, one):
    """KSamplerAdvanced in two parts."""
    def part(latent, start, end):
        return run_node("KSamplerAdvanced", model=one.model, positive=one.positive, negative=one.negative, cfg=7.0,
                        add_noise="enable" if start == 0 else "disable", noise_seed=11, steps=5, sampler_name="dpmpp_2m",
                        scheduler="karras", start_at_step=start, end_at_step=end, latent_image=latent,
                        return_with_leftover_noise="enable" if end < 5 else "disable")[0]

    part(part(empty_latent(), 0, 2), 2, 10000)
    assert len(set(check_text(spy.calls, one.entries).timesteps)) == 5


# --- the conditioning and the MODEL belong together ----------------------------------------------------------------

def test_no_assembly_is_the_model_itself(tiny, ksample, model):
    positive, negative = SDXL.conditioning(4), SDXL.conditioning(8)
    connected = tiny.connecting.connect(model, None, positive, negative, None, None, None)
    assert connected[1] == positive and connected[2] == negative
    assert torch.equal(ksample(*connected), ksample(model, positive, negative))


def test_our_conditioning_on_another_model_is_refused(ksample, model, one, pack_import):
    with pytest.raises(pack_import("emma_core.errors").UnconnectedModelError, match="Wire the MODEL output of EMMA Connector"):
        ksample(model, one.positive, one.negative)


def test_modules_are_loaded_with_the_model(one, style):
    known = one.model.get_additional_models()
    assert [patcher.model for patcher in known] == [style.module]
