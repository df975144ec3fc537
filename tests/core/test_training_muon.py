"""Muon for the matrices of the blocks: what it updates, how a run with it goes on, and that nothing else changes."""

import pytest
import torch
from training_world import interrupted_at, same, tiny_config, tiny_trainer, weights

from emma_core import load_module
from emma_core.training.checkpoints import checkpoints, load_checkpoint
from emma_core.training.losses import TimestepBuckets
from emma_core.training.muon import is_hidden_matrix


def learning(trainer) -> dict[str, torch.nn.Parameter]:
    return dict(trainer.student.parameters())


@pytest.mark.parametrize("what", ["module", "ella"])
def test_the_matrices_of_the_blocks_alone_are_updated_by_muon(tmp_path, what):
    """One update beside torch's own optimizers on copies."""
    trainer = tiny_trainer(tmp_path, tiny_config(train__optimizer="muon", train__warmup=0, train__clip=0.0), what=what)
    matrices = {name for name, value in learning(trainer).items() if is_hidden_matrix(name, value)}
    assert matrices and all("blocks." in name for name in matrices)
    assert len(matrices) < len(learning(trainer))
    before = {name: value.detach().clone() for name, value in learning(trainer).items()}
    gradients = {}
    step = trainer.optimizer.step

    def watched():
        gradients.update({name: value.grad.clone() for name, value in learning(trainer).items() if value.grad is not None})
        step()

    trainer.optimizer.step = watched
    trainer.update(TimestepBuckets())
    rate = trainer.config.train.rate
    for name, gradient in gradients.items():
        copy = torch.nn.Parameter(before[name].clone())
        copy.grad = gradient
        decay = 0.0 if name.endswith(("attn_gate", "ffn_gate")) else trainer.config.train.decay
        kind, more = (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}) if name in matrices else (torch.optim.AdamW, {})
        kind([copy], lr=rate, weight_decay=decay, **more).step()
        torch.testing.assert_close(learning(trainer)[name].detach(), copy.detach(), msg=name)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    config = tiny_config(train__optimizer="muon", train__average=0.9)
    whole = tiny_trainer(tmp_path / "whole", config)
    whole.run()
    interrupted_at(tiny_trainer(tmp_path / "parts", config), 3)
    again = tiny_trainer(tmp_path / "parts", config)
    assert again.resume() and again.step == 3
    again.run()
    assert same(weights(again), weights(whole))
    assert set(load_checkpoint(checkpoints(tmp_path / "whole")[-1])["optimizer"]) == {"muon", "adamw"}


def test_a_run_of_one_optimizer_is_not_gone_on_with_by_the_other(tmp_path):
    tiny_trainer(tmp_path, tiny_config(train__optimizer="muon")).run()
    with pytest.raises(Exception, match="train.optimizer is 'muon' there and 'adamw' here"):
        tiny_trainer(tmp_path, tiny_config()).resume()


def test_without_it_the_optimizer_is_adamw_with_the_groups_of_before(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config())
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    others, gates = trainer.optimizer.param_groups
    assert len(others["params"]) + len(gates["params"]) == len(learning(trainer)) and gates["weight_decay"] == 0.0


def test_the_rate_is_the_schedules_in_both(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config(train__optimizer="muon", train__schedule="cosine", train__gate_rate=3.0))
    trainer.update(TimestepBuckets())
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates[0] == rates[1] > 0 and rates[2] == pytest.approx(3 * rates[1])


def test_it_lowers_the_loss_and_the_module_says_what_trained_it(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config(train__optimizer="muon", train__steps=40))
    losses = [trainer.update(TimestepBuckets()) for _ in range(40)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    trainer.save_result()
    assert load_module(tmp_path / "emma-module.safetensors").config.condition == "object"
