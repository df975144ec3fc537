"""An IP-Adapter as teacher in the graph: its prediction, its blocks, what a module learns of it, what it leaves alone."""

from __future__ import annotations

import dataclasses
import json

import comfy.clip_vision
import folder_paths
import peers
import pytest
import torch
from safetensors.torch import save_file
from sd15_layout import ATTENTION_WIDTHS, CLIP_VISION, SD15_UNET, save_ipadapter
from sdxl_layout import ATTENTION_WIDTHS as XL_WIDTHS
from sdxl_layout import SDXL, TOKENS
from tiny_models import TEXT_DIM, WIDTH, call_node, fill_, noise

CPU = (torch.device("cpu"), torch.float32)


class Row:
    """What a teacher is told of a row."""

    def __init__(self, reference: int, strength: float = 1.0):
        self.reference, self.strength, self.target, self.caption = reference, strength, 0, "conditioning 1"


class Many(list):
    """Several values on one input, as a list output of another node gives them."""


@pytest.fixture(scope="module")
def clip_vision(tmp_path_factory):
    config = tmp_path_factory.mktemp("clip_vision") / "config.json"
    config.write_text(json.dumps(CLIP_VISION))
    clip_vision = comfy.clip_vision.ClipVisionModel(str(config))
    fill_(clip_vision.model, 75)
    return clip_vision


def save_plus(path, token_width: int, widths) -> None:
    """An IP-Adapter of the plus kind: a resampler of the CLIP's hidden states, of the sizes that the other pack expects."""
    dim, (inner, heads) = CLIP_VISION["hidden_size"], (1280, 20) if token_width == TOKENS else (token_width, 12)
    shapes = {"latents": (1, 16, inner), "proj_in.weight": (inner, dim), "proj_in.bias": (inner,),
              "proj_out.weight": (token_width, inner), "proj_out.bias": (token_width,), "norm_out.weight": (token_width,),
              "norm_out.bias": (token_width,)}
    for layer in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{layer}.{name}.weight": (inner,), f"layers.{layer}.{name}.bias": (inner,)}
        shapes |= {f"layers.{layer}.0.to_q.weight": (64 * heads, inner), f"layers.{layer}.0.to_kv.weight": (128 * heads, inner),
                   f"layers.{layer}.0.to_out.weight": (inner, 64 * heads), f"layers.{layer}.1.1.weight": (4 * inner, inner),
                   f"layers.{layer}.1.3.weight": (inner, 4 * inner)}
    save_ipadapter(path, token_width, widths)
    from safetensors.torch import load_file

    state = {key: value for key, value in load_file(path).items() if key.startswith("ip_adapter.")}
    state |= {f"image_proj.{key}": noise(shape, 40 + index) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
              + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
              for index, (key, shape) in enumerate(shapes.items())}
    save_file(state, path)


@pytest.fixture(scope="module")
def files(base_directory):
    """Names in models/ipadapter: plain and plus, for the small SD1.5 and the small SDXL."""
    folder = base_directory / "models" / "ipadapter"
    for name, width, widths in (("sd15", WIDTH, ATTENTION_WIDTHS), ("sdxl", TOKENS, XL_WIDTHS)):
        save_ipadapter(folder / f"teacher-{name}.safetensors", width, widths)
        save_plus(folder / f"teacher-plus-{name}.safetensors", width, widths)
    return folder


@pytest.fixture
def teacher(run_node, files, clip_vision):
    def make(name="teacher-sd15.safetensors", **settings):
        return run_node("EMMAIPAdapterTeacher", ip_adapter=name, clip_vision=clip_vision,
                        **{"weight": 0.8, "blocks": "all", **settings})[0]

    return make


def pictures(count: int) -> torch.Tensor:
    """Of the size that the CLIP sees, in whole 8-bit values: preparing them changes nothing. Each has a colour of its own."""
    coloured = noise((count, 224, 224, 3), 76) + 2 * noise((count, 1, 1, 3), 77)
    return (coloured.sigmoid() * 255).round() / 255


def model_of(tiny, name: str):
    return tiny.model(sizes=SD15_UNET) if name == "sd15" else SDXL.patcher(tiny.patcher_for)


def texts_of(pack_import, model):
    """One text of the small SDXL, under the name that the rows call it by."""
    latents = [noise((4, 8, 8), 1)]
    return pack_import("host.own_text").OwnTexts(model, [*SDXL.conditioning(4)], latents, [Row(0).caption])


def predicted(pack_import, model, teacher, rows, name: str, images=None):
    """The teacher's prediction and the plain one, of rows of one latent."""
    denoiser = pack_import("host.denoiser").HostDenoiser(model, *CPU)
    tokens = teacher.tokens([pictures(2) if images is None else images])
    count, beside = len(rows), ()
    own = None
    if name == "sdxl":
        texts = texts_of(pack_import, model)
        own = texts.own_text(torch.arange(1000.0))
        context = texts.tokens(0).expand(count, -1, -1)
        beside = (own.stacked(rows, CPU[0]),)
    else:
        context = noise((1, 8, WIDTH), 5).expand(count, -1, -1)
    seen = (noise((1, 4, 8, 8), 6).expand(count, -1, -1, -1), torch.full((count,), 400), context)
    with torch.no_grad():
        plain = denoiser.predict_noise(*seen, *beside)
        return teacher.target(denoiser, tokens, own, CPU).predict(*seen, rows), plain, denoiser


# the layers in the order of published files, by the host's names
LAYERS = {
    "sd15": [*[("input", n, 0) for n in (1, 2, 4, 5, 7, 8)], *[("output", n, 0) for n in range(3, 12)], ("middle", 0, 0)],
    "sdxl": [*[("input", n, i) for n in (4, 5) for i in range(2)], *[("input", n, i) for n in (7, 8) for i in range(10)],
             *[("output", n, i) for n in range(3) for i in range(10)],
             *[("output", n, i) for n in range(3, 6) for i in range(2)], *[("middle", 0, i) for i in range(10)]],
}


def attention_of(network, layer):
    part, number, index = layer
    blocks = {"input": network.input_blocks, "output": network.output_blocks, "middle": [network.middle_block]}[part]
    transformer = next(one for one in blocks[number] if hasattr(one, "transformer_blocks"))
    return transformer.transformer_blocks[index].attn2


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_attention_is_the_equation_with_the_weights_of_its_number(pack_import, tiny, teacher, name):
    """Z = Attn(Q, K, V) + weight Attn(Q, K', V'), K' and V' of the picture's tokens by the layer's own weights."""
    made, model = teacher(f"teacher-{name}.safetensors"), model_of(tiny, name)
    queries, found = {}, {}
    denoiser_of = pack_import("host.denoiser").HostDenoiser

    class Watched(denoiser_of):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            for layer in LAYERS[name]:
                attention = attention_of(self.network, layer)
                attention.to_q.register_forward_hook(lambda _, arguments, out, layer=layer: queries.__setitem__(layer, out))
                attention.to_out.register_forward_hook(
                    lambda _, arguments, out, layer=layer: found.__setitem__(layer, arguments[0]))

    denoiser, context, beside = Watched(model, *CPU), *text_of(pack_import, model, name)
    own = beside and texts_of(pack_import, model)
    own = own.own_text(torch.arange(1000.0)) if own else None
    with torch.no_grad():
        made.target(denoiser, made.tokens([pictures(1)]), own, CPU).predict(
            noise((1, 4, 8, 8), 6), torch.tensor([400]), context, [Row(0)])
    projection, weights = made.adapter.projection, made.adapter.attention
    width = context.shape[-1]
    tokens = torch.nn.functional.layer_norm(
        (clip_embedding(made) @ projection["proj.weight"].T + projection["proj.bias"]).view(1, 4, width), (width,))
    for number, layer in enumerate(LAYERS[name]):
        attention = attention_of(denoiser.network, layer)

        def attend(keys, values, q=queries[layer], heads=attention.heads):
            split = [one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, keys, values)]
            return torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)

        picture = attend(*(tokens @ weights[f"{2 * number + 1}.to_{part}_ip.weight"].T for part in "kv"))
        wanted = attend(attention.to_k(context), attention.to_v(context)) + 0.8 * picture
        torch.testing.assert_close(found[layer], wanted, rtol=1e-3, atol=1e-4)
        assert picture.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_tokens_of_a_plus_adapter_are_those_of_the_penultimate_layer(teacher, pack_import, name):
    made = teacher(f"teacher-plus-{name}.safetensors")
    hidden = made.encoder.encode_image(pictures(2), crop=True)["penultimate_hidden_states"].cpu()
    with torch.no_grad():
        wanted = pack_import("emma_core.base.ip_adapter").projection_of(made.adapter)(hidden)
    torch.testing.assert_close(torch.stack(made.tokens([pictures(2)])), wanted, rtol=1e-3, atol=1e-4)


def text_of(pack_import, model, name: str):
    """Tokens of a text, and what the model is told beside them."""
    if name == "sd15":
        return noise((1, 8, WIDTH), 5), ()
    texts = texts_of(pack_import, model)
    return texts.tokens(0), (texts.own_text(torch.arange(1000.0)).stacked([Row(0)], CPU[0]),)


def clip_embedding(teacher) -> torch.Tensor:
    return teacher.encoder.encode_image(pictures(1), crop=True)["image_embeds"].cpu()


def test_each_row_sees_its_own_reference_and_dropped_ones_none(pack_import, tiny, teacher):
    found, plain, _ = predicted(pack_import, model_of(tiny, "sd15"), teacher(), [Row(0), Row(1), Row(0, 0.0)], "sd15")
    alone, _, _ = predicted(pack_import, model_of(tiny, "sd15"), teacher(), [Row(1)], "sd15")
    torch.testing.assert_close(found[1], alone[0], rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 2e-4
    torch.testing.assert_close(found[2], plain[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize(("blocks", "inside"), [
    ("style", {"sd15": [*[("input", n) for n in (1, 2, 4, 5)], *[("output", n) for n in range(5, 12)]],
               "sdxl": [("output", 1)]}),
    ("no layout", {"sd15": [*[("input", n) for n in (1, 2, 4, 5)], *[("output", n) for n in range(3, 12)], ("middle", 0)],
                   "sdxl": [*[("input", n) for n in (4, 5, 7)], *[("output", n) for n in range(6)], ("middle", 0)]}),
])
def test_it_acts_in_its_blocks_and_in_no_others(pack_import, tiny, teacher, name, blocks, inside):
    """By the host's names of blocks; the queries of all others see the text alone."""
    made, model = teacher(f"teacher-{name}.safetensors", blocks=blocks), model_of(tiny, name)
    denoiser = pack_import("host.denoiser").HostDenoiser(model, *CPU)
    names = []
    denoiser.with_attention = lambda patches: names.append(list(patches)) or denoiser
    made.target(denoiser, made.tokens([pictures(1)]), None, CPU)
    target = made.target(denoiser, made.tokens([pictures(1)]), None, CPU)
    denoiser.predict_noise = lambda *seen: None
    target.predict(None, None, None, [Row(0)])
    assert sorted({layer[:2] for layer in names[0]}) == sorted(inside[name])
    assert len(names[0]) == sum({"sd15": {}, "sdxl": {("input", 4): 2, ("input", 5): 2, ("output", 3): 2, ("output", 4): 2,
                                                      ("output", 5): 2}}[name].get(block, 10 if name == "sdxl" else 1)
                                for block in inside[name])


@pytest.fixture
def train(run_node, tiny, clip_vision, monkeypatch, tmp_path, pack_import):
    """`train(model, teacher, ...)`: Train EMMA Module on two latents and three references."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    encoder = pack_import("host.encoders").load_playground_reference_encoder()

    def run(model, teacher, **changes):
        settings = {
            "model": model, "latents": {"samples": noise((2, 4, 8, 8), 31)},
            "reference_image": noise((3, 64, 64, 3), 32).sigmoid(), "encoder": encoder, "name": "run",
            "condition": "style", "steps": 20, "batch": 2, "accumulate": 1, "rate": 5e-3,
            "gate_rate": 20.0, "seed": 3, "precision": "fp32", "timestep_power": 0.3, "inverse_snr": 0.0, "average": 0.0,
            "checkpoint_every": 100, "teacher": teacher, **changes,
        }
        settings = {key: value if isinstance(value, Many) else [value] for key, value in settings.items()}
        return run_node("EMMATrainModule", **{key: list(value) for key, value in settings.items()})

    return run


def with_ella(tiny):
    return {"ella": tiny.ella(), "positive": [[noise((1, 5 + index, TEXT_DIM), 40 + index), {}] for index in range(2)]}


@pytest.mark.parametrize("name", ["ella", "sd15", "sdxl"])
def test_a_module_learns_from_it_and_the_model_stays_as_it_is(train, tiny, teacher, name):
    """Over 20 updates, on ELLA and on a checkpoint's own tokens; the same draws without a rate do not fall."""
    made = teacher(f"teacher-{'sdxl' if name == 'sdxl' else 'sd15'}.safetensors", weight=1.5)
    model = model_of(tiny, "sdxl" if name == "sdxl" else "sd15")
    if name == "ella":
        text = with_ella(tiny)
    else:
        text = {"positive": Many(SDXL.conditioning(40 + index) if name == "sdxl" else [[noise((1, 9, WIDTH), 40 + index), {}]]
                                 for index in range(2))}
    text |= {"batch": 1, "rate": 1e-3} if name == "sdxl" else {}  # its 70 attentions take their time
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    options = json.dumps(model.model_options, default=str, sort_keys=True)
    still = train(model, made, name="still", **{**text, "rate": 0.0})[1]["loss"]
    module, losses, _ = train(model, made, name="learning", **text)
    assert sum(losses["loss"][-5:]) < 0.9 * sum(still[-5:])
    assert module.module.config.training["recipe"]["teacher"] == "IP-Adapter"
    assert module.module.config.training["data"]["references"] == 3
    model.detach()
    after = model.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert json.dumps(model.model_options, default=str, sort_keys=True) == options


def test_teachers_that_do_not_fit_are_refused(train, tiny, teacher, pack_import):
    errors = pack_import("emma_core.errors")
    text = with_ella(tiny)
    with pytest.raises(errors.FileError, match="makes tokens of width 2048"):
        train(model_of(tiny, "sd15"), teacher("teacher-sdxl.safetensors"), **text)
    with pytest.raises(errors.TrainingConfigError, match="teacher and teacher_model are both wired"):
        train(model_of(tiny, "sd15"), teacher(), teacher_model=model_of(tiny, "sd15"),
              teacher_positive=[[noise((1, 8, WIDTH), 60), {}]], **text)
    with pytest.raises(errors.FileError, match="unexpected keys"):
        train(tiny.model(), teacher(), **text)
    with pytest.raises(errors.FileError, match="was not found for the IP-Adapter"):
        teacher("none.safetensors")


def test_its_settings_make_another_run(train, tiny, teacher, tmp_path):
    text, model = with_ella(tiny), model_of(tiny, "sd15")
    for settings in ({}, {"blocks": "style"}, {"weight": 0.5}):
        train(model, teacher(**settings), steps=1, **text)
    train(model, teacher(), steps=1, **text)
    assert len(list((tmp_path / "emma_training").iterdir())) == 3


@pytest.fixture(scope="module")
def ipadapter_plus(host_nodes, pack, host_path):
    """ComfyUI_IPAdapter_plus: what users draw with an IP-Adapter by."""
    with peers.loaded(host_nodes, host_path, "ComfyUI_IPAdapter_plus"):
        yield host_nodes


# ours -> theirs; without layout is what they call strong style
WEIGHT_TYPES = {"all": "linear", "style": "style transfer", "no layout": "strong style transfer"}


def by_the_other_pack(nodes, pack_import, model, teacher, images, name: str) -> torch.Tensor:
    """What IPAdapter Advanced makes of a picture on this MODEL, on the latent and the text of `predicted`."""
    ipadapter = call_node(nodes, "IPAdapterModelLoader", ipadapter_file=teacher.adapter.layout.name)[0]
    adapted = call_node(nodes, "IPAdapterAdvanced", model=model, ipadapter=ipadapter, clip_vision=teacher.encoder, image=images,
                        weight=teacher.weight, weight_type=WEIGHT_TYPES[teacher.blocks], combine_embeds="concat", start_at=0.0,
                        end_at=1.0, embeds_scaling="V only")[0]
    denoiser, (context, beside) = pack_import("host.denoiser").HostDenoiser(adapted, *CPU), text_of(pack_import, model, name)
    with torch.no_grad():
        return denoiser.predict_noise(noise((1, 4, 8, 8), 6), torch.tensor([400]), context, *beside)


def without_middle(teacher, name: str):
    """The same teacher, whose image attention says nothing in the middle block."""
    silent = [f"{2 * number + 1}.to_v_ip.weight" for number, layer in enumerate(LAYERS[name]) if layer[0] == "middle"]
    weights = {key: torch.zeros_like(value) if key in silent else value for key, value in teacher.adapter.attention.items()}
    return dataclasses.replace(teacher, adapter=dataclasses.replace(teacher.adapter, attention=weights))


# plus-face files have the layout of plus
@pytest.mark.parametrize(("file", "blocks"), [
    *[(file, "all") for file in ("teacher-sd15", "teacher-plus-sd15", "teacher-sdxl", "teacher-plus-sdxl")],
    *[(file, blocks) for file in ("teacher-plus-sd15", "teacher-sdxl") for blocks in ("style", "no layout")],
])
def test_beside_ipadapter_plus_it_differs_by_the_middle_block_alone(ipadapter_plus, pack_import, tiny, teacher, file, blocks):
    """That pack wants the host's block ("middle", 1), and the host has ("middle", 0) alone: its middle block does nothing."""
    name = file.rpartition("-")[2]
    made, model = teacher(f"{file}.safetensors", blocks=blocks), model_of(tiny, name)
    theirs = by_the_other_pack(ipadapter_plus, pack_import, model, made, pictures(1), name)
    whole, plain, _ = predicted(pack_import, model, made, [Row(0)], name, pictures(1))
    without, _, _ = predicted(pack_import, model, without_middle(made, name), [Row(0)], name, pictures(1))
    assert (theirs - plain).abs().max() > 0.02
    torch.testing.assert_close(without, theirs, rtol=0, atol=1e-5)
    if blocks == "style":  # which has no middle block
        torch.testing.assert_close(whole, theirs, rtol=0, atol=1e-5)
    else:
        assert (whole - theirs).abs().max() > 1e-3


def test_pictures_of_other_sizes_differ_from_ipadapter_plus_by_their_resizing_alone(ipadapter_plus, pack_import, tiny, teacher):
    """Ours are resized by Pillow and to whole pixels below, as where the adapters were trained; of the same square both say the
    same.
    """
    pictures_of, framing = pack_import("emma_core.encoders.pictures"), pack_import("emma_core.encoders.options").Framing()
    made, model = teacher("teacher-plus-sd15.safetensors", blocks="style"), model_of(tiny, "sd15")
    image = noise((1, 512, 384, 3), 78).sigmoid()  # its long side becomes 298 or 299 pixels
    ours, _, _ = predicted(pack_import, model, made, [Row(0)], "sd15", image)
    preparation = pack_import("host.encoders").as_encoder(made.encoder).encoder.preparation
    square = pictures_of.prepare_pictures(image, None, preparation, framing).movedim(1, -1)
    same, resized = (by_the_other_pack(ipadapter_plus, pack_import, model, made, one, "sd15") for one in (square, image))
    torch.testing.assert_close(ours, same, rtol=0, atol=1e-5)
    assert (ours - resized).abs().max() > 1e-4
