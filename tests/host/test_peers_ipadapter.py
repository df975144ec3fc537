"""IPAdapter beside EMMA on one MODEL: the tokens stay right, both act, and their order does not matter."""

from __future__ import annotations

import json

import comfy.clip_vision
import peers
import pytest
import torch
from sd15_layout import CLIP_VISION, SD15_UNET, save_ipadapter
from sdxl_layout import ATTENTION_WIDTHS, SDXL, TOKENS
from text_input import TextSpy, check_text, wire_own
from tiny_models import call_node, empty_latent, fill_, noise, wire
from token_check import CallSpy, check

pytestmark = pytest.mark.usefixtures("added_literally")


@pytest.fixture(scope="module", autouse=True)
def ipadapter_plus(host_nodes, pack, host_path):
    with peers.loaded(host_nodes, host_path, "ComfyUI_IPAdapter_plus") as (root,):
        yield root


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model(sizes=SD15_UNET)


@pytest.fixture(scope="module")
def clip_vision(tmp_path_factory):
    config = tmp_path_factory.mktemp("clip_vision") / "config.json"
    config.write_text(json.dumps(CLIP_VISION))
    clip_vision = comfy.clip_vision.ClipVisionModel(str(config))
    fill_(clip_vision.model, 75)
    return clip_vision


@pytest.fixture(scope="module")
def ipadapter(ipadapter_plus, host_nodes, base_directory):
    """IPADAPTER, from a file."""
    save_ipadapter(base_directory / "models" / "ipadapter" / "tiny.safetensors")
    return call_node(host_nodes, "IPAdapterModelLoader", ipadapter_file="tiny.safetensors")[0]


@pytest.fixture
def connect(tiny, way):
    return lambda model: wire(tiny, model, tiny.ella(), tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), way)


@pytest.fixture
def adapt(run_node, ipadapter, clip_vision):
    """IPAdapter Advanced on a MODEL."""

    def run(model, **settings):
        usual = {"ipadapter": ipadapter, "weight": 0.8, "weight_type": "linear", "combine_embeds": "concat", "start_at": 0.0,
                 "end_at": 1.0, "embeds_scaling": "V only"}
        return run_node("IPAdapterAdvanced", model=model, clip_vision=clip_vision,
                        image=noise((1, 224, 224, 3), 76).sigmoid(), **{**usual, **settings})[0]

    return run


@pytest.mark.parametrize("settings", [{}, {"weight_type": "style transfer"}, {"end_at": 0.4, "embeds_scaling": "K+V"},
                                      {"attn_mask": torch.eye(64)[None]}], ids=lambda settings: "+".join(settings) or "plain")
def test_before_or_after_the_connector(ksample, connect, adapt, model, settings):
    before = connect(adapt(model, **settings))
    plain = connect(model)
    with CallSpy(model.model.diffusion_model) as spy:
        samples = ksample(before.model, before.positive, before.negative)
    check(spy.calls, before.answers)
    assert torch.equal(samples, ksample(adapt(plain.model, **settings), plain.positive, plain.negative))
    assert not torch.equal(samples, ksample(plain.model, plain.positive, plain.negative)), "IPAdapter acts"


def test_the_reference_of_emma_acts_beside_it(tiny, ksample, connect, adapt, model):
    adapted = adapt(model)
    both = connect(adapted)
    ella_alone = wire(tiny, adapted, tiny.ella(), tiny.text(), tiny.text(1, seed=8))
    assert not torch.equal(ksample(both.model, both.positive, both.negative),
                           ksample(ella_alone.model, ella_alone.positive, ella_alone.negative))


def test_a_picture_for_each_of_a_batch(run_node, tiny, ksample, ipadapter, clip_vision, model, way):
    """IPAdapter Batch and references of EMMA that vary in the same way."""
    assembly = tiny.style_and_face(references=3)
    wired = wire(tiny, model, tiny.ella(), tiny.text(), tiny.text(1, seed=8), assembly, way)
    adapted = run_node("IPAdapterBatch", model=wired.model, ipadapter=ipadapter, clip_vision=clip_vision,
                       image=noise((3, 224, 224, 3), 76).sigmoid(), weight=0.8, weight_type="linear", start_at=0.0, end_at=1.0,
                       embeds_scaling="V only", encode_batch_size=0)[0]
    with CallSpy(model.model.diffusion_model) as spy:
        ksample(adapted, wired.positive, wired.negative, latent=empty_latent(3))
    check(spy.calls, wired.answers)


@pytest.mark.parametrize("settings", [{}, {"weight_type": "style transfer"}, {"end_at": 0.4}],
                         ids=lambda settings: "+".join(settings) or "plain")
def test_beside_references_on_sdxls_own_tokens(host_nodes, base_directory, tiny, pack_import, ksample, adapt, settings):
    """In the 60 layers that it reaches, before EMMA Connector and after it."""
    path = base_directory / "models" / "ipadapter" / "tiny-xl.safetensors"
    save_ipadapter(path, TOKENS, ATTENTION_WIDTHS)
    settings = {**settings, "ipadapter": call_node(host_nodes, "IPAdapterModelLoader", ipadapter_file=path.name)[0]}
    model = SDXL.patcher(tiny.patcher_for)
    before, entries = wire_own(tiny, pack_import, SDXL, adapt(model, **settings))
    plain, _ = wire_own(tiny, pack_import, SDXL, model)
    with TextSpy(model.model.diffusion_model) as spy:
        samples = ksample(*before, steps=2)
    check_text(spy.calls, entries)
    assert torch.equal(samples, ksample(adapt(plain[0], **settings), *plain[1:], steps=2))
    assert not torch.equal(samples, ksample(*plain, steps=2)), "IPAdapter acts"
    assert not torch.equal(samples, ksample(before[0], SDXL.conditioning(4), before[2], steps=2)), "the reference acts"
