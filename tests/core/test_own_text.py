"""Text encoders of checkpoints: every layout gives transformers' own answer, in the rows that diffusers and ComfyUI read."""

import json
import shutil

import pytest
import torch
from checkpoints_with_text import POOLED, WIDTHS, as_single_file, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from emma_core.base.own_text import load_own_text, sizes_of
from emma_core.base.recognition import recognised
from emma_core.errors import TextEncoderFileError, TextInputError
from emma_core.text.clip_tokenizer import load_clip_tokenizer

PROMPTS = ("a photo of a Red fox, don't 123", "", "naïve 東京 two")
LONG = "fox " * 90


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sdxl") / "small")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd15") / "small", sdxl=False)


def encoder_of(path):
    return load_own_text(path, recognised(path), torch.float32)


def padded(prompt: str, pad_id: int) -> torch.Tensor:
    """(1, 77) by the published vocabulary, filled up here."""
    ids = load_clip_tokenizer(None)._tokenizer.encode(prompt, add_special_tokens=False).ids
    row = [49406, *ids, 49407]
    return torch.tensor([row + [pad_id] * (77 - len(row))])


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_sdxl_reads_the_layer_before_the_last_of_both_and_the_second_ones_projection(sdxl, prompt):
    encoder = encoder_of(sdxl)
    first, second = (kind.from_pretrained(sdxl / name) for kind, name in
                     ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2")))
    left = first(padded(prompt, 49407), output_hidden_states=True).hidden_states[-2]
    right = second(padded(prompt, 0), output_hidden_states=True)
    [tokens_1SD], [pooled_1P] = encoder.encode([prompt]), encoder.pooled([prompt])
    assert tokens_1SD.shape == (1, 77, sum(WIDTHS)) and pooled_1P.shape == (1, POOLED)
    assert torch.allclose(tokens_1SD, torch.cat([left, right.hidden_states[-2]], -1), atol=1e-6)
    assert torch.allclose(pooled_1P, right.text_embeds, atol=1e-6)


@torch.no_grad()
def test_sd15_reads_the_last_layer_with_its_norm_and_no_pooled_vector(sd15):
    encoder, model = encoder_of(sd15), CLIPTextModel.from_pretrained(sd15 / "text_encoder")
    for prompt in PROMPTS:
        assert torch.allclose(encoder.encode([prompt])[0], model(padded(prompt, 49407)).last_hidden_state, atol=1e-6)
    assert encoder.pooled_width == 0


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_a_single_file_gives_what_the_folder_gives(request, tmp_path, kind):
    folder = request.getfixturevalue(kind)
    single = encoder_of(as_single_file(folder, tmp_path / "single.safetensors"))
    whole = encoder_of(folder)
    for one, other in ((single.encode(PROMPTS), whole.encode(PROMPTS)), (single.pooled(PROMPTS), whole.pooled(PROMPTS))):
        assert all(torch.equal(found, wanted) for found, wanted in zip(one, other, strict=True))
    assert single.tokenizer_fingerprint == whole.tokenizer_fingerprint


def test_files_of_2022_without_a_towers_outer_name_load(sd15, tmp_path):
    tensors = load_file(as_single_file(sd15, tmp_path / "new.safetensors"))
    save_file({key.replace(".text_model.", "."): value for key, value in tensors.items()}, tmp_path / "old.safetensors")
    assert torch.equal(encoder_of(tmp_path / "old.safetensors").encode(["fox"])[0], encoder_of(sd15).encode(["fox"])[0])


def test_long_texts_take_more_rows_and_the_first_one_gives_the_pooled_vector(sdxl):
    encoder = encoder_of(sdxl)
    [tokens_1SD], [pooled_1P] = encoder.encode([LONG]), encoder.pooled([LONG])
    begin, rest = " ".join(["fox"] * 75), " ".join(["fox"] * 15)
    assert tokens_1SD.shape[1] == 154
    assert torch.allclose(tokens_1SD, torch.cat(encoder.encode([begin, rest]), 1), atol=1e-6)
    assert torch.allclose(pooled_1P, encoder.pooled([begin])[0], atol=1e-6)


def test_sdxl_is_told_sizes_before_scaling_and_where_the_middle_was_cut():
    # 2000 x 1000 covers 1024 x 768 at 1536 x 768, of which 256 px on the left are cut off
    assert sizes_of([((2000, 1000), (1024, 768))]).tolist() == [[1000, 2000, 0, 256, 768, 1024]]
    assert sizes_of([((512, 512), (512, 512))]).tolist() == [[512, 512, 0, 0, 512, 512]]


def without(sdxl, tmp_path, part):
    copy = shutil.copytree(sdxl, tmp_path / "copy")
    shutil.rmtree(copy / part)
    return copy


@pytest.mark.parametrize(("part", "message"), [("text_encoder_2", "text_encoder_2/config.json"),
                                               ("tokenizer_2", "vocab.json")])
def test_folders_without_a_part_are_refused(sdxl, tmp_path, part, message):
    with pytest.raises(TextEncoderFileError, match=message):
        encoder_of(without(sdxl, tmp_path, part))


def drop(tensors, end):
    del tensors[next(key for key in tensors if key.endswith(end))]


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: drop(t, "embedders.1.model.ln_final.bias"), "1 missing keys .text_model.final_layer_norm.bias"),
    (lambda t: drop(t, "embedders.0.transformer.text_model.embeddings.token_embedding.weight"), "holds no CLIP text encoder"),
    (lambda t: t.update({"conditioner.embedders.1.model.extra.weight": torch.zeros(2)}), "1 unexpected keys .extra.weight"),
    (lambda t: next(v for k, v in t.items() if k.endswith("ln_final.weight")).fill_(torch.nan), "holds NaN"),
])
def test_incomplete_or_damaged_text_encoders_are_refused(sdxl, tmp_path, change, message):
    tensors = load_file(as_single_file(sdxl, tmp_path / "whole.safetensors"))
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(TextEncoderFileError, match=message):
        encoder_of(tmp_path / "bad.safetensors")


def test_a_tokenizer_of_another_vocabulary_is_refused(sd15, tmp_path):
    copy = shutil.copytree(sd15, tmp_path / "copy")
    words = json.loads((copy / "tokenizer" / "vocab.json").read_text())
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps({**words, "more": 60000}))
    with pytest.raises(TextEncoderFileError, match="has ids up to 60000, the CLIP text encoder of .* a vocabulary of 49408"):
        encoder_of(copy)


def test_half_a_character_is_refused(sd15):
    with pytest.raises(TextInputError, match="half of a character at position 4"):
        encoder_of(sd15).encode(["fox \ud83e"])


@torch.no_grad()
def test_a_weight_moves_a_token_away_from_the_empty_prompts(sd15):
    encoder = encoder_of(sd15)
    [found] = encoder.encode_weighted(["a (red:1.5) fox"])
    plain, empty = encoder.encode(["a red fox", ""])
    wanted = plain.clone()
    wanted[:, 2] = empty[:, 2] + 1.5 * (plain[:, 2] - empty[:, 2])
    assert torch.allclose(found, wanted, atol=1e-5) and (found - plain).abs().max() > 0.01
    assert torch.equal(encoder.encode_weighted(["a red fox"])[0], plain)
