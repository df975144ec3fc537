"""ELLA connectors on disk: any size by its shapes, nothing lost, nothing wrong read."""

import json
from dataclasses import replace

import pytest
import torch
from bad_files import CHECKPOINT, NOT_SAFETENSORS, rewrite
from safetensors.torch import load_file, save_file
from small_models import SMALL, small_connector, small_module, small_text

import emma_core.files.connector_file as connector_file
from emma_core import ConnectorConfig, load_connector, save_connector, save_module
from emma_core.errors import ConnectorFileError, ConnectorMismatchError, WriteError
from emma_core.files.tensor_file import sha256_of_file

HEADS = {"ella": json.dumps({"heads": 4})}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ella.safetensors"
    save_connector(small_connector(), path)
    return path


def changed(saved, change=lambda tensors: None, metadata=HEADS):
    return rewrite(saved, saved.with_name("changed.safetensors"), change, metadata)


# --- what is kept --------------------------------------------------------------------------------------------------

def test_saving_and_loading_keeps_every_bit_and_every_size(saved):
    connector, loaded = small_connector(), load_connector(saved)
    assert loaded.config == SMALL
    for name, weight in connector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert torch.equal(loaded.tokens(small_text(), 500), connector.tokens(small_text(), 500))
    assert loaded.sha256 == sha256_of_file(saved)


def test_the_keys_are_those_of_the_released_file(saved):
    tensors = load_file(saved)
    block = ["attn.in_proj_bias", "attn.in_proj_weight", "attn.out_proj.bias", "attn.out_proj.weight",
             "ln_1.linear.bias", "ln_1.linear.weight", "ln_2.linear.bias", "ln_2.linear.weight",
             "ln_ff.linear.bias", "ln_ff.linear.weight", "mlp.c_fc.bias", "mlp.c_fc.weight", "mlp.c_proj.bias",
             "mlp.c_proj.weight"]
    wanted = [f"connector.perceiver_blocks.{layer}.{key}" for layer in range(SMALL.layers) for key in block]
    wanted += [f"connector.{key}" for key in ("latents", "proj_in.bias", "proj_in.weight", "time_aware_linear.bias",
                                              "time_aware_linear.weight")]
    wanted += [f"time_embedding.linear_{number}.{kind}" for number in (1, 2) for kind in ("bias", "weight")]
    assert sorted(tensors) == sorted(wanted)


def test_the_number_of_heads_is_eight_unless_the_metadata_tell(saved):
    assert load_connector(changed(saved, metadata=None)).config == replace(SMALL, heads=8)
    two = load_connector(changed(saved, metadata={"ella": json.dumps({"heads": 2})}))
    assert two.config.heads == 2
    assert not torch.allclose(two.tokens(small_text(), 500), load_connector(saved).tokens(small_text(), 500))


def test_a_half_precision_file_loads_as_its_float32_values(saved):
    half = saved.with_name("half.safetensors")
    save_connector(load_connector(saved), half, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.float16}
    loaded = load_connector(half)
    for name, weight in load_connector(saved).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float()), name


def test_weights_may_be_kept_smaller_than_the_tokens(saved):
    tokens = load_connector(saved, dtype=torch.bfloat16).tokens(small_text(), 500)
    assert tokens.dtype == torch.bfloat16
    exact = load_connector(saved).tokens(small_text(), 500)
    assert ((tokens.float() - exact).abs().max() / exact.std()) < 0.3


def test_a_loaded_connector_is_frozen_and_in_evaluation_mode(saved):
    loaded = load_connector(saved)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_a_failing_write_leaves_the_old_file_as_it_was(saved, monkeypatch):
    before = saved.read_bytes()

    def disk_full(tensors, filename, metadata):
        with open(filename, "wb") as stream:
            stream.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(connector_file, "save_file", disk_full)
    with pytest.raises(WriteError, match=r"cannot be written: the disk is full. Make room there"):
        save_connector(small_connector(seed=9), saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


# --- refusals ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "message"), NOT_SAFETENSORS)
def test_a_file_that_is_not_safetensors_is_refused(saved, make, message):
    path = saved.with_name("given.safetensors")
    make(path, saved.read_bytes())
    with pytest.raises(ConnectorFileError, match=message.format(name="given.safetensors") + "(.|\n)*an ELLA connector"):
        load_connector(path)


def test_a_checkpoint_is_refused(tmp_path):
    save_file(CHECKPOINT, tmp_path / "sd15.safetensors")
    with pytest.raises(ConnectorFileError, match=r"sd15.safetensors holds 2 tensors \(first_stage_model.*none of an "
                                                 "ELLA connector.*Choose the ELLA file"):
        load_connector(tmp_path / "sd15.safetensors")


def test_a_module_is_refused(tmp_path):
    save_module(small_module(), tmp_path / "style.safetensors")
    with pytest.raises(ConnectorFileError, match=r"style.safetensors holds .* none of an ELLA connector .*EMMA modules"):
        load_connector(tmp_path / "style.safetensors")


def test_text_features_of_another_encoder_are_refused_by_a_connector_of_another_width(tmp_path):
    wide = ConnectorConfig(width=96, latents=8, layers=1, heads=4, text_dim=56, time_channels=32, time_width=48)
    save_connector(small_connector(config=wide), tmp_path / "wide.safetensors")
    connector = load_connector(tmp_path / "wide.safetensors")
    assert connector.config == wide
    with pytest.raises(ConnectorMismatchError, match=r"shape \(1, 11, 40\), wide.safetensors wants .*56"):
        connector.tokens(small_text(), 500)


def test_a_missing_weight_is_named(saved):
    path = changed(saved, lambda tensors: tensors.pop("connector.perceiver_blocks.1.mlp.c_fc.bias"))
    with pytest.raises(ConnectorFileError, match=r"1 missing keys \(connector.perceiver_blocks.1.mlp.c_fc.bias\)"):
        load_connector(path)


def test_a_missing_block_is_noticed(saved):
    def drop_block(tensors):
        for key in [key for key in tensors if ".perceiver_blocks.1." in key]:
            del tensors[key]

    with pytest.raises(ConnectorFileError, match=r"14 missing keys \(connector.perceiver_blocks.1.attn.*and 10 more"):
        load_connector(changed(saved, drop_block))


def test_an_extra_weight_is_named(saved):
    path = changed(saved, lambda tensors: tensors.update({"connector.proj_out.weight": torch.zeros(64, 64)}))
    with pytest.raises(ConnectorFileError, match=r"1 unexpected keys \(connector.proj_out.weight\)"):
        load_connector(path)


def test_a_misshapen_weight_is_named(saved):
    path = changed(saved, lambda tensors: tensors.update({"connector.proj_in.bias": torch.zeros(65)}))
    with pytest.raises(ConnectorFileError, match=r"connector.proj_in.bias has shape \(65,\), wanted \(64,\)"):
        load_connector(path)


def test_weights_that_are_not_numbers_are_refused(saved):
    path = changed(saved, lambda tensors: tensors["connector.latents"][3].fill_(float("nan")))
    with pytest.raises(ConnectorFileError, match=r"connector.latents holds NaN or infinite values"):
        load_connector(path)


@pytest.mark.parametrize(("metadata", "message"), [
    ({"ella": json.dumps({"heads": 7})}, "has width 64, which 7 heads do not divide"),
    ({"ella": json.dumps({"heads": 0})}, "names 0 heads; wanted 1 or more"),
    ({"ella": json.dumps({"layers": 3})}, "does not name the heads; wanted JSON"),
    ({"ella": '{"heads": 4.5}'}, "does not name the heads; wanted JSON"),
    ({"ella": '{"heads": true}'}, "does not name the heads; wanted JSON"),
    ({"ella": "{broken"}, "its `ella` metadata is not JSON"),
    ({"ella": "[" * 100_000}, "its `ella` metadata has lists or objects nested more than 64 deep"),
])
def test_an_impossible_number_of_heads_is_refused(saved, metadata, message):
    with pytest.raises(ConnectorFileError, match=rf"changed.safetensors.*{message}"):
        load_connector(changed(saved, metadata=metadata))
