"""Ultimate SD Upscale around EMMA's tokens: every tile and seam has those of its conditioning and timestep."""

from __future__ import annotations

from dataclasses import replace

import peers
import pytest
import torch
from tiny_models import noise, side_by_side, wire
from token_check import CallSpy, check

SEAMS = ("None", "Band Pass", "Half Tile", "Half Tile + Intersections")
USUAL = {"seed": 11, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 0.6, "tile_width": 64,
         "tile_height": 64, "mask_blur": 8, "tile_padding": 16, "seam_fix_denoise": 0.5, "seam_fix_width": 32,
         "seam_fix_mask_blur": 8, "seam_fix_padding": 16, "force_uniform_tiles": True, "tiled_decode": False}


@pytest.fixture(scope="module", autouse=True)
def ultimate_upscale(host_nodes, pack, host_path):
    with peers.loaded(host_nodes, host_path, "ComfyUI_UltimateSDUpscale") as (root,):
        yield root


@pytest.fixture
def picture_1HW3():
    return noise((1, 128, 128, 3), 82).sigmoid()


@pytest.fixture
def upscale(run_node, vae):
    """`upscale(wired, picture, ...)`: the picture drawn anew in tiles of 64 pixels."""
    return lambda wired, picture_1HW3, **settings: run_node(
        "UltimateSDUpscaleNoUpscale", upscaled_image=picture_1HW3, model=wired.model, positive=wired.positive,
        negative=wired.negative, vae=vae, **{**USUAL, "mode_type": "Linear", "seam_fix_mode": "None", "batch_size": 1,
                                             **settings})[0]


@pytest.mark.parametrize("settings", [
    *({"seam_fix_mode": mode} for mode in SEAMS), {"mode_type": "Chess"}, {"batch_size": 2},
], ids=lambda settings: " ".join(f"{value}" for value in settings.values()))
def test_every_tile_has_its_tokens(upscale, model, wired, picture_1HW3, settings):
    with CallSpy(model.model.diffusion_model) as spy:
        found_1HW3 = upscale(wired, picture_1HW3, **settings)
    check(spy.calls, wired.answers)
    assert found_1HW3.shape == picture_1HW3.shape and not torch.equal(found_1HW3, picture_1HW3)
    assert len(spy.calls) >= 4 * USUAL["steps"] // settings.get("batch_size", 1)


def test_a_controlnet_sees_the_same_tokens_in_every_tile(upscale, run_node, tiny, model, wired, picture_1HW3):
    controlnet = tiny.controlnet()
    positive, negative = run_node("ControlNetApplyAdvanced", positive=wired.positive, negative=wired.negative,
                                  control_net=controlnet, image=picture_1HW3, strength=0.7, start_percent=0.0, end_percent=1.0)
    with CallSpy(model.model.diffusion_model) as spy, CallSpy(controlnet.control_model) as control_spy:
        upscale(replace(wired, positive=positive, negative=negative), picture_1HW3)
    check(spy.calls, wired.answers)
    assert len(control_spy.calls) == len(spy.calls)
    assert all(torch.equal(control.context_BSW, call.context_BSW)
               for control, call in zip(control_spy.calls, spy.calls, strict=True))


@pytest.mark.parametrize("kind", ["area", "mask"])
def test_regions_are_cut_with_the_tiles(upscale, run_node, tiny, model, ella, wired, picture_1HW3, kind):
    """Two prompts side by side: each tile has the tokens of those that it touches."""
    other = wire(tiny, wired.model, ella, tiny.text(4, seed=32), tiny.text(1, seed=8))
    if kind == "area":
        settings = {"y": 0, "width": 64, "height": 128, "strength": 1.0}
        left, right = (run_node("ConditioningSetArea", conditioning=one.positive, x=x, **settings)[0]
                       for one, x in ((wired, 0), (other, 64)))
        positive = run_node("ConditioningCombine", conditioning_1=left, conditioning_2=right)[0]
    else:
        positive = side_by_side(run_node, wired, other, 128)
    with CallSpy(model.model.diffusion_model) as spy:
        upscale(replace(other, positive=positive), picture_1HW3)
    check(spy.calls, {0: [*wired.answers[0], *other.answers[0]], 1: wired.answers[1]})
