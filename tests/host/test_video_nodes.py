"""Strengths that change over frames and over the sampling, and references that blend into one another."""

from __future__ import annotations

import comfy.hooks
import comfy.samplers
import numpy
import pytest
import torch
from graphs import run_graph
from tiny_models import empty_latent, wire
from token_check import Answer, check, same

FRAMES = 4


@pytest.fixture(scope="module")
def core(pack_import):
    return pack_import("emma_core.model.assembly")


@pytest.fixture(scope="module")
def mismatch(pack_import):
    return pack_import("emma_core.errors").ReferenceMismatchError


@pytest.fixture
def assemble(run_node, tiny, module):
    """Assemble EMMA Modules with the usual settings."""

    def run(**settings):
        usual = {"module": module, "reference": tiny.reference(module), "strength": 1.0, "start_percent": 0.0,
                 "end_percent": 1.0}
        return run_node("EMMAAssembleModules", **{**usual, **settings})[0]

    return run


@pytest.fixture
def connect(tiny, model, ella):
    return lambda assembly: wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), assembly)


# --- strengths for each frame --------------------------------------------------------------------------------------

FACTORS = [0.0, 0.5, 1.0, -0.5]


@pytest.mark.parametrize("strengths", [FACTORS, tuple(FACTORS), numpy.array(FACTORS, dtype=numpy.float32),
                                       torch.tensor(FACTORS)])
def test_each_frame_has_its_strength(spy, tiny, ella, module, core, ksample, assemble, connect, strengths):
    wired = connect(assemble(strength=0.8, strengths=strengths))
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(FRAMES))
    features = tiny.reference(module).features
    wanted = core.Assembly([core.Reference(module.module, features, 0.8 * torch.tensor(FACTORS))])
    check(spy.calls, {0: [Answer(ella.connector, tiny.text()[0][0], wanted)], 1: wired.answers[1]})
    first, third = (wired.answers[0][0].at(500.0, frame) for frame in (0, 2))
    assert not torch.allclose(first, third, rtol=1e-2)


def test_frame_strengths_node_into_a_video(spy, run_node, ksample, assemble, connect):
    strengths, count = run_node("EMMAFrameStrengths", frames=FRAMES, keyframes="0: 0.0, 3: 1.5", interpolation="linear")
    assert strengths == [0.0, 0.5, 1.0, 1.5] and count == FRAMES
    assembly = assemble(strengths=strengths)
    assert assembly.references[0].strength.tolist() == strengths
    wired = connect(assembly)
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(count))
    check(spy.calls, wired.answers)


@pytest.mark.parametrize("strengths", [0.5, [0.5], 1 / 2])
def test_a_single_number_is_a_factor_for_all_frames(assemble, strengths):
    reference = assemble(strength=3.0, strengths=strengths).references[0]
    assert reference.strength == 1.5 and reference.rows == 1


def test_strengths_and_references_per_frame_go_together(spy, tiny, module, ksample, assemble, connect):
    assembly = assemble(reference=tiny.reference(module, references=FRAMES), strengths=FACTORS)
    wired = connect(assembly)
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(FRAMES))
    check(spy.calls, wired.answers)


def test_windows_get_the_strengths_of_their_frames(pack_import, ella, tiny, assemble):
    payload = pack_import("host.payload").EmmaPayload(ella, tiny.text()[0][0], assemble(strengths=FACTORS))
    timestep_B, [whole] = torch.full((2,), 500.0), payload.tokens(torch.full((4,), 500.0), [], None)
    assert torch.equal(*payload.tokens(timestep_B, [], [2, 3]), whole[[2, 3]])
    assert not torch.allclose(whole[2], whole[3], rtol=1e-2)


@pytest.mark.parametrize(("strengths", "message"), [
    ([1.0, 2.0], "2 strengths for 3 references; wanted one for all, or one per reference"),
    ([], "the list of strengths is empty; wanted one number for each frame"),
    ([1.0, "b", 1.0], "the strength of frame 1 is b; wanted a finite number. Wire one number, a list"),
    ([1.0, 1.0, float("nan")], "the strength of frame 2 is nan; wanted a finite number"),
    ([[1.0, 1.0]], "the strength of frame 0 is .*; wanted a finite number"),
    ("0.5, 1.0", "the strength of frame 0 is 0.5, 1.0; wanted a finite number"),
])
def test_strengths_that_cannot_be_used_are_refused(tiny, module, assemble, mismatch, strengths, message):
    with pytest.raises(mismatch, match=message):
        assemble(reference=tiny.reference(module, references=3), strengths=strengths)


def test_strengths_for_another_number_of_frames_are_refused(ksample, assemble, connect, mismatch):
    wired = connect(assemble(strengths=FACTORS))
    with pytest.raises(mismatch, match="holds 4 per-frame strengths, the latent batch has 3 frames. Give one strength per"):
        ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(3))


def test_two_modules_with_unequal_frames_are_refused(assemble, connect, mismatch):
    with pytest.raises(mismatch, match="3 references or strengths for 4 frames; wanted 1 or 4"):
        connect(assemble(strengths=FACTORS[:3], assembly=assemble(strengths=FACTORS)))


def test_gate_map_of_strengths_per_frame_is_refused(run_node, tiny, ella, assemble, mismatch):
    with pytest.raises(mismatch, match="per-frame references or strengths was asked for.*disconnect lists of strengths"):
        run_node("EMMAGateMap", ella=ella, assembly=assemble(strengths=FACTORS), conditioning=tiny.text(), timestep=500)


# --- strengths over the sampling -----------------------------------------------------------------------------------

class KeyframedAnswer:
    """The connector's tokens at a plain strength for each timestep."""

    def __init__(self, ella, text, core, module, features, strengths: dict[float, float]):
        self._answers = {}
        for timestep, factor in strengths.items():
            assembly = core.Assembly([core.Reference(module.module, features, factor)])
            self._answers[timestep] = Answer(ella.connector, text, assembly)

    def at(self, timestep, row=0):
        return self._answers[timestep].at(timestep)


def as_the_host(model, keyframes, sigmas) -> dict[float, float]:
    """{timestep: strength} as the host's own keyframes go through a schedule."""
    keyframes = keyframes.clone()
    keyframes.initialize_timesteps(model.model)
    keyframes.reset()
    found = {}
    for sigma in sigmas[:-1]:
        keyframes.prepare_current_keyframe(sigma, {"sample_sigmas": sigmas})
        found[float(model.model.model_sampling.timestep(sigma))] = float(keyframes.strength)
    return found


def chain(run_node, *pairs):
    keyframes = None
    for strength, percent in pairs:
        keyframes = run_node("CreateHookKeyframe", strength_mult=strength, start_percent=percent, prev_hook_kf=keyframes)[0]
    return keyframes


def interpolated(run_node):
    return run_node("CreateHookKeyframesInterpolated", strength_start=0.0, strength_end=1.4, interpolation="ease_in",
                    start_percent=0.2, end_percent=0.9, keyframes_count=6, print_keyframes=False)[0]


def from_floats(run_node):
    return run_node("CreateHookKeyframesFromFloats", floats_strength=[1.0, 0.0, 0.6, 0.2], start_percent=0.0, end_percent=1.0,
                    print_keyframes=False)[0]


KEYFRAMES = {
    "apart": lambda run_node: chain(run_node, (1.0, 0.0), (0.0, 0.35), (0.7, 0.6)),
    "each for a step": lambda run_node: chain(run_node, (0.1, 0.3), (0.4, 0.301), (0.7, 0.302), (1.0, 0.303)),
    "interpolated": interpolated,
    "from floats": from_floats,
}


@pytest.mark.parametrize("kind", KEYFRAMES)
@pytest.mark.parametrize(("sampler", "scheduler", "denoise"), [
    ("euler", "normal", 1.0), ("dpmpp_2m", "karras", 1.0), ("heun", "simple", 1.0), ("euler", "normal", 0.6)])
def test_hook_keyframes_count_as_in_the_host(
    spy, run_node, tiny, model, ella, module, core, ksample, assemble, connect, kind, sampler, scheduler, denoise
):
    """Two runs of unequal steps on one conditioning: where a keyframe lasts for steps, the schedule decides."""
    keyframes = KEYFRAMES[kind](run_node)
    wired = connect(assemble(strength=0.9, strengths=keyframes))
    features = tiny.reference(module).features
    seen = []
    for steps in (8, 5, 8):
        spy.calls.clear()
        ksample(wired.model, wired.positive, wired.negative, steps=steps, sampler_name=sampler, scheduler=scheduler,
                denoise=denoise)
        sigmas = comfy.samplers.KSampler(wired.model, steps, "cpu", sampler, scheduler, denoise).sigmas
        strengths = as_the_host(model, keyframes, sigmas)
        answer = KeyframedAnswer(ella, tiny.text()[0][0], core, module, features,
                                 {timestep: 0.9 * factor for timestep, factor in strengths.items()})
        check(spy.calls, {0: [answer], 1: wired.answers[1]})
        seen.append(tuple(strengths.values()))
    assert seen[0] == seen[2]
    # the keyframes that each last for a step lie before the part that is sampled with less denoise
    assert (len(set(seen[0])) > 1) == (denoise == 1.0 or kind != "each for a step")


def test_each_keyframe_of_a_chain_lasts_for_a_step(run_node, model):
    """The example above can tell counted steps from percents alone."""
    sigmas = comfy.samplers.KSampler(model, 8, "cpu", "euler", "normal", 1.0).sigmas
    strengths = as_the_host(model, KEYFRAMES["each for a step"](run_node), sigmas)
    assert [round(value, 3) for value in strengths.values()] == [0.1, 0.1, 0.1, 0.4, 0.7, 1.0, 1.0, 1.0]


def test_evaluations_between_steps_have_their_percents_strength(spy, run_node, tiny, ella, module, core, ksample, assemble,
                                                                connect):
    wired = connect(assemble(strengths=chain(run_node, (1.0, 0.0), (0.0, 0.4))))
    ksample(wired.model, wired.positive, wired.negative, steps=5, sampler_name="dpmpp_sde", scheduler="normal")
    features = tiny.reference(module).features
    timesteps = [call.timestep_B[0].item() for call in spy.calls]
    answer = KeyframedAnswer(ella, tiny.text()[0][0], core, module, features,
                             {timestep: float(timestep > 0.6 * 999) for timestep in timesteps})
    check(spy.calls, {0: [answer], 1: wired.answers[1]})
    assert len(timesteps) == 9


def test_a_timestep_between_steps_follows_the_schedule_it_is_in(run_node, tiny, ella, module, core, assemble, pack_import):
    """Also where another schedule asked for the same timestep before."""
    keyframes = KEYFRAMES["each for a step"](run_node)
    payload = pack_import("host.payload").EmmaPayload(ella, tiny.text()[0][0], assemble(strengths=keyframes))
    for schedule, strength in (([999.0, 800.0, 600.0], 0.7), ([999.0, 800.0], 0.4)):
        assembly = core.Assembly([core.Reference(module.module, tiny.reference(module).features, strength)])
        wanted = Answer(ella.connector, tiny.text()[0][0], assembly).at(500.0)
        assert same(payload.tokens(torch.tensor([500.0]), schedule, None)[0][0], wanted)


def test_no_keyframes_change_nothing(ksample, assemble, connect):
    plain, empty = (connect(assemble(strengths=strengths)) for strengths in (None, comfy.hooks.HookKeyframeGroup()))
    samples = [ksample(wired.model, wired.positive, wired.negative) for wired in (plain, empty)]
    assert torch.equal(*samples)


def test_keyframes_with_a_range_and_references_per_frame(spy, run_node, tiny, ella, module, core, ksample, assemble, connect):
    """Outside of start and end percent the reference does not act, whatever its keyframes say."""
    reference = tiny.reference(module, references=FRAMES)
    wired = connect(assemble(reference=reference, start_percent=0.3, end_percent=0.7,
                             strengths=chain(run_node, (0.5, 0.0), (1.2, 0.55))))
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(FRAMES), steps=7, scheduler="normal")

    class Frames:
        def at(self, timestep, row):
            factor = (0.5 if timestep > 0.45 * 999 else 1.2) if 0.3 * 999 <= timestep <= 0.7 * 999 else 0.0
            features = {name: tensor[row:row + 1] for name, tensor in reference.features.items()}
            return Answer(ella.connector, tiny.text()[0][0],
                          core.Assembly([core.Reference(module.module, features, factor)])).at(timestep)

    check(spy.calls, {0: [Frames()], 1: wired.answers[1]})


# --- blending ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("interpolation", ["linear", "ease"])
def test_blended_references_reach_their_frames(spy, run_node, tiny, ella, module, core, ksample, assemble, connect,
                                               interpolation):
    a, b = tiny.reference(module), tiny.reference(module, seed=33)
    blend = run_node("EMMABlendReferences", reference_a=a, reference_b=b, frames=FRAMES, start_weight=0.0, end_weight=1.0,
                     interpolation=interpolation)[0]
    assert torch.equal(blend.features["global"][:1], a.features["global"])
    assert torch.equal(blend.features["global"][-1:], b.features["global"])
    wired = connect(assemble(reference=blend))
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(FRAMES))
    shares = {"linear": [0, 1 / 3, 2 / 3, 1], "ease": [0, 0.25, 0.75, 1]}[interpolation]
    features = {"global": torch.cat([(1 - w) * a.features["global"] + w * b.features["global"] for w in shares])}
    wanted = core.Assembly([core.Reference(module.module, features)])
    check(spy.calls, {0: [Answer(ella.connector, tiny.text()[0][0], wanted)], 1: wired.answers[1]})


def test_one_blended_reference_serves_any_batch(spy, run_node, tiny, module, ksample, assemble, connect):
    blend = run_node("EMMABlendReferences", reference_a=tiny.reference(module), reference_b=tiny.reference(module, seed=33),
                     frames=1, start_weight=0.4, end_weight=1.0, interpolation="linear")[0]
    wired = connect(assemble(reference=blend))
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(3))
    check(spy.calls, wired.answers)


def test_blend_is_saved_and_loaded_as_frames(run_node, tiny, module):
    blend = run_node("EMMABlendReferences", reference_a=tiny.reference(module), reference_b=tiny.reference(module, seed=33),
                     frames=3, start_weight=0.2, end_weight=1.0, interpolation="linear")[0]
    run_node("EMMASaveReference", reference=blend, name="blends/three")
    loaded = run_node("EMMALoadReference", reference_name="blends/three.safetensors")[0]
    assert loaded.per_frame and torch.equal(loaded.features["global"], blend.features["global"])


# --- the server ----------------------------------------------------------------------------------------------------

def test_server_wires_lists_and_keyframes(server):
    """The host lets FLOAT and HOOK_KEYFRAMES into the socket, and a whole video runs."""
    range_ = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    model, clip, ella, style, face, encoder = (["1", slot] for slot in (0, 1, 3, 4, 5, 6))
    encode = {"encoder": encoder, "combine": "concat"}
    graph = {
        "1": ("EMMAPlayground", {}),
        "2": ("EmptyImage", {"width": 96, "height": 96, "batch_size": 1, "color": 0x8090A0}),
        "3": ("EmptyImage", {"width": 96, "height": 96, "batch_size": 1, "color": 0xA03020}),
        "4": ("EMMAEncodeReference", {"module": style, "image": ["2", 0], **encode}),
        "5": ("EMMAEncodeReference", {"module": style, "image": ["3", 0], **encode}),
        "6": ("EMMAEncodeReference", {"module": face, "image": ["2", 0], **encode}),
        "7": ("EMMAFrameStrengths", {"frames": 3, "keyframes": "0: 0, 2: 1", "interpolation": "ease"}),
        "8": ("EMMABlendReferences", {"reference_a": ["4", 0], "reference_b": ["5", 0], "frames": ["7", 1], "start_weight": 0.0,
                                      "end_weight": 1.0, "interpolation": "linear"}),
        "9": ("EMMAAssembleModules", {"module": style, "reference": ["8", 0], "strengths": ["7", 0], **range_}),
        "10": ("CreateHookKeyframe", {"strength_mult": 0.5, "start_percent": 0.4}),
        "11": ("EMMAAssembleModules", {"module": face, "reference": ["6", 0], "strengths": ["10", 0], "assembly": ["9", 0],
                                       **range_}),
        "12": ("CLIPTextEncode", {"clip": clip, "text": "woman astronaut"}),
        "13": ("CLIPTextEncode", {"clip": clip, "text": ""}),
        "14": ("EMMAConnector", {"model": model, "ella": ella, "positive": ["12", 0], "negative": ["13", 0],
                                 "assembly": ["11", 0]}),
        "15": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": ["7", 1]}),
        "16": ("KSampler", {"model": ["14", 0], "positive": ["14", 1], "negative": ["14", 2], "latent_image": ["15", 0],
                            "seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal",
                            "denoise": 1.0}),
        "17": ("VAEDecode", {"samples": ["16", 0], "vae": ["1", 2]}),
        "18": ("SaveImage", {"images": ["17", 0], "filename_prefix": "video"}),
    }
    assert len(run_graph(server, graph)["outputs"]["18"]["images"]) == 3
