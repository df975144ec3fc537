"""The nodes as the host lists and runs them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TinyWorld, empty_latent, noise
from token_check import Answer, CallSpy, check

PROMISED = {
    "EMMALoadELLA": ["ELLA"], "EMMALoadTextEncoder": ["CLIP"], "EMMALoadModule": ["EMMA_MODULE"],
    "EMMALoadReferenceEncoder": ["EMMA_ENCODER"], "EMMAEncodeReference": ["EMMA_REFERENCE", "IMAGE"],
    "EMMAAssembleModules": ["EMMA_ASSEMBLY"], "EMMAConnector": ["MODEL", "CONDITIONING", "CONDITIONING"],
    "EMMAGateMap": ["IMAGE"],
    "EMMASaveReference": [], "EMMALoadReference": ["EMMA_REFERENCE"],
    "EMMATrainModule": ["EMMA_MODULE", "LOSS_MAP", "STRING"], "EMMASaveModule": [],
    "EMMAPlayground": ["MODEL", "CLIP", "VAE", "ELLA", "EMMA_MODULE", "EMMA_MODULE", "EMMA_ENCODER", "EMMA_MODULE"],
    "EMMAFrameStrengths": ["FLOAT", "INT"], "EMMABlendReferences": ["EMMA_REFERENCE"],
    "EMMAPromptList": ["CONDITIONING", "INT", "STRING"], "EMMAIPAdapterTeacher": ["EMMA_TEACHER"],
}
# feature name -> (dim, tokens per vector) of the shipped encoder
PLAYGROUND_FEATURES = {"global": (128, 4), "face": (128, 2)}


@pytest.fixture(scope="module")
def infos(server):
    """What the editor is told about each of our nodes."""
    return {name: info for name, info in server.get_json("/object_info").items()
            if info["python_module"].startswith("custom_nodes.") and "EMMA" in info["category"]}


def test_promised_nodes_are_there_with_their_outputs(infos):
    assert {name: infos[name]["output"] for name in PROMISED} == PROMISED


def test_every_node_is_found_and_explained(infos):
    for name, info in infos.items():
        assert name.startswith("EMMA") and info["category"].split("/")[0] == "EMMA"
        assert info["display_name"] and info["display_name"] != name
        assert len(info["description"]) > 30, name


def test_every_input_and_output_has_a_tooltip(infos):
    for name, info in infos.items():
        for inputs in (info["input"].get("required", {}), info["input"].get("optional", {})):
            for key, (_, *options) in inputs.items():
                assert options and len(options[0].get("tooltip") or "") >= 20, f"{name}.{key}"
        tooltips = info["output_tooltips"] or []
        assert len(tooltips) == len(info["output"])
        assert all(tooltip and len(tooltip) >= 20 for tooltip in tooltips), name


def test_no_id_is_used_twice_in_a_node(host_nodes, pack):
    """0.3.64 refuses an id that is used for an input and an output."""
    for name in PROMISED:
        schema = host_nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA()
        ids = [part.id for part in (*schema.inputs, *(schema.outputs or ()))]
        assert len(ids) == len(set(ids)), name


def test_server_log_has_no_complaint_about_the_pack(server, infos):
    log = server.log_path.read_text(encoding="utf-8", errors="replace")
    assert "IMPORT FAILED" not in log and "Traceback" not in log


@pytest.mark.parametrize(("node", "field", "folder"), [
    ("EMMALoadELLA", "ella_name", "ella"), ("EMMALoadModule", "module_name", "emma"),
    ("EMMALoadTextEncoder", "text_encoder_name", "text_encoders"),
    ("EMMALoadTextEncoder", "text_encoder_name", "ella_encoder"),
    ("EMMALoadReferenceEncoder", "encoder_name", "clip_vision"), ("EMMALoadReferenceEncoder", "encoder_name", "open_clip"),
    ("EMMALoadReferenceEncoder", "encoder_name", "adaface"), ("EMMALoadReference", "reference_name", "emma_references"),
])
def test_running_server_lists_new_files(server, node, field, folder):
    path = server.models_dir / folder / "new" / f"{node}-{folder}.safetensors"
    path.parent.mkdir(parents=True)
    save_file({"weight": torch.zeros(1)}, path)
    (path.parent / "notes.txt").write_text("no model")
    kind, *options = server.get_json(f"/object_info/{node}")[node]["input"]["required"][field]
    choices = kind if isinstance(kind, list) else options[0]["options"]
    assert str(path.relative_to(server.models_dir / folder)) in choices
    assert not any(choice.endswith(".txt") for choice in choices)


@pytest.fixture(scope="module")
def files(tiny: TinyWorld, pack_import, base_directory):
    """Tiny files in the host's model folders; the module reads the shipped encoder's features."""
    fingerprint = pack_import("host.encoders").load_playground_reference_encoder().encoder.description["fingerprint"]
    encoder = {"family": "clip-miniature", "fingerprint": fingerprint}
    ella, module = tiny.ella(), tiny.module("portrait", PLAYGROUND_FEATURES, encoder=encoder)
    tiny.save_files(base_directory / "made", ella, module)
    for name, folder in (("ella.safetensors", "ella/sub"), ("module.safetensors", "emma"), ("t5", "text_encoders")):
        (base_directory / "models" / folder).mkdir(parents=True, exist_ok=True)
        (base_directory / "made" / name).rename(base_directory / "models" / folder / name)
    return ella, module


def combo(host_nodes, node: str, field: str) -> list[str]:
    kind, *options = host_nodes.NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["required"][field]
    return kind if isinstance(kind, list) else options[0]["options"]


def test_folder_of_a_text_encoder_is_one_choice(files, host_nodes):
    choices = combo(host_nodes, "EMMALoadTextEncoder", "text_encoder_name")
    assert "t5" in choices and not any("model.safetensors" in choice for choice in choices)


def test_whole_graph_from_files(files, run_node, host_nodes, tiny, pack_import):
    """Load, encode, assemble, connect, sample: the UNet gets the tokens of the weights that were saved."""
    assert str(Path("sub") / "ella.safetensors") in combo(host_nodes, "EMMALoadELLA", "ella_name")
    ella = run_node("EMMALoadELLA", ella_name=str(Path("sub") / "ella.safetensors"))[0]
    clip = run_node("EMMALoadTextEncoder", text_encoder_name="t5", dtype="auto", empty_prompt="natural length")[0]
    module = run_node("EMMALoadModule", module_name="module.safetensors")[0]
    encoder = run_node("EMMALoadReferenceEncoder", encoder_name="playground (shipped)")[0]
    picture = noise((1, 90, 70, 3), 71).sigmoid()
    reference, seen = run_node("EMMAEncodeReference", module=module, encoder=encoder, image=picture, combine="concat")
    assembly = run_node("EMMAAssembleModules", module=module, reference=reference, strength=0.7, start_percent=0.0,
                        end_percent=0.8)[0]
    texts = [run_node("CLIPTextEncode", clip=clip, text=text)[0] for text in ("a red cat", "")]
    model, positive, negative = run_node("EMMAConnector", model=tiny.model(), ella=ella, positive=texts[0],
                                         negative=texts[1], assembly=assembly)
    with CallSpy(model.model.diffusion_model) as spy:
        run_node("KSampler", model=model, positive=positive, negative=negative, seed=1, steps=4, cfg=6.0,
                 sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0, latent_image=empty_latent())
    saved_ella, saved_module = files
    core = pack_import("emma_core.model.assembly")
    expected = core.Assembly([core.Reference(saved_module.module, reference.features, 0.7, 0.0, 0.8)])
    check(spy.calls, {0: [Answer(saved_ella.connector, texts[0][0][0], expected)],
                      1: [Answer(saved_ella.connector, texts[1][0][0])]})
    assert texts[0][0][0].shape == (1, 4, 24) and texts[1][0][0].shape == (1, 1, 24)
    assert seen.shape == (1, 64, 64, 3) and seen.min() >= 0 and seen.max() <= 1


@pytest.mark.parametrize(("combine", "rows", "vectors"), [
    ("concat", 1, 3), ("average", 1, 1), ("normalised average", 1, 1), ("per frame", 3, 1)])
def test_encoding_several_pictures(files, run_node, combine, rows, vectors):
    module = run_node("EMMALoadModule", module_name="module.safetensors")[0]
    encoder = run_node("EMMALoadReferenceEncoder", encoder_name="playground (shipped)")[0]
    pictures = noise((3, 64, 64, 3), 72).sigmoid()
    reference, seen = run_node("EMMAEncodeReference", module=module, encoder=encoder, image=pictures, combine=combine)
    assert {name: tuple(value.shape) for name, value in reference.features.items()} == {
        name: (rows, vectors, dim) for name, (dim, _) in PLAYGROUND_FEATURES.items()}
    assert seen.shape == (3, 64, 64, 3)
    alone = [run_node("EMMAEncodeReference", module=module, encoder=encoder, image=pictures[index:index + 1],
                      combine="concat")[0].features["face"] for index in range(3)]
    wanted = {"concat": torch.cat(alone, 1), "average": torch.stack(alone).mean(0), "per frame": torch.cat(alone)}
    if combine in wanted:
        torch.testing.assert_close(reference.features["face"], wanted[combine], rtol=1e-4, atol=1e-4)


def test_progress_counts_the_pictures(monkeypatch, files, run_node):
    import comfy.utils

    steps = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *rest, **more: steps.append((value, total)))
    module = run_node("EMMALoadModule", module_name="module.safetensors")[0]
    encoder = run_node("EMMALoadReferenceEncoder", encoder_name="playground (shipped)")[0]
    run_node("EMMAEncodeReference", module=module, encoder=encoder, image=torch.rand(20, 64, 64, 3), combine="average")
    assert steps == [(16, 20), (20, 20)]


def test_mask_removes_the_background(files, run_node, pack_import):
    module = run_node("EMMALoadModule", module_name="module.safetensors")[0]
    encoder = run_node("EMMALoadReferenceEncoder", encoder_name="playground (shipped)")[0]
    mask = torch.zeros(1, 32, 32)
    mask[:, :16] = 1
    first, second = (noise((1, 64, 64, 3), seed).sigmoid() for seed in (73, 74))
    second[:, :36] = first[:, :36]  # the same object before another background
    encoded = [run_node("EMMAEncodeReference", module=module, encoder=encoder, image=picture, mask=mask, combine="concat")
               for picture in (first, second)]
    unmasked = run_node("EMMAEncodeReference", module=module, encoder=encoder, image=first, combine="concat")[0]
    assert torch.equal(encoded[0][0].features["face"], encoded[1][0].features["face"])
    assert not torch.allclose(encoded[0][0].features["face"], unmasked.features["face"], rtol=1e-2)
    mean = torch.tensor(pack_import("emma_core.encoders.families").MEAN)
    assert (encoded[0][1][:, 40:] - mean).abs().max() < 1 / 255, "the encoder's mean colour"


@pytest.mark.parametrize("yaml_first", [True, False])
@pytest.mark.parametrize("is_default", [True, False])
def test_extra_model_paths_are_honoured(monkeypatch, tmp_path, pack_import, yaml_first, is_default):
    from utils.extra_config import load_extra_path_config

    paths = pack_import("host.paths")
    known = {key: value for key, value in folder_paths.folder_names_and_paths.items()
             if key not in ("ella", "emma", "ella_encoder")}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for folder in ("my ella", "my emma"):
        (tmp_path / folder).mkdir()
        save_file({"weight": torch.zeros(1)}, tmp_path / folder / "mine.safetensors")
    config = {"elsewhere": {"base_path": str(tmp_path), "is_default": is_default, "ella": "my ella", "emma": "my emma",
                            "ella_encoder": "my encoders"}}
    (tmp_path / "paths.yaml").write_text(json.dumps(config))
    for step in (1, 0) if yaml_first else (0, 1):
        if step:
            load_extra_path_config(str(tmp_path / "paths.yaml"))
        else:
            paths.register_folders()
    own, mine = str(Path(folder_paths.models_dir) / "ella"), str(tmp_path / "my ella")
    assert sorted(paths.ELLA.roots()) == sorted([own, mine])
    if is_default:
        assert paths.ELLA.roots()[0] == mine
    assert "mine.safetensors" in paths.ELLA.names() and "mine.safetensors" in paths.MODULE.names()
    assert paths.MODULE.path("mine.safetensors") == str(tmp_path / "my emma" / "mine.safetensors")
    assert str(tmp_path / "my encoders") in paths.TEXT_ENCODER.roots()


def test_playground_graph_runs_on_the_server(server):
    """The shipped world through /prompt: two modules assembled, sampled and decoded to a picture."""
    play = ["1", 0], ["1", 1], ["1", 2], ["1", 3], ["1", 4], ["1", 5], ["1", 6]
    model, clip, vae, ella, style, face, encoder = play
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    graph = {
        "1": ("EMMAPlayground", {}),
        "2": ("EmptyImage", {"width": 96, "height": 96, "batch_size": 1, "color": 0x8090A0}),
        "3": ("EMMAEncodeReference", {"module": style, "encoder": encoder, "image": ["2", 0], "combine": "concat"}),
        "4": ("EMMAEncodeReference", {"module": face, "encoder": encoder, "image": ["2", 0], "combine": "average"}),
        "5": ("EMMAAssembleModules", {"module": style, "reference": ["3", 0], **settings}),
        "6": ("EMMAAssembleModules", {"module": face, "reference": ["4", 0], "assembly": ["5", 0], **settings}),
        "7": ("CLIPTextEncode", {"clip": clip, "text": "woman astronaut"}),
        "8": ("CLIPTextEncode", {"clip": clip, "text": ""}),
        "9": ("EMMAConnector", {"model": model, "ella": ella, "positive": ["7", 0], "negative": ["8", 0],
                                "assembly": ["6", 0]}),
        "10": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "11": ("KSampler", {"model": ["9", 0], "positive": ["9", 1], "negative": ["9", 2], "latent_image": ["10", 0], "seed": 1,
                            "steps": 2, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}),
        "12": ("VAEDecode", {"samples": ["11", 0], "vae": vae}),
        "13": ("SaveImage", {"images": ["12", 0], "filename_prefix": "nodes"}),
        "14": ("EMMAGateMap", {"ella": ella, "assembly": ["6", 0], "conditioning": ["7", 0], "timestep": 700}),
        "15": ("SaveImage", {"images": ["14", 0], "filename_prefix": "gates"}),
    }
    prompt = {key: {"class_type": node, "inputs": inputs} for key, (node, inputs) in graph.items()}
    status, answer = server.post_json("/prompt", {"prompt": prompt})
    assert status == 200, answer
    deadline = time.monotonic() + 240
    while not (history := server.get_json(f"/history/{answer['prompt_id']}")) and time.monotonic() < deadline:
        time.sleep(0.2)
    outcome = history[answer["prompt_id"]]
    assert outcome["status"]["status_str"] == "success", outcome["status"]
    for key in ("13", "15"):
        (image,) = outcome["outputs"][key]["images"]
        assert (server.output_dir / image["filename"]).stat().st_size > 500
