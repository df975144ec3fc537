"""AnimateDiff-Evolved on the same MODEL: in its context windows every frame gets its own tokens."""

from __future__ import annotations

import importlib
from dataclasses import replace

import comfy.sample
import peers
import pytest
import torch
from sd15_layout import SD15_UNET, FrameSpy, controlnet, narrow_motion_modules, save_motion_module
from tiny_models import WIDTH, TinyWorld, empty_latent, noise, save_t5, wire
from token_check import CallSpy, check

FRAMES = 6
SEED = 11
ANIMATEDIFF = "ComfyUI-AnimateDiff-Evolved"
CONTROLNET = "ComfyUI-Advanced-ControlNet"


@pytest.fixture(scope="module", autouse=True)
def animatediff(host_nodes, pack, host_path, base_directory):
    """AnimateDiff-Evolved, loaded after our pack, and two motion modules in its folder."""
    with peers.loaded(host_nodes, host_path, ANIMATEDIFF) as (root,), pytest.MonkeyPatch.context() as patch:
        def animatediff_import(name):
            return importlib.import_module(f"{root.__name__}.{name}")

        narrow_motion_modules(patch, animatediff_import)
        folder = base_directory / "models" / "animatediff_models"
        for middle, name in ((False, "v3.safetensors"), (True, "v2.safetensors")):
            save_motion_module(animatediff_import, folder / name, middle)
        yield root


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model(sizes=SD15_UNET)


def connected(world: TinyWorld, model, way, **appended):
    """EMMA Connector on a MODEL, with one style for each frame and one face for all."""
    assembly = world.style_and_face(references=FRAMES)
    return wire(world, model, world.ella(), world.text(), world.text(1, seed=8), assembly, way, **appended)


@pytest.fixture
def animated(tiny, model, way):
    """AnimateDiff before or after EMMA Connector on the MODEL's way."""

    def run(animate, place: str, world: TinyWorld = tiny, **appended):
        if place == "before":
            return connected(world, animate(model), way, **appended)
        wired = connected(world, model, way, **appended)
        return replace(wired, model=animate(wired.model))

    return run


@pytest.fixture
def spy(model):
    with FrameSpy(model.model.diffusion_model, comfy.sample.prepare_noise(empty_latent(FRAMES)["samples"], SEED)) as spy:
        yield spy


@pytest.fixture
def sample(ksample):
    """KSampler on all frames."""
    return lambda wired, **settings: ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(FRAMES),
                                             seed=SEED, **settings)


@pytest.fixture
def context(run_node):
    """CONTEXT_OPTIONS: windows of four frames that overlap by two."""

    def options(kind):
        if kind == "looped":
            return run_node("ADE_LoopedUniformContextOptions", context_length=4, context_stride=1, context_overlap=2,
                            closed_loop=True)[0]
        return run_node("ADE_StandardStaticContextOptions", context_length=4, context_overlap=2)[0]

    return options


def gen1(run_node, model, context=None):
    return run_node("ADE_AnimateDiffLoaderGen1", model=model, model_name="v2.safetensors", beta_schedule="autoselect",
                    context_options=context)[0]


def gen2(run_node, model, context=None):
    motion = run_node("ADE_LoadAnimateDiffModel", model_name="v3.safetensors")[0]
    applied = run_node("ADE_ApplyAnimateDiffModelSimple", motion_model=motion)[0]
    return run_node("ADE_UseEvolvedSampling", model=model, beta_schedule="autoselect", m_models=applied,
                    context_options=context)[0]


def no_motion(run_node, model, context=None):
    return run_node("ADE_UseEvolvedSampling", model=model, beta_schedule="use existing", context_options=context)[0]


def check_windows(spy: FrameSpy, wired, kind: str) -> None:
    verdict = check(spy.calls, wired.answers, spy.frames)
    assert all(len(frames) == 4 for frames in spy.frames) and len({tuple(frames) for frames in spy.frames}) > 1
    assert len(set(verdict.timesteps)) == 3 and verdict.total > 3
    assert any({0, 5} <= set(frames) for frames in spy.frames) == (kind == "looped")


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(("kind", "generation"), [("static", gen2), ("looped", gen1)])
def test_windows_get_their_frames(spy, run_node, sample, animated, context, kind, generation, place):
    wired = animated(lambda given: generation(run_node, given, context(kind)), place)
    sample(wired, sampler_name="euler")
    check_windows(spy, wired, kind)


def test_windows_get_their_frames_if_our_pack_is_loaded_last(
    spy, run_node, sample, animated, animatediff, host_nodes, tmp_path, context
):
    world = TinyWorld(peers.load_our_pack_again(host_nodes, tmp_path))
    wired = animated(lambda given: gen2(run_node, given, context("static")), "before", world)
    sample(wired, sampler_name="euler")
    check_windows(spy, wired, "static")


@pytest.mark.parametrize("place", ["before", "after"])
def test_clip_prompt_for_each_frame(spy, run_node, sample, tiny, animated, context, place):
    """What Prompt Scheduling gives for the checkpoint's CLIP, appended to our tokens."""
    clip = {"clip_positive": [[noise((FRAMES, 9, WIDTH), 71), {"pooled_output": None}]], "clip_negative": tiny.clip_text(9)}
    wired = animated(lambda given: no_motion(run_node, given, context("static")), place, **clip)
    sample(wired)
    check(spy.calls, wired.answers, spy.frames)
    assert not torch.equal(spy.calls[0].context_BSW[-1, -9:], spy.calls[0].context_BSW[-2, -9:]), "the positive's rows"


def test_prompt_scheduling_cannot_use_a_t5(run_node, base_directory):
    """It joins the pooled vectors of its prompts; a T5 has none."""
    save_t5(base_directory / "models" / "text_encoders" / "t5-of-frames")
    clip = run_node("EMMALoadTextEncoder", text_encoder_name="t5-of-frames", dtype="auto", empty_prompt="natural length")[0]
    with pytest.raises(TypeError, match="NoneType"):
        run_node("ADE_PromptScheduling", prompts='"0": "a red cat", "3": "blue dog"', clip=clip, print_schedule=False,
                 max_length=FRAMES)


def test_several_evaluations_a_step(spy, run_node, sample, animated, context):
    """Use Evolved Sampling alone, without a motion module."""
    wired = animated(lambda given: no_motion(run_node, given, context("static")), "after")
    sample(wired, sampler_name="heun")
    check(spy.calls, wired.answers, spy.frames)


def test_whole_batch_without_windows(spy, run_node, sample, animated, tiny, model, way):
    wired = animated(lambda given: gen2(run_node, given), "after")
    samples = sample(wired)
    check(spy.calls, wired.answers, spy.frames)
    assert not torch.equal(samples, sample(connected(tiny, model, way))), "the motion module acts"


def test_samples_do_not_depend_on_the_place(run_node, sample, animated, context):
    first, second = (sample(animated(lambda given: gen2(run_node, given, context("static")), place))
                     for place in ("before", "after"))
    assert torch.equal(first, second)


@pytest.fixture
def advanced_controlnet(animatediff, host_nodes, host_path):
    with peers.loaded(host_nodes, host_path, CONTROLNET) as (root,):
        yield root


def test_controlnet_in_windows_gets_the_same_tokens(advanced_controlnet, spy, run_node, sample, animated, context):
    control_net = controlnet()
    wired = animated(lambda given: gen2(run_node, given, context("static")), "after")
    positive, negative = run_node(
        "ACN_AdvancedControlNetApply_v2", positive=wired.positive, negative=wired.negative, control_net=control_net,
        image=noise((FRAMES, 64, 64, 3), 37).sigmoid(), strength=0.7, start_percent=0.0, end_percent=1.0)
    with CallSpy(control_net.control_model) as control_spy:
        sample(replace(wired, positive=positive, negative=negative))
    check(spy.calls, wired.answers, spy.frames)
    assert len(control_spy.calls) == len(spy.calls)
    for control, call in zip(control_spy.calls, spy.calls, strict=True):
        assert torch.equal(control.context_BSW, call.context_BSW)
