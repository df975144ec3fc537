"""A LoRA of any layout is W + alpha / rank * up @ down in each layer, computed here literally, merged and as a teacher."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file
from test_training_backbones import inputs, ldm_unet_name, save_folder

from emma_core.base.backbones import load_backbone
from emma_core.base.config import BaseConfig
from emma_core.base.ldm_names import ldm_unet_names
from emma_core.errors import EmmaWarning, FileError
from emma_core.training.config import TeacherConfig
from emma_core.training.teachers import load_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(BaseConfig(str(folder)))


class Change:
    """The matrices of one layer."""

    def __init__(self, name: str, shape: tuple[int, ...], rank: int, alpha: float, generator: torch.Generator):
        self.name, self.rank, self.alpha, self.shape = name, rank, alpha, shape
        self.down = torch.randn(rank, *shape[1:], generator=generator) * 0.2
        self.up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.2

    def literal(self, scale: float) -> torch.Tensor:
        """The sum over the rank, element by element of the definition."""
        added = torch.zeros(self.shape, dtype=torch.float64)
        for index in range(self.rank):
            column = self.up[:, index].double().reshape(-1, *[1] * (len(self.shape) - 1))
            added += scale * column * self.down[index].double()[None]
        return added


def changes(unet, ends=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "resnets.0.conv1", "conv_shortcut")):
    """Every layer with a rank and an alpha of its own, as a resized LoRA has."""
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    found = []
    for key, value in unet.state_dict().items():
        name = key.removesuffix(".weight")
        if key.endswith(".weight") and name.endswith(ends):
            rank = chance.randint(1, 16)
            found.append(Change(name, tuple(value.shape), rank, rank * chance.choice([0.25, 0.5, 1.0, 3.0]), generator))
    assert len({change.rank for change in found}) > 5 and len(found) > 15
    return found


def old_processor_name(name: str) -> str:
    """The name of a layer of an attention in diffusers of before 2023."""
    before, _, layer = name.rpartition(".attn")
    number, _, part = layer.partition(".")
    return f"{before}.attn{number}.processor.{part.removesuffix('.0')}_lora" if before else f"{name}.lora"


def underscored(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


# layout -> the name of a layer, and of down, up and alpha behind it
LAYOUTS = {
    "kohya": (underscored, "lora_down.weight", "lora_up.weight", "alpha"),
    "kohya, original names": (lambda name: underscored(ldm_unet_name(f"{name}.weight").removesuffix(".weight")),
                              "lora_down.weight", "lora_up.weight", "alpha"),
    "diffusers": (lambda name: f"unet.{name}", "lora_A.weight", "lora_B.weight", "alpha"),
    "diffusers without unet.": (lambda name: name, "lora_A.weight", "lora_B.weight", "alpha"),
    "peft": (lambda name: f"base_model.model.{name}", "lora_A.weight", "lora_B.weight", "alpha"),
    "peft of a pipeline": (lambda name: f"base_model.model.unet.{name}", "lora_A.weight", "lora_B.weight", "alpha"),
    "peft with an adapter's name": (lambda name: name, "lora_A.default.weight", "lora_B.default.weight", "alpha"),
    "older diffusers": (lambda name: f"unet.{old_processor_name(name)}", "down.weight", "up.weight", "alpha"),
    "original names with dots": (lambda name: "diffusion_model." + ldm_unet_name(f"{name}.weight").removesuffix(".weight"),
                                 "lora_down.weight", "lora_up.weight", "alpha"),
}


def write(path, layers, layout: str, with_alpha: bool = True, **more):
    of, down, up, alpha = LAYOUTS[layout]
    tensors = dict(more)
    for layer in layers:
        tensors |= {f"{of(layer.name)}.{down}": layer.down, f"{of(layer.name)}.{up}": layer.up}
        if with_alpha:
            tensors[f"{of(layer.name)}.{alpha}"] = torch.tensor(layer.alpha)
    save_file(tensors, path)
    return str(path)


def check_merged(folder, backbone, lora: str, layers, scale_of) -> None:
    """The base with this LoRA: every layer as the formula says, all others as they were."""
    found, before = load_backbone(BaseConfig(str(folder), lora=lora)).unet.state_dict(), backbone.unet.state_dict()
    assert found.keys() == before.keys()
    of_layer = {f"{layer.name}.weight": layer for layer in layers}
    for key, value in before.items():
        if key not in of_layer:
            assert torch.equal(found[key], value), key
            continue
        added = of_layer[key].literal(scale_of(of_layer[key]))
        assert (found[key].double() - value.double() - added).abs().max() <= 1e-5 * added.abs().max(), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layer_is_merged_with_its_own_alpha_and_rank(tmp_path, folder, backbone, layout):
    layers = changes(backbone.unet)
    lora = write(tmp_path / "a.safetensors", layers, layout)
    check_merged(folder, backbone, lora, layers, lambda layer: layer.alpha / layer.rank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_an_alpha_the_product_is_added_as_it_is(tmp_path, folder, backbone, layout):
    layers = changes(backbone.unet)
    lora = write(tmp_path / "a.safetensors", layers, layout, with_alpha=False)
    check_merged(folder, backbone, lora, layers, lambda layer: 1.0)


@pytest.mark.parametrize("layout", ["kohya", "peft", "older diffusers"])
def test_the_teacher_predicts_what_the_merged_base_does(tmp_path, folder, backbone, layout):
    lora = write(tmp_path / "a.safetensors", changes(backbone.unet), layout)
    merged = load_backbone(BaseConfig(str(folder), lora=lora)).predict_noise(*inputs())
    plain = backbone.predict_noise(*inputs())
    taught = load_teacher(TeacherConfig(lora=lora), backbone).predict(*inputs())
    assert (merged - plain).abs().max() > 0.05 * plain.abs().max()
    assert (taught - merged).abs().max() <= 1e-4 * merged.abs().max()
    assert torch.equal(backbone.predict_noise(*inputs()), plain), "the base stays as it is"


def test_half_precision_and_whole_alphas_are_read(tmp_path, folder, backbone):
    layers = changes(backbone.unet)
    for layer in layers:
        layer.down, layer.up, layer.alpha = layer.down.half(), layer.up.half(), round(layer.alpha)
    check_merged(folder, backbone, write(tmp_path / "a.safetensors", layers, "kohya"), layers,
                 lambda layer: layer.alpha / layer.rank)


def test_a_convolution_of_one_pixel_may_be_told_as_a_product(tmp_path, folder, backbone):
    layers = changes(backbone.unet, ("proj_in", "proj_out", "conv_shortcut", "to_q", "to_k", "to_v", "to_out.0", "linear_1"))
    tensors = {}
    for layer in layers:
        flat = layer.shape[2:] == (1, 1)
        tensors[f"{underscored(layer.name)}.lora_down.weight"] = layer.down.flatten(1) if flat else layer.down
        tensors[f"{underscored(layer.name)}.lora_up.weight"] = layer.up.flatten(1) if flat else layer.up
    assert sum(value.ndim == 2 for value in tensors.values()) > 20
    save_file(tensors, tmp_path / "a.safetensors")
    check_merged(folder, backbone, str(tmp_path / "a.safetensors"), layers, lambda layer: 1.0)


def test_pefts_configuration_beside_the_file_tells_alphas(tmp_path, folder, backbone):
    layers = changes(backbone.unet)
    write(tmp_path / "adapter_model.safetensors", layers, "peft", with_alpha=False)
    own = {"to_k": 2.5, "attn1.to_q": 40}
    config = {"r": 8, "lora_alpha": 6, "alpha_pattern": own, "rank_pattern": {}, "use_rslora": False}

    def alpha(layer):
        return next((value for end, value in own.items() if layer.name.endswith(f".{end}")), 6)

    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check_merged(folder, backbone, str(tmp_path / "adapter_model.safetensors"), layers, lambda layer: alpha(layer) / layer.rank)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    check_merged(folder, backbone, str(tmp_path / "adapter_model.safetensors"), layers,
                 lambda layer: alpha(layer) / layer.rank ** 0.5)


@pytest.mark.parametrize("text", ["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
                                  "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
                                  "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
                                  "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight",
                                  "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_B.weight"])
def test_the_part_for_the_text_encoder_is_left_out_and_said(tmp_path, folder, backbone, text):
    layers = changes(backbone.unet)
    lora = write(tmp_path / "a.safetensors", layers, "kohya", **{text: torch.ones(2, 2)})
    with pytest.warns(EmmaWarning, match="a.safetensors also changes the CLIP text encoder; that part is left out"):
        check_merged(folder, backbone, lora, layers, lambda layer: layer.alpha / layer.rank)
    save_file({text: torch.ones(2, 2)}, tmp_path / "text.safetensors")
    with pytest.warns(EmmaWarning, match="left out"), pytest.raises(FileError, match="has no weights for a UNet"):
        load_backbone(BaseConfig(str(folder), lora=str(tmp_path / "text.safetensors")))


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
BAD = {
    "ranks that differ": {f"{LAYER}.lora_A.weight": (3, 64), f"{LAYER}.lora_B.weight": (64, 2)},
    "no rank": {f"{LAYER}.lora_A.weight": (0, 64), f"{LAYER}.lora_B.weight": (64, 0)},
    "up alone": {f"{LAYER}.lora_B.weight": (64, 2)}, "alpha alone": {f"{LAYER}.alpha": ()},
    "several alphas": {f"{LAYER}.lora_A.weight": (2, 64), f"{LAYER}.lora_B.weight": (64, 2), f"{LAYER}.alpha": (2,)},
    "turned around": {f"{LAYER}.lora_A.weight": (64, 2), f"{LAYER}.lora_B.weight": (2, 64)},
    "vectors": {f"{LAYER}.lora_A.weight": (64,), f"{LAYER}.lora_B.weight": (64,)},
    "kernel of another size": {"conv_in.lora_A.weight": (2, 4, 5, 5), "conv_in.lora_B.weight": (32, 2, 1, 1)},
    "a kernel up": {"conv_in.lora_A.weight": (2, 4, 3, 3), "conv_in.lora_B.weight": (32, 2, 3, 3)},
    "a layer that is a norm": {"conv_norm_out.lora_A.weight": (2, 32), "conv_norm_out.lora_B.weight": (32, 2)},
    "a bias": {f"{LAYER}.lora_A.weight": (2, 64), f"{LAYER}.lora_B.weight": (64, 2), f"{LAYER}.lora_B.bias": (64,)},
    "twice": {f"{LAYER}.lora_A.weight": (2, 64), f"{LAYER}.lora_B.weight": (64, 2),
              f"unet.{LAYER}.lora_A.weight": (2, 64), f"unet.{LAYER}.lora_B.weight": (64, 2)},
    "OFT": {"lora_unet_conv_in.oft_blocks": (2, 2, 2)}, "another model": {"lora_unet_double_blocks_0.lora_up.weight": (2, 2)},
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_lora_for_this_unet_is_refused_in_words(tmp_path, folder, case):
    save_file({key: torch.ones(shape) for key, shape in BAD[case].items()}, tmp_path / "bad.safetensors")
    with pytest.raises(FileError, match=r"^bad.safetensors .*(again|another file|merge it into the base)"):
        load_backbone(BaseConfig(str(folder), lora=str(tmp_path / "bad.safetensors")))


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.tensor(float("inf")), torch.tensor(1 + 2j)])
def test_an_alpha_that_is_no_number_is_refused(tmp_path, folder, backbone, alpha):
    first = changes(backbone.unet)[0]
    lora = write(tmp_path / "a.safetensors", [first], "kohya", False, **{f"{underscored(first.name)}.alpha": alpha})
    with pytest.raises(FileError, match="a.safetensors"):
        load_backbone(BaseConfig(str(folder), lora=lora))


@pytest.mark.parametrize("depth", [1, 2])
def test_original_names_are_those_of_the_checkpoints(depth):
    """Against the names that the tests of checkpoints use, which diffusers' own converter reads."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=[32, 64, 64], layers_per_block=depth, norm_num_groups=8,
                                    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                                    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"])
    names = {key.rpartition(".")[0] for key in unet.state_dict()}
    found = ldm_unet_names(names, depth)
    assert found == {name: ldm_unet_name(f"{name}.weight", depth).removesuffix(".weight") for name in names}
