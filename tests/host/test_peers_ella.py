"""ComfyUI-ELLA beside our pack: the same file gives the same tokens, and mixed-up wires are told, not sampled.

Shapes: N text tokens.
"""

from __future__ import annotations

import comfy.cli_args
import peers
import pytest
import torch
from tiny_models import UNET, TinyWorld, call_node, noise, wire
from token_check import Constant, check, judge

STEPS = 5
SIZES = {"width": 768, "latents": 64, "layers": 6, "heads": 8, "text_dim": 2048, "time_channels": 320, "time_width": 768}


@pytest.fixture(scope="module", autouse=True)
def comfyui_ella(host_nodes, pack, host_path):
    with peers.loaded(host_nodes, host_path, "ComfyUI-ELLA") as (root,):
        yield root


@pytest.fixture(scope="module")
def model(tiny):
    """Its ELLA has the released sizes only."""
    return tiny.model(sizes={**UNET, "context_dim": SIZES["width"]})


@pytest.fixture(scope="module")
def ellas(tiny: TinyWorld, pack_import, host_nodes, base_directory):
    """(Load ELLA, Load ELLA Model): one random file through our loader and theirs."""
    file = base_directory / "models" / "ella" / "full.safetensors"
    file.parent.mkdir(exist_ok=True)
    pack_import("emma_core.files.connector_file").save_connector(tiny.ella(**SIZES).connector, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.cli_args.args, "fp32_text_enc", True)  # theirs is float16 on a CPU otherwise
        loaders = (("EMMALoadELLA", {"ella_name": file.name}), ("ELLALoader", {"name": file.name}))
        yield tuple(call_node(host_nodes, node, **inputs)[0] for node, inputs in loaders)
    file.unlink()


@pytest.fixture(scope="module")
def texts():
    """T5 features of the prompt and of the negative."""
    return noise((1, 7, SIZES["text_dim"]), 4), noise((1, 2, SIZES["text_dim"]), 8)


@pytest.fixture(scope="module")
def wired(tiny, model, ellas, texts):
    return wire(tiny, model, ellas[0], *([[text, {"pooled_output": None}]] for text in texts))


@pytest.fixture
def embeds(texts):
    """ELLA_EMBEDS of both texts."""
    return [{"ella_t5_embeds": text} for text in texts]


def apply_ella(run_node, model, ella, embeds, sigmas=None):
    return run_node("EllaApply", model=model, ella=ella, positive=embeds[0], negative=embeds[1], sigmas=sigmas,
                    mode="ELLA ONLY")


def test_every_node_of_comfyui_ella_is_in_the_table(comfyui_ella, pack):
    """docs/compatibility.md names what to use instead of each."""
    table = (peers.PACK / "docs" / "compatibility.md").read_text(encoding="utf-8")
    names = comfyui_ella.NODE_DISPLAY_NAME_MAPPINGS
    assert [name for node, name in names.items() if name not in table and node not in table] == []


@pytest.mark.parametrize("timestep", [999, 500, 1])
def test_both_loaders_give_the_same_tokens(ellas, texts, timestep):
    ours, theirs = ellas
    with torch.inference_mode():
        wanted = theirs["model"](torch.tensor([timestep]), texts[0])
        found = ours.connector.tokens(texts[0], torch.tensor([float(timestep)]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sampler", "scheduler", "all_right"), [
    ("euler", "normal", True), ("dpmpp_2m", "karras", False), ("dpmpp_sde", "karras", False),
])
def test_tokens_at_the_right_timestep(spy, run_node, ksample, ellas, wired, model, embeds, sampler, scheduler, all_right):
    """Set ELLA Timesteps and ELLA Encode, as its README wires them, against EMMA Connector."""
    settings = {"sampler_name": sampler, "scheduler": scheduler, "steps": STEPS}
    timed = run_node("SetEllaTimesteps", model=model, ella=ellas[1], scheduler=scheduler, steps=STEPS, denoise=1.0)[0]
    prompts = [run_node("EllaEncode", ella=timed, embeds=embed)[0] for embed in embeds]
    ksample(model, *prompts, **settings)
    theirs = judge(spy.calls, wired.answers)
    assert (theirs.right == theirs.total) == all_right, f"{theirs.right} of {theirs.total}"
    spy.calls.clear()
    ksample(wired.model, wired.positive, wired.negative, **settings)
    check(spy.calls, wired.answers)


def test_their_conditioning_on_our_model_stays_as_it_is(spy, run_node, ksample, ellas, wired, model, embeds):
    """Both packs' prompts in one sampling: each entry keeps its own tokens."""
    timed = run_node("SetEllaTimesteps", model=model, ella=ellas[1], scheduler="normal", steps=STEPS, denoise=1.0)[0]
    theirs = run_node("EllaEncode", ella=timed, embeds=embeds[0])[0]
    positive = run_node("ConditioningCombine", conditioning_1=wired.positive, conditioning_2=theirs)[0]
    ksample(wired.model, positive, wired.negative, sampler_name="euler", scheduler="normal", steps=STEPS)
    answers = {0: [*wired.answers[0], *(Constant(tokens) for tokens, _ in theirs)], 1: wired.answers[1]}
    verdict = judge(spy.calls, answers)
    assert verdict.right == verdict.total and verdict.met[0, 0]


@pytest.fixture
def mismatch(pack_import):
    return pack_import("emma_core.errors").ConnectorMismatchError


def test_their_ella_in_emma_connector_is_refused(tiny, model, ellas, mismatch):
    """Both packs' sockets are named ELLA, so the editor lets the wire be drawn."""
    with pytest.raises(mismatch, match="this ELLA comes from another node pack.*Use Load ELLA with the same file"):
        wire(tiny, model, ellas[1], tiny.text(), tiny.text(1))


def test_apply_ella_without_sigmas_fails_on_this_host(run_node, ellas, model, embeds):
    """So it cannot put its tokens over ours: it hands an argument to the host that supported hosts do not take."""
    with pytest.raises(TypeError, match="process_cond"):
        apply_ella(run_node, model, ellas[1], embeds)


def test_their_nodes_leave_our_model_alone(run_node, ksample, ellas, wired, model, embeds):
    before = ksample(wired.model, wired.positive, wired.negative)
    sigmas = run_node("BasicScheduler", model=wired.model, scheduler="normal", steps=STEPS, denoise=1.0)[0]
    ksample(*apply_ella(run_node, wired.model, ellas[1], embeds, sigmas))
    assert torch.equal(ksample(wired.model, wired.positive, wired.negative), before)
