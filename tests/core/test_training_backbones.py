"""Frozen diffusion models of the trainer: every layout of a checkpoint gives the same model, others are refused."""

import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from emma_core.base.autoencoder_files import vae_config_of
from emma_core.base.backbones import load_backbone
from emma_core.base.config import BaseConfig
from emma_core.base.recognition import spec_of_shapes
from emma_core.base.spec import PLAYGROUND_SPEC, SD15
from emma_core.base.unet_files import unet_config_of
from emma_core.errors import FileError, SettingsError
from emma_core.playground import load_autoencoder, load_unet

SMALL_UNET = {
    "sample_size": 8, "block_out_channels": [32, 64], "layers_per_block": 2, "cross_attention_dim": 48,
    "attention_head_dim": 8, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SMALL_VAE = {
    "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "latent_channels": 4, "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD15_UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "cross_attention_dim": 768, "attention_head_dim": 8,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTER = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
         "conv_out": "out.2"}
LDM = "model.diffusion_model."
SDXL_UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20], "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}
VAE_NAMES = ((r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"), (r"down_blocks\.(\d)", r"down.\1"),
             (r"samplers\.0\.conv", "sample.conv"), (r"\.attentions\.0\.group_norm", ".attn_1.norm"),
             (r"\.attentions\.0\.to_out\.0", ".attn_1.proj_out"), (r"\.attentions\.0\.to_", ".attn_1."))


def ldm_unet_name(key: str, layers: int = 2, first_attends: bool = False) -> str:
    """The original name of a UNet weight, from diffusers'; ``first_attends``: the lowest level does, as SDXL's."""
    stem, _, kind = key.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    mid = re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key)
    if mid:
        return f"middle_block.{2 * int(mid[2]) if mid[1] == 'resnets' else 1}.{inner(mid[1], mid[3])}"
    side, level, part, index, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", key).groups()
    first = int(level) * (layers + 1) + (side == "down")
    if part == "downsamplers":
        return f"input_blocks.{first + layers}.0.op.{kind}"
    if part == "upsamplers":
        # after the attention, and the first level up of Stable Diffusion 1.5 has none
        return f"output_blocks.{first + layers}.{1 if level == '0' and not first_attends else 2}.conv.{kind}"
    block = "input_blocks" if side == "down" else "output_blocks"
    return f"{block}.{first + int(index)}.{int(part == 'attentions')}.{inner(part, rest)}"


def inner(part: str, rest: str) -> str:
    head, _, tail = rest.partition(".")
    return f"{RESNET[head]}.{tail}" if part == "resnets" else rest


def ldm_vae_name(key: str, levels: int = 4) -> str:
    """The original name of an autoencoder weight, from diffusers'."""
    for pattern, name in VAE_NAMES:
        key = re.sub(pattern, name, key)
    key = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{levels - 1 - int(found[1])}", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    return key.replace("mid_block", "mid").replace("resnets", "block")


def ldm_vae(state) -> dict[str, torch.Tensor]:
    named = {ldm_vae_name(key): value.clone() for key, value in state.items()}
    # the original attention is made of 1 x 1 convolutions
    return {key: value[:, :, None, None] if "attn_1" in key and value.ndim == 2 else value for key, value in named.items()}


def single_file(folder, path, prediction=None, change=lambda tensors: None, vae=True):
    """A diffusers folder as one file in the original layout, with a piece of a text encoder beside."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    tensors = {f"model.diffusion_model.{ldm_unet_name(key)}": value for key, value in unet.items()}
    if vae:
        state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        tensors |= {f"first_stage_model.{key}": value for key, value in ldm_vae(state).items()}
    tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = torch.zeros(4)
    change(tensors)
    save_file(tensors, path, metadata={"modelspec.prediction_type": prediction} if prediction else None)
    return path


def save_folder(folder, unet=None, vae=None, **schedule):
    """A small model of the SD1.5 kind with random weights, as diffusers saves it."""
    torch.manual_seed(0)
    UNet2DConditionModel(**(SMALL_UNET | (unet or {}))).save_pretrained(folder / "unet")
    AutoencoderKL(**(SMALL_VAE | (vae or {}))).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **SCHEDULE, **schedule}))
    return folder


def inputs(width: int = 48, rows: int = 2):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(rows, 4, 8, 8, generator=generator), torch.tensor([3, 700][:rows]),
            torch.randn(rows, 6, width, generator=generator))


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1


def kohya_lora(layers, seed: int = 3, rank: int = 2, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """Random weights for layers given as name -> shape."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, (outputs, taken, *sides) in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, taken, *sides, generator=generator) * 0.3
        tensors[f"{key}.lora_up.weight"] = torch.randn(outputs, rank, *[1] * len(sides), generator=generator) * 0.3
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers_lora(layers, seed: int = 3, rank: int = 2, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """The same weights in diffusers' layout, which has no alpha: it is in the matrix."""
    kohya = kohya_lora(layers, seed, rank)
    return {f"unet.{name}.lora_{side}.weight": kohya[f"lora_unet_{name.replace('.', '_')}.lora_{word}.weight"] * factor
            for name in layers for side, word, factor in (("A", "down", 1.0), ("B", "up", alpha / rank))}


def lora_layers(unet) -> dict[str, tuple[int, ...]]:
    """Attention, feed-forward, projections and a convolution: what LoRA trainers reach."""
    ends = (".to_q", ".to_v", ".to_out.0", ".ff.net.0.proj", ".proj_in", ".resnets.0.conv1")
    return {key.removesuffix(".weight"): tuple(value.shape) for key, value in unet.state_dict().items()
            if key.removesuffix(".weight").endswith(ends) and key.endswith(".weight")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return single_file(folder, folder.parent / "small.safetensors")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(BaseConfig(str(folder)))


def test_single_file_and_folder_give_the_same_model(checkpoint, backbone):
    single = load_backbone(BaseConfig(str(checkpoint)))
    assert (single.predict_noise(*inputs()) - backbone.predict_noise(*inputs())).abs().max() <= 1e-6
    latents = single.encode(pictures())
    assert (latents - backbone.encode(pictures())).abs().max() <= 1e-6
    assert (single.decode(latents) - backbone.decode(latents)).abs().max() <= 1e-6
    assert single.spec.context_width == 48 and single.prediction == "eps" and single.name == "small.safetensors"
    assert len(single.sha256) == 64 and single.sha256 != backbone.sha256


def test_the_model_predicts_and_encodes_as_diffusers_own_loader(folder, backbone):
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone.predict_noise(*inputs()), unet(*inputs(), return_dict=False)[0], rtol=0, atol=0)
        wanted = vae.encode(pictures()).latent_dist.mode() * 0.18215
        torch.testing.assert_close(backbone.encode(pictures()), wanted, rtol=0, atol=0)
        decoded = vae.decode(wanted / 0.18215).sample.clamp(-1, 1)
        torch.testing.assert_close(backbone.decode(wanted), decoded, rtol=0, atol=0)
    assert wanted.shape == (2, 4, 4, 8)


def test_full_size_shapes_tell_sd15s_configuration():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET).state_dict()
        vae = AutoencoderKL(**(SMALL_VAE | {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2})).state_dict()
    shapes = {ldm_unet_name(key): tuple(value.shape) for key, value in unet.items()}
    assert shapes["output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 768) and len(shapes) == 686
    assert unet_config_of(shapes, spec_of_shapes(shapes, "sd15")) == SD15_UNET
    found = vae_config_of({ldm_vae_name(key): tuple(value.shape) for key, value in vae.items()}, "vae", SD15)
    assert found["block_out_channels"] == [128, 256, 512, 512] and found["layers_per_block"] == 2


def test_the_configuration_of_sdxl_is_read_from_its_shapes():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET).state_dict()
    shapes = {ldm_unet_name(key, first_attends=True): tuple(value.shape) for key, value in unet.items()}
    assert shapes["middle_block.1.transformer_blocks.9.attn2.to_k.weight"] == (1280, 2048) and len(shapes) == 1680
    spec = spec_of_shapes(shapes, "sdxl")
    assert unet_config_of(shapes, spec) == SDXL_UNET
    assert (spec.family, spec.context_width, spec.pooled_width, spec.side_px) == ("sdxl", 2048, 1280, 1024)


def test_the_schedule_is_sd15s(backbone, checkpoint):
    wanted = DDPMScheduler(**SCHEDULE).alphas_cumprod
    single = load_backbone(BaseConfig(str(checkpoint)))
    for alphas in (backbone.alphas_cumprod_T, single.alphas_cumprod_T):
        torch.testing.assert_close(alphas, wanted, rtol=1e-4, atol=1e-6)


def test_v_is_declared_by_scheduler_metadata_or_marker(tmp_path, folder, checkpoint):
    as_v = save_folder(tmp_path / "v", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    by_folder = load_backbone(BaseConfig(str(as_v)))
    marked = single_file(folder, tmp_path / "marked.safetensors",
                         change=lambda t: t.update({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}))
    by_marker = load_backbone(BaseConfig(str(marked)))
    by_metadata = load_backbone(BaseConfig(str(single_file(folder, tmp_path / "meta.safetensors", "v"))))
    assert by_folder.prediction == by_marker.prediction == by_metadata.prediction == "v"
    assert by_folder.alphas_cumprod_T[-1] == by_marker.alphas_cumprod_T[-1] == 0 < by_metadata.alphas_cumprod_T[-1]
    torch.testing.assert_close(by_folder.alphas_cumprod_T, by_marker.alphas_cumprod_T, rtol=1e-3, atol=1e-6)


def test_a_prediction_that_is_set_goes_before_the_declared(tmp_path, folder, checkpoint):
    assert load_backbone(BaseConfig(str(checkpoint), prediction="v")).prediction == "v"
    as_v = single_file(folder, tmp_path / "v.safetensors", "v")
    assert load_backbone(BaseConfig(str(as_v), prediction="eps")).prediction == "eps"


def test_only_the_context_gets_a_gradient_and_checkpointing_keeps_it(folder):
    backbone = load_backbone(BaseConfig(str(folder)))
    gradients = []
    for _ in range(2):
        noised, timestep, context = inputs()
        context.requires_grad_()
        backbone.predict_noise(noised, timestep, context).square().sum().backward()
        gradients.append(context.grad)
        backbone.enable_gradient_checkpointing()
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    assert all(value.grad is None and not value.requires_grad for value in backbone.parameters())


def test_gradient_checkpointing_computes_activations_again(folder):
    backbone = load_backbone(BaseConfig(str(folder)))
    backbone.enable_gradient_checkpointing()
    calls = []
    attention = backbone.unet.mid_block.attentions[0].transformer_blocks[0]
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    noised, timestep, context = inputs()
    predicted = backbone.predict_noise(noised, timestep, context.requires_grad_())
    assert len(calls) == 1
    predicted.sum().backward()
    assert len(calls) == 2


def test_the_playground_predicts_and_encodes_as_shipped():
    backbone = load_backbone(BaseConfig())
    assert (backbone.prediction, backbone.spec.context_width, backbone.name) == ("eps", 128, "playground")
    with torch.no_grad():
        wanted = load_unet()(*inputs(128), return_dict=False)[0]
        latents = load_autoencoder(PLAYGROUND_SPEC.latent_scale).encode(pictures()) * 0.18215
    torch.testing.assert_close(backbone.predict_noise(*inputs(128)), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone.encode(pictures()), latents, rtol=0, atol=0)
    wanted = load_autoencoder(PLAYGROUND_SPEC.latent_scale).decode(latents / 0.18215)
    torch.testing.assert_close(backbone.decode(latents), wanted, rtol=0, atol=0)
    assert not any(value.requires_grad for value in backbone.parameters())


def test_the_playground_refuses_v():
    with pytest.raises(SettingsError, match="playground predicts eps"):
        load_backbone(BaseConfig(prediction="v"))


def test_a_lower_precision_gives_float32_near_the_full_one(folder, backbone):
    low = load_backbone(BaseConfig(str(folder)), torch.bfloat16)
    found, wanted = low.predict_noise(*inputs()), backbone.predict_noise(*inputs())
    assert found.dtype == torch.float32 and low.dtype == torch.bfloat16
    assert 0 < (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert low.encode(pictures()).dtype == torch.float32


@pytest.mark.parametrize("layout", ["original", "diffusers file", "folder", "old folder", "checkpoint"])
def test_another_autoencoder_replaces_the_own_in_every_layout(tmp_path, backbone, layout):
    other = save_folder(tmp_path / "other", vae={"block_out_channels": [32, 64, 32, 32], "scaling_factor": 0.5})
    state = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    path, scale = tmp_path / "vae.safetensors", 0.18215
    if layout == "original":
        save_file(ldm_vae(state) | {"loss.logvar": torch.zeros(())}, path)
    elif layout == "diffusers file":
        save_file(state, path)
    elif layout == "checkpoint":
        single_file(other, path)
    else:
        path, scale = other / "vae", 0.5
    if layout == "old folder":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        renamed = {re.sub(r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)", lambda m: m[1] + old[m[2]], key): value
                   for key, value in state.items()}
        save_file(renamed, path / "diffusion_pytorch_model.safetensors")
    found = load_backbone(BaseConfig("playground", vae=str(path))).encode(pictures())
    wanted = load_backbone(BaseConfig(str(other))).encode(pictures()) / 0.5 * scale
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (wanted / scale * 0.18215 - backbone.encode(pictures())).abs().max() > 1e-3


def drop(tensors, end):
    tensors.pop(next(key for key in tensors if key.endswith(end)))


def widen(tensors, end, shape):
    tensors[next(key for key in tensors if key.endswith(end))] = torch.zeros(shape)


def spoil(tensors, end):
    tensors[next(key for key in tensors if key.endswith(end))].view(-1)[0] = torch.nan


def as_width(tensors, width):
    for key in [key for key in tensors if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]:
        tensors[key] = torch.zeros(tensors[key].shape[0], width)


BAD_FILES = [
    pytest.param(lambda t: as_width(t, 2048), "is another model: .* width 2048; wanted", id="SDXL without its pooled vector"),
    pytest.param(lambda t: t.update({f"{LDM}label_emb.0.0.weight": torch.zeros(2, 2)}), "is another model", id="label"),
    pytest.param(lambda t: as_width(t, 1280), "is the SDXL refiner", id="refiner"),
    pytest.param(lambda t: as_width(t, 1024), "is Stable Diffusion 2: 4 input channels, .* width 1024", id="SD2"),
    pytest.param(lambda t: widen(t, "input_blocks.0.0.weight", (32, 9, 3, 3)), "is an inpainting model: 9 input", id="inpaint"),
    pytest.param(lambda t: widen(t, "input_blocks.0.0.weight", (32, 8, 3, 3)), "InstructPix2Pix.*: 8 input", id="editing"),
    pytest.param(lambda t: widen(t, "input_blocks.0.0.weight", (32, 7, 3, 3)), "another model: 7 input", id="other inputs"),
    pytest.param(lambda t: drop(t, "middle_block.0.in_layers.2.bias"), "missing.*mid_block.resnets.0.conv1.bias", id="missing"),
    pytest.param(lambda t: t.update({"model.diffusion_model.hint.weight": torch.zeros(3)}), "such as .*hint", id="extra"),
    pytest.param(lambda t: widen(t, "out.2.bias", (5,)), r"conv_out.bias", id="shape"),
    pytest.param(lambda t: spoil(t, "out.2.bias"), "conv_out.bias holds NaN", id="NaN"),
    pytest.param(lambda t: spoil(t, "decoder.conv_in.bias"), "decoder.conv_in.bias holds NaN", id="NaN in the autoencoder"),
    pytest.param(lambda t: drop(t, "decoder.conv_in.bias"), "missing.*decoder.conv_in.bias", id="autoencoder not whole"),
    pytest.param(lambda t: widen(t, "encoder.conv_out.weight", (32, 64, 3, 3)), "latents of 16 channels", id="SD3's latents"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FILES)
def test_single_files_of_other_models_are_refused(tmp_path, folder, change, message):
    path = single_file(folder, tmp_path / "bad.safetensors", change=change)
    with pytest.raises(FileError, match=message):
        load_backbone(BaseConfig(str(path)))


def test_incomplete_checkpoints_are_refused(tmp_path, folder):
    without = single_file(folder, tmp_path / "unet.safetensors", vae=False)
    with pytest.raises(FileError, match="holds no autoencoder; .* as base.vae"):
        load_backbone(BaseConfig(str(without)))
    assert load_backbone(BaseConfig(str(without), vae=str(folder / "vae"))).encode(pictures()).shape == (2, 4, 4, 8)
    with pytest.raises(FileError, match="the diffusers folder as a whole"):
        load_backbone(BaseConfig(str(folder / "unet" / "diffusion_pytorch_model.safetensors")))
    with pytest.raises(FileError, match="holds no autoencoder .encoder"):
        load_backbone(BaseConfig(vae=str(folder / "unet" / "diffusion_pytorch_model.safetensors")))
    with pytest.raises(FileError, match="modelspec.prediction_type is 'sample'"):
        load_backbone(BaseConfig(str(single_file(folder, tmp_path / "sample.safetensors", "sample"))))


def test_pickles_and_missing_files_are_refused(tmp_path, folder):
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    with pytest.raises(FileError, match="pickled PyTorch file"):
        load_backbone(BaseConfig(str(tmp_path / "model.ckpt")))
    with pytest.raises(FileError, match="does not exist"):
        load_backbone(BaseConfig(str(tmp_path / "none.safetensors")))
    copy = shutil.copytree(folder, tmp_path / "pickled")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileError, match="holds no weights"):
        load_backbone(BaseConfig(str(copy)))
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileError, match="holds only diffusion_pytorch_model.bin, a pickled"):
        load_backbone(BaseConfig(str(copy)))


BAD_FOLDERS = [
    pytest.param("unet", {"in_channels": 9}, "an inpainting model: 9 input channels", id="inpaint"),
    pytest.param("unet", {"cross_attention_dim": 1024}, "is Stable Diffusion 2", id="SD2"),
    pytest.param("unet", {"cross_attention_dim": 2048}, "is another model: .* width 2048", id="SDXL without its pooled vector"),
    pytest.param("unet", {"addition_embed_type": "text"}, "is another model", id="another vector beside the tokens"),
    pytest.param("unet", {"layers_per_block": 1}, "unexpected", id="config of another"),
    pytest.param("vae", {"latent_channels": 16}, "latents of 16 channels", id="latents"),
    pytest.param("scheduler", {"prediction_type": "sample"}, "declares prediction 'sample'", id="sample"),
    pytest.param("scheduler", {"num_train_timesteps": 50}, "over 50 timesteps", id="few timesteps"),
]


@pytest.mark.parametrize(("part", "change", "message"), BAD_FOLDERS)
def test_folders_of_other_models_are_refused(tmp_path, folder, part, change, message):
    folder = shutil.copytree(folder, tmp_path / "bad")
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileError, match=message):
        load_backbone(BaseConfig(str(folder)))


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ("{", "is not JSON"), ("[]", "is a list, wanted")])
def test_folders_without_a_schedule_are_refused(tmp_path, folder, content, message):
    folder = shutil.copytree(folder, tmp_path / "bad")
    path = folder / "scheduler" / "scheduler_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(FileError, match=message):
        load_backbone(BaseConfig(str(folder)))


def test_a_twin_shares_every_weight_and_follows_it(folder):
    backbone = load_backbone(BaseConfig(str(folder)))
    twin = backbone.twin()
    pairs = zip(backbone.unet.parameters(), twin.unet.parameters(), strict=True)
    assert all(own.data_ptr() == other.data_ptr() for own, other in pairs)
    assert torch.equal(twin.predict_noise(*inputs()), backbone.predict_noise(*inputs()))
    backbone.to("cpu", torch.bfloat16)
    assert twin.dtype == torch.bfloat16
    assert next(twin.unet.parameters()).data_ptr() == next(backbone.unet.parameters()).data_ptr()
