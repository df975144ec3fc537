"""Picture towers of open_clip against open_clip itself: answers, recognition, preparation, file layouts and refusals."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import NOT_SAFETENSORS
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import Normalize

from emma_core.encoders.open_clip_models import load_open_clip_encoder
from emma_core.encoders.open_clip_names import model_names
from emma_core.encoders.open_clip_recognition import CONFIG_NAME, built_on_meta, named_tower, recognised_tower, shapes_of
from emma_core.encoders.options import LAYERS, EncodeOptions
from emma_core.errors import EmmaWarning, EncoderFileError, ImageInputError, ReferenceMismatchError

open_clip = pytest.importorskip("open_clip")

SMALL_TEXT = {"width": 64, "heads": 1, "layers": 1, "vocab_size": 8, "context_length": 4}
INCEPTION, IMAGENET = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
MOST_ERROR = 1e-5


def tiny(**vision):
    """The configuration of a model that open_clip does not know."""
    sizes = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
    return {"embed_dim": 24, "text_cfg": SMALL_TEXT, "vision_cfg": sizes | vision}


def write_config(folder: Path, model, **more) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps({"model_cfg": model, **more}))


def oracle(name: str):
    """open_clip's own model with a small text tower, no weight of the picture tower zero or one."""
    model = open_clip.create_model(name, pretrained=None, text_cfg=SMALL_TEXT).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.visual.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def state_of(model) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in model.state_dict().items()}


def visual(state):
    return {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}


def seen(size_px: int) -> torch.Tensor:
    return torch.rand(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(2))


def features_of(encoder, seen_B3SS: torch.Tensor, layer: str = LAYERS[0], names=None) -> dict[str, torch.Tensor]:
    return encoder.features_of(seen_B3SS, EncodeOptions(names or encoder.feature_names, layer))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the length of what is wanted."""
    assert found.shape == wanted.shape and wanted.norm() > 0
    return ((found - wanted).norm() / wanted.norm()).item()


def answer(model, pixels: torch.Tensor, modules) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The image embedding, and what some modules put out on the way to it."""
    found: list[torch.Tensor] = []
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    wanted = model.encode_image(pixels)
    return wanted, found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A whole model that only one name fits, and its file."""
    model = oracle("ViT-S-32")
    path = tmp_path_factory.mktemp("small") / "renamed by its user.safetensors"
    save_file(state_of(model), path)
    return model, path


@pytest.fixture
def tiny_folder(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_config(folder, tiny())
    save_file(state_of(open_clip.CLIP(**tiny())), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *found: pytest.fail("a connection"))


@pytest.mark.parametrize("name, chosen, statistics", [
    ("ViT-B-32", "ViT-B-32", OPENAI), ("ViT-B-16-SigLIP", None, INCEPTION), ("EVA02-B-16", None, OPENAI),
    ("ViT-B-16-SigLIP2", "ViT-B-16-SigLIP2", INCEPTION), ("PE-Core-T-16-384", None, INCEPTION),
    ("vit_relpos_medium_patch16_cls_224", None, OPENAI),
])
def test_transformers_answer_as_open_clip(tmp_path, name, chosen, statistics):
    model = oracle(name)
    save_file(state_of(model), tmp_path / "weights.safetensors")
    encoder = load_open_clip_encoder(tmp_path / "weights.safetensors", chosen)
    size_px = model.visual.image_size[0]
    assert encoder.description["family"] == f"open_clip:{name}" and encoder.description["input_size"] == size_px
    blocks = model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks
    wanted, (penultimate, last) = answer(model, Normalize(*statistics)(seen(size_px)), blocks[-2:])
    given = features_of(encoder, seen(size_px))
    assert error(given["global"], wanted[:, None]) <= MOST_ERROR and error(given["local"], last) <= MOST_ERROR
    assert error(features_of(encoder, seen(size_px), "penultimate", ("local",))["local"], penultimate) <= MOST_ERROR
    assert error(features_of(encoder, seen(size_px), "last", ("global",))["global"], wanted[:, None]) <= MOST_ERROR
    assert error(penultimate, last) > 0.01


@pytest.mark.parametrize("name, statistics", [
    ("convnext_tiny", OPENAI), ("RN50", OPENAI), ("MobileCLIP2-S0", ((0, 0, 0), (1, 1, 1))),
    ("swin_base_patch4_window7_224", OPENAI),
])
def test_convolutional_towers_answer_as_open_clip(tmp_path, name, statistics):
    model = oracle(name)
    save_file(state_of(model), tmp_path / "weights.safetensors")
    encoder = load_open_clip_encoder(tmp_path / "weights.safetensors")
    size_px = encoder.description["input_size"]
    trunk = getattr(model.visual, "trunk", None)
    stage = model.visual.layer4 if trunk is None else trunk.layers[-1] if name.startswith("swin") else trunk.stages[-1]
    wanted, [map_BChw] = answer(model, Normalize(*statistics)(seen(size_px)), [stage])
    map_BChw = map_BChw.movedim(-1, 1) if name.startswith("swin") else map_BChw
    given = features_of(encoder, seen(size_px))
    assert error(given["global"], wanted[:, None]) <= MOST_ERROR
    assert error(given["local"], torch.stack([cell for row in map_BChw.unbind(2) for cell in row.unbind(2)], 1)) <= MOST_ERROR
    with pytest.raises(ImageInputError, match="gives only the last one"):
        features_of(encoder, seen(size_px), "penultimate")


def test_twins_of_another_activation_are_named_and_obeyed(tmp_path):
    model, quick = oracle("ViT-B-32"), oracle("ViT-B-32-quickgelu")
    quick.load_state_dict(model.state_dict())
    path = tmp_path / "weights.safetensors"
    save_file(state_of(model), path)
    with pytest.raises(EncoderFileError, match=r"ViT-B-32 \(activation GELU\), ViT-B-32-quickgelu \(activation quick GELU\).*"
                                               "choose the model name"):
        load_open_clip_encoder(path)
    answers = [tower.encode_image(Normalize(*OPENAI)(seen(224)))[:, None] for tower in (model, quick)]
    for name, wanted in zip(("ViT-B/32", "ViT-B-32-quickgelu"), answers, strict=True):
        assert error(features_of(load_open_clip_encoder(path, name), seen(224))["global"], wanted) <= MOST_ERROR
    assert error(*answers) > 0.001


def recognises(name: str) -> bool:
    """Whether a tower's shapes lead to it, to one that answers alike, or to a choice with one of these."""
    tower = named_tower(name)
    try:
        return recognised_tower(shapes_of(built_on_meta(tower)), "file").facts == tower.facts
    except EncoderFileError as refusal:
        alike = [other for other in model_names() if named_tower(other).facts == tower.facts]
        return "treat a picture differently" in str(refusal) and any(f" {other} (" in str(refusal) for other in alike)


@pytest.mark.parametrize("name", [
    "ViT-L-14-CLIPA", "ViT-H-14-378-quickgelu", "RN50x4-quickgelu", "coca_ViT-L-14", "convnext_large_d", "PE-Core-L-14-336",
    "EVA02-L-14-336", "ViT-SO400M-14-SigLIP2-378", "nllb-clip-base-siglip", "ViTamin-S", "MobileCLIP-B",
])
def test_shapes_lead_to_the_model(name):
    assert recognises(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", model_names())
def test_shapes_lead_to_every_model(name):
    assert recognises(name)


@pytest.mark.parametrize("name, size_px, statistics, interpolation, frame", [
    ("ViT-B-32", 224, OPENAI, "bicubic", "center"), ("ViT-B-16-SigLIP2-384", 384, INCEPTION, "bicubic", "stretch"),
    ("ViT-L-14-CLIPA-336", 336, IMAGENET, "bilinear", "stretch"), ("PE-Core-B-16", 224, INCEPTION, "bilinear", "stretch"),
    ("ViT-H-14-378-quickgelu", 378, OPENAI, "bicubic", "stretch"),
    ("MobileCLIP-S2", 256, ((0, 0, 0), (1, 1, 1)), "bilinear", "center"),
])
def test_pictures_are_prepared_as_published_weights_want_them(name, size_px, statistics, interpolation, frame):
    way = named_tower(name).preparation
    assert (way.size_px, (way.mean, way.std), way.interpolation, way.frame) == (size_px, statistics, interpolation, frame)


@pytest.mark.parametrize("mode, frame", [("shortest", "center"), ("squash", "stretch"), ("longest", "pad")])
def test_a_folder_is_encoded_as_open_clip_encodes_it(tiny_folder, mode, frame):
    preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "resize_mode": mode}
    write_config(tiny_folder, tiny() | {"quick_gelu": True}, preprocess_cfg=preprocess)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_folder}")
    picture = np.random.default_rng(3).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    wanted = model.eval().encode_image(transform(Image.fromarray(picture))[None]).detach()
    encoder = load_open_clip_encoder(tiny_folder)
    assert encoder.preparation.frame == frame
    [encoded] = encoder.encode(torch.from_numpy(picture)[None] / 255, None, EncodeOptions(("global",)))
    assert error(encoded.features["global"][0], wanted) <= MOST_ERROR
    assert encoder.description["family"] == "open_clip:custom"


def test_loading_warns_of_weights_prepared_in_another_way(small, monkeypatch):
    assert named_tower("ViT-L-14").other_tags == ("laion2b_s32b_b82k",) and not named_tower("ViT-L-14-quickgelu").other_tags
    published = {"first": {"mean": OPENAI[0], "std": OPENAI[1]}, "second": {"mean": INCEPTION[0], "std": INCEPTION[1]}}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(published))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: published[tag])
    with pytest.warns(EmmaWarning, match=r"mean of red 0\.481\); its weights second want another frame or mean"):
        load_open_clip_encoder(small[1], "ViT-S-32")


LAYOUTS = {
    "whole.bin": lambda state: state,
    "training.pt": lambda state: {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}},
    "tower.pth": visual,
    "tower.safetensors": visual,
    "module.sft": lambda state: {f"module.{key}": value for key, value in state.items()},
    "half.safetensors": lambda state: {key: value.half() for key, value in state.items()},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_tower(tmp_path, small, name):
    model, whole = small
    half = {key: value.half().float() for key, value in state_of(model).items()}
    save_file(half, tmp_path / "reference.safetensors")
    save = save_file if name.endswith(("safetensors", "sft")) else torch.save
    save(LAYOUTS[name](half), tmp_path / name)
    reference, encoder = (load_open_clip_encoder(tmp_path / file) for file in ("reference.safetensors", name))
    assert encoder.description == reference.description
    assert encoder.description["fingerprint"] == load_open_clip_encoder(whole).description["fingerprint"]
    torch.testing.assert_close(features_of(encoder, seen(224)), features_of(reference, seen(224)), rtol=0, atol=0)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}


def test_loading_draws_no_random_numbers_and_leaves_nothing_to_train(small):
    before = torch.get_rng_state()
    encoder = load_open_clip_encoder(small[1])
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [*encoder.model.parameters(), *encoder.model.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    assert not any(module.training for module in encoder.model.modules())


def test_a_folder_is_called_by_the_name_of_its_tower(tmp_path, small):
    write_config(tmp_path, open_clip.get_model_config("ViT-S-32"))
    save_file(state_of(small[0]), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"another layout of the same model")
    for path in (tmp_path, tmp_path / "open_clip_model.safetensors"):
        assert load_open_clip_encoder(path).description == load_open_clip_encoder(small[1]).description
    with pytest.raises(EncoderFileError, match=r"open_clip_config\.json declares another model than ViT-B-32"):
        load_open_clip_encoder(tmp_path, "ViT-B-32")


def test_a_configuration_beside_other_files_is_not_theirs(tiny_folder, small):
    save_file(state_of(small[0]), tiny_folder / "ViT-S.safetensors")
    for name, family in (("ViT-S", "ViT-S-32"), ("open_clip_model", "custom")):
        assert load_open_clip_encoder(tiny_folder / f"{name}.safetensors").description["family"] == f"open_clip:{family}"


@pytest.mark.parametrize("config, message", [
    ("{", "is not JSON"), ("[]", "is a list, wanted a JSON object"), ({}, "model_cfg is missing"),
    ("[" * 100_000, "nested more than 64 deep"), ({"model_cfg": {"embed_dim": 8, "vision_cfg": [1]}}, "vision_cfg is a list"),
    ({"model_cfg": tiny(layers=10**9)}, "layers is 1000000000; wanted numbers from 0 to 256"),
    ({"model_cfg": tiny(layers=[1] * 100)}, "layers is .*; wanted numbers"),
    ({"model_cfg": tiny(width=10**12)}, "width is 1000"), ({"model_cfg": tiny(mlp_ratio=1e300)}, "mlp_ratio is"),
    ({"model_cfg": tiny(image_size=10**9)}, "image_size is 1000000000"),
    ({"model_cfg": tiny(timm_model_name=["a"])}, "TypeError|cannot build"),
    ({"model_cfg": tiny(patch_size=0)}, "Zero|cannot build"),
    ({"model_cfg": tiny(depth=3)}, "TypeError.*depth"), ({"model_cfg": tiny(image_size=[32, 64])}, "wanted a square"),
    ({"model_cfg": tiny(), "preprocess_cfg": {"mean": [0.5]}}, "wanted .* 3 numbers each"),
    ({"model_cfg": tiny(), "preprocess_cfg": {"std": [0.5, 0, 0.5]}}, "wanted .* 3 numbers each"),
    ({"model_cfg": tiny(), "preprocess_cfg": {"interpolation": "lanczos"}}, "'lanczos'.*bicubic or bilinear"),
    ({"model_cfg": tiny(), "preprocess_cfg": {"resize_mode": "crop"}}, "'crop'.*shortest, longest, squash"),
    ({"model_cfg": tiny(width=65)}, "cannot build the picture tower"),
    ({"model_cfg": tiny(layers=4)}, r"not fit the model custom: transformer\.resblocks\.3\.\S+ is missing, wanted \("),
])
def test_faulty_configurations_are_refused(tiny_folder, config, message):
    (tiny_folder / CONFIG_NAME).write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(EncoderFileError, match=message):
        load_open_clip_encoder(tiny_folder)


@pytest.mark.parametrize("name", ["hf-hub:timm/vit_tiny_patch16_224", "local-dir:/tmp", "timm/vit_tiny_patch16_224"])
def test_a_configuration_cannot_make_timm_download(tiny_folder, name):
    write_config(tiny_folder, tiny(timm_model_name=name))
    with pytest.raises(EncoderFileError, match=f"timm has no model '{name}'"):
        load_open_clip_encoder(tiny_folder)


def test_pretrained_weights_of_timm_are_not_fetched(tiny_folder):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}
    model = open_clip.CLIP(24, vision, SMALL_TEXT).eval()
    write_config(tiny_folder, tiny(**vision, timm_model_pretrained=True))
    save_file(state_of(model), tiny_folder / "open_clip_model.safetensors")
    given = features_of(load_open_clip_encoder(tiny_folder), seen(224))
    wanted = model.encode_image(Normalize(*OPENAI)(seen(224)))
    assert error(given["global"], wanted[:, None].detach()) <= MOST_ERROR


@pytest.mark.parametrize("path", [
    "laion2b_s34b_b79k", "hf-hub:timm/ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP", "https://a/b.safetensors", "local-dir:/a/b.bin",
])
def test_tags_and_addresses_are_refused(path):
    with pytest.raises(EncoderFileError, match="no file or folder on this computer, and nothing is downl.*models/open_clip"):
        load_open_clip_encoder(path)


@pytest.mark.parametrize("name", ["ViT-B-33", "hf-hub:timm/ViT-B-16-SigLIP", "laion2b_s34b_b79k"])
def test_unknown_models_are_refused(small, name):
    with pytest.raises(EncoderFileError, match=f"'{name}' is not a model of the installed open_clip; near it: .*ViT-"):
        load_open_clip_encoder(small[1], name)


def test_unfitting_weights_are_refused_by_the_first_tensor(tmp_path, small):
    with pytest.raises(EncoderFileError, match=r"not fit the model ViT-B-32: class_embedding is \(384,\), wanted \(768,\)"):
        load_open_clip_encoder(small[1], "ViT-B-32")
    save_file(state_of(small[0]) | {"visual.extra": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(EncoderFileError, match=r"extra is \(2,\), wanted no such tensor"):
        load_open_clip_encoder(tmp_path / "more.safetensors", "ViT-S-32")
    with pytest.raises(EncoderFileError, match=r"no model of the installed open_clip has a picture tower with its 153 tensors"):
        load_open_clip_encoder(tmp_path / "more.safetensors")


def test_files_without_a_picture_tower_are_refused(tmp_path, small):
    text = {key: value for key, value in state_of(small[0]).items() if not key.startswith("visual.")}
    save_file(text, tmp_path / "text.safetensors")
    save_file({"vision_model.post_layernorm.bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    for name in ("text", "model"):
        with pytest.raises(EncoderFileError, match=rf"{name}\.safetensors holds no picture tower of open_clip \(its tensors: "):
            load_open_clip_encoder(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("make, message", [case for case in NOT_SAFETENSORS if case.id != "folder"])
def test_damaged_files_are_refused(tmp_path, small, make, message):
    make(tmp_path / "bad.safetensors", small[1].read_bytes())
    with pytest.raises(EncoderFileError, match=message.format(name=r"bad\.safetensors")):
        load_open_clip_encoder(tmp_path / "bad.safetensors")


def test_values_that_are_no_numbers_are_refused_in_the_picture_tower_alone(tmp_path, small):
    state = {key: value if key.startswith("visual.") else value * torch.nan for key, value in state_of(small[0]).items()}
    save_file(state, tmp_path / "nan.safetensors")
    assert set(load_open_clip_encoder(tmp_path / "nan.safetensors").model.state_dict()) == set(visual(state))
    save_file(state | {"visual.proj": state["visual.proj"] * torch.nan}, tmp_path / "nan.safetensors")
    with pytest.raises(EncoderFileError, match="proj holds NaN"):
        load_open_clip_encoder(tmp_path / "nan.safetensors")


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    payload = type("Payload", (), {"__reduce__": lambda self: (print, ("run",))})
    torch.save({"state_dict": payload()}, tmp_path / "bad.bin")
    with pytest.raises(EncoderFileError, match="weights alone"):
        load_open_clip_encoder(tmp_path / "bad.bin")
    assert "run" not in capsys.readouterr().out.split()


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(EncoderFileError, match="holds no weights; wanted both"):
        load_open_clip_encoder(tmp_path)
    for name in ("a.bin", "b.safetensors"):
        (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(EncoderFileError, match=r"holds no open_clip_config\.json; wanted both"):
        load_open_clip_encoder(tmp_path)
    write_config(tmp_path, tiny())
    with pytest.raises(EncoderFileError, match=r"several weights \(a\.bin, b\.safetensors\).*name it open_clip_model"):
        load_open_clip_encoder(tmp_path)


def test_what_the_tower_cannot_give_is_refused(small):
    encoder = load_open_clip_encoder(small[1])
    with pytest.raises(ReferenceMismatchError, match="face are needed; this encoder gives global, local"):
        encoder.encode(torch.rand(1, 9, 9, 3), None, EncodeOptions(("global", "face")))
    with pytest.raises(ImageInputError, match=r"open_clip:ViT-S-32 wants \(pictures, 3, 224, 224\)"):
        features_of(encoder, seen(256))


def test_an_old_timm_is_refused_not_trusted(monkeypatch, tmp_path):
    tower = built_on_meta(named_tower("PE-Core-T-16-384"))
    owner = next(kind for kind in type(tower.trunk.rope).__mro__ if "init_non_persistent_buffers" in vars(kind))
    monkeypatch.delattr(owner, "init_non_persistent_buffers")
    weights = {key: torch.zeros(value.shape) for key, value in tower.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(EncoderFileError, match="the installed timm cannot compute .*bands.*pip install -U timm"):
        load_open_clip_encoder(tmp_path / "weights.safetensors", "PE-Core-T-16-384")


@pytest.mark.parametrize("package", ["open_clip", "timm"])
def test_a_missing_package_is_named(small, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in (None, "ViT-S-32"):
        with pytest.raises(EncoderFileError, match=f"{package}.*pip install open_clip_torch"):
            load_open_clip_encoder(small[1], name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert model_names() == []


def test_names_come_at_once_and_without_importing_open_clip():
    code = ("import sys, timeit; from emma_core.encoders.open_clip_names import model_names as names; "
            "print(*names(), *({'open_clip', 'timm'} & {*sys.modules}), min(timeit.repeat(names, number=1)))")
    answer = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[2], text=True)
    *names, seconds = answer.split()
    assert names == sorted(open_clip.list_models()) and float(seconds) < 0.01
