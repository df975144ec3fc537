"""Checkpoints are packed: the same bits in fewer bytes, and those of before are still gone on from."""

import zlib

import pytest
import torch
from small_models import random_tensor
from training_world import interrupted_at, same, tiny_config, tiny_trainer, weights

from emma_core.training.checkpoints import checkpoints, load_checkpoint
from emma_core.training.config import resolve
from emma_core.training.packing import packed, unpacked


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


def nbytes(tree) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return sum(map(nbytes, parts))


def any_bits(seed: int) -> torch.Tensor:
    """Every kind of float32 there is: NaN of any payload, infinities, -0, numbers below the smallest normal one."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-2 ** 31, 2 ** 31, (64, 40), generator=generator, dtype=torch.int64).to(torch.int32)
    words[0, :6] = torch.tensor([0, -2 ** 31, 0x7F800000, -0x800000, 1, 0x7FC00001], dtype=torch.int64).to(torch.int32)
    return words.view(torch.float32)


def test_every_bit_comes_back():
    state = {"weights": {"a": any_bits(1), "few": torch.tensor([1.5]), "turned": any_bits(2).T},
             "half": any_bits(3).half(), "step": 7, 0: {"exp": torch.zeros(2048)}}
    found = unpacked(packed(state))
    for name in ("a", "turned"):
        assert torch.equal(bits(found["weights"][name]), bits(state["weights"][name]))
    assert found["weights"]["few"] is state["weights"]["few"] and found["half"] is state["half"] and found["step"] == 7
    assert found[0]["exp"].shape == (2048,) and not found[0]["exp"].any()


def test_every_bit_comes_back_from_beside_other_weights():
    learning, average = {"a": any_bits(4)}, {"a": any_bits(5)}
    average["a"].view(torch.int32)[1] = learning["a"].view(torch.int32)[1] - 1
    found = unpacked(packed(average, learning), learning)
    assert torch.equal(bits(found["a"]), bits(average["a"]))


def test_weights_take_less_and_their_average_less_again():
    weight = {"a": 0.02 * random_tensor((512, 512), 6)}
    average = {"a": weight["a"] + 1e-4 * random_tensor((512, 512), 7)}
    whole = weight["a"].nbytes
    assert nbytes(packed(weight)) < 0.85 * whole and nbytes(packed(average, weight)) < 0.72 * whole


def test_what_cannot_be_made_shorter_costs_nothing():
    state = {"a": any_bits(8)}
    assert nbytes(packed(state)) == state["a"].nbytes


def bomb(count: int) -> torch.Tensor:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return torch.frombuffer(bytearray(coder.compress(bytes(count)) + coder.flush()), dtype=torch.uint8)


@pytest.mark.parametrize("damage", [
    lambda node: node.pop("shape"), lambda node: node.update(shape=[2049]), lambda node: node.update(coded=[True] * 4),
    lambda node: node["planes"].pop(), lambda node: node.update(planes=3),
    lambda node: node.update(planes=[bomb(1 << 24)] * 4, coded=[True] * 4),
    lambda node: node.update(planes=[bomb(1 << 24)] * 4, coded=[True] * 4, shape=[1 << 24]),
    lambda node: node.update(planes=[bomb(1 << 24)] * 4, coded=[True] * 4, shape=[1 << 70])])
def test_packed_numbers_that_are_damaged_are_refused(damage):
    node = {**packed({"a": any_bits(9)})["a"]}
    node["planes"] = node.pop("byte planes of float32")
    damage(node)
    node["byte planes of float32"] = node.pop("planes")
    with pytest.raises(ValueError):
        unpacked({"a": node})


def test_a_run_is_kept_in_fewer_bytes_and_goes_on_bit_for_bit(tmp_path):
    config = tiny_config(train__average=0.9)
    whole, first = (tiny_trainer(tmp_path / name, config) for name in ("whole", "parts"))
    whole.run()
    interrupted_at(first, 5)
    path = checkpoints(tmp_path / "parts")[-1]
    assert path.stat().st_size < 0.88 * nbytes(first.state())
    second = tiny_trainer(tmp_path / "parts", config)
    assert second.resume() and second.step == 5
    second.run()
    assert same(weights(whole), weights(second)) and same(whole.average.values, second.average.values)


def test_a_checkpoint_of_before_they_were_packed_is_gone_on_from_bit_for_bit(tmp_path):
    config = tiny_config(train__average=0.9)
    whole, first = (tiny_trainer(tmp_path / name, config) for name in ("whole", "parts"))
    whole.run()
    interrupted_at(first, 5)
    torch.save({**first.state(), "format_version": 1}, checkpoints(tmp_path / "parts")[-1])
    second = tiny_trainer(tmp_path / "parts", config)
    assert second.resume() and second.step == 5
    second.run()
    assert same(weights(whole), weights(second))


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    from emma_core.errors import TrainingError

    trainer = tiny_trainer(tmp_path, tiny_config())
    torch.save({**trainer.state(), "format_version": 3}, tmp_path / "checkpoint-00000003.pt")
    with pytest.raises(TrainingError, match="has format version 3, this version of ComfyUI-EMMA reads 1 to 2"):
        load_checkpoint(tmp_path / "checkpoint-00000003.pt")


def test_two_checkpoints_are_kept_if_nothing_is_said(tmp_path):
    assert resolve({}).report.keep == resolve({}, "small-card").report.keep == 2
    tiny_trainer(tmp_path, tiny_config(report__save_every=2)).run()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000006.pt", "checkpoint-00000008.pt"]
