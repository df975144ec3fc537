"""Training a module on the shipped playground: what learns, what it starts from, what is drawn, what is written."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from emma_core import load_module
from emma_core.emoji.dataset import EmojiPeople, Row
from emma_core.playground import PLAYGROUND_DIR, train_module
from emma_core.playground.pairs import CONDITIONS, ReferencePicker
from emma_core.playground.train_module import (
    DROP_BOTH,
    DROP_REFERENCE,
    DROP_TEXT,
    GATE_RATE_FACTOR,
    LARGEST_WEIGHT,
    RATE,
    Batches,
    ModuleTraining,
    loss_weight,
    place_weights,
)
from emma_core.training.draws import captions_of_few_lengths

VENDORS = ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji")
TONES = ("light", "medium", "dark")
ROLES = ("cook", "pilot", "farmer", "with red hair")
SIZE_PX = 32  # the UNet bears any size, and small latents make the tests fast


def small_data() -> EmojiPeople:
    rows = [Row(str(number), f"man {role}", role, "man", tone, vendor, "", "",
                "heldout-triple" if (role, tone) == ("pilot", "dark") else "train")
            for number, role in enumerate(ROLES) for tone in TONES for vendor in VENDORS]
    pixels = np.random.default_rng(0).integers(0, 256, (len(rows), SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    return EmojiPeople(pixels, rows)


@pytest.fixture
def training(monkeypatch) -> ModuleTraining:
    monkeypatch.setattr(train_module, "BATCH", 6)
    return ModuleTraining("style", small_data(), PLAYGROUND_DIR)


def open_gates(training: ModuleTraining) -> None:
    with torch.no_grad():
        for block in training.module.blocks:
            block.attn_gate.fill_(0.5)
            block.ffn_gate.fill_(0.5)


def test_a_new_module_changes_no_prediction(training):
    batch = training.batches.draw()
    torch.testing.assert_close(training.losses(batch), training.losses(batch, with_reference=False), rtol=0, atol=0)


def test_a_new_module_starts_as_copies_of_the_connectors_blocks(training):
    for block, source in zip(training.module.blocks, training.base.connector.connector.perceiver_blocks, strict=True):
        own = block.state_dict()
        for name, value in source.state_dict().items():
            assert torch.equal(own.pop(name), value)
        gates = {name: value.unique().tolist() for name, value in own.items()}
        assert gates == {"attn_gate": [0.0], "ffn_gate": [0.0], "gate.weight": [0.0], "gate.bias": [1.0]}


def test_only_the_module_gets_gradients_and_all_of_it_does(training):
    open_gates(training)
    batch = training.batches.draw()
    training.losses(batch).mean().backward()
    without = [name for name, value in training.module.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    for part in (training.base.connector, training.base.unet):
        assert all(value.grad is None and not value.requires_grad for value in part.parameters())


def test_a_step_changes_the_module_and_nothing_else(training):
    frozen = {**training.base.connector.state_dict(), **training.base.unet.state_dict()}
    before = {name: value.clone() for name, value in frozen.items()}
    gates = [block.attn_gate.item() for block in training.module.blocks]
    training.step(1.0)
    assert all(torch.equal(value, before[name]) for name, value in frozen.items())
    assert all(block.attn_gate.item() != old for block, old in zip(training.module.blocks, gates, strict=True))


def test_gates_learn_faster_and_do_not_decay(training):
    others, gates = training.optimizer.param_groups
    assert (others["base_lr"], others["weight_decay"]) == (RATE, 0.01)
    assert (gates["base_lr"], gates["weight_decay"]) == (RATE * GATE_RATE_FACTOR, 0.0)
    assert len(gates["params"]) == 2 * len(training.module.blocks)
    training.step(0.5)
    assert (others["lr"], gates["lr"]) == (RATE / 2, RATE * GATE_RATE_FACTOR / 2)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(training, tmp_path):
    training.step(1.0)
    training.save(tmp_path / "style.pt", 12.5)
    training.step(0.7)
    resumed = ModuleTraining("style", small_data(), PLAYGROUND_DIR, seed=99)
    assert resumed.resume(tmp_path / "style.pt") == 12.5
    resumed.step(0.7)
    assert resumed.steps == training.steps == 2
    for name, value in training.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name
    for name, value in training.average.values.items():
        assert torch.equal(value, resumed.average.values[name]), name


def test_a_non_finite_loss_stops_before_the_update(training):
    open_gates(training)
    before = {name: value.clone() for name, value in training.module.state_dict().items()}
    training.latents[:] = float("nan")
    with pytest.raises(RuntimeError, match="non-finite"):
        training.step(1.0)
    assert training.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in training.module.state_dict().items())


def test_rows_of_strength_zero_are_ella_alone(training):
    open_gates(training)
    batch = training.batches.draw()
    features = {"global": training.features["global"][batch.references]}
    strength = torch.tensor([1.0, 0, 1, 0, 1, 0])
    found, plain = (training.base.tokens(batch.prompts, batch.timestep_B, training.module, features, one)
                    for one in (strength, torch.zeros(6)))
    differs = (found - plain).abs().amax((1, 2)) > 0
    assert differs.tolist() == [True, False, True, False, True, False]


def test_tokens_do_not_depend_on_the_other_rows(training):
    """Prompts of different lengths go through in groups, each at its own length and in its own row."""
    open_gates(training)
    batch = training.batches.draw()
    prompts = ["man cook", "", "a picture of a man with red hair", "man cook", "man pilot emoji", ""]
    features = {"global": training.features["global"][batch.references]}
    together = training.base.tokens(prompts, batch.timestep_B, training.module, features, torch.ones(6))
    for row, prompt in enumerate(prompts):
        alone = training.base.tokens([prompt], batch.timestep_B[row:row + 1], training.module,
                                     {"global": features["global"][row:row + 1]}, torch.ones(1))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_the_module_file_holds_the_averaged_weights_and_says_what_it_belongs_to(training, tmp_path):
    training.step(1.0)
    training.step(1.0)
    training.export(tmp_path / "emma-style.safetensors", gate_scale=1.5)
    module = load_module(tmp_path / "emma-style.safetensors")
    for name, value in module.named_parameters():
        assert torch.equal(value, training.average.values[name].half().float()), name
    assert module.config.gate_scale == 1.5 and training.module.config.gate_scale == 1
    assert module.config.ella["sha256"] == training.base.connector.sha256
    assert module.config.encoder["family"] == "playground" and module.config.training["steps"] == 2
    assert module.config.file_metadata["modelspec.title"] == "EMMA playground style"


def test_loss_weights_count_errors_of_the_picture_up_to_a_limit():
    # where the variances of picture and noise are equal the weight is 1; it grows with the noise, up to the limit
    weights = loss_weight(torch.tensor([0, 300, 600, 999]))
    assert weights[0] < 0.001 and 0.5 < weights[1] < 1.5 and 5 < weights[2] < 20 and weights[3] == LARGEST_WEIGHT


@pytest.mark.parametrize("condition", CONDITIONS)
def test_references_share_only_what_the_condition_names(condition):
    data = small_data()
    picker, chance = ReferencePicker(data.rows, data.positions("train")), random.Random(0)
    seen = set()
    for row in data.rows:
        for _ in range(20):
            reference = data.rows[picker.pick(condition, row, chance)]
            assert reference.split == "train" and reference.emoji != row.emoji
            same = {"style": reference.vendor == row.vendor, "face": reference.tone == row.tone}
            assert same[condition]
            seen.add(same["face" if condition == "style" else "style"])
    assert seen == {True, False}


def test_face_references_of_evaluation_are_never_the_targets_vendor():
    data = small_data()
    picker, chance = ReferencePicker(data.rows, data.positions("train")), random.Random(0)
    assert all(data.rows[picker.face(row, chance, other_vendor=True)].vendor != row.vendor
               for row in data.rows for _ in range(20))


def test_batches_drop_text_and_references_as_often_as_said_and_never_hold_held_out_pictures():
    data = small_data()
    batches = Batches("style", data, torch.Size((4, 4, 4)), len, seed=0)
    drawn = [batches.draw() for _ in range(100)]
    assert all(data.rows[position].split == "train" for batch in drawn for position in batch.targets + batch.references)
    kinds = Counter((prompt == "", strength == 0) for batch in drawn
                    for prompt, strength in zip(batch.prompts, batch.strength_B.tolist(), strict=True))
    total = sum(kinds.values())
    for kind, share in (((True, False), DROP_TEXT), ((False, True), DROP_REFERENCE), ((True, True), DROP_BOTH)):
        assert abs(kinds[kind] / total - share) < 0.02
    timesteps = torch.cat([batch.timestep_B for batch in drawn])
    assert timesteps.min() >= 0 and timesteps.max() <= 999 and 680 < timesteps.float().mean() < 750


def test_prompts_are_of_few_lengths_and_each_of_its_own_row():
    choices = [["aa", "aaaa"], ["bbb", "bb"], ["ccc"], ["", "dd"], ["eeeeee"]]
    prompts = captions_of_few_lengths(choices, len, random.Random(0))
    assert prompts == ["aa", "bb", "ccc", "dd", "eeeeee"]


def test_all_wordings_of_a_length_are_drawn():
    drawn = {captions_of_few_lengths([["aa", "bb", "c"], ["dd"]], len, random.Random(seed))[0] for seed in range(20)}
    assert drawn == {"aa", "bb"}


def test_place_weights_stress_where_tones_differ_and_have_mean_one():
    data = small_data()
    latents = torch.zeros(len(data.rows), 4, 2, 2)
    for position, row in enumerate(data.rows):
        latents[position, :, 0, 1] = TONES.index(row.tone)  # only this place depends on the tone
    weights = place_weights("face", data, latents)
    train = data.positions("train")
    torch.testing.assert_close(weights[train].mean((1, 2, 3)), torch.ones(len(train)))
    torch.testing.assert_close(weights[train[0], 0], torch.tensor([[0.2, 3.4], [0.2, 0.2]]))


def test_style_is_learnt_from_every_place_alike():
    data = small_data()
    latents = torch.randn(len(data.rows), 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(place_weights("style", data, latents), torch.ones(len(data.rows), 1, 2, 2))
