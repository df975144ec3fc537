"""The training loop: what learns, what stays, resuming, interrupts, bad losses, several processes."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from small_models import random_tensor, small_connector, small_text
from training_world import DIMS, TinySet, same, tiny_config, tiny_trainer, weights

from emma_core import Assembly, Reference, load_connector, load_module
from emma_core.errors import TrainingConfigError
from emma_core.training.checkpoints import checkpoints, load_checkpoint
from emma_core.training.draws import Draws, captions_of_few_lengths
from emma_core.training.losses import TimestepBuckets, row_weights, target_of
from emma_core.training.starts import begin_module
from emma_core.training.student import TeacherTarget
from emma_core.training.trainer import gain_of_reference, rate_factor


@pytest.mark.parametrize("blocks", ["ella", "random"])
def test_a_new_module_is_exactly_ella(blocks):
    connector = small_connector()
    config = tiny_config(module__blocks=blocks, module__gate_bias=0.7)
    module = begin_module(config, connector, DIMS, {}, torch.Generator().manual_seed(1))
    features = {"global": random_tensor((1, 1, 24), 3), "local": random_tensor((1, 5, 20), 4)}
    timestep = torch.tensor([700])
    with torch.no_grad():
        found = connector.tokens(small_text(), timestep, Assembly([Reference(module, features)]))
        assert torch.equal(found, connector.tokens(small_text(), timestep, Assembly()))
    own, ella = module.blocks[0].state_dict(), connector.connector.perceiver_blocks[0].state_dict()
    assert set(ella) < set(own) and all(torch.equal(own[name], value) for name, value in ella.items()) == (blocks == "ella")
    assert (module.blocks[1].gate.bias == 0.7).all() and not module.blocks[1].attn_gate.any()


def test_only_the_module_gets_gradients(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config())
    frozen = {name: value.clone() for name, value in trainer.student.connector.state_dict().items()}
    denoiser = {name: value.clone() for name, value in trainer.student.denoiser.state_dict().items()}
    before = weights(trainer)
    trainer.run()
    assert same(frozen, trainer.student.connector.state_dict()) and same(denoiser, trainer.student.denoiser.state_dict())
    assert all(value.grad is None and not value.requires_grad for value in trainer.student.connector.parameters())
    after = weights(trainer)
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert not unchanged, "every weight of the module learns"


def test_ella_itself_learns_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config(), what="ella")
    before = weights(trainer)
    trainer.run()
    changed = [name for name, value in weights(trainer).items() if not torch.equal(value, before[name])]
    assert len(changed) == len(before)
    saved = load_connector(tmp_path / "emma-module.safetensors")
    assert same({name: value.float() for name, value in saved.state_dict().items()}, weights(trainer))


def test_without_separable_gates_the_gates_stay(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config(module__separable_gates=False))
    before = weights(trainer)
    trainer.run()
    after = weights(trainer)
    assert torch.equal(before["blocks.0.gate.weight"], after["blocks.0.gate.weight"])
    assert not torch.equal(before["blocks.0.attn_gate"], after["blocks.0.attn_gate"])
    assert load_module(tmp_path / "emma-module.safetensors").config.separable_gates is False


def test_every_optimizer_setting_reaches_its_group(tmp_path):
    config = tiny_config(train__rate=2e-3, train__gate_rate=5.0, train__decay=0.03, train__warmup=10)
    trainer = tiny_trainer(tmp_path, config)
    trainer.update(TimestepBuckets())
    others, gates = trainer.optimizer.param_groups
    assert (others["lr"], gates["lr"]) == pytest.approx((2e-4, 1e-3)), "10% at the first step of the warm-up"
    assert (others["weight_decay"], gates["weight_decay"]) == (0.03, 0.0)
    assert others["betas"] == (0.9, 0.999) and others["eps"] == 1e-8
    assert len(gates["params"]) == 2 * trainer.student.connector.layers
    assert len(others["params"]) + len(gates["params"]) == len(list(trainer.student.module.parameters()))


def test_rate_rises_and_falls_as_told():
    constant = tiny_config(train__warmup=1000, train__steps=200_000)
    assert [rate_factor(step, constant) for step in (0, 500, 1000, 150_000)] == pytest.approx([0.1, 0.55, 1, 1])
    cosine = tiny_config(train__warmup=10, train__steps=110, train__schedule="cosine")
    assert [rate_factor(step, cosine) for step in (10, 60, 110)] == pytest.approx([1, 0.505, 0.01])


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    config = tiny_config(train__average=0.9, train__accumulate=2, data__flip=True, objective__noise_offset=0.1)
    whole = tiny_trainer(tmp_path / "whole", config)
    whole.run()

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == 3:
            raise Stop

    first = tiny_trainer(tmp_path / "parts", config)
    with pytest.raises(Stop):
        first.run(stop)
    assert load_module(tmp_path / "parts" / "emma-module.safetensors").config.training["steps"] == 3
    second = tiny_trainer(tmp_path / "parts", config)
    assert second.resume() and second.step == 3
    second.run()
    assert same(weights(whole), weights(second)) and same(whole.average.values, second.average.values)
    assert (tmp_path / "whole" / "emma-module.safetensors").stat().st_size > 0
    assert same(load_module(tmp_path / "whole" / "emma-module.safetensors").state_dict(),
                load_module(tmp_path / "parts" / "emma-module.safetensors").state_dict())


def test_averaged_weights_are_what_is_saved(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config(train__average=0.9))
    trainer.run()
    saved = load_module(tmp_path / "emma-module.safetensors").state_dict()
    for name, value in trainer.average.values.items():
        torch.testing.assert_close(saved[name], value.half().float())
    assert not torch.allclose(saved["blocks.0.attn_gate"], weights(trainer)["blocks.0.attn_gate"], rtol=1e-3)


def test_learning_moves_the_loss_where_references_tell(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config(train__steps=150, train__gate_rate=3.0, objective__timestep_power=0.5))
    begun = gain_of_reference(trainer)
    assert begun["with reference"] == begun["text only"]
    trainer.run()
    gain = gain_of_reference(trainer, 8)
    assert gain["with reference"][-1] < 0.9 * gain["text only"][-1]


def test_starting_from_another_module_takes_its_weights(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config())
    trainer.run()
    start = str(tmp_path / "emma-module.safetensors")
    config = tiny_config(module__condition="portrait", module__start=start)
    module = begin_module(config, small_connector(), DIMS, {}, torch.Generator())
    assert module.config.condition == "portrait"
    assert same(module.state_dict(), load_module(start).state_dict())
    style = tiny_config(module__condition="style", module__start=start)
    with pytest.raises(TrainingConfigError, match="features global, local; this run has .*Start from a module of the same"):
        begin_module(style, small_connector(), DIMS, {}, torch.Generator())


@pytest.mark.parametrize(("changes", "found"), [
    ({"module__condition": "face"}, "the face module reads face; the encoder gives global, local"),
    ({"module__condition": "custom"}, "a custom condition needs module.features"),
    ({"module__features": "global"}, "wanted JSON such as"), ({"module__features": "{}"}, "one feature or more"),
    ({"module__features": '{"global": 0}'}, "of 1 token or more"),
])
def test_features_that_cannot_be_had_are_refused(changes, found):
    with pytest.raises(TrainingConfigError, match=found):
        begin_module(tiny_config(**changes), small_connector(), DIMS, {}, torch.Generator())


def test_every_epoch_shows_every_target_once_in_its_bucket():
    data = TinySet(12)
    draws = Draws(data, tiny_config(train__batch=2), lambda text: 1)
    for _ in range(3):
        batches = [draws.draw() for _ in range(6)]
        assert sorted(row.target for batch in batches for row in batch.rows) == list(range(12))
        assert all(len({data.bucket(row.target) for row in batch.rows}) == 1 for batch in batches)


def test_shares_of_dropped_text_and_references():
    draws = Draws(TinySet(), tiny_config(objective__drop_text=0.1, objective__drop_both=0.2, objective__drop_reference=0.3),
                  lambda text: 1)
    rows = [row for _ in range(1000) for row in draws.draw().rows]
    shares = {(bool(row.caption), row.strength): 0 for row in rows}
    for row in rows:
        shares[bool(row.caption), row.strength] += 1 / len(rows)
    wanted = {(False, 1.0): 0.1, (False, 0.0): 0.2, (True, 0.0): 0.3, (True, 1.0): 0.4}
    assert shares == {key: pytest.approx(value, abs=0.03) for key, value in wanted.items()}


def test_processes_share_the_batch_of_one():
    data = TinySet(12)
    alone = Draws(data, tiny_config(train__batch=4), lambda text: 1).draw()
    halves = [Draws(data, tiny_config(train__batch=2), lambda text: 1, rank, 2).draw() for rank in range(2)]
    for index in range(4):
        half = halves[index % 2]
        assert half.rows[index // 2] == alone.rows[index]
        assert torch.equal(half.noise_B4hw[index // 2], alone.noise_B4hw[index])
        assert half.timestep_B[index // 2] == alone.timestep_B[index]


def test_weights_of_the_loss_are_the_papers():
    kept = torch.tensor([0.9, 0.5, 0.1])
    snr = kept / (1 - kept)
    min_snr, inverse = (tiny_config(**{f"objective__{name}": value}).objective
                        for name, value in (("min_snr", 5.0), ("inverse_snr", 4.0)))
    torch.testing.assert_close(row_weights("eps", kept, min_snr), snr.clamp(max=5) / snr)
    torch.testing.assert_close(row_weights("v", kept, min_snr), snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(row_weights("eps", kept, inverse), torch.tensor([1 / 9, 1.0, 4.0]))
    assert torch.equal(row_weights("eps", kept, tiny_config().objective), torch.ones(3))
    # a zero terminal SNR, and a picture without noise
    ends = torch.tensor([0.0, 1.0])
    assert row_weights("eps", ends, min_snr).tolist() == [1.0, 0.0] and row_weights("v", ends, min_snr).tolist() == [0.0, 0.0]
    assert row_weights("eps", ends, inverse).tolist() == [4.0, 0.0]


def test_velocity_recovers_the_picture():
    """x = sqrt(a) x_t - sqrt(1 - a) v (arXiv 2202.00512, appendix D)."""
    latent, noise, kept = random_tensor((2, 4, 3, 3), 1), random_tensor((2, 4, 3, 3), 2), torch.tensor([0.9, 0.3])
    root, rest = kept.sqrt()[:, None, None, None], (1 - kept).sqrt()[:, None, None, None]
    velocity = target_of("v", latent, noise, kept)
    torch.testing.assert_close(root * (root * latent + rest * noise) - rest * velocity, latent)
    assert torch.equal(target_of("eps", latent, noise, kept), noise)


def test_a_teachers_prediction_is_the_target(tmp_path):
    seen = []

    def teacher(noised, timestep, context, rows):
        seen.append((context.requires_grad, len(context), len(rows)))
        return torch.zeros_like(noised)

    trainer = tiny_trainer(tmp_path, tiny_config(train__steps=60), teacher=TeacherTarget("a test", teacher))
    losses = []
    trainer.run(lambda progress: losses.append(progress.loss))
    assert set(seen) == {(False, 4, 4)}
    assert sum(losses[-10:]) < sum(losses[:10])


def scaled_trainer(folder, **changes):
    """A run with the loss scaled, as fp16 is trained on a GPU; accelerate unscales before it clips only there."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return tiny_trainer(folder, tiny_config(train__clip=0.0, **changes), accelerator=accelerator)


def test_a_scaled_loss_teaches_the_same(tmp_path):
    scaled = scaled_trainer(tmp_path / "scaled")
    scaled.run()
    plain = tiny_trainer(tmp_path / "plain", tiny_config(train__clip=0.0))
    plain.run()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(scaled)[name], value, rtol=1e-3, atol=1e-5)
    again = scaled_trainer(tmp_path / "scaled")
    assert again.resume() and again.accelerator.scaler.state_dict() == scaled.accelerator.scaler.state_dict()


def test_a_scaled_batch_without_any_reference_changes_nothing(tmp_path):
    trainer = scaled_trainer(tmp_path, objective__drop_reference=1.0, objective__drop_text=0.0, objective__drop_both=0.0)
    begun = weights(trainer)
    trainer.run()
    assert trainer.step == 8 and same(weights(trainer), begun)


_WORKER = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
from emma_core.training.shards import disconnect
from training_world import tiny_config, tiny_trainer
config = tiny_config(**json.loads(sys.argv[3]))
accelerator = Accelerator(cpu=True)
tiny_trainer(Path(sys.argv[2]), config, accelerator=accelerator).run()
accelerator.wait_for_everyone()
disconnect(well=True)  # a process that exits with gloo's threads running is often aborted
"""


def test_two_processes_learn_what_one_does(tmp_path):
    """gloo on the CPU: the same batch split in two gives the same weights."""
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    paths = json.dumps([str(path) for path in (Path(__file__).parent, *sys.path) if path])
    # most references dropped, so that whole batches have none
    settings = {"train__steps": 8, "train__rate": 1e-3, "objective__drop_reference": 0.75}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(script), paths, str(tmp_path / "two"), json.dumps({**settings, "train__batch": 2})]
    ran = subprocess.run(command, timeout=250, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    tiny_trainer(tmp_path / "one", tiny_config(**settings, train__batch=4)).run()
    one, two = (load_checkpoint(checkpoints(tmp_path / name)[-1])["learning"] for name in ("one", "two"))
    begun = weights(tiny_trainer(tmp_path / "begun", tiny_config(**settings)))
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-5, name
    assert any((one[name] - begun[name]).abs().max() > 1e-3 for name in one), "both have learnt"


def test_captions_are_of_few_lengths_and_each_of_its_own_row():
    choices = [["aa", "aaaa"], ["bbb", "bb"], ["ccc"], ["", "dd"], ["eeeeee"]]
    assert captions_of_few_lengths(choices, len, random.Random(0)) == ["aa", "bb", "ccc", "dd", "eeeeee"]


def test_all_captions_of_a_length_are_drawn():
    drawn = {captions_of_few_lengths([["aa", "bb", "c"], ["dd"]], len, random.Random(seed))[0] for seed in range(20)}
    assert drawn == {"aa", "bb"}
