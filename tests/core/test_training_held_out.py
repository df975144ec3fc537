"""Held-out pictures: never learnt from, measured on the same noise, and when training ends by itself."""

import pytest
import torch
from training_world import TinySet, interrupted_at, same, tiny_config, tiny_trainer, weights

from emma_core.training.checkpoints import checkpoints, load_checkpoint
from emma_core.training.config import resolve
from emma_core.training.draws import Draws
from emma_core.training.held_out import Growth, HeldOut, chosen
from emma_core.training.identity import check_folder, run_identity

CPU = torch.device("cpu")


class Grouped(TinySet):
    """Twenty pictures: one alone in its group, three pairs, and a group of thirteen."""

    def __init__(self):
        super().__init__(20)

    def group(self, index):
        return "many" if index > 6 else "alone" if index == 0 else f"pair {(index - 1) // 2}"


def test_held_out_pictures_are_a_share_and_leave_each_group_one():
    data, config = Grouped(), tiny_config(train__held_out=0.5)
    found = chosen(data, config)
    assert len(found) == 10 and found == chosen(data, config) != chosen(data, tiny_config(train__held_out=0.5, train__seed=1))
    for group in ("many", "pair 0", "pair 1", "pair 2"):
        assert [index for index in range(20) if data.group(index) == group and index not in found]


@pytest.mark.parametrize(("share", "count", "what"), [(0.0, 20, "module"), (0.1, 20, "module"), (0.5, 20, "ella")])
def test_fewer_than_four_are_none(share, count, what):
    config = resolve({"what": what}, changes={"train.held_out": share})
    assert chosen(TinySet(count), config) == frozenset()


def test_they_are_never_drawn():
    data, config = Grouped(), tiny_config(train__held_out=0.3)
    without = chosen(data, config)
    draws = Draws(data, config, lambda text: 1, without=without)
    seen = {row.target for _ in range(30) for row in draws.draw().rows}
    assert seen == set(range(20)) - without


def test_the_gain_is_that_of_the_reference_on_the_same_noise(tmp_path):
    config = tiny_config(train__held_out=0.3, objective__timestep_power=0.4, objective__inverse_snr=20.0)
    trainer = tiny_trainer(tmp_path, config, Grouped())
    held = trainer.held_out
    assert held.gain(trainer.student, trainer.averaged(), CPU).share == 0.0, "a new module is as if it were not there"
    trainer.run()
    module = trainer.averaged()
    first, second = held.gain(trainer.student, module, CPU), held.gain(trainer.student, module, CPU)
    assert first == second and first.share != 0.0
    sums = [0.0, 0.0]
    rows = 0
    for batch in held._batches:
        assert {row.target for row in batch.rows} <= held.indices and all(row.strength == 1 for row in batch.rows)
        rows += len(batch.rows)
        for place, shown in enumerate((True, False)):
            with torch.no_grad():
                error_B, weight_B = trainer.student.errors(trainer.data, batch, CPU, shown)
            sums[place] += (error_B * weight_B).sum().item()
    assert rows == 32 and abs(first.share - (1 - sums[0] / sums[1])) < 1e-6
    times = torch.cat([batch.timestep_B for batch in held._batches]).sort().values
    wanted = torch.tensor([round(999 * ((place + 0.5) / 32) ** 0.4) for place in range(32)])
    assert torch.equal(times, wanted)


def test_growth_counts_what_is_more_than_noise():
    growth = Growth([(100, 0.01), (200, 0.0105), (300, 0.02), (400, 0.0205), (500, 0.019)])
    assert growth.best == (300, 0.02) and Growth().best == (0, 0.0)
    config = tiny_config(train__steps=800, train__patience=200)
    assert growth.ended(config, 500) and not growth.ended(config, 499)
    assert not growth.ended(tiny_config(train__steps=1200, train__patience=200), 500), "not before half of the steps"
    assert not growth.ended(tiny_config(train__steps=800), 500) and not Growth().ended(config, 800)
    assert Growth.of_state(growth.state) == growth and Growth.of_state({}) == Growth()


def stopping_config(**changes):
    """A rate of 0 gains nothing, so nothing grows."""
    return tiny_config(**{"train__steps": 20, "train__held_out": 0.3, "train__patience": 4, "train__rate": 0.0,
                          "report__save_every": 2, **changes})


def test_a_run_that_gains_nothing_ends_by_itself_and_stays_ended(tmp_path):
    trainer = tiny_trainer(tmp_path, stopping_config(), Grouped())
    trainer.run()
    assert trainer.step == 10 and trainer.ended_growing
    again = tiny_trainer(tmp_path, stopping_config(), Grouped())
    assert again.resume()
    again.run()
    assert again.step == 10
    on = tiny_trainer(tmp_path, stopping_config(train__patience=0), Grouped())
    assert on.resume()
    on.run()
    assert on.step == 20


def test_a_run_that_still_grows_goes_on(tmp_path):
    trainer = tiny_trainer(tmp_path, stopping_config(train__rate=1e-2, train__gate_rate=5.0, train__patience=8), Grouped())
    trainer.run()
    assert trainer.step == 20 and trainer.growth.best[0] > 10


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    config = stopping_config()
    whole, first = (tiny_trainer(tmp_path / name, config, Grouped()) for name in ("whole", "parts"))
    whole.run()
    interrupted_at(first, 7)
    second = tiny_trainer(tmp_path / "parts", config, Grouped())
    second.resume()
    second.run()
    assert second.step == whole.step and second.growth == whole.growth and same(weights(whole), weights(second))


def test_gains_are_told_after_the_update_they_belong_to(tmp_path):
    told = {}
    tiny_trainer(tmp_path, stopping_config(), Grouped()).run(lambda progress: told.update({progress.step: progress.gain}))
    assert {step for step, gain in told.items() if gain} == {2, 4, 6, 8, 10}


def test_a_run_of_before_learns_from_all_pictures_to_its_end(tmp_path):
    """Its checkpoint knows nothing of held-out pictures: the preset's share must neither refuse it nor change it."""
    old = tiny_config(train__steps=2)
    tiny_trainer(tmp_path, old, Grouped()).run()
    state = load_checkpoint(checkpoints(tmp_path)[-1])
    assert "train.held_out" not in state["run"] and not {"train.patience", "train.held_out"} & set(run_identity(old))
    goes_on = check_folder(tmp_path, tiny_config(train__held_out=0.3, train__patience=4))
    assert goes_on.train.held_out == 0.0
    assert check_folder(tmp_path / "new", tiny_config(train__held_out=0.3)).train.held_out == 0.3
    assert HeldOut(Grouped(), goes_on, frozenset())._batches == []


def test_small_presets_end_by_themselves_and_the_papers_does_not():
    assert (resolve({}).train.held_out, resolve({}).train.patience) == (0.0, 0)
    for name in ("small-card", "distil"):
        train = resolve({}, name).train
        assert train.held_out == 0.1 and 0 < train.patience <= train.steps / 2
