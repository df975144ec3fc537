"""One character, many prompts: a list of prompts of any lengths is a batch in which each has the tokens that it has alone."""

from __future__ import annotations

import comfy.hooks
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import pytest
import torch
from graphs import run_graph
from tiny_models import WIDTH, empty_latent, fill_, noise, save_t5, wire
from token_check import Answer, CallSpy, check

PROMPTS = ["a red cat", "dog", "a (red:1.4) dog a blue cat", "blue"]
PICTURES = len(PROMPTS)


@pytest.fixture(scope="module")
def clip(run_node, base_directory):
    """The CLIP of Load ELLA Text Encoder, with a small T5."""
    save_t5(base_directory / "models" / "text_encoders" / "t5-of-story")
    return run_node("EMMALoadTextEncoder", text_encoder_name="t5-of-story", dtype="auto", empty_prompt="natural length")[0]


@pytest.fixture(scope="module")
def own_clip():
    """A checkpoint's own CLIP: the host's classes and vocabulary, with a small network."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
             "hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": WIDTH,
             "eos_token_id": 49407, "layer_norm_eps": 1e-5}

    class Network(comfy.sd1_clip.SDClipModel):
        def __init__(self, device, dtype, model_options):
            super().__init__(device=device, dtype=torch.float32, textmodel_json_config=sizes, layer_norm_hidden_state=True)

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device, dtype, model_options):
            super().__init__(device=device, dtype=dtype, model_options=model_options, name="l", clip_model=Network)

    made = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, Model))
    fill_(made.cond_stage_model, 91)
    return made


@pytest.fixture(scope="module")
def core(pack_import):
    return pack_import("emma_core.model.assembly")


@pytest.fixture(scope="module")
def mismatch(pack_import):
    return pack_import("emma_core.errors").ConnectorMismatchError


@pytest.fixture(scope="module")
def reference_mismatch(pack_import):
    return pack_import("emma_core.errors").ReferenceMismatchError


@pytest.fixture(scope="module")
def listed(run_node, clip):
    """CONDITIONING of the list."""
    return run_node("EMMAPromptList", clip=clip, prompts="\n".join(PROMPTS))[0]


@pytest.fixture(scope="module")
def alone(run_node, clip):
    """CONDITIONING of each prompt, from the stock node."""
    return [run_node("CLIPTextEncode", clip=clip, text=prompt)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def negative(run_node, clip):
    return run_node("CLIPTextEncode", clip=clip, text="")[0]


class Rows:
    """An answer for each row."""

    def __init__(self, answers):
        self._answers = list(answers)

    def at(self, timestep, row):
        return self._answers[row].at(timestep)


def frames_of(reference, core, module):
    """An assembly of each frame's reference alone."""
    return [core.Assembly([core.Reference(module.module, {name: tensor[row:row + 1]
                                                          for name, tensor in reference.features.items()}, 0.8)])
            for row in range(reference.rows)]


# --- the node ------------------------------------------------------------------------------------------------------

def test_each_row_is_the_prompt_alone_bit_for_bit(listed, alone):
    (text_FND, options), = listed
    lengths = [conditioning[0][0].shape[1] for conditioning in alone]
    assert len(set(lengths)) > 2 and text_FND.shape[:2] == (PICTURES, max(lengths))
    for row, conditioning in enumerate(alone):
        assert torch.equal(text_FND[row:row + 1, :lengths[row]], conditioning[0][0])
        assert not text_FND[row, lengths[row]:].any()
    assert options["pooled_output"] is None


def test_lines_prefix_and_suffix(run_node, clip):
    conditioning, count, texts = run_node("EMMAPromptList", clip=clip, prompts="\n a cat \r\n\n  \ndog\n", prefix=" red ",
                                          suffix=", blue")
    assert texts == ["red a cat, blue", "red dog, blue"] and count == 2 and conditioning[0][0].shape[0] == 2
    assert run_node("EMMAPromptList", clip=clip, prompts="dog", suffix="blue")[2] == ["dog blue"]


def test_texts_come_out_one_by_one(host_nodes, pack):
    assert host_nodes.NODE_CLASS_MAPPINGS["EMMAPromptList"].OUTPUT_IS_LIST == [False, False, True]


def test_empty_list_is_refused(run_node, clip, pack_import):
    with pytest.raises(pack_import("emma_core.errors").TextInputError, match="holds no prompts; wanted one per line"):
        run_node("EMMAPromptList", clip=clip, prompts=" \n\n")


def test_missing_clip_is_refused(run_node, mismatch):
    with pytest.raises(mismatch, match="there is no CLIP; wanted that of Load ELLA Text Encoder or of a checkpoint"):
        run_node("EMMAPromptList", clip=None, prompts="a cat")


# --- tokens --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("references", [0, 1, PICTURES])
def test_tokens_of_a_row_are_those_of_the_prompt_alone_bit_for_bit(tiny, ella, module, listed, alone, pack_import, core,
                                                                   references):
    payload, host = pack_import("host.payload"), pack_import("host.conditioning")
    reference = tiny.reference(module, references=max(1, references))
    assembly = tiny.assemble((module, reference, 0.8)) if references else payload.HostAssembly()
    together = host.connect_conditioning(ella, listed, assembly, None)[0][1]["model_conds"]["emma"].cond
    schedule = [999.0, 800.0, 613.0, 400.0, 201.0, 37.0]
    for row, conditioning in enumerate(alone):
        mine = assembly
        if references > 1:
            mine = payload.HostAssembly(frames_of(reference, core, module)[row].references, assembly.patchers)
        single = host.connect_conditioning(ella, conditioning, mine, None)[0][1]["model_conds"]["emma"].cond
        for timestep in (*schedule, 500.0):
            [found] = together.tokens(torch.full((PICTURES,), timestep), schedule, None)
            assert found.shape[0] == PICTURES
            assert torch.equal(found[row:row + 1], *single.tokens(torch.tensor([timestep]), schedule, None))


@pytest.fixture(scope="module")
def story(tiny, model, ella, module, listed, alone, negative, core):
    """One character over many prompts, connected, with the answers that it must give."""
    reference = tiny.reference(module)
    connected, positive, negative_out = tiny.connecting.connect(
        model, ella, listed, negative, tiny.assemble((module, reference, 0.8)), None, None)
    assembly = core.Assembly([core.Reference(module.module, reference.features, 0.8)])
    rows = Rows(Answer(ella.connector, conditioning[0][0], assembly) for conditioning in alone)
    return connected, positive, negative_out, {0: [rows], 1: [Answer(ella.connector, negative[0][0])]}


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "dpmpp_sde"])
def test_one_character_over_many_prompts(spy, ksample, story, sampler):
    connected, positive, negative, answers = story
    ksample(connected, positive, negative, latent=empty_latent(PICTURES), sampler_name=sampler)
    check(spy.calls, answers)
    assert all(call.groups == (1, 0) for call in spy.calls), "positive and negative sample in one pass"
    rows = [answers[0][0].at(500.0, row) for row in (0, 1)]
    assert not torch.allclose(*rows, rtol=1e-2)


def test_prompts_and_references_per_picture(spy, tiny, model, ella, module, ksample, listed, alone, negative, core):
    reference = tiny.reference(module, references=PICTURES)
    connected, positive, negative_out = tiny.connecting.connect(
        model, ella, listed, negative, tiny.assemble((module, reference, 0.8)), None, None)
    ksample(connected, positive, negative_out, latent=empty_latent(PICTURES))
    rows = Rows(Answer(ella.connector, conditioning[0][0], assembly)
                for conditioning, assembly in zip(alone, frames_of(reference, core, module), strict=True))
    check(spy.calls, {0: [rows], 1: [Answer(ella.connector, negative[0][0])]})


def test_a_list_of_negatives(spy, tiny, model, ella, ksample, listed, alone):
    connected, positive, negative = tiny.connecting.connect(model, ella, alone[0], listed, None, None, None)
    ksample(connected, positive, negative, latent=empty_latent(PICTURES))
    check(spy.calls, {0: [Answer(ella.connector, alone[0][0][0])],
                      1: [Rows(Answer(ella.connector, conditioning[0][0]) for conditioning in alone)]})


def test_windows_get_the_prompts_of_their_frames(story):
    payload = story[1][0][1]["model_conds"]["emma"].cond
    [whole] = payload.tokens(torch.full((PICTURES,), 500.0), [], None)
    assert torch.equal(*payload.tokens(torch.full((2,), 500.0), [], [1, 3]), whole[[1, 3]])


def test_another_batch_is_refused(ksample, story, reference_mismatch):
    with pytest.raises(reference_mismatch, match="holds 4 prompts, the latent batch has 3 pictures. Wire the count of"):
        ksample(*story[:3], latent=empty_latent(3))


def test_other_numbers_of_references_are_refused(tiny, model, ella, module, listed, negative, reference_mismatch):
    assembly = tiny.assemble((module, tiny.reference(module, references=3)))
    with pytest.raises(reference_mismatch, match="3 references or strengths for 4 frames; wanted 1 or 4. Use one for all"):
        tiny.connecting.connect(model, ella, listed, negative, assembly, None, None)


def test_gate_map_draws_the_first_prompt(run_node, tiny, ella, module, listed, alone):
    """Without the padding of the longest."""
    assembly = tiny.assemble((module, tiny.reference(module)))
    maps = [run_node("EMMAGateMap", ella=ella, assembly=assembly, conditioning=text, timestep=500)[0] for text in
            (listed, alone[0], [[listed[0][0], {}]])]
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


def test_training_reads_each_text_at_its_length(listed, alone, pack_import):
    texts = pack_import("host.training_set")._entries([listed], "positive")
    assert len(texts) == PICTURES
    assert all(torch.equal(text, conditioning[0][0]) for text, conditioning in zip(texts, alone, strict=True))


# --- stock nodes between -------------------------------------------------------------------------------------------

def average(run_node, to, other):
    return run_node("ConditioningAverage", conditioning_to=to, conditioning_from=other, conditioning_to_strength=0.7)[0]


@pytest.mark.parametrize("node", [
    lambda run_node, text, other: average(run_node, text, other),
    lambda run_node, text, other: average(run_node, other, text),
    lambda run_node, text, other: run_node("ConditioningZeroOut", conditioning=text)[0],
    lambda run_node, text, other: run_node("ConditioningSetMask", conditioning=text, mask=torch.ones(1, 64, 64), strength=1.0,
                                           set_cond_area="default")[0],
], ids=["average", "average into another", "zero out", "set mask"])
def test_nodes_before_the_connector_act_on_each_prompt(tiny, ella, run_node, listed, alone, pack_import, node):
    """As they act on the prompt alone, bit for bit."""
    rows = pack_import("host.text_rows")
    other = tiny.text(3, seed=77)
    (text_FND, options), = node(run_node, listed, other)
    found = rows.text_rows(text_FND, options.get(rows.LENGTHS))
    wanted = [node(run_node, conditioning, other)[0][0] for conditioning in alone]
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_concat_is_refused(run_node, tiny, model, ella, listed, negative, mismatch):
    longer = run_node("ConditioningConcat", conditioning_to=listed, conditioning_from=listed)[0]
    with pytest.raises(mismatch, match=r"prompt list of 4 texts with up to 7 tokens was changed to shape \(4, 14, 24\) \(by "
                                       "Conditioning Concat.*Write what shall be added into the prefix or suffix"):
        tiny.connecting.connect(model, ella, longer, negative, None, None, None)


def test_average_after_the_connector_is_refused(run_node, tiny, ksample, story, mismatch):
    connected, positive, negative, _ = story
    with pytest.raises(mismatch, match="was changed after EMMA Connector.*Put that node before EMMA Connector"):
        ksample(connected, average(run_node, positive, tiny.clip_text(8)), negative, latent=empty_latent(PICTURES))


def test_combined_lists_areas_and_controlnet(spy, run_node, tiny, model, ella, ksample, listed, alone, negative):
    """A list and a single prompt in the same batch, each in its half, before a ControlNet."""
    place = {"width": 32, "height": 64, "y": 0, "strength": 1.0}
    left = run_node("ConditioningSetArea", conditioning=listed, x=0, **place)[0]
    right = run_node("ConditioningSetArea", conditioning=alone[1], x=32, **place)[0]
    both = run_node("ConditioningCombine", conditioning_1=left, conditioning_2=right)[0]
    connected, positive, negative_out = tiny.connecting.connect(model, ella, both, negative, None, None, None)
    controlnet = tiny.controlnet()
    positive, negative_out = run_node(
        "ControlNetApplyAdvanced", positive=positive, negative=negative_out, control_net=controlnet,
        image=noise((1, 64, 64, 3), 37).sigmoid(), strength=0.7, start_percent=0.0, end_percent=1.0)
    with CallSpy(controlnet.control_model) as control_spy:
        ksample(connected, positive, negative_out, latent=empty_latent(PICTURES))
    answers = {0: [Rows(Answer(ella.connector, conditioning[0][0]) for conditioning in alone),
                   Answer(ella.connector, alone[1][0][0])], 1: [Answer(ella.connector, negative[0][0])]}
    check(spy.calls, answers)
    for control, call in zip(control_spy.calls, spy.calls, strict=True):
        assert torch.equal(control.context_BSW, call.context_BSW) and torch.equal(control.timestep_B, call.timestep_B)


def test_hooks_of_the_text_encoder_make_entries_of_all_prompts(run_node, clip):
    keyframes = run_node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)[0]
    keyframes = run_node("CreateHookKeyframe", strength_mult=0.2, start_percent=0.5, prev_hook_kf=keyframes)[0]
    hooks = run_node("SetHookKeyframes", hooks=comfy.hooks.create_hook_lora(lora={}, strength_model=1.0, strength_clip=1.0),
                     hook_kf=keyframes)[0]
    hooked = run_node("SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=True, hooks=hooks)[0]
    conditioning = run_node("EMMAPromptList", clip=hooked, prompts="a red cat\ndog")[0]
    single = run_node("CLIPTextEncode", clip=hooked, text="a red cat")[0]
    assert len(conditioning) == len(single) == 2
    for entry, one in zip(conditioning, single, strict=True):
        assert entry[0].shape[0] == 2 and torch.equal(entry[0][:1, :one[0].shape[1]], one[0])
        assert [entry[1][key] for key in ("clip_start_percent", "clip_end_percent")] == [
            one[1][key] for key in ("clip_start_percent", "clip_end_percent")]


# --- ELLA+CLIP -----------------------------------------------------------------------------------------------------

def test_own_clip_gives_each_prompt_as_alone(run_node, own_clip):
    (text_FND, options), = run_node("EMMAPromptList", clip=own_clip, prompts="\n".join(PROMPTS))[0]
    for row, prompt in enumerate(PROMPTS):
        (single_1ND, single), = run_node("CLIPTextEncode", clip=own_clip, text=prompt)[0]
        assert torch.equal(text_FND[row:row + 1], single_1ND)
        assert torch.equal(options["pooled_output"][row:row + 1], single["pooled_output"])
    assert not torch.allclose(text_FND[0], text_FND[1], rtol=1e-2)


def test_long_prompts_of_a_clip_give_the_others_empty_chunks(run_node, own_clip, caplog):
    prompts = ["a cat", "a red dog, " * 40]
    (text_FND, _), = run_node("EMMAPromptList", clip=own_clip, prompts="\n".join(prompts))[0]
    alone = [run_node("CLIPTextEncode", clip=own_clip, text=prompt)[0][0][0] for prompt in (*prompts, "")]
    assert alone[1].shape[1] == text_FND.shape[1] > 77
    assert torch.equal(text_FND[1:], alone[1]) and torch.equal(text_FND[:1, :77], alone[0])
    assert torch.equal(text_FND[:1, 77:154], alone[2])
    assert "the shorter prompts get empty chunks" in caplog.text


def test_ella_and_clip_of_the_same_list(spy, run_node, tiny, model, ella, ksample, own_clip, listed, alone, negative):
    clips = run_node("EMMAPromptList", clip=own_clip, prompts="\n".join(PROMPTS))[0]
    clip_negative = run_node("CLIPTextEncode", clip=own_clip, text="")[0]
    connected, positive, negative_out = tiny.connecting.connect(model, ella, listed, negative, None, clips, clip_negative)
    ksample(connected, positive, negative_out, latent=empty_latent(PICTURES))
    rows = Rows(Answer(ella.connector, conditioning[0][0], appended=clips[0][0][row:row + 1])
                for row, conditioning in enumerate(alone))
    check(spy.calls, {0: [rows], 1: [Answer(ella.connector, negative[0][0], appended=clip_negative[0][0])]})


def test_clip_of_another_list_is_refused(run_node, tiny, model, ella, own_clip, listed, negative, mismatch):
    clips = run_node("EMMAPromptList", clip=own_clip, prompts="a cat\na dog\na bird")[0]
    with pytest.raises(mismatch, match="holds 3 prompts for 4 prompts or frames of T5; wanted 1 or 4. Encode the same list"):
        tiny.connecting.connect(model, ella, listed, negative, None, clips, None)


def test_one_prompt_is_as_the_stock_node_gives_it(spy, run_node, tiny, model, ella, ksample, clip, alone, negative):
    one = run_node("EMMAPromptList", clip=clip, prompts=PROMPTS[0])[0]
    assert torch.equal(one[0][0], alone[0][0][0]) and one[0][1].keys() == alone[0][0][1].keys()
    wired = wire(tiny, model, ella, one, negative)
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(3))
    check(spy.calls, wired.answers)


# --- the server ----------------------------------------------------------------------------------------------------

def test_story_runs_on_the_server(server):
    model, clip, vae, ella, face, encoder = (["1", slot] for slot in (0, 1, 2, 3, 5, 6))
    graph = {
        "1": ("EMMAPlayground", {}),
        "2": ("EmptyImage", {"width": 96, "height": 96, "batch_size": 1, "color": 0x8090A0}),
        "3": ("EMMAEncodeReference", {"module": face, "encoder": encoder, "image": ["2", 0], "combine": "concat"}),
        "4": ("EMMAAssembleModules", {"module": face, "reference": ["3", 0], "strength": 1.0, "start_percent": 0.0,
                                      "end_percent": 1.0}),
        "5": ("EMMAPromptList", {"clip": clip, "prompts": "astronaut\ncook\n\nsinger on a stage", "prefix": "woman"}),
        "6": ("CLIPTextEncode", {"clip": clip, "text": ""}),
        "7": ("EMMAConnector", {"model": model, "ella": ella, "positive": ["5", 0], "negative": ["6", 0],
                                "assembly": ["4", 0]}),
        "8": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": ["5", 1]}),
        "9": ("KSampler", {"model": ["7", 0], "positive": ["7", 1], "negative": ["7", 2], "latent_image": ["8", 0], "seed": 1,
                           "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}),
        "10": ("VAEDecode", {"samples": ["9", 0], "vae": vae}),
        "11": ("SaveImage", {"images": ["10", 0], "filename_prefix": "story"}),
        "12": ("PreviewAny", {"source": ["5", 2]}),
    }
    outputs = run_graph(server, graph)["outputs"]
    assert len(outputs["11"]["images"]) == 3
    assert outputs["12"]["text"] == ["woman astronaut", "woman cook", "woman singer on a stage"]
