"""An ELLA that learns to tell its base what the base's own text encoder tells it."""

import json
import warnings
from unittest import mock

import pytest
import torch
from checkpoints_with_text import save_checkpoint
from PIL import Image
from training_world import fresh_accelerate

from emma_core.__main__ import main
from emma_core.base.own_text import load_own_text
from emma_core.base.parts import load_base_parts
from emma_core.errors import TrainingDataError
from emma_core.files.connector_file import load_connector, save_connector
from emma_core.model.connector import Connector, ConnectorConfig
from emma_core.playground import PLAYGROUND_DIR
from emma_core.training.checkpoints import checkpoints, load_checkpoint
from emma_core.training.config import resolve
from emma_core.training.draws import Batch, BatchRow
from emma_core.training.own_text_teacher import encode_for_teacher, own_text_target
from emma_core.training.reading import ask, read

T5 = str(PLAYGROUND_DIR / "t5.safetensors")
SMALL = ["--preset", "small-card", "--data.resolution_px", "64", "--data.bucket_step_px", "32", "--data.workers", "0",
         "--train.precision", "fp32", "--train.batch", "4", "--train.accumulate", "1", "--train.warmup", "1",
         "--report.log_every", "1", "--report.sample_every", "0", "--objective.place_weight", "false", "--device", "cpu"]
LONG = "a red ball " * 60  # more than 77 tokens


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd15") / "small", sdxl=False)


@pytest.fixture(scope="module")
def ella(sd15, tmp_path_factory):
    """One that has learnt nothing, of this base's width and the small T5's."""
    torch.manual_seed(0)
    text_dim = load_connector(PLAYGROUND_DIR / "ella.safetensors").config.text_dim
    path = tmp_path_factory.mktemp("ella") / "ella.safetensors"
    config = ConnectorConfig(width=64, text_dim=text_dim, layers=2, heads=1, time_channels=64, time_width=64)
    save_connector(Connector(config), path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, (colour, caption) in enumerate((("#c03030", "a red ball"), ("#3030c0", "a blue ball"), ("#30c030", LONG))):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def train(what, sd15, ella, pictures, out, *more) -> int:
    with fresh_accelerate(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main(["train", *what, *SMALL, "--base.checkpoint", str(sd15), "--ella.file", str(ella), "--ella.text_encoder",
                     T5, "--data.folder", str(pictures), "--output.folder", str(out), "--teacher.own_text", "true", *more])


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def check_that_an_interrupted_run_ends_alike(begin, folder, monkeypatch) -> None:
    """``begin`` starts the run in `parts`, which is interrupted after 7 updates and goes on; the whole one is in `whole`."""
    from emma_core.training.trainer import Trainer

    update = Trainer.update

    def interrupted(self, buckets):
        if self.step == 7:
            raise KeyboardInterrupt
        return update(self, buckets)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", interrupted)
        assert begin() == 130
    assert begin() == 0
    again, wanted = (load_checkpoint(checkpoints(folder / name)[-1])["learning"] for name in ("parts", "whole"))
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_it_says_of_captions_of_all_lengths_what_the_base_says_by_its_own_tokens(sd15, tmp_path):
    config, captions = resolve({"what": "ella", "base": {"checkpoint": str(sd15)}}), ["a ball", LONG, "", "a fox"]
    parts = load_base_parts(config.base, config.ella, torch.float32, torch.device("cpu"))
    backbone = parts.backbone

    class Data:
        def __len__(self):
            return len(captions)

        def captions(self, index):
            return (captions[index],)

    told = []
    texts = encode_for_teacher(config, parts, Data(), tmp_path, lambda *progress: told.append(progress))
    assert told[-1][1:] == (4, 4)
    target = own_text_target(backbone, texts)
    torch.manual_seed(1)
    noised_B4hw, timestep_B = torch.randn(4, 4, 8, 8), torch.tensor([10, 400, 700, 999])
    rows = [BatchRow(index, False, caption, 0, 0, 1.0) for index, caption in enumerate(captions)]
    found_B4hw = target.predict(noised_B4hw, timestep_B, torch.zeros(4, 77, 64), rows)
    encode = load_own_text(sd15, backbone.spec, torch.float32).encode
    for index, caption in enumerate(captions):
        [text_1NW] = encode([caption])
        with torch.no_grad():
            wanted = backbone.predict_noise(noised_B4hw[index:index + 1], timestep_B[index:index + 1], text_1NW)
        assert torch.allclose(found_B4hw[index], wanted[0], atol=1e-5)
    assert not torch.allclose(found_B4hw[0], found_B4hw[1], atol=1e-3)


def test_an_ella_learns_from_it_and_an_interrupted_run_goes_on_bit_for_bit(sd15, ella, pictures, tmp_path, monkeypatch):
    settings = ["--train.steps", "60", "--train.rate", "5e-3", "--report.save_every", "60"]
    assert train(["ella"], sd15, ella, pictures, tmp_path / "whole", *settings) == 0
    found = losses(tmp_path / "whole")
    assert sum(found[-10:]) < 0.5 * sum(found[:10]), "a teacher's prediction has no noise of its own"
    metadata = load_connector(tmp_path / "whole" / "emma-module.safetensors")
    assert metadata.config.width == 64

    check_that_an_interrupted_run_ends_alike(lambda: train(["ella"], sd15, ella, pictures, tmp_path / "parts", *settings),
                                             tmp_path, monkeypatch)


@pytest.mark.parametrize(("what", "more", "found"), [
    ([], ["--encoder.file", str(PLAYGROUND_DIR / "encoder.safetensors")], "teacher.own_text teaches an ELLA"),
    (["ella"], ["--teacher.lora", "a.safetensors"], "teacher.own_text does not go with teacher.lora"),
    (["ella"], ["--teacher.lora", "a.safetensors", "--teacher.own_latents", "true"],
     "teacher.own_text does not go with teacher.lora and teacher.own_latents"),
    (["ella"], ["--base.checkpoint", "playground"], "the playground has none but its ELLA's"),
])
def test_what_does_not_go_with_it_is_refused(sd15, ella, pictures, tmp_path, capsys, what, more, found):
    assert train(what, sd15, ella, pictures, tmp_path / "out", *more) == 1
    assert found in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_text_encoders_is_refused(ella, pictures, tmp_path, capsys, sd15):
    import shutil

    bare = shutil.copytree(sd15, tmp_path / "bare")
    shutil.rmtree(bare / "text_encoder")
    assert train(["ella"], bare, ella, pictures, tmp_path / "out") == 1
    assert "text_encoder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def reading_of(sd15, ella, captions, reading=3):
    """What a run asks of a base; captions are those of the pictures, of any latents."""
    config = resolve({"what": "ella", "base": {"checkpoint": str(sd15)}, "teacher": {"own_text": True, "reading": reading}})
    parts = load_base_parts(config.base, config.ella, torch.float32, torch.device("cpu"))
    encode = load_own_text(sd15, parts.backbone.spec, torch.float32).encode
    words = torch.Generator().manual_seed(1)
    t5 = {caption: torch.randn(1, 3, 128, generator=words) for caption in captions}

    class Data:
        def __len__(self):
            return len(captions)

        def captions(self, index):
            return (captions[index],)

        def bucket(self, index):
            return (64, 64)

        def latent(self, index, flipped=False):
            return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(index))

        def text(self, caption):
            return t5[caption]

    class Texts:
        def text(self, caption):
            return encode([caption])[0]

    data = Data()
    return ask(config, parts.backbone, data, Texts(), torch.device("cpu")), data, parts.backbone, encode


def test_what_is_read_is_what_the_unets_cross_attention_gives(sd15, ella):
    reading, _, backbone, encode = reading_of(sd15, ella, ["a ball", "a fox", ""])
    [text_1NW] = encode(["a fox"])
    for name, attention in reading.attentions.items():
        hidden_1LE = torch.randn(1, 6, attention.to_q.in_features)
        with torch.no_grad():
            wanted = attention(hidden_1LE, encoder_hidden_states=text_1NW)
            found = read(attention, attention.to_q(hidden_1LE), text_1NW)
        assert torch.allclose(found, wanted, atol=1e-5), name
    assert len(reading.attentions) == sum(name.endswith("attn2.to_k") for name, _ in backbone.unet.named_modules()) > 1


def test_queries_are_those_that_the_base_asks_and_the_same_ones_again(sd15, ella):
    reading, *_ = reading_of(sd15, ella, ["a ball", LONG, ""])
    again, *_ = reading_of(sd15, ella, ["a ball", LONG, ""])
    assert bool((reading.timestep_N.diff() >= 0).all()) and reading.timestep_N.equal(again.timestep_N)
    for name, asked_NQE in reading.asked.items():
        assert asked_NQE.equal(again.asked[name]) and len(asked_NQE) == len(reading.timestep_N)
        assert asked_NQE.shape[-1] == reading.attentions[name].to_q.out_features and torch.isfinite(asked_NQE).all()
        early, late = asked_NQE[:50].float().mean(0), asked_NQE[-50:].float().mean(0)
        assert not torch.allclose(early, late, atol=1e-3), "they belong to the timesteps"


def test_the_error_is_none_where_both_tokens_are_one_and_a_whole_where_the_text_is_another(sd15, ella):
    captions = ["a ball", "a fox", "two blue dogs", "red houses at night"]
    reading, data, _, encode = reading_of(sd15, ella, captions)
    timestep_B = torch.tensor([3, 400, 700, 999])

    def errors(of):
        told = {caption: encode([other])[0] for caption, other in of.items()}
        rows = tuple(BatchRow(index, False, caption, 0, 0, 0.0) for index, caption in enumerate(captions))
        with mock.patch("emma_core.training.reading.tokens_of_texts",
                        lambda connector, texts, timestep_B: torch.cat([told[caption] for caption in captions])):
            return reading.errors(None, data, Batch(1, rows, timestep_B, None), torch.device("cpu"))

    assert errors({caption: caption for caption in captions}).abs().max() < 1e-9
    assert errors(dict(zip(captions, captions[1:] + captions[:1], strict=True))).min() > 0.1
    assert [reading.teaches(Batch(number, (), timestep_B, None)) for number in (1, 3, 4)] == [True, True, False]


def test_a_run_that_begins_by_reading_learns_and_goes_on_through_the_unet(sd15, ella, pictures, tmp_path, capsys, monkeypatch):
    from emma_core.training.trainer import Trainer

    passes = []
    learn_from = Trainer._learn_from

    def counted(self, batch, buckets):
        predict = self.student.denoiser.predict_noise
        with mock.patch.object(type(self.student.denoiser), "predict_noise",
                               lambda backbone, *given: passes.append(batch.number) or predict(*given)):
            return learn_from(self, batch, buckets)

    monkeypatch.setattr(Trainer, "_learn_from", counted)
    settings = ["--train.steps", "42", "--train.rate", "5e-3", "--report.save_every", "40", "--teacher.reading", "40"]
    assert train(["ella"], sd15, ella, pictures, tmp_path / "whole", *settings) == 0
    found = losses(tmp_path / "whole")
    assert sum(found[30:40]) < 0.5 * sum(found[:10])
    assert set(passes) == {41, 42}
    assert "the first 40 updates learn from what the base's cross-attention reads" in capsys.readouterr().out
    assert found[0] < 20, "a share of what captions differ by"

    check_that_an_interrupted_run_ends_alike(lambda: train(["ella"], sd15, ella, pictures, tmp_path / "parts", *settings),
                                             tmp_path, monkeypatch)


def test_reading_without_its_teacher_is_refused(sd15, ella, pictures, tmp_path, capsys):
    assert train(["ella"], sd15, ella, pictures, tmp_path / "out", "--teacher.own_text", "false", "--teacher.reading", "3") == 1
    assert "teacher.reading is 3, and teacher.own_text is not set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_row_of_the_base_that_asked_is_asked_for_by_its_own_timestep(sd15, ella):
    reading, *_ = reading_of(sd15, ella, ["a ball", "a fox"])
    found_T = reading.timestep_N[reading._nearest(torch.arange(1000))]
    nearest_T = (reading.timestep_N[None] - torch.arange(1000)[:, None]).abs().amin(1)
    assert (found_T - torch.arange(1000)).abs().equal(nearest_T) and nearest_T.max() <= 2


@pytest.mark.parametrize(("captions", "whole"), [(["a fox"] * 19 + ["a ball"], True), (["a fox"] * 3, True), ([""] * 3, False)])
def test_the_unit_of_the_error_does_not_depend_on_how_often_a_caption_stands_there(sd15, ella, captions, whole):
    if not whole:
        with pytest.raises(TrainingDataError, match="no picture has a caption, and teacher.reading learns"):
            reading_of(sd15, ella, captions)
        return
    reading, *_ = reading_of(sd15, ella, captions)
    assert min(reading.variance.values()) > 1e-9


def test_the_time_of_both_kinds_of_updates_is_foretold(sd15, ella, pictures, tmp_path, capsys):
    assert train(["ella"], sd15, ella, pictures, tmp_path / "out", "--teacher.reading", "30", "--train.steps", "90",
                 "--dry-run") == 0
    told = capsys.readouterr().out
    assert "trial: 4 updates" in told and "s an update of reading, " in told and "30 of 90 read; 90 of them and" in told


def test_a_run_that_has_read_does_not_ask_again(sd15, ella, pictures, tmp_path, capsys):
    settings = ["--teacher.reading", "2", "--report.save_every", "1"]
    assert train(["ella"], sd15, ella, pictures, tmp_path / "out", "--train.steps", "2", *settings) == 0
    assert "all updates learn from what the base's cross-attention reads" in capsys.readouterr().out
    with mock.patch("emma_core.training.runs.ask", side_effect=AssertionError("asked again")):
        assert train(["ella"], sd15, ella, pictures, tmp_path / "out", "--train.steps", "3", *settings) == 0
    assert "reads, without the UNet" not in capsys.readouterr().out
