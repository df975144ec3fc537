"""Stock nodes that hang something on our conditioning: ControlNets of every kind, GLIGEN, hooks."""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.t2i_adapter.adapter
import pytest
import torch
from safetensors.torch import save_file
from sd15_layout import SD15_UNET
from tiny_models import UNET, WIDTH, fill_, noise, save_t5, wire
from token_check import CallSpy, check, judge

pytestmark = pytest.mark.usefixtures("added_literally")


@pytest.fixture
def picture():
    return noise((1, 64, 64, 3), 37).sigmoid()


def test_controlnet_on_the_positive_alone(spy, run_node, tiny, ksample, wired, picture):
    """Apply ControlNet (OLD): the host hangs it on the negative too."""
    controlnet = tiny.controlnet()
    positive = run_node("ControlNetApply", conditioning=wired.positive, control_net=controlnet, image=picture, strength=0.7)[0]
    with CallSpy(controlnet.control_model) as control_spy:
        ksample(wired.model, positive, wired.negative)
    check(spy.calls, wired.answers)
    assert len(control_spy.calls) == len(spy.calls)
    assert all(torch.equal(control.context_BSW, call.context_BSW)
               for control, call in zip(control_spy.calls, spy.calls, strict=True))


def test_two_controlnets_in_a_row(spy, run_node, tiny, ksample, wired, picture):
    """The second one in a part of the sampling only."""
    controlnets = tiny.controlnet(), tiny.controlnet(seed=60)
    positive, negative = wired.positive, wired.negative
    for controlnet, end in zip(controlnets, (1.0, 0.5), strict=True):
        positive, negative = run_node("ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=controlnet,
                                      image=picture, strength=0.7, start_percent=0.0, end_percent=end)
    with CallSpy(controlnets[0].control_model) as first, CallSpy(controlnets[1].control_model) as second:
        ksample(wired.model, positive, negative, steps=6, scheduler="normal")
    check(spy.calls, wired.answers)
    assert len(first.calls) == 6 * wired.evaluations and 0 < len(second.calls) < len(first.calls)
    for control in (first, second):
        assert all(torch.equal(found.context_BSW, call.context_BSW)
                   for found, call in zip(control.calls, spy.calls, strict=False))


def test_t2i_adapter(run_node, tiny, ksample, connect, picture):
    model = tiny.model(sizes=SD15_UNET)
    wired = connect(model)
    network = comfy.t2i_adapter.adapter.Adapter(channels=[32, 64, 128, 128], nums_rb=2, cin=192, ksize=1, sk=True,
                                                use_conv=False, xl=False)
    adapter = comfy.controlnet.T2IAdapter(fill_(network, 61), network.input_channels, 8, "nearest-exact")
    positive, negative = run_node("ControlNetApplyAdvanced", positive=wired.positive, negative=wired.negative,
                                  control_net=adapter, image=picture, strength=1.0, start_percent=0.0, end_percent=1.0)
    with CallSpy(model.model.diffusion_model) as spy:
        samples = ksample(wired.model, positive, negative)
    check(spy.calls, wired.answers)
    assert not torch.equal(samples, ksample(wired.model, wired.positive, wired.negative))


def test_difference_controlnet(run_node, tiny, ksample, base_directory, picture):
    """Load ControlNet Model (diff) adds the MODEL's weights to the file's: a connected MODEL is as good as the original."""
    sizes = {**UNET, "model_channels": 320, "channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1],
             "transformer_depth_output": [1, 1], "context_dim": 768, "num_heads": 8}  # the smallest that the host recognises
    model = tiny.model(sizes=sizes)
    wired = wire(tiny, model, tiny.ella(width=768), tiny.text(), tiny.text(1, seed=8))
    path = base_directory / "models" / "controlnet" / "difference.safetensors"
    path.parent.mkdir(exist_ok=True)
    names = {"image_size", "in_channels", "model_channels", "channel_mult", "num_res_blocks", "transformer_depth",
             "transformer_depth_middle", "context_dim", "num_heads", "use_spatial_transformer", "legacy"}
    network = fill_(comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init,
                                               **{name: sizes[name] for name in names}), 65)
    save_file({"difference": torch.ones(1), **{f"control_model.{key}": 0.1 * value
                                               for key, value in network.state_dict().items()}}, path)
    loaded = [run_node("DiffControlNetLoader", model=given, control_net_name=path.name)[0] for given in (model, wired.model)]
    path.unlink()
    weights = [controlnet.control_model.state_dict() for controlnet in loaded]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    key = "middle_block.0.in_layers.2.weight"
    added = 0.1 * network.state_dict()[key] + model.model_state_dict()[f"diffusion_model.{key}"]
    torch.testing.assert_close(weights[1][key].float(), added, rtol=1e-3, atol=1e-3)
    positive, negative = run_node("ControlNetApplyAdvanced", positive=wired.positive, negative=wired.negative,
                                  control_net=loaded[1], image=picture, strength=0.7, start_percent=0.0, end_percent=1.0)
    with CallSpy(model.model.diffusion_model) as spy:
        ksample(wired.model, positive, negative, steps=2)
    check(spy.calls, wired.answers)


@pytest.fixture(scope="module")
def gligen():
    """GLIGEN for the small UNet, as the loader hands it out."""
    widths = (32, 64, 64, 64, 64, 32, 32)  # of the cross-attentions: input, middle and output blocks
    layers = [comfy.gligen.GatedSelfAttentionDense(width, WIDTH, 4, width // 4) for width in widths]
    network = fill_(comfy.gligen.Gligen(layers, comfy.gligen.PositionNet(WIDTH, WIDTH), WIDTH), 62)
    for layer in layers:
        layer.alpha_attn.fill_(1.0)
        layer.alpha_dense.fill_(1.0)
    return comfy.model_patcher.ModelPatcher(network, load_device=comfy.model_management.get_torch_device(),
                                            offload_device=comfy.model_management.unet_offload_device())


class PooledText:
    """What GLIGEN's node asks of a CLIP: a vector for a text."""

    def tokenize(self, text):
        return text

    def encode_from_tokens(self, tokens, return_pooled):
        return noise((1, 3, WIDTH), 63), noise((1, WIDTH), 64)


def test_gligen(spy, run_node, ksample, wired, gligen):
    """Its texts come from the checkpoint's own CLIP, the prompt from ours."""
    positive = run_node("GLIGENTextBoxApply", conditioning_to=wired.positive, clip=PooledText(), gligen_textbox_model=gligen,
                        text="a cat", width=32, height=32, x=0, y=0)[0]
    samples = ksample(wired.model, positive, wired.negative)
    check(spy.calls, wired.answers)
    assert not torch.equal(samples, ksample(wired.model, wired.positive, wired.negative))


def test_gligen_with_a_t5_is_refused(run_node, ksample, base_directory, pack_import, wired, gligen):
    save_t5(base_directory / "models" / "text_encoders" / "t5-of-boxes")
    clip = run_node("EMMALoadTextEncoder", text_encoder_name="t5-of-boxes", dtype="auto", empty_prompt="natural length")[0]
    positive = run_node("GLIGENTextBoxApply", conditioning_to=wired.positive, clip=clip, gligen_textbox_model=gligen,
                        text="a red cat", width=32, height=32, x=0, y=0)[0]
    error = pack_import("emma_core.errors").ConnectorMismatchError
    with pytest.raises(error, match="no pooled vector.*Wire the checkpoint's own CLIP into GLIGENTextBoxApply"):
        ksample(wired.model, positive, wired.negative)


def lora_hook(model, seed: int):
    """HOOKS that add to the values of every cross-attention."""
    weights = {}
    for index, (key, value) in enumerate(model.model_state_dict().items()):
        if key.endswith("attn2.to_v.weight"):
            name = key.removesuffix(".weight")
            weights |= {f"{name}.lora_up.weight": 0.5 * noise(value.shape, seed + index),
                        f"{name}.lora_down.weight": torch.eye(value.shape[1])}
    return comfy.hooks.create_hook_lora(lora=weights, strength_model=1.0, strength_clip=0.0)


@pytest.mark.parametrize("combined", [False, True])
def test_hooks_with_keyframes(spy, run_node, ksample, wired, model, combined):
    """LoRA hooks whose strength changes while sampling, alone and two together, on both prompts and a part of the time."""
    keyframes = run_node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)[0]
    keyframes = run_node("CreateHookKeyframe", strength_mult=0.2, start_percent=0.5, prev_hook_kf=keyframes)[0]
    hooks = run_node("SetHookKeyframes", hooks=lora_hook(model, 100), hook_kf=keyframes)[0]
    if combined:
        hooks = run_node("CombineHooks2", hooks_A=hooks, hooks_B=lora_hook(model, 200))[0]
    early = run_node("ConditioningTimestepsRange", start_percent=0.0, end_percent=0.6)[0]
    prompts = {"positive_NEW": wired.positive, "negative_NEW": wired.negative, "strength": 1.0, "set_cond_area": "default"}
    hooked = run_node("PairConditioningSetProperties", **prompts, hooks=hooks, timesteps=early)
    late = run_node("ConditioningTimestepsRange", start_percent=0.6, end_percent=1.0)[0]
    plain = run_node("PairConditioningSetProperties", **prompts, timesteps=late)
    positive, negative = run_node("PairConditioningCombine", positive_A=hooked[0], negative_A=hooked[1], positive_B=plain[0],
                                  negative_B=plain[1])
    settings = {"steps": 6, "scheduler": "normal"}
    samples = ksample(wired.model, positive, negative, **settings)
    check(spy.calls, wired.answers)
    assert not torch.equal(samples, ksample(wired.model, wired.positive, wired.negative, **settings))


@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks_of_the_text_encoder(spy, run_node, tiny, ksample, model, base_directory, scheduled):
    """Set CLIP Hooks: what CLIP Text Encode then gives carries the hooks, in parts of the sampling."""
    keyframes = run_node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)[0]
    keyframes = run_node("CreateHookKeyframe", strength_mult=0.2, start_percent=0.5, prev_hook_kf=keyframes)[0]
    hooks = run_node("SetHookKeyframes", hooks=lora_hook(model, 100), hook_kf=keyframes)[0]
    save_t5(base_directory / "models" / "text_encoders" / "t5-of-hooks")
    clip = run_node("EMMALoadTextEncoder", text_encoder_name="t5-of-hooks", dtype="auto", empty_prompt="natural length")[0]
    hooked = run_node("SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=scheduled, hooks=hooks)[0]
    texts = [[run_node("CLIPTextEncode", clip=each, text=prompt)[0] for each in (hooked, clip)]
             for prompt in ("a red cat", "")]
    samples = []
    for positive, negative in zip(*texts, strict=True):
        wired = wire(tiny, model, tiny.ella(), positive, negative)
        spy.calls.clear()
        samples.append(ksample(wired.model, wired.positive, wired.negative, steps=6, scheduler="normal"))
        verdict = judge(spy.calls, wired.answers)  # the parts of a schedule have one text here, so not all can be met
        assert verdict.right == verdict.total == 6
    assert len(texts[0][0]) == (2 if scheduled else 1)
    assert not torch.equal(*samples), "the hooks act"
