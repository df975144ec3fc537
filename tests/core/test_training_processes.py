"""Whole runs from shards on the playground: the module that files give, and that of two real processes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small_models import random_tensor
from test_training_run import SMALL
from test_training_shards import entries, noise
from training_world import in_processes, same, tiny_config, write_shard

from emma_core.__main__ import main
from emma_core.errors import EmmaWarning, TrainingError
from emma_core.training.checkpoints import checkpoints, load_checkpoint
from emma_core.training.own_latents import own_latents

CAPTIONS = ("woman astronaut", "man cook")
# a batch of two without any reference would not move the weights of one process, but decay those of two
SETTINGS = [*SMALL, "--train.steps", "3", "--data.reference_crops", "2", "--data.flip", "true",
            "--objective.drop_reference", "0", "--objective.drop_both", "0"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two groups of three pictures as a folder, and the same in two shards."""
    folder = tmp_path_factory.mktemp("world")
    for number, group in enumerate(("first", "second")):
        members = {}
        for sample in range(3):
            content, caption = noise(10 * number + sample, (128, 128)), CAPTIONS[sample % 2]
            (folder / "files" / group).mkdir(parents=True, exist_ok=True)
            (folder / "files" / group / f"{sample}.png").write_bytes(content)
            (folder / "files" / group / f"{sample}.txt").write_text(caption)
            members |= {f"{sample}.png": content, f"{sample}.json": json.dumps({"caption": caption, "group": group})}
        write_shard(folder / f"{number}.tar", members)
    return folder


def train(source: list[str], folder: Path, *more: str) -> int:
    return main(["train", *SETTINGS, *source, "--output.folder", str(folder), *more])


@pytest.fixture(scope="module")
def alone(world):
    """A run of one process from the shards."""
    assert train(["--data.shards", str(world / "{0..1}.tar")], world / "alone") == 0
    return world / "alone"


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoints(folder)[-1])["learning"]


def test_shards_give_the_module_of_the_same_files_bit_for_bit(world, alone):
    assert train(["--data.folder", str(world / "files")], world / "of files") == 0
    assert same(learnt(alone), learnt(world / "of files"))
    assert same(*(load_file(folder / "emma-module.safetensors") for folder in (alone, world / "of files")))
    assert entries(alone / "cache") == entries(world / "of files" / "cache")


def test_a_dry_run_counts_shards_and_samples(world, capsys):
    assert main(["train", "--dry-run", "--data.resolution_px", "128", "--data.shards", str(world / "*.tar")]) == 0
    assert capsys.readouterr().out.startswith("2 shards, 6 samples\npictures: 6 to learn from")


_WORKER = """
import json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from emma_core.encoders.clip_vision import ClipVisionEncoder
from emma_core.errors import EmmaError
from emma_core.__main__ import main
from emma_core.base.backbones import Backbone
from emma_core.training.trainer import Trainer
rank, folder = int(os.environ["RANK"]), Path(sys.argv[2])
right, seen = ClipVisionEncoder.features_of, []
if rank and sys.argv[3] == "fail":
    def features_of(self, *rest):
        raise EmmaError("this one is broken")
else:
    def features_of(self, seen_B3SS, options):
        seen.append(len(seen_B3SS))
        return right(self, seen_B3SS, options)
ClipVisionEncoder.features_of = features_of
run = Trainer.run
def run_and_keep(self, after_step=None):
    run(self, after_step)
    torch.save(self.student.learning.state_dict(), folder / f"rank {rank}.pt")
Trainer.run = run_and_keep
status = main(sys.argv[4:])
(folder / f"rank {rank}.json").write_text(json.dumps(
    {"status": status, "references": sum(seen), "connected": torch.distributed.is_initialized()}))
"""


def in_two_processes(folder: Path, mode: str, *arguments: str) -> tuple[list[dict], str]:
    """What both wrote, and what they said."""
    folder.mkdir()
    (folder / "worker.py").write_text(_WORKER)
    paths = json.dumps([str(path) for path in (Path(__file__).parent, *sys.path) if path])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(folder / "worker.py"), paths, str(folder), mode, "train", *arguments,
                           "--output.folder", str(folder)], timeout=250, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank {rank}.json").read_text()) for rank in range(2)], done.stderr


def test_two_processes_share_the_encoding_and_learn_what_one_does(world, alone):
    """gloo on the CPU; a batch of two is one picture in each."""
    found, _ = in_two_processes(world / "two", "", *SETTINGS, "--train.batch", "1", "--data.shards", str(world / "{0..1}.tar"))
    assert [one["status"] for one in found] == [0, 0] and [one["references"] for one in found] == [12, 12]
    assert not any(one["connected"] for one in found), "gloo's threads may abort a process that exits without"
    written = entries(world / "two" / "cache")
    assert written == entries(alone / "cache") and set(written.values()) == {1} and len(written) == 6 * 2 + 6 * 4 + 3
    one = learnt(alone)
    for two in (learnt(world / "two"), *(torch.load(world / "two" / f"rank {rank}.pt") for rank in range(2))):
        assert all((one[name] - two[name]).abs().max() <= 1e-5 for name in one)
    assert train(["--data.shards", str(world / "*.tar"), "--data.cache", str(alone / "cache")], world / "begun",
                 "--train.rate", "0") == 0
    begun = learnt(world / "begun")
    assert any((one[name] - begun[name]).abs().max() > 1e-3 for name in one), "all have learnt"


def test_a_failure_in_one_of_two_processes_is_told_by_both(world):
    found, said = in_two_processes(world / "failing", "fail", *SETTINGS, "--train.batch", "1",
                                   "--data.shards", str(world / "{0..1}.tar"))
    assert [one["status"] for one in found] == [1, 1] and not any(one["connected"] for one in found)
    assert "error: this one is broken" in said
    assert "error: process 2 of 2 failed, which ends the others: EmmaError: this one is broken. Correct that" in said
    assert not (world / "failing" / "emma-module.safetensors").exists()


@pytest.fixture
def draw_own(tmp_path, monkeypatch):
    """Own latents of three prompts, two each, drawn by a fake; with the list of what was drawn."""
    drawn = []

    def sample(config, backbone, connector, texts, pooled, prompt, number):
        drawn.append((prompt, number))
        if (prompt, number) == ("broken", 1):
            raise RuntimeError("out of memory")
        return random_tensor((4, 2, 2), 10 * len(prompt) + number)

    monkeypatch.setattr("emma_core.training.own_latents._sample", sample)
    backbone = SimpleNamespace(sha256="1", name="base", device=torch.device("cpu"), spec=SimpleNamespace(prediction="eps"),
                               alphas_cumprod_T=torch.linspace(0.9, 0.1, 10))
    connector = SimpleNamespace(sha256="2", to=lambda device: None)
    prepared = SimpleNamespace(variant_keys={0: ("a",)})

    def draw(processes=None, cache="cache", text=0.0, **changes):
        config = tiny_config(teacher__lora="a", teacher__prompts=str(tmp_path / "prompts.txt"), teacher__samples=2)
        own = SimpleNamespace(**{**vars(backbone), **changes})
        return own_latents(config, own, connector, lambda texts: [torch.full((1, 1, 2), text) for _ in texts], prepared,
                           tmp_path / cache, None, processes)

    return draw, drawn


def test_processes_share_the_drawing_of_own_latents(draw_own, tmp_path):
    draw, drawn = draw_own
    (tmp_path / "prompts.txt").write_text("a\nbb\nccc")
    alone = draw(cache="alone")
    wanted, drawn[:] = sorted(drawn), []
    for found in in_processes(2, draw):
        assert len(found) == 6 and all(torch.equal(found.latent(index), alone.latent(index)) for index in range(6))
    assert sorted(drawn) == wanted and len(wanted) == 6
    (tmp_path / "prompts.txt").write_text("a\nbb\nccc\nbroken")
    with pytest.warns(EmmaWarning, match="process 2 of 2 failed"):
        first, second = in_processes(2, draw)
    assert isinstance(first, TrainingError) and isinstance(second, RuntimeError) and "out of memory" in str(first)


@pytest.mark.parametrize("change", [
    {"spec": SimpleNamespace(prediction="v")}, {"alphas_cumprod_T": torch.linspace(0.8, 0.1, 10)}, {"text": 1.0}])
def test_own_latents_are_drawn_again_when_what_they_depend_on_changes(draw_own, tmp_path, change):
    draw, drawn = draw_own
    (tmp_path / "prompts.txt").write_text("a\nbb")
    draw()
    draw()
    assert len(drawn) == 4, "the second time they come from the cache"
    draw(**change)
    assert len(drawn) == 8
