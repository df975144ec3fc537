"""IP-Adapters in the layouts they are published in: recognised, made to tokens as diffusers does it, limited to blocks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from emma_core.base.ip_adapter import projection_of
from emma_core.base.ip_adapter_file import IpAdapterFile, ip_adapter_layout, read_ip_adapter, read_ip_adapter_layout
from emma_core.errors import FileError, TrainingConfigError
from emma_core.model.ip_adapter_blocks import layers_in

SD15 = {"cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8}
SDXL = {"cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
# of h94/IP-Adapter: base, plus, dim of what is read, inner width, heads, layers of the UNet
PUBLISHED = {
    "ip-adapter_sd15": (SD15, False, 1024, 0, 0, 16),
    "ip-adapter-plus_sd15": (SD15, True, 1280, 768, 12, 16),
    "ip-adapter-plus-face_sd15": (SD15, True, 1280, 768, 12, 16),
    "ip-adapter_sdxl": (SDXL, False, 1280, 0, 0, 70),
    "ip-adapter_sdxl_vit-h": (SDXL, False, 1024, 0, 0, 70),
    "ip-adapter-plus_sdxl_vit-h": (SDXL, True, 1280, 1280, 20, 70),
}


def attentions(base: dict) -> list[tuple[str, tuple]]:
    """diffusers' names of the cross-attentions of the real UNet, with the shapes of their keys and values."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**base)
    weights, names = unet.state_dict(), [name for name in unet.attn_processors if "attn2" in name]
    return [(name, tuple(tuple(weights[f"{name.removesuffix('.processor')}.to_{part}.weight"].shape) for part in "kv"))
            for name in names]


@pytest.fixture(scope="module")
def layers() -> dict[int, list]:
    return {16: attentions(SD15), 70: attentions(SDXL)}


def projection_shapes(base: dict, plus: bool, dim: int, inner: int, heads: int) -> dict[str, tuple[int, ...]]:
    width = base["cross_attention_dim"]
    if not plus:
        return {"proj.weight": (4 * width, dim), "proj.bias": (4 * width,), "norm.weight": (width,), "norm.bias": (width,)}
    shapes = {"latents": (1, 16, inner), "proj_in.weight": (inner, dim), "proj_in.bias": (inner,),
              "proj_out.weight": (width, inner), "proj_out.bias": (width,), "norm_out.weight": (width,),
              "norm_out.bias": (width,)}
    for layer in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{layer}.{name}.weight": (inner,), f"layers.{layer}.{name}.bias": (inner,)}
        shapes |= {f"layers.{layer}.0.to_q.weight": (64 * heads, inner), f"layers.{layer}.0.to_kv.weight": (128 * heads, inner),
                   f"layers.{layer}.0.to_out.weight": (inner, 64 * heads), f"layers.{layer}.1.1.weight": (4 * inner, inner),
                   f"layers.{layer}.1.3.weight": (inner, 4 * inner)}
    return shapes


def random_projection(name: str) -> dict[str, torch.Tensor]:
    base, plus, dim, inner, heads, _ = PUBLISHED[name]
    generator = torch.Generator().manual_seed(3)
    return {key: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
            + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
            for key, shape in projection_shapes(base, plus, dim, inner, heads).items()}


def all_shapes(name: str, layers) -> dict[str, tuple[int, ...]]:
    base, plus, dim, inner, heads, count = PUBLISHED[name]
    shapes = {f"image_proj.{key}": shape for key, shape in projection_shapes(base, plus, dim, inner, heads).items()}
    return shapes | {f"ip_adapter.{2 * index + 1}.to_{part}_ip.weight": shape for index, (_, pair) in enumerate(layers[count])
                     for part, shape in zip("kv", pair, strict=True)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_layout_is_recognised_and_fits_its_unet(layers, name):
    base, plus, dim, _, _, count = PUBLISHED[name]
    shapes = all_shapes(name, layers)
    layout = ip_adapter_layout(shapes, name)
    assert (layout.plus, layout.dim, layout.width, layout.layers) == (plus, dim, base["cross_attention_dim"], count)
    assert layout.reads == ("local" if plus else "global")
    attention = {key.removeprefix("ip_adapter."): torch.empty(shape, device="meta") for key, shape in shapes.items()
                 if key.startswith("ip_adapter.")}
    file = IpAdapterFile(layout, {}, attention)
    file.check_layers([pair for _, pair in layers[count]])
    with pytest.raises(FileError, match="unexpected|missing"):
        file.check_layers([pair for _, pair in layers[86 - count]])


@pytest.mark.parametrize("name", ["ip-adapter_sd15", "ip-adapter-plus_sd15", "ip-adapter_sdxl", "ip-adapter-plus_sdxl_vit-h"])
def test_tokens_at_real_sizes_are_those_that_diffusers_makes(layers, name):
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    projection = random_projection(name)
    vectors = torch.randn(2, 257 if PUBLISHED[name][1] else 1, PUBLISHED[name][2], generator=torch.Generator().manual_seed(4))
    wanted = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(projection, low_cpu_mem_usage=False)
    layout = ip_adapter_layout(all_shapes(name, layers), name)
    with torch.no_grad():
        found = projection_of(IpAdapterFile(layout, projection, {}))(vectors)
        torch.testing.assert_close(found, wanted(vectors if layout.plus else vectors[:, 0]), rtol=1e-4, atol=1e-5)
    assert found.shape == (2, 16 if layout.plus else 4, layout.width) and (found[0] - found[1]).abs().max() > 0.1


@pytest.mark.parametrize(("count", "blocks", "wanted"), [
    (70, "style", {"up_blocks.0.attentions.1."}),
    (16, "style", {"down_blocks.0.", "down_blocks.1.", "up_blocks.1.attentions.2.", "up_blocks.2.", "up_blocks.3."}),
])
def test_style_blocks_are_those_and_no_others_by_diffusers_names(layers, count, blocks, wanted):
    names = [name for name, _ in layers[count]]
    chosen = layers_in(blocks, count)
    assert [name for name, inside in zip(names, chosen, strict=True) if inside] == [
        name for name in names if name.startswith(tuple(wanted))]
    assert sum(chosen) == {70: 10, 16: 11}[count]


@pytest.mark.parametrize(("count", "left_out", "layers_left"), [(70, "down_blocks.2.attentions.1.", 60),
                                                                (16, "down_blocks.2.", 14)])
def test_no_layout_leaves_out_the_layouts_block_alone(layers, count, left_out, layers_left):
    chosen = layers_in("no layout", count)
    assert sum(chosen) == layers_left
    assert all(inside != name.startswith(left_out) for (name, _), inside in zip(layers[count], chosen, strict=True))
    assert layers_in("all", count) == (True,) * count


def test_blocks_of_unknown_models_are_refused_except_all():
    assert layers_in("all", 7) == (True,) * 7
    with pytest.raises(TrainingConfigError, match="known for SD1.5 .16 cross-attentions. and SDXL .70.; this model has 7"):
        layers_in("style", 7)


def test_a_file_tells_its_layout_without_its_numbers(tmp_path, layers):
    shapes = {key: shape for key, shape in all_shapes("ip-adapter_sd15", layers).items() if ".to_" not in key}
    state = {key: torch.zeros(shape) for key, shape in shapes.items()} | {"ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2)}
    save_file(state, tmp_path / "ip.safetensors")
    assert read_ip_adapter_layout(tmp_path / "ip.safetensors").dim == 1024
    assert read_ip_adapter(tmp_path / "ip.safetensors").projection.keys() == {"proj.weight", "proj.bias", "norm.weight",
                                                                              "norm.bias"}


@pytest.mark.parametrize("lost", ["layers.2.0.to_out.weight", "norm_out.bias", "layers.0.0.to_q.weight"])
def test_a_projection_that_is_not_whole_is_refused(layers, lost):
    projection = random_projection("ip-adapter-plus_sd15")
    layout = ip_adapter_layout(all_shapes("ip-adapter-plus_sd15", layers), "cut.safetensors")
    with pytest.raises(FileError, match="cut.safetensors has an image projection that is not whole"):
        projection_of(IpAdapterFile(layout, {key: value for key, value in projection.items() if key != lost}, {}))


@pytest.mark.parametrize(("width", "encoder", "message"), [
    (2048, (1024, 1280), "makes tokens of width 768, and the base has 2048"),
    (768, (768, 1024), "reads vectors of 1024, and the image encoder gives 768"),
])
def test_another_base_or_encoder_is_refused(layers, width, encoder, message):
    layout = ip_adapter_layout(all_shapes("ip-adapter_sd15", layers), "ip.safetensors")
    with pytest.raises(FileError, match=message):
        layout.check_base(width, "the base")
        layout.check_encoder(*encoder)
