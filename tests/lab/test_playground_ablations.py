"""What the playground's modules are measured against: trained with their connector, or style and face together."""

import sys
from pathlib import Path

import pytest
import torch
from emoji_people import small_data

from emma_core import load_connector, load_module
from emma_core.playground import PLAYGROUND_DIR, load_unet
from emma_core.training.draws import BatchRow
from lab.playground import RECIPES, ablations
from lab.playground.labelled import Labelled
from lab.playground.timed_run import TimedRun
from lab.playground.training_data import write_training_data

RECIPE = RECIPES / "style.toml"


@pytest.fixture(scope="module")
def run_ablation(tmp_path_factory):
    """Kind of ablation -> the folder of a run of a few updates."""
    folder = tmp_path_factory.mktemp("ablations")
    write_training_data(small_data(), folder)

    def run(kind: str, teacher: Path | None = None, *more: str):
        out = folder / f"{kind}-{bool(teacher)}-{len(more)}"
        arguments = [kind, str(RECIPE), "--face-list", str(folder / "face.jsonl"), "--data.jsonl", str(folder / "style.jsonl"),
                     "--data.resolution_px", "32", "--data.bucket_step_px", "8", "--data.cache", str(folder / "cache"),
                     "--train.steps", "3", "--train.batch", "8", "--train.precision", "fp32", "--train.warmup", "0",
                     "--train.average", "0", "--output.folder", str(out), *(["--teacher", str(teacher)] if teacher else []),
                     *more]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["ablations", *arguments])
            ablations.main()
        return out

    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of a labelled UNet that has learnt nothing yet."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(0)
    TimedRun(Labelled(load_unet()), path, minutes=0, rate=1e-3, seed=0).save()
    return path


def gates(module) -> float:
    return max(abs(block.attn_gate.item()) for block in module.blocks)


@pytest.mark.parametrize("taught", [pytest.param(False, marks=pytest.mark.slow), True])
def test_an_unfrozen_connector_learns_with_its_module(run_ablation, teacher, taught):
    folder = run_ablation("unfrozen", teacher if taught else None)
    shipped, learnt = load_connector(PLAYGROUND_DIR / "ella.safetensors"), load_connector(folder / "ella.safetensors")
    moved = [name for name, value in learnt.state_dict().items() if not torch.equal(value, shipped.state_dict()[name])]
    assert any("perceiver_blocks.0" in name for name in moved)
    assert gates(load_module(folder / "emma-style.safetensors")) > 0
    assert not (folder / "emma-face.safetensors").exists()


@pytest.mark.parametrize("taught", [pytest.param(False, marks=pytest.mark.slow), True])
def test_joint_training_teaches_both_modules_and_leaves_the_connector(run_ablation, teacher, taught):
    folder = run_ablation("joint", teacher if taught else None)
    style, face = (load_module(folder / f"emma-{condition}.safetensors") for condition in ("style", "face"))
    assert (style.config.condition, face.config.condition) == ("style", "face")
    assert gates(style) > 0 and gates(face) > 0
    assert list(style.config.features) != list(face.config.features)
    assert not (folder / "ella.safetensors").exists()


def test_modules_that_are_trained_together_can_be_added_up_in_the_predictions(run_ablation, teacher):
    """Two ways from the same start end at two results."""
    starts = [str(PLAYGROUND_DIR / f"emma-{condition}.safetensors") for condition in ("style", "face")]
    begin = ["--module.start", starts[0], "--face-start", starts[1]]
    folders = [run_ablation("joint", teacher, *begin, *more) for more in ((), ("--adding", "predictions"))]
    for condition in ("style", "face"):
        blocks, predictions = (load_module(folder / f"emma-{condition}.safetensors") for folder in folders)
        assert gates(blocks) > 0 and gates(predictions) > 0
        assert any(not torch.equal(value, predictions.state_dict()[name]) for name, value in blocks.state_dict().items())


def test_joint_training_continues_from_modules_that_were_trained_apart(run_ablation, teacher):
    starts = {condition: PLAYGROUND_DIR / f"emma-{condition}.safetensors" for condition in ("style", "face")}
    folder = run_ablation("joint", teacher, "--module.start", str(starts["style"]), "--face-start", str(starts["face"]))
    for condition, start in starts.items():
        before, after = (gates(load_module(path)) for path in (start, folder / f"emma-{condition}.safetensors"))
        assert 0 < abs(after - before) < 0.05, condition


def test_rows_show_both_references_or_one_or_none():
    rows = [BatchRow(target, False, "man cook", target + 7, 0, 1.0) for target in range(2000)]
    shown = ablations.strengths_of(rows)
    pairs = list(zip(shown["style"], shown["face"], strict=True))
    assert set(pairs) == {(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)} and 0.75 < pairs.count((1.0, 1.0)) / 2000 < 0.85
    dropped = ablations.strengths_of([BatchRow(0, False, "", 3, 0, 0.0)])
    assert dropped == {"style": [0.0], "face": [0.0]}
