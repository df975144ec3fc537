"""Training nodes: the host's UNet as a denoiser, a run in the graph, what it leaves, and what it refuses."""

from __future__ import annotations

import base64
import dataclasses
import io as bytes_io
import json
import time
import types

import comfy.model_management
import comfy.supported_models
import folder_paths
import pytest
import torch
from model_variants import made_in_inference_mode, with_lora, with_velocity
from PIL import Image
from safetensors import safe_open
from tiny_models import TEXT_DIM, UNET, WIDTH, empty_latent, fill_, noise

CPU = torch.device("cpu")


@pytest.fixture
def training(pack_import, monkeypatch, tmp_path):
    """host.training, with the output folder of this test."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return pack_import("host.training")


@pytest.fixture(scope="module")
def beginning(pack_import):
    return pack_import("emma_core.training.beginning")


@pytest.fixture(scope="module")
def training_set(pack_import):
    return pack_import("host.training_set")


@pytest.fixture(scope="module")
def errors(pack_import):
    return pack_import("emma_core.errors")


@pytest.fixture(scope="module")
def encoder(pack_import):
    return pack_import("host.encoders").load_playground_reference_encoder()


def texts(count: int, tokens: int = 5) -> list:
    return [[noise((1, tokens + index, TEXT_DIM), 40 + index), {}] for index in range(count)]


@pytest.fixture
def train(run_node, tiny, encoder, training):
    """`train(steps=...)`: the node as the host calls it, with every input in a list, on two pictures."""

    def run(**changes):
        settings = {
            "model": tiny.model(), "ella": tiny.ella(), "latents": {"samples": noise((2, 4, 8, 8), 31)}, "positive": texts(2),
            "reference_image": noise((2, 64, 64, 3), 32).sigmoid(), "encoder": encoder, "name": "run", "condition": "style",
            "steps": 5, "batch": 2, "accumulate": 1, "rate": 1e-3, "gate_rate": 5.0, "seed": 3, "precision": "fp32",
            "timestep_power": 1.0, "inverse_snr": 0.0, "average": 0.0, "checkpoint_every": 100, **changes,
        }
        settings = {key: value if isinstance(value, Many) else [value] for key, value in settings.items()}
        return run_node("EMMATrainModule", **{key: list(value) for key, value in settings.items()})

    return run


class Many(list):
    """Several values on one input, as a list output of another node gives them."""


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def assert_same(found, wanted):
    assert set(found) == set(wanted) and all(torch.equal(found[name], value) for name, value in wanted.items())


def test_run_gives_a_module_that_learnt(train, tiny, training):
    module, loss_map, report = train(steps=6)
    assert len(loss_map["loss"]) == 6 and all(0 < loss < 100 for loss in loss_map["loss"])
    config = module.module.config
    assert config.condition == "style" and list(config.features) == ["global"] and config.encoder["family"] == "clip-miniature"
    assert config.training["steps"] == 6 and config.training["data"]["pictures"] == 2
    assert all(block.attn_gate.abs() > 1e-4 and block.ffn_gate.abs() > 1e-4 for block in module.module.blocks)
    assert "6 updates" in report and "with reference" in report and "text only" in report


def test_run_begins_as_ella(train, tiny):
    """Without a rate nothing moves: A and F stay 0, and the tokens are ELLA's."""
    ella = tiny.ella()
    module = train(ella=ella, rate=0.0, steps=2)[0]
    assert all(block.attn_gate == 0 and block.ffn_gate == 0 for block in module.module.blocks)


def test_module_learns_from_its_teacher(train, tiny):
    """The teacher is the same UNet under other tokens, which a module comes near to; the same draws without a rate do not."""
    model = tiny.model()
    shared = {"model": model, "teacher_model": model, "teacher_positive": [[noise((1, 8, WIDTH), 60), {}]],
              "latents": {"samples": noise((1, 4, 8, 8), 36)}, "positive": texts(1), "steps": 40, "gate_rate": 20.0,
              "reference_image": noise((1, 64, 64, 3), 32).sigmoid(), "timestep_power": 0.3}
    learning, still = (sum(train(rate=rate, name=str(rate), **shared)[1]["loss"][-10:]) for rate in (5e-3, 0.0))
    assert learning < 0.5 * still


def test_model_and_ella_stay_bit_identical(train, tiny):
    model, ella = with_lora(made_in_inference_mode(tiny)), tiny.ella()
    before, ella_before = weights(model), {name: value.clone() for name, value in ella.connector.state_dict().items()}
    options = json.dumps(model.model_options, default=str, sort_keys=True)
    train(model=model, ella=ella)
    model.detach()  # takes the LoRA out of the weights, as the host does when another model needs the room
    assert_same(weights(model), before)
    assert_same(ella.connector.state_dict(), ella_before)
    assert all(value.grad is None for value in (*model.model.parameters(), *ella.connector.parameters()))
    assert json.dumps(model.model_options, default=str, sort_keys=True) == options


def test_latents_are_scaled_as_the_unet_reads_them(pack_import, tiny):
    samples = noise((1, 4, 8, 8), 31)
    assert torch.equal(pack_import("host.latents").scaled(tiny.model(), samples), samples * 0.18215)


def test_lists_of_sizes_and_shared_inputs_are_taken(train):
    latents = Many([{"samples": noise((2, 4, 8, 8), 31)}, {"samples": noise((1, 4, 8, 16), 37)}])
    module, loss_map, _ = train(latents=latents, positive=texts(1), steps=4,
                                reference_image=noise((1, 50, 70, 3), 32).sigmoid())
    assert len(loss_map["loss"]) == 4
    assert module.module.config.training["data"] == {"pictures": 3, "captions": 1, "references": 1,
                                                     "sizes_px": {"64x64": 2, "128x64": 1}}


def test_every_latent_has_its_own_text_and_reference(training_set):
    rows = [torch.full((4, 2, 3), float(index)) for index in range(3)]
    own = training_set.GraphSet(tuple(rows), tuple(row[:1, :, :2] for row in rows), tuple({"global": row[0]} for row in rows))
    shared = training_set.GraphSet(tuple(rows), own.texts[1:2], own.features_of_references[2:])
    for index in range(3):
        assert own.text(own.captions(index)[0])[0, 0, 0] == index
        assert own.features(own.references(index)[0], 0)["global"][0, 0] == index
        assert shared.text(shared.captions(index)[0])[0, 0, 0] == 1
        assert shared.features(shared.references(index)[0], 0)["global"][0, 0] == 2
    assert own.bucket(0) == (24, 16)


def test_settings_reach_the_run(train, beginning, monkeypatch):
    seen = []
    real = beginning.Trainer
    monkeypatch.setattr(beginning, "Trainer", lambda config, *rest: seen.append(config) or real(config, *rest))
    train(steps=1, batch=1, accumulate=3, rate=2e-4, gate_rate=7.0, seed=2 ** 63, timestep_power=0.6, inverse_snr=9.0,
          average=0.5, checkpoint_every=17)
    config = seen[0]
    assert dataclasses.asdict(config.train) | {
        "steps": 1, "batch": 1, "accumulate": 3, "rate": 2e-4, "gate_rate": 7.0, "seed": 2 ** 63, "average": 0.5,
        "precision": "fp32", "warmup": 50, "schedule": "cosine"} == dataclasses.asdict(config.train)
    assert (config.objective.timestep_power, config.objective.inverse_snr, config.report.save_every) == (0.6, 9.0, 17)
    assert config.objective.drop_text == config.objective.drop_both == 0 and config.objective.drop_reference == 0.05


@pytest.mark.parametrize(("cpu", "has_bf16", "precision"), [
    (True, True, "fp32"), (False, True, "bf16"), (False, False, "fp32")])
def test_auto_precision(training, monkeypatch, cpu, has_bf16, precision):
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: cpu)
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device: has_bf16)
    assert training.precision_of("auto") == precision and training.precision_of("fp32") == "fp32"


def test_precisions_can_follow_each_other(train):
    """accelerate refuses a second precision in a process unless its memory of the first is cleared."""
    for precision in ("fp32", "bf16", "fp32"):
        assert len(train(precision=precision, steps=1, name=precision)[1]["loss"]) == 1


def test_same_run_twice_is_bit_identical(train, training):
    first, second = (train(name=name, average=0.9)[0].module.state_dict() for name in ("one", "two"))
    assert_same(first, second)
    assert any(not torch.equal(first[name], value)
               for name, value in train(name="one", average=0.9, seed=4)[0].module.state_dict().items())


@pytest.fixture
def cancel_at(monkeypatch):
    """`cancel_at(3)`: the host's Cancel, pressed during that update; `cancel_at(None)` lets runs go on."""
    import comfy.utils

    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)  # later hosts skip quick updates

    def press(step: int | None) -> None:
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, *rest, **more: (
            comfy.model_management.interrupt_current_processing(True) if value == step else None))

    yield press
    comfy.model_management.interrupt_current_processing(False)


def test_cancel_leaves_a_module_and_the_run_goes_on(train, tmp_path, cancel_at, pack_import):
    wanted, wanted_losses, _ = train(name="whole", average=0.9)
    cancel_at(3)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(average=0.9)
    folder = tmp_path / "emma_training" / "run"
    left = pack_import("host.loaded").load_emma_module(str(folder / "run.safetensors"))
    assert left.module.config.training["steps"] == 3 and (folder / "checkpoint-00000003.pt").exists()
    cancel_at(None)
    module, losses, _ = train(average=0.9)
    assert_same(module.module.state_dict(), wanted.module.state_dict())
    assert losses == wanted_losses and len(losses["loss"]) == 5
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith("run")] == ["run"]


def test_another_run_of_the_same_name_gets_a_folder_of_its_own(train, tmp_path):
    train(steps=1)
    kept = (tmp_path / "emma_training" / "run" / "run.safetensors").read_bytes()
    train(steps=1, latents={"samples": noise((2, 4, 8, 8), 99)})
    train(steps=1, seed=9)
    names = sorted(path.name for path in (tmp_path / "emma_training").iterdir())
    assert names == ["run", "run_2", "run_3"]
    assert (tmp_path / "emma_training" / "run" / "run.safetensors").read_bytes() == kept


def test_more_steps_continue_the_same_run(train, tmp_path):
    first = train(steps=2)[1]["loss"]
    longer = train(steps=4)[1]["loss"]
    assert longer[:2] == first and len(longer) == 4
    assert [path.name for path in (tmp_path / "emma_training").iterdir()] == ["run"]


def test_start_module_is_where_the_run_begins(train, tiny, encoder):
    start = tiny.module("style", {"global": (128, 4)}, encoder=dict(encoder.encoder.description))
    module = train(start=start, rate=0.0, steps=1)[0]
    for name, value in start.module.state_dict().items():
        assert torch.equal(module.module.state_dict()[name], value.half().float())


def test_start_module_of_other_sizes_is_refused(train, tiny, errors):
    with pytest.raises(errors.TrainingConfigError, match=r"start\.safetensors has width 64, 2 blocks and the features global"):
        train(start=tiny.module("style", {"global": (20, 4)}))


def test_metadata_tell_what_was_used_and_no_more(train, tiny, encoder):
    """The preset weighs places, and the node cannot: what pictures have in common is not wired into it."""
    begun = train(steps=1)[0].module.config.training["recipe"]
    assert begun["blocks"] == "ella" and not {"place_weight", "teacher", "start"} & set(begun)
    start = tiny.module("style", {"global": (128, 4)}, encoder=dict(encoder.encoder.description))
    settings = {"start": start, "teacher_model": tiny.model(seed=8), "teacher_positive": [[noise((1, 5, WIDTH), 60), {}]]}
    taught = train(steps=1, name="taught", **settings)[0].module.config.training["recipe"]
    assert taught["teacher"] == "MODEL (BaseModel)" and len(taught["start"]) == 64 and "blocks" not in taught


def test_teacher_is_the_target(beginning, tiny, train, monkeypatch):
    """The target of a row is the teacher's own prediction under that row's own conditioning, and the loss is measured on it."""
    teacher, conditioning = with_lora(tiny.model(seed=8)), [[noise((1, 5, WIDTH), 60), {}], [noise((1, 9, WIDTH), 61), {}]]
    made = []
    real = beginning.Student
    monkeypatch.setattr(beginning, "Student", lambda *parts: made.append(real(*parts)) or made[-1])
    losses = train(teacher_model=teacher, teacher_positive=conditioning, steps=1, rate=0.0)[1]["loss"]
    student = made[0]
    assert len(losses) == 1
    noised, timestep_B = noise((2, 4, 8, 8), 62), torch.tensor([300, 800])

    @dataclasses.dataclass
    class Target:
        target: int

    with torch.no_grad():
        found = student.teacher.predict(noised, timestep_B, None, [Target(1), Target(0)])
    comfy.model_management.load_models_gpu([teacher])
    for row, entry in enumerate((1, 0)):
        sigma = teacher.model.model_sampling.sigmas[timestep_B[row:row + 1]]
        scaled = noised[row:row + 1] * (sigma ** 2 + 1).sqrt()
        with torch.no_grad():
            denoised = teacher.model.apply_model(scaled, sigma, c_crossattn=conditioning[entry][0])
        wanted = (scaled - denoised) / sigma
        assert (found[row:row + 1] - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    plain = train(steps=1, rate=0.0, name="plain")[1]["loss"]
    assert losses != plain


def test_whole_graph_of_a_trained_module(train, run_node, tiny, encoder, base_directory, host_nodes):
    """Train, save, load, encode, assemble, connect, sample."""
    ella, model = tiny.ella(), tiny.model()
    module = train(ella=ella, model=model, steps=4, rate=1e-2, gate_rate=50.0)[0]
    run_node("EMMASaveModule", module=module, name="made/trained")
    loaded = run_node("EMMALoadModule", module_name="made/trained.safetensors")[0]
    assert_same(loaded.module.state_dict(), module.module.state_dict())
    picture = noise((1, 64, 64, 3), 32).sigmoid()
    reference = run_node("EMMAEncodeReference", module=loaded, encoder=encoder, image=picture, combine="concat")[0]
    assembly = run_node("EMMAAssembleModules", module=loaded, reference=reference, strength=1.0, start_percent=0.0,
                        end_percent=1.0)[0]
    texts_of_both = {"positive": tiny.text(), "negative": tiny.text(2, 9)}

    def sample(**optional):
        connected, positive, negative = run_node("EMMAConnector", model=model, ella=ella, **texts_of_both, **optional)
        return run_node("KSampler", model=connected, positive=positive, negative=negative, seed=1, steps=3, cfg=6.0,
                        sampler_name="euler", scheduler="normal", denoise=1.0, latent_image=empty_latent())[0]["samples"]

    with_module, alone = sample(assembly=assembly), sample()
    assert torch.isfinite(with_module).all() and not torch.allclose(with_module, alone, rtol=1e-3)


def test_training_graph_runs_on_the_server(server):
    """The playground through /prompt: the host's execution, its lists and its plot of the losses."""
    settings = {"name": "served", "condition": "face", "steps": 3, "batch": 1, "accumulate": 1, "rate": 1e-3, "gate_rate": 5.0,
                "seed": 1, "precision": "auto", "timestep_power": 0.4, "inverse_snr": 60.0, "average": 0.9,
                "checkpoint_every": 100}
    graph = {
        "1": ("EMMAPlayground", {}),
        "2": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 2, "color": 0x8090A0}),
        "3": ("VAEEncode", {"pixels": ["2", 0], "vae": ["1", 2]}),
        "4": ("CLIPTextEncode", {"clip": ["1", 1], "text": "woman astronaut"}),
        "5": ("EMMATrainModule", {"model": ["1", 0], "ella": ["1", 3], "latents": ["3", 0], "positive": ["4", 0],
                                  "reference_image": ["2", 0], "encoder": ["1", 6], **settings}),
        "6": ("EMMASaveModule", {"module": ["5", 0], "name": "served"}),
        "7": ("LossGraphNode", {"loss": ["5", 1], "filename_prefix": "losses"}),
    }
    prompt = {key: {"class_type": node, "inputs": inputs} for key, (node, inputs) in graph.items()}
    status, answer = server.post_json("/prompt", {"prompt": prompt})
    assert status == 200, answer
    deadline = time.monotonic() + 240
    while not (history := server.get_json(f"/history/{answer['prompt_id']}")) and time.monotonic() < deadline:
        time.sleep(0.2)
    outcome = history[answer["prompt_id"]]
    assert outcome["status"]["status_str"] == "success", outcome["status"]
    assert "7" in outcome["outputs"]
    with safe_open(server.models_dir / "emma" / "served.safetensors", "pt") as stream:
        assert json.loads(stream.metadata()["emma"])["training"]["steps"] == 3
    assert (server.output_dir / "emma_training" / "served" / "checkpoint-00000003.pt").exists()


def test_saved_file_keeps_and_adds_metadata(run_node, tiny, base_directory):
    module = tiny.module(unknown={"colour": "blue"}, file_metadata={"modelspec.title": "Old", "modelspec.author": "Ada"})
    run_node("EMMASaveModule", module=module, name="described", title="New", license="CC0-1.0",
             thumbnail=noise((1, 300, 600, 3), 70).sigmoid())
    with safe_open(base_directory / "models" / "emma" / "described.safetensors", "pt") as stream:
        metadata = stream.metadata()
    assert metadata["modelspec.title"] == "New" and metadata["modelspec.author"] == "Ada"
    assert metadata["modelspec.license"] == "CC0-1.0" and json.loads(metadata["emma"])["colour"] == "blue"
    kind, _, data = metadata["modelspec.thumbnail"].partition(",")
    picture = Image.open(bytes_io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and picture.format == "JPEG" and picture.size == (256, 128)


def test_saving_never_overwrites(run_node, tiny, base_directory):
    folder = base_directory / "models" / "emma" / "twice"
    for seed in (2, 3):
        run_node("EMMASaveModule", module=tiny.module(seed=seed), name="twice/same.safetensors")
    files = [(folder / name).read_bytes() for name in ("same.safetensors", "same_2.safetensors")]
    assert files[0] != files[1] and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("name", ["", "  ", ".", "..", "../outside", "folder/", "/etc/module"])
def test_names_outside_of_the_folder_are_refused(run_node, train, tiny, errors, name):
    with pytest.raises(errors.FileError, match="cannot be a name in .*Give a name"):
        run_node("EMMASaveModule", module=tiny.module(), name=name)
    with pytest.raises(errors.FileError, match="cannot be a name in .*Give a name"):
        train(name=name)


SDXL = {**UNET, "adm_in_channels": 16, "num_classes": "sequential"}
REFUSALS = {
    "numbers of texts": ("TrainingDataError", {"positive": texts(3)},
                         r"3 conditioning entries for 2 latents; wanted 1 for all, or 2"),
    "numbers of references": ("TrainingDataError", {"reference_image": torch.rand(3, 64, 64, 3)},
                              r"3 reference pictures for 2 latents; wanted 1 for all, or 2"),
    "no latents": ("TrainingDataError", {"latents": {"samples": torch.zeros(0, 4, 8, 8)}}, "no latents to learn from"),
    "channels": ("TrainingDataError", {"latents": {"samples": torch.zeros(2, 16, 8, 8)}},
                 r"latents of shape \(2, 16, 8, 8\); wanted \(pictures, 4, height, width\)"),
    "NaN": ("TrainingDataError", {"latents": {"samples": torch.full((2, 4, 8, 8), torch.nan)}}, "a latent holds NaN"),
    "CLIP": ("ConnectorMismatchError", {"positive": [[torch.zeros(1, 77, WIDTH), {}]]},
             r"positive conditioning has width 64, the ELLA reads text features of width 24.*Load ELLA Text Encoder"),
    "no text": ("ConnectorMismatchError", {"positive": [[None, {}]]}, "positive conditioning holds no text features"),
    "no picture": ("ImageInputError", {"reference_image": torch.zeros(0, 64, 64, 3)}, "image batch is empty"),
    "teacher alone": ("TrainingConfigError", {"teacher_model": "model"}, "needs both.*; teacher_positive is not wired"),
    "teacher's text alone": ("TrainingConfigError", {"teacher_positive": texts(1)}, "needs both.*; teacher_model is not wired"),
    "teacher's width": ("TrainingConfigError", {"teacher_model": "model", "teacher_positive": texts(1)},
                        "teacher's conditioning has width 24, its MODEL reads 64"),
    "teacher's numbers": ("TrainingDataError", {"teacher_model": "model", "teacher_positive": [[torch.rand(3, 4, WIDTH), {}]]},
                          "3 entries of the teacher's conditioning for 2 latents"),
    "teacher's prediction": ("TrainingConfigError", {"teacher_model": "velocity", "teacher_positive": texts(1)},
                             "the teacher predicts v, the MODEL eps"),
    "width of the model": ("ConnectorMismatchError", {"model": "wide"},
                           r"cross-attention of width 32; the ELLA makes tokens of width 64"),
    "inpainting": ("TrainingConfigError", {"model": "inpainting"}, r"reads 9 channels; wanted 4"),
    "start": ("TrainingConfigError", {"start": "object module"},
              r"has width 64, 2 blocks and the features global, local; this run has .* global. Start from"),
    "name": ("FileError", {"name": "../outside"}, "cannot be a name in .*Give a name"),
    "settings": ("SettingsError", {"steps": 0}, r"train\.steps = 0; wanted 1 to any"),
}


def host_models(tiny, value):
    """MODELs are made when a test runs."""
    made = {"model": lambda: tiny.model(), "velocity": lambda: with_velocity(tiny.model()),
            "object module": lambda: tiny.module("object", {"global": (24, 1), "local": (20, 1)}),
            "wide": lambda: tiny.model(sizes={**UNET, "context_dim": 32}),
            "inpainting": lambda: tiny.model(sizes={**UNET, "in_channels": 9})}
    return made[value]() if isinstance(value, str) and value in made else value


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_was_found_before_anything_is_encoded(train, tiny, errors, encoder, tmp_path, monkeypatch, case):
    monkeypatch.setattr(encoder.encoder, "encode", lambda *pictures: pytest.fail("a reference was encoded"))
    kind, changes, message = REFUSALS[case]
    with pytest.raises(getattr(errors, kind), match=message):
        train(**{key: host_models(tiny, value) for key, value in changes.items()})
    assert not (tmp_path / "emma_training").exists()


def test_encoder_without_the_features_is_refused(train, errors, tmp_path):
    import comfy.clip_vision

    sizes = {"hidden_act": "gelu", "hidden_size": 32, "image_size": 28, "intermediate_size": 64, "layer_norm_eps": 1e-5,
             "model_type": "clip_vision_model", "num_attention_heads": 4, "num_channels": 3, "num_hidden_layers": 2,
             "patch_size": 14, "projection_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    clip_vision = comfy.clip_vision.ClipVisionModel(str(tmp_path / "config.json"))
    fill_(clip_vision.model, 75)
    with pytest.raises(errors.ReferenceMismatchError, match="the features face are needed; this encoder gives global, local"):
        train(encoder=clip_vision, condition="face")
    module = train(encoder=clip_vision, condition="object", steps=1)[0]
    assert {name: spec.dim for name, spec in module.module.config.features.items()} == {"global": 16, "local": 32}


def test_connected_conditioning_is_refused(train, run_node, tiny, errors):
    ella = tiny.ella()
    positive = run_node("EMMAConnector", model=tiny.model(), ella=ella, positive=texts(1), negative=texts(1))[1]
    with pytest.raises(errors.ConnectorMismatchError, match="positive conditioning holds tokens of EMMA Connector"):
        train(ella=ella, positive=positive)


def test_missing_accelerate_is_explained(train, errors, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(errors.TrainingError, match="needs the package accelerate.*pip install accelerate"):
        train()


def test_a_disk_without_room_is_refused_before_the_first_update(train, training, errors, monkeypatch):
    monkeypatch.setattr(training.check_room.__globals__["shutil"], "disk_usage",
                        lambda path: types.SimpleNamespace(free=10_000))
    with pytest.raises(errors.TrainingError, match=r"checkpoints need about .* GB, .* has 0.0 GB free. Make room"):
        train()
