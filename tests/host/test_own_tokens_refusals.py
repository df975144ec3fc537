"""A module, a model, a text or an ELLA that do not belong together are refused in words."""

from __future__ import annotations

import re

import comfy.model_sampling
import pytest
import torch
from model_families import FAMILIES, WIDTH
from tiny_models import WIDTH as ELLA_WIDTH
from tiny_models import noise

SDXL, SD15, FLUX = FAMILIES["sdxl"], FAMILIES["sd15"], FAMILIES["flux"]


@pytest.fixture(scope="module")
def mismatch(pack_import):
    return pack_import("emma_core.errors").ConnectorMismatchError


@pytest.fixture(scope="module")
def model(tiny):
    return SDXL.patcher(tiny.patcher_for)


@pytest.fixture(scope="module")
def module(tiny):
    return tiny.token_module(SDXL)


@pytest.fixture(scope="module")
def connect(run_node, tiny, model, module):
    """EMMA Connector with some inputs exchanged."""
    usual = {"model": model, "positive": SDXL.conditioning(4), "negative": SDXL.conditioning(8),
             "assembly": tiny.assemble((module, tiny.reference(module)))}
    return lambda **inputs: run_node("EMMAConnector", **{**usual, **inputs})


def assembly_of(tiny, module):
    return tiny.assemble((module, tiny.reference(module)))


def test_a_module_for_an_ella_needs_one(tiny, connect, mismatch):
    with pytest.raises(mismatch, match=r"style module was made for an ELLA \(width 64, 2 blocks\), and none is wired\. Wire "
                                       r"Load ELLA and its text encoder, or choose a module for the own tokens of sdxl"):
        connect(assembly=assembly_of(tiny, tiny.module()))


def test_a_module_of_own_tokens_is_refused_beside_an_ella(tiny, connect, mismatch):
    module = tiny.token_module(SD15)
    with pytest.raises(mismatch, match=rf"style module acts on the own tokens of sd15 \(width {WIDTH}\), not on an ELLA's.*"
                                       "Leave ELLA out"):
        connect(model=tiny.model(), ella=tiny.ella(), positive=tiny.text(), negative=tiny.text(1),
                assembly=assembly_of(tiny, module))


def test_both_kinds_in_one_assembly_are_refused(tiny, connect, module, mismatch):
    ellas = tiny.module()
    both = tiny.assemble((module, tiny.reference(module)), (ellas, tiny.reference(ellas)))
    with pytest.raises(mismatch, match="was made for an ELLA"):
        connect(assembly=both)
    with pytest.raises(mismatch, match="acts on the own tokens of sdxl"):
        connect(model=tiny.model(), ella=tiny.ella(), positive=tiny.text(), negative=tiny.text(1), assembly=both)


def test_a_module_of_another_family_is_refused(tiny, connect, mismatch):
    with pytest.raises(mismatch, match=rf"acts on the tokens of sd15 models \(width {WIDTH}, ddpm time\); this is a sdxl model "
                                       rf"\(width {WIDTH}, ddpm time\)\. Choose a module made for sdxl, or a checkpoint of "):
        connect(assembly=assembly_of(tiny, tiny.token_module(SD15)))


def test_a_module_of_another_width_is_refused(tiny, connect, module, mismatch, pack_import):
    source = pack_import("emma_core.model.source_spec").SourceSpec("sdxl", 80)
    with pytest.raises(mismatch, match=rf"sdxl models \(width 80, ddpm time\); this is a sdxl model \(width {WIDTH}"):
        connect(assembly=assembly_of(tiny, tiny.token_module(SDXL, source=source)))


def test_a_flow_model_wants_modules_that_count_so(run_node, tiny, connect, module, mismatch):
    flow = tiny.patcher_for(SDXL.patcher(tiny.patcher_for).model)
    flow.add_object_patch("model_sampling", type("Flow", (comfy.model_sampling.ModelSamplingDiscreteFlow,
                                                           comfy.model_sampling.CONST), {})())
    with pytest.raises(mismatch, match=rf"ddpm time\); this is a sdxl model \(width {WIDTH}, flow time\)"):
        connect(model=flow)


def test_sampling_without_timesteps_is_refused_at_once_and_after_the_connector(run_node, connect, ksample, model, mismatch):
    settings = {"sampling": "v_prediction", "sigma_max": 120.0, "sigma_min": 0.002}
    said = r"counts time from 1\.20, a module on the model's own tokens needs timesteps 0 to 999\. Remove the node"
    with pytest.raises(mismatch, match=said):
        connect(model=run_node("ModelSamplingContinuousEDM", model=model, **settings)[0])
    connected, positive, negative = connect()
    with pytest.raises(mismatch, match=said):
        ksample(run_node("ModelSamplingContinuousEDM", model=connected, **settings)[0], positive, negative)


@pytest.mark.parametrize("place", ["positive", "negative"])
def test_text_of_another_width_is_refused(connect, mismatch, place):
    with pytest.raises(mismatch, match=rf"the conditioning has width 24, and a sdxl model reads width {WIDTH} from its own "
                                       "text.*the checkpoint's own CLIP; or, if this is Load ELLA Text Encoder's, wire"):
        connect(**{place: [[noise((1, 5, 24), 3), dict(SDXL.options)]]})


def test_t5_as_wide_as_the_models_own_text_is_refused(connect, mismatch):
    """flan-t5-xl and SDXL share the width 2048; only the latter has a pooled vector."""
    with pytest.raises(mismatch, match=rf"width {WIDTH} without a pooled vector"):
        connect(positive=[[noise((1, 5, WIDTH), 3), {"pooled_output": None}]])


def test_a_prompt_list_of_t5_is_refused(tiny, connect, mismatch, pack_import):
    lengths = pack_import("host.text_rows").LENGTHS
    with pytest.raises(mismatch, match="if this is Load ELLA Text Encoder's"):
        connect(model=SD15.patcher(tiny.patcher_for), positive=[[noise((2, 5, WIDTH), 3), {lengths: (3, 5)}]],
                negative=SD15.conditioning(8), assembly=assembly_of(tiny, tiny.token_module(SD15)))


def test_conditioning_without_text_is_refused(connect, mismatch):
    with pytest.raises(mismatch, match="holds no text. Wire CLIP Text Encode"):
        connect(positive=[[None, {}]])


@pytest.mark.parametrize("place", ["clip_positive", "clip_negative"])
def test_appending_without_an_ella_is_refused(connect, mismatch, place):
    with pytest.raises(mismatch, match="appended to an ELLA's tokens, and no ELLA is wired. Wire the checkpoint's conditioning "
                                       "into positive and negative"):
        connect(**{place: SDXL.conditioning(9)})


def test_connecting_twice_is_refused(connect, mismatch):
    _, positive, _ = connect()
    with pytest.raises(mismatch, match="went through EMMA Connector before"):
        connect(positive=positive)


def test_an_ella_on_a_model_of_another_width_is_refused_as_before(tiny, connect, model, mismatch):
    with pytest.raises(mismatch, match=re.escape(f"(SDXL) has a cross-attention of width {WIDTH}; the ELLA makes tokens of "
                                                 f"width {ELLA_WIDTH}")):
        connect(ella=tiny.ella(), positive=tiny.text(), negative=tiny.text(1))


def test_a_model_that_is_not_listed_is_a_family_of_its_own(tiny, pack_import, connect, model):
    """Its width is that of its conditioning; a module says for which it was made."""
    families = pack_import("host.families")

    class Unknown:
        unet_config = {}

    class NewKind:
        model_config = Unknown()

    assert families.family_of(NewKind()).name == "unknown" and families.context_width(NewKind()) is None
    assert families.family_of(model.model).name == "sdxl" and families.context_width(model.model) == WIDTH


def test_the_gate_map_needs_no_ella_for_modules_on_own_tokens(run_node, tiny, module, mismatch):
    image = run_node("EMMAGateMap", assembly=assembly_of(tiny, module), conditioning=SDXL.conditioning(4), timestep=700)[0]
    assert image.shape[0] == 1 and image.shape[-1] == 3 and len(torch.unique(image)) > 10
    with pytest.raises(mismatch, match="was made for an ELLA, and none is wired. Wire Load ELLA into ella"):
        run_node("EMMAGateMap", assembly=assembly_of(tiny, tiny.module()), conditioning=SDXL.conditioning(4), timestep=700)
