"""Tiled Diffusion around EMMA's tokens: each tile of each call has those of its conditioning and timestep."""

from __future__ import annotations

from dataclasses import replace

import peers
import pytest
import torch
from model_families import FAMILIES
from text_input import TextSpy, check_text, wire_own
from tiny_models import empty_latent, wire
from token_check import CallSpy, check

METHODS = ("MultiDiffusion", "Mixture of Diffusers", "SpotDiffusion")
TILES_OF_64_PX = {"tile_width": 64, "tile_height": 64, "tile_overlap": 32, "tile_batch_size": 4}


@pytest.fixture(scope="module", autouse=True)
def tiled_diffusion(host_nodes, pack, host_path):
    with peers.loaded(host_nodes, host_path, "ComfyUI-TiledDiffusion") as (root,):
        yield root


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model()


def by_tile(calls):
    """Calls of one picture as the pack makes them: the rows of all conditionings for a tile, then those for the next."""
    for call in calls:
        tiles = len(call.timestep_B) // len(call.groups)
        assert len(call.timestep_B) == tiles * len(call.groups)
        yield replace(call, groups=call.groups * tiles)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_every_tile_has_its_tokens(run_node, tiny, ksample, model, way, method, place):
    def tiled(model):
        return run_node("TiledDiffusion", model=model, method=method, **TILES_OF_64_PX)[0]

    def connected(model):
        return wire(tiny, model, tiny.ella(), tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), way)

    plain, latent = connected(model), empty_latent(1, 16)
    wired = connected(tiled(model)) if place == "before" else replace(plain, model=tiled(plain.model))
    with CallSpy(model.model.diffusion_model) as spy:
        samples = ksample(wired.model, wired.positive, wired.negative, latent=latent)
    check(list(by_tile(spy.calls)), wired.answers)
    assert max(len(call.timestep_B) for call in spy.calls) > len(spy.calls[0].groups), "no call had several tiles"
    assert not torch.equal(samples, ksample(plain.model, plain.positive, plain.negative, latent=latent))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_every_tile_of_sdxl_has_its_own_tokens(run_node, tiny, pack_import, ksample, method, place):
    family = FAMILIES["sdxl"]
    model = family.patcher(tiny.patcher_for)

    def tiled(model):
        return run_node("TiledDiffusion", model=model, method=method, **TILES_OF_64_PX)[0]

    connected, entries = wire_own(tiny, pack_import, family, tiled(model) if place == "before" else model)
    sampled = connected[0] if place == "before" else tiled(connected[0])
    with TextSpy(model.model.diffusion_model) as spy:
        ksample(sampled, *connected[1:], empty_latent(1, 16))
    calls = list(by_tile(spy.calls))
    check_text(calls, entries)
    assert max(len(call.timestep_B) for call in calls) > 2, "no call had several tiles"
