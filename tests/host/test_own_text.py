"""The command line reads captions as the host does: the same tokens and pooled vectors of the same text encoders."""

from __future__ import annotations

import comfy.sd1_clip
import comfy.sdxl_clip
import pytest
import torch
from sdxl_text import WIDTHS, small_sdxl_clip
from tiny_models import fill_

PROMPTS = ("a photo of a Red fox, don't 123", "", "naïve 東京 two", "two\nlines  and spaces", "fox " * 90,
           "a (red:1.4) fox (runs) far", "fox " * 70 + "(a small old red house:0.7) " + "fox " * 40)


@pytest.fixture(scope="module")
def towers(pack_import):
    """The host's SDXL text model of few layers, and ours with its weights."""
    host = fill_(small_sdxl_clip(), 64)
    layout, encoder = pack_import("emma_core.text.clip_layout"), pack_import("emma_core.text.clip_encoder")
    tokenizer = pack_import("emma_core.text.clip_tokenizer").load_clip_tokenizer(None)
    loaded = [encoder.load_tower(tower, one.transformer.state_dict(), tokenizer, "small", torch.float32)
              for tower, one in ((layout.SDXL_CLIP_L, host.clip_l), (layout.SDXL_CLIP_G, host.clip_g))]
    return host, encoder.ClipTextEncoder(loaded)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_and_pooled_vectors_of_sdxl_are_the_hosts(towers, prompt):
    host, ours = towers
    tokens = comfy.sdxl_clip.SDXLTokenizer().tokenize_with_weights(prompt)
    with torch.no_grad():
        wanted, wanted_pooled = host.encode_token_weights(tokens)
    [found], [pooled] = ours.encode_weighted([prompt]), ours.pooled([prompt], weighted=True)
    assert found.shape == (1, 154 if len(prompt) > 250 else 77, sum(WIDTHS))
    assert torch.allclose(found, wanted, atol=1e-4) and wanted.std() > 0.1
    assert torch.allclose(pooled, wanted_pooled, atol=1e-4)


def test_the_hosts_ids_are_those_of_the_published_vocabulary(pack_import):
    ours, host = pack_import("emma_core.text.clip_tokenizer").load_clip_tokenizer(None), comfy.sd1_clip.SDTokenizer()
    weighted_parts = pack_import("emma_core.text.prompt_weights").weighted_parts
    for prompt in PROMPTS:
        assert ours.rows(weighted_parts(prompt), 77, ours.end_id) == host.tokenize_with_weights(prompt)
