"""What the playground's modules are measured against: trained with their connector, or style and face together."""

import sys

import pytest
import torch
from emoji_people import small_data

from emma_core import load_connector, load_module
from emma_core.playground import PLAYGROUND_DIR, ablations
from emma_core.playground.training_data import write_training_data

RECIPE = PLAYGROUND_DIR / "recipes" / "style.toml"


@pytest.fixture(scope="module")
def run_ablation(tmp_path_factory):
    """Kind of ablation -> the folder of a run of a few updates."""
    folder = tmp_path_factory.mktemp("ablations")
    write_training_data(small_data(), folder)

    def run(kind: str):
        out = folder / kind
        arguments = [kind, str(RECIPE), "--face-list", str(folder / "face.jsonl"), "--data.jsonl", str(folder / "style.jsonl"),
                     "--data.resolution_px", "32", "--data.bucket_step_px", "8", "--data.cache", str(folder / "cache"),
                     "--train.steps", "3", "--train.batch", "8", "--train.precision", "fp32", "--train.warmup", "0",
                     "--train.average", "0", "--output.folder", str(out)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["ablations", *arguments])
            ablations.main()
        return out

    return run


def gates(module) -> float:
    return max(abs(block.attn_gate.item()) for block in module.blocks)


def test_an_unfrozen_connector_learns_with_its_module(run_ablation):
    folder = run_ablation("unfrozen")
    shipped, learnt = load_connector(PLAYGROUND_DIR / "ella.safetensors"), load_connector(folder / "ella.safetensors")
    moved = [name for name, value in learnt.state_dict().items() if not torch.equal(value, shipped.state_dict()[name])]
    assert any("perceiver_blocks.0" in name for name in moved)
    assert gates(load_module(folder / "emma-style.safetensors")) > 0
    assert not (folder / "emma-face.safetensors").exists()


def test_joint_training_teaches_both_modules_and_leaves_the_connector(run_ablation):
    folder = run_ablation("joint")
    style, face = (load_module(folder / f"emma-{condition}.safetensors") for condition in ("style", "face"))
    assert (style.config.condition, face.config.condition) == ("style", "face")
    assert gates(style) > 0 and gates(face) > 0
    assert list(style.config.features) != list(face.config.features)
    assert not (folder / "ella.safetensors").exists()
