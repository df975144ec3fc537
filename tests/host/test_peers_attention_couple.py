"""Attention couple reads the conditioning's tokens when its node runs, so EMMA's cannot follow the timesteps in it."""

from __future__ import annotations

import peers
import pytest
import torch
from sd15_layout import SD15_UNET
from tiny_models import call_node, wire
from token_check import CallSpy

STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def attention_couple(host_nodes, pack, host_path):
    with peers.loaded(host_nodes, host_path, "attention-couple-ComfyUI") as (root,):
        yield root


def test_its_regions_keep_the_tokens_of_one_timestep(host_nodes, run_node, tiny, ksample):
    """What docs/compatibility.md says of it: does not work."""
    model = tiny.model(sizes=SD15_UNET)
    first = wire(tiny, model, tiny.ella(), tiny.text(), tiny.text(1, seed=8))
    other = wire(tiny, model, tiny.ella(), tiny.text(seed=9), tiny.text(1, seed=8))
    half = torch.zeros(1, 64, 64)
    half[:, :, :32] = 1
    regions = [run_node("ConditioningSetMask", conditioning=conditioning, mask=mask, strength=1.0, set_cond_area="default")[0]
               for conditioning, mask in ((first.positive, half), (other.positive, 1 - half))]
    both = run_node("ConditioningCombine", conditioning_1=regions[0], conditioning_2=regions[1])[0]
    coupled = call_node(host_nodes, "Attention couple", model=first.model, positive=both, negative=first.negative,
                        mode="Attention")
    with CallSpy(model.model.diffusion_model) as spy:
        ksample(*coupled, steps=STEPS)
    assert len({call.timestep_B[0].item() for call in spy.calls}) == STEPS
    at_any_timestep = torch.cat([conditioning[0][0] for conditioning in (first.positive, other.positive)])
    assert sum(same_tensor(call.context_BSW, at_any_timestep) for call in spy.calls) == STEPS


def same_tensor(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and torch.equal(found, wanted)
