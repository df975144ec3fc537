"""LoRAs and teachers: a LoRA or an IP-Adapter changes the prediction as its equation says, and the base stays as it is."""

import json
import logging
import shutil

import pytest
import torch
from checkpoints_with_text import POOLED, WIDTHS, save_checkpoint
from clip_towers import TINY, random_tower, transformers_model
from safetensors.torch import load_file, save_file
from test_training_backbones import diffusers_lora, inputs, kohya_lora, lora_layers, spoil

from emma_core.base.backbones import load_backbone
from emma_core.base.config import BaseConfig
from emma_core.base.own_text import sizes_of
from emma_core.base.schedule import alphas_cumprod
from emma_core.encoders.families import CLIP_TOWERS
from emma_core.errors import EmmaWarning, FileError, ReferenceMismatchError, TrainingConfigError
from emma_core.training.config import TeacherConfig
from emma_core.training.lora_teacher import LoraTeacher
from emma_core.training.own_latents import sample_latents
from emma_core.training.teachers import load_teacher

WIDTH = 128


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BaseConfig())


@pytest.fixture
def lora(tmp_path, backbone):
    save_file(kohya_lora(lora_layers(backbone.unet)), tmp_path / "kohya.safetensors")
    save_file(diffusers_lora(lora_layers(backbone.unet)), tmp_path / "diffusers.safetensors")
    return tmp_path / "kohya.safetensors"


@pytest.fixture
def image_encoder(tmp_path, monkeypatch):
    monkeypatch.setitem(CLIP_TOWERS, "clip-tiny", TINY)
    (tmp_path / "image_encoder").mkdir()
    save_file(random_tower(TINY), tmp_path / "image_encoder" / "model.safetensors")
    return tmp_path / "image_encoder"


def attention_shapes(unet) -> dict[str, tuple[int, ...]]:
    layers = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    return {f"ip_adapter.{2 * index + 1}.to_{part}_ip.weight": tuple(unet.state_dict()[f"{layer}.to_{part}.weight"].shape)
            for index, layer in enumerate(layers) for part in "kv"}


def plain_adapter(unet, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Random weights in the layout of ip-adapter_sd15.safetensors."""
    shapes = attention_shapes(unet) | {
        "image_proj.proj.weight": (4 * width, TINY.projected), "image_proj.proj.bias": (4 * width,),
        "image_proj.norm.weight": (width,), "image_proj.norm.bias": (width,)}
    return filled(shapes)


def plus_adapter(unet, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Random weights in the layout of ip-adapter-plus_sd15.safetensors."""
    inner, dim, mlp = 64, TINY.hidden, 256
    shapes = {"latents": (1, 5, inner), "proj_in.weight": (inner, dim), "proj_in.bias": (inner,),
              "proj_out.weight": (width, inner), "proj_out.bias": (width,), "norm_out.weight": (width,),
              "norm_out.bias": (width,)}
    for layer in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{layer}.{name}.weight": (inner,), f"layers.{layer}.{name}.bias": (inner,)}
        shapes |= {f"layers.{layer}.0.to_q.weight": (64, inner), f"layers.{layer}.0.to_kv.weight": (128, inner),
                   f"layers.{layer}.0.to_out.weight": (inner, 64), f"layers.{layer}.1.1.weight": (mlp, inner),
                   f"layers.{layer}.1.3.weight": (inner, mlp)}
    return filled(attention_shapes(unet) | {f"image_proj.{key}": shape for key, shape in shapes.items()})


def filled(shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {key: torch.randn(shape, generator=generator) * 0.2 + (1 if "norm" in key and key.endswith("weight") else 0)
            for key, shape in shapes.items()}


def picture(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.rand(rows, 40, 28, 3, generator=torch.Generator().manual_seed(seed))


def adapter_config(tmp_path, image_encoder, tensors, **changes) -> TeacherConfig:
    save_file(tensors, tmp_path / "ip.safetensors")
    return TeacherConfig(ip_adapter=str(tmp_path / "ip.safetensors"), ip_image_encoder=str(image_encoder), **changes)


def test_a_lora_is_merged_as_its_equation_says_in_both_layouts(tmp_path, backbone):
    layers = lora_layers(backbone.unet)
    kohya = kohya_lora(layers)
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(diffusers_lora(layers), tmp_path / "diffusers.safetensors")
    wanted = {key: value.clone() for key, value in backbone.unet.state_dict().items()}
    for name in layers:
        key = f"lora_unet_{name.replace('.', '_')}"
        up, down = kohya[f"{key}.lora_up.weight"], kohya[f"{key}.lora_down.weight"]
        # W + alpha / rank * up down, with alpha 1 and rank 2
        wanted[f"{name}.weight"] += 0.5 * (up.flatten(1) @ down.flatten(1)).view_as(wanted[f"{name}.weight"])
    for file in ("kohya", "diffusers"):
        merged = load_backbone(BaseConfig(lora=str(tmp_path / f"{file}.safetensors")))
        found = merged.unet.state_dict()
        assert found.keys() == wanted.keys() and merged.name == f"playground + {file}.safetensors"
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
        assert (merged.predict_noise(*inputs(WIDTH)) - backbone.predict_noise(*inputs(WIDTH))).abs().max() > 1e-2
        assert not any(value.requires_grad for value in merged.parameters())


def test_an_alpha_in_the_metadata_counts(tmp_path, backbone):
    from peft import LoraConfig

    unet = load_backbone(BaseConfig()).unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False), "own")
    with torch.no_grad():
        wanted = unet(*inputs(WIDTH), return_dict=False)[0]
    unet.save_lora_adapter(tmp_path, adapter_name="own", weight_name="bare.safetensors")
    tensors = {f"unet.{key}": value for key, value in load_file(tmp_path / "bare.safetensors").items()}
    config = {f"unet.{key}": value for key, value in
              {"r": 2, "lora_alpha": 8, "target_modules": ["to_q"]}.items()}
    save_file(tensors, tmp_path / "own.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    found = load_backbone(BaseConfig(lora=str(tmp_path / "own.safetensors"))).predict_noise(*inputs(WIDTH))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - backbone.predict_noise(*inputs(WIDTH))).abs().max() > 1e-3


BAD_LORAS = [
    pytest.param({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (2, 2)}, "is no plain LoRA", id="LoHa"),
    pytest.param({"unet.mid_block.attentions.0.proj_in.lora_magnitude_vector": (2,)}, "is no plain LoRA", id="DoRA"),
    pytest.param({"conv_in.weight": (2, 2)}, "has no weights for a UNet", id="no LoRA"),
    pytest.param({"unet.conv_up.lora_A.weight": (2, 4), "unet.conv_up.lora_B.weight": (4, 2)}, "no such layer", id="layer"),
    pytest.param({"lora_unet_conv_in.lora_down.weight": (2, 9, 3, 3), "lora_unet_conv_in.lora_up.weight": (64, 2, 1, 1)},
                 r"a layer of shape \(64, 4, 3, 3\)", id="inputs"),
    pytest.param({"lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3), "lora_unet_conv_in.lora_up.weight": (40, 2, 1, 1)},
                 r"a layer of shape \(64, 4, 3, 3\)", id="outputs"),
    pytest.param({"lora_unet_conv_in.lora_down.weight": (2, 4, 3, 3)}, "has down of lora_unet_conv_in alone", id="half"),
]


@pytest.mark.parametrize(("shapes", "message"), BAD_LORAS)
def test_loras_that_do_not_fit_are_refused(tmp_path, shapes, message):
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(FileError, match=message):
        load_backbone(BaseConfig(lora=str(tmp_path / "bad.safetensors")))


def test_a_lora_with_nan_is_refused(tmp_path, backbone):
    tensors = kohya_lora(lora_layers(backbone.unet))
    spoil(tensors, "lora_up.weight")
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(FileError, match="holds NaN"):
        load_backbone(BaseConfig(lora=str(tmp_path / "bad.safetensors")))


def test_the_text_encoder_part_of_a_lora_is_left_out_with_a_warning(tmp_path, backbone):
    layers = lora_layers(backbone.unet)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1": (8, 8)}
    extra = {key.replace("lora_unet_", ""): value for key, value in kohya_lora(text).items()}
    save_file(kohya_lora(layers), tmp_path / "unet.safetensors")
    save_file(kohya_lora(layers) | extra, tmp_path / "both.safetensors")
    with pytest.warns(EmmaWarning, match="also changes the CLIP text encoder"):
        both = load_backbone(BaseConfig(lora=str(tmp_path / "both.safetensors")))
    alone = load_backbone(BaseConfig(lora=str(tmp_path / "unet.safetensors")))
    assert torch.equal(both.predict_noise(*inputs(WIDTH)), alone.predict_noise(*inputs(WIDTH)))


def test_no_teacher_is_none_and_two_are_refused(lora, backbone):
    assert load_teacher(TeacherConfig(), backbone) is None
    with pytest.raises(TrainingConfigError, match="both given"):
        load_teacher(TeacherConfig(lora=str(lora), ip_adapter=str(lora)), backbone)
    with pytest.raises(TrainingConfigError, match="needs teacher.ip_image_encoder"):
        load_teacher(TeacherConfig(ip_adapter=str(lora)), backbone)
    with pytest.raises(TrainingConfigError, match="teacher.ip_image_encoder = 'none' does not exist"):
        load_teacher(TeacherConfig(ip_adapter=str(lora), ip_image_encoder="none"), backbone)
    with pytest.raises(TrainingConfigError, match="teacher.lora = 'none.safetensors' does not exist"):
        load_teacher(TeacherConfig(lora="none.safetensors"), backbone)


def test_lora_of_scale_zero_is_the_base_bit_for_bit_and_of_scale_one_is_not(lora, backbone):
    wanted = backbone.predict_noise(*inputs(WIDTH))
    off = load_teacher(TeacherConfig(lora=str(lora), scale=0.0), backbone)
    on = load_teacher(TeacherConfig(lora=str(lora)), backbone)
    assert torch.equal(off.predict(*inputs(WIDTH)), wanted)
    assert (on.predict(*inputs(WIDTH)) - wanted).abs().max() > 1e-2
    assert torch.equal(backbone.predict_noise(*inputs(WIDTH)), wanted)


def test_both_layouts_of_a_lora_teach_what_the_merged_base_predicts(lora, backbone):
    merged = load_backbone(BaseConfig(lora=str(lora))).predict_noise(*inputs(WIDTH))
    for path in (lora, lora.with_name("diffusers.safetensors")):
        taught = load_teacher(TeacherConfig(lora=str(path)), backbone).predict(*inputs(WIDTH))
        torch.testing.assert_close(taught, merged, rtol=1e-3, atol=1e-4)


def test_scale_multiplies_the_lora(lora, backbone):
    layers = lora_layers(backbone.unet)
    save_file(kohya_lora(layers, alpha=0.5), lora.with_name("half.safetensors"))
    wanted = load_teacher(TeacherConfig(lora=str(lora.with_name("half.safetensors"))), backbone)
    found = load_teacher(TeacherConfig(lora=str(lora), scale=0.5), backbone)
    torch.testing.assert_close(found.predict(*inputs(WIDTH)), wanted.predict(*inputs(WIDTH)), rtol=1e-4, atol=1e-5)


def test_a_teacher_shares_the_base_and_leaves_it_plain(lora):
    backbone = load_backbone(BaseConfig())
    names = list(backbone.unet.state_dict())
    teacher = load_teacher(TeacherConfig(lora=str(lora)), backbone)
    assert list(backbone.unet.state_dict()) == names
    own = {value.data_ptr() for value in teacher._backbone.unet.parameters()}
    assert {value.data_ptr() for value in backbone.unet.parameters()} <= own
    noised, timestep, context = inputs(WIDTH)
    backbone.predict_noise(noised, timestep, context.requires_grad_()).sum().backward()
    assert context.grad.abs().max() > 0 and not teacher.predict(noised, timestep, context).requires_grad
    assert not any(value.requires_grad for value in teacher._backbone.unet.parameters())


def test_of_several_loras_each_row_is_taught_by_its_own(lora, backbone, tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    save_file(kohya_lora(lora_layers(backbone.unet), alpha=0.5), folder / "ada.safetensors")
    shutil.copyfile(lora, folder / "bob.safetensors")
    both = load_teacher(TeacherConfig(lora=str(folder)), backbone)
    assert both.groups == ("ada", "bob")
    found = both.predict(*inputs(WIDTH), {"lora_B": torch.tensor([1, 0])})
    for row, name in enumerate(("bob", "ada")):
        alone = load_teacher(TeacherConfig(lora=str(folder / f"{name}.safetensors")), backbone)
        torch.testing.assert_close(found[row], alone.predict(*inputs(WIDTH))[row], rtol=1e-4, atol=1e-5)
    assert (found - backbone.predict_noise(*inputs(WIDTH))).abs().amax((1, 2, 3)).min() > 1e-3


def test_a_folder_without_loras_is_refused(tmp_path, backbone):
    with pytest.raises(TrainingConfigError, match="without .safetensors files; wanted a LoRA for each"):
        load_teacher(TeacherConfig(lora=str(tmp_path)), backbone)


def test_an_image_prompt_adds_its_own_attention(tmp_path, image_encoder, backbone):
    tensors = plain_adapter(backbone.unet)
    teacher = load_teacher(adapter_config(tmp_path, image_encoder, tensors, scale=0.7), backbone)
    layer = next(name.removesuffix(".processor") for name in backbone.unet.attn_processors if "attn2" in name)
    seen = []
    for unet in (backbone.unet, teacher._backbone.unet):
        unet.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    reference = teacher.encode_reference(picture(1))
    with torch.no_grad():
        backbone.predict_noise(*inputs(WIDTH))
    teacher.predict(*inputs(WIDTH), reference)
    (query, text_alone), (same_query, found) = seen
    torch.testing.assert_close(query, same_query, rtol=1e-4, atol=1e-5)
    # tokens of the picture: a linear layer to four of them, then LayerNorm
    made = reference["ip_adapter"][:, 0] @ tensors["image_proj.proj.weight"].T + tensors["image_proj.proj.bias"]
    tokens = torch.nn.functional.layer_norm(made.view(2, 4, WIDTH), (WIDTH,), tensors["image_proj.norm.weight"],
                                            tensors["image_proj.norm.bias"])
    attn = backbone.unet.get_submodule(layer)
    heads = [value.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for value in
             (attn.to_q(query), *(tokens @ tensors[f"ip_adapter.1.to_{part}_ip.weight"].T for part in "kv"))]
    added = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    wanted = text_alone + 0.7 * added @ attn.to_out[0].weight.T
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert (found - text_alone).abs().max() > 1e-2


@pytest.mark.parametrize("adapter", [plain_adapter, plus_adapter])
def test_the_reference_is_what_tells_an_ip_adapter(tmp_path, image_encoder, backbone, adapter):
    config = adapter_config(tmp_path, image_encoder, adapter(backbone.unet))
    teacher = load_teacher(config, backbone)
    base = backbone.predict_noise(*inputs(WIDTH))
    first, second = (teacher.predict(*inputs(WIDTH), teacher.encode_reference(picture(seed))) for seed in (1, 2))
    assert (first - second).abs().max() > 1e-4 and (first - base).abs().max() > 1e-2
    assert torch.equal(teacher.predict(*inputs(WIDTH)), base)
    off = load_teacher(adapter_config(tmp_path, image_encoder, adapter(backbone.unet), scale=0.0), backbone)
    torch.testing.assert_close(off.predict(*inputs(WIDTH), off.encode_reference(picture(1))), base, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adapter", [plain_adapter, plus_adapter])
def test_an_ip_adapter_teaches_on_sdxl_with_its_pooled_vector_and_sizes(tmp_path, image_encoder, adapter):
    xl = load_backbone(BaseConfig(str(save_checkpoint(tmp_path / "sdxl"))))
    teacher = load_teacher(adapter_config(tmp_path, image_encoder, adapter(xl.unet, sum(WIDTHS))), xl, text_is_used=True)
    beside = {"text_embeds": torch.randn(2, POOLED, generator=torch.Generator().manual_seed(1)),
              "time_ids": sizes_of([((800, 600), (64, 64)), ((64, 64), (64, 64))])}
    base = xl.predict_noise(*inputs(sum(WIDTHS)), beside)
    reference = teacher.encode_reference(picture(1))
    shown = reference | {"present_B": torch.tensor([True, False])}
    found = teacher.predict(*inputs(sum(WIDTHS)), shown, beside)
    torch.testing.assert_close(found[1], base[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:1], teacher.predict(*inputs(sum(WIDTHS)), reference, beside)[:1], rtol=1e-4, atol=1e-4)
    other = teacher.predict(*inputs(sum(WIDTHS)), reference, beside | {"text_embeds": beside["text_embeds"].flip(0)})
    assert (found[0] - base[0]).abs().max() > 1e-2 and (other[0] - found[0]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ip_adapter_counts_its_own_weights_and_its_image_encoder(tmp_path, image_encoder, backbone, dtype):
    tensors = plus_adapter(backbone.unet)
    teacher = load_teacher(adapter_config(tmp_path, image_encoder, tensors), backbone)
    own = sum(value.numel() for value in tensors.values()) * dtype.itemsize
    encoder = sum(value.nbytes for value in teacher._encoder.model.state_dict().values())
    assert teacher.bytes_beside(dtype) == pytest.approx(own + encoder, rel=0.01)


def test_an_ip_adapter_loads_without_a_word_of_diffusers(tmp_path, image_encoder, backbone, monkeypatch):
    said = []
    logger = logging.getLogger("diffusers.models.modeling_utils")
    monkeypatch.setattr(logger, "handle", lambda record: said.append(record.getMessage()))
    load_teacher(adapter_config(tmp_path, image_encoder, plain_adapter(backbone.unet)), backbone)
    assert said == [] and not logger.disabled


def test_a_lora_counts_its_matrices_and_several_all_of_theirs(lora, backbone, tmp_path):
    numbers = sum(value.numel() for key, value in load_file(lora).items() if "alpha" not in key)
    one = LoraTeacher(backbone, {"": lora}, 1.0)
    two = LoraTeacher(backbone, {"a": lora, "b": tmp_path / "diffusers.safetensors"}, 1.0)
    assert one.bytes_beside(torch.bfloat16) == 2 * numbers and two.bytes_beside(torch.float32) == 2 * 4 * numbers


def test_rows_without_reference_get_the_bases_prediction(tmp_path, image_encoder, backbone):
    teacher = load_teacher(adapter_config(tmp_path, image_encoder, plain_adapter(backbone.unet)), backbone)
    reference = teacher.encode_reference(picture(1))
    every = teacher.predict(*inputs(WIDTH), reference)
    mixed = teacher.predict(*inputs(WIDTH), reference | {"present_B": torch.tensor([False, True])})
    base = backbone.predict_noise(*inputs(WIDTH))
    torch.testing.assert_close(mixed, torch.stack([base[0], every[1]]), rtol=1e-4, atol=1e-5)
    assert (every[0] - base[0]).abs().max() > 1e-2


@pytest.mark.parametrize("adapter", [plain_adapter, plus_adapter])
def test_an_ip_adapter_reads_what_it_was_trained_on(tmp_path, image_encoder, backbone, adapter):
    teacher = load_teacher(adapter_config(tmp_path, image_encoder, adapter(backbone.unet)), backbone)
    # whole 8-bit values, which preparing a picture keeps
    image = torch.randint(0, 256, (1, TINY.input_px, TINY.input_px, 3), generator=torch.Generator().manual_seed(0)) / 255
    mean, deviation = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        output = transformers_model(TINY, random_tower(TINY))(
            pixel_values=((image - mean) / deviation).permute(0, 3, 1, 2), output_hidden_states=True)
    wanted = output.image_embeds[:, None] if adapter is plain_adapter else output.hidden_states[-2]
    torch.testing.assert_close(teacher.encode_reference(image)["ip_adapter"], wanted, rtol=1e-3, atol=1e-4)


def without(tensors, part):
    return {key: value for key, value in tensors.items() if part not in key}


BAD_ADAPTERS = [
    pytest.param(lambda t: without(t, "image_proj"), "holds no IP-Adapter", id="no projection"),
    pytest.param(lambda t: without(t, "proj.weight"), "of another kind .FaceID", id="another kind"),
    pytest.param(lambda t: t | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(2, 2)}, "of another kind", id="FaceID"),
    pytest.param(lambda t: t | {"image_proj.proj.weight": torch.zeros(4 * 2048, TINY.projected)},
                 "tokens of width 2048, and playground has 128", id="SDXL"),
    pytest.param(lambda t: t | {"image_proj.proj.weight": torch.zeros(4 * WIDTH, 77)},
                 f"reads vectors of 77, and the image encoder gives {TINY.projected}", id="image encoder"),
    pytest.param(lambda t: without(t, "ip_adapter.1.to_k"), "missing.*1.to_k_ip", id="layer"),
    pytest.param(lambda t: t | {"ip_adapter.1.to_k_ip.weight": torch.zeros(7, WIDTH)}, "1.to_k_ip.weight", id="size"),
    pytest.param(lambda t: without(t, "proj.bias"), "can be read", id="projection not whole"),
    pytest.param(lambda t: t | {"image_proj.proj.bias": torch.full((4 * WIDTH,), torch.nan)}, "holds NaN", id="NaN"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ADAPTERS)
def test_ip_adapters_that_do_not_fit_are_refused(tmp_path, image_encoder, backbone, change, message):
    config = adapter_config(tmp_path, image_encoder, change(plain_adapter(backbone.unet)))
    with pytest.raises(FileError, match=message):
        load_teacher(config, backbone)


def test_a_pickled_ip_adapter_is_refused(tmp_path, image_encoder, backbone):
    torch.save({"image_proj": {}}, tmp_path / "ip.bin")
    config = TeacherConfig(ip_adapter=str(tmp_path / "ip.bin"), ip_image_encoder=str(image_encoder))
    with pytest.raises(FileError, match="pickled PyTorch file"):
        load_teacher(config, backbone)


def test_references_of_another_size_are_refused(tmp_path, image_encoder, backbone):
    teacher = load_teacher(adapter_config(tmp_path, image_encoder, plain_adapter(backbone.unet)), backbone)
    with pytest.raises(ReferenceMismatchError, match=r"got shape \(1, 1, 16\).* wanted \(2, vectors, 16\)"):
        teacher.predict(*inputs(WIDTH), teacher.encode_reference(picture(1, rows=1)))
    with pytest.raises(ReferenceMismatchError, match="got nothing"):
        teacher.predict(*inputs(WIDTH), {})


def exact_eps(mean: float, deviation: float):
    """The best prediction of the noise in latents that are N(mean, deviation²)."""
    alphas = alphas_cumprod()

    def predict(noised, timestep, context):
        kept = alphas[timestep][:, None, None, None]
        return (1 - kept).sqrt() * (noised - kept.sqrt() * mean) / (kept * deviation**2 + 1 - kept)

    return predict


def as_v(predict):
    """The same model that predicts v = sqrt(a) eps - sqrt(1 - a) x."""
    alphas = alphas_cumprod()

    def predict_v(noised, timestep, context):
        kept = alphas[timestep][:, None, None, None]
        eps = predict(noised, timestep, context)
        return kept.sqrt() * eps - (1 - kept).sqrt() * (noised - (1 - kept).sqrt() * eps) / kept.sqrt()

    return predict_v


def sampled(predict, steps=50, prediction="eps", context=None, seed=0):
    context = torch.zeros(2, 1, 1) if context is None else context
    return sample_latents(predict, alphas_cumprod(), context, torch.Generator().manual_seed(seed), steps, (2, 4, 16, 16),
                          prediction)


def test_samples_have_the_distribution_that_the_model_knows():
    latents = sampled(exact_eps(0.8, 0.5), steps=200)
    assert abs(latents.mean() - 0.8) < 0.06 and abs(latents.std() - 0.5) < 0.03
    torch.testing.assert_close(sampled(exact_eps(0.3, 0.0)), torch.full((2, 4, 16, 16), 0.3), rtol=1e-3, atol=1e-3)


def test_a_v_model_gives_the_samples_of_the_same_eps_model():
    torch.testing.assert_close(sampled(as_v(exact_eps(0.8, 0.5)), prediction="v"), sampled(exact_eps(0.8, 0.5)), rtol=1e-3,
                               atol=1e-3)


def test_samples_follow_the_generator_alone():
    assert torch.equal(sampled(exact_eps(0.8, 0.5), 5), sampled(exact_eps(0.8, 0.5), 5))
    assert not torch.equal(sampled(exact_eps(0.8, 0.5), 5), sampled(exact_eps(0.8, 0.5), 5, seed=1))


def test_tokens_follow_the_timestep_down_from_the_last():
    asked, seen = [], []

    def context(timestep_B):
        asked.append(timestep_B.tolist())
        return timestep_B[:, None, None].float()

    def predict(noised, timestep, tokens):
        seen.append(tokens[:, 0, 0].tolist())
        return torch.zeros_like(noised)

    sampled(predict, steps=4, context=context)
    assert asked == seen == [[999, 999], [749, 749], [499, 499], [249, 249]]
