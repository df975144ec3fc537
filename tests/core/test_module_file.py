"""EMMA modules on disk: nothing is lost on the way, and nothing wrong is read."""

import json
from dataclasses import replace

import pytest
import torch
from bad_files import CHECKPOINT, NOT_SAFETENSORS, rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import OBJECT, SMALL, small_connector, small_features, small_module, small_text

import emma_core.files.module_file as module_file
from emma_core import Assembly, FeatureSpec, GatedResampler, ModuleConfig, Reference, load_module, save_module
from emma_core.__main__ import main
from emma_core.errors import ConnectorMismatchError, EmmaWarning, FileError, ModuleFileError, WriteError
from emma_core.files.connector_file import load_connector, save_connector

EXTRAS = {"encoder": {"family": "clip-vit-h-14", "fingerprint": "ab12", "masked": True}, "training": {"steps": 7}}


@pytest.fixture(scope="module")
def module():
    return small_module("object", features=OBJECT, gate_scale=0.7, **EXTRAS)


@pytest.fixture
def saved(module, tmp_path):
    path = tmp_path / "object.safetensors"
    save_module(module, path, metadata={"modelspec.title": "Objects", "modelspec.author": "A. Painter"})
    return path


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def emma_entry(path) -> dict:
    return json.loads(metadata_of(path)["emma"])


def with_entry(saved, **changes):
    """The saved file with another `emma` entry; a change to None removes the key."""
    entry = {key: value for key, value in {**emma_entry(saved), **changes}.items() if value is not None}
    return rewrite(saved, saved.with_name("changed.safetensors"), lambda tensors: None, {"emma": json.dumps(entry)})


# --- what is kept --------------------------------------------------------------------------------------------------

def test_saving_and_loading_keeps_every_bit(module, saved):
    loaded = load_module(saved)
    for name, weight in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert loaded.config == module.config.replace(file_metadata=loaded.config.file_metadata)
    references = [Reference(one, small_features(one)) for one in (module, loaded)]
    before, after = (small_connector().tokens(small_text(), 500, Assembly([one])) for one in references)
    assert torch.equal(before, after)


def test_the_file_has_the_promised_keys_and_shapes(saved):
    width, time_width = SMALL.width, SMALL.time_width
    wanted = {"proj.global.weight": (width, 24), "proj.global.bias": (width,),
              "proj.local.weight": (width, 20), "proj.local.bias": (width,)}
    for layer in range(SMALL.layers):
        block = {f"{norm}.linear.{kind}": shape for norm in ("ln_1", "ln_2", "ln_ff")
                 for kind, shape in (("weight", (2 * width, time_width)), ("bias", (2 * width,)))}
        block |= {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
                  "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
                  "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
                  "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
                  "gate.weight": (1, width), "gate.bias": (1,), "attn_gate": (1,), "ffn_gate": (1,)}
        wanted |= {f"blocks.{layer}.{key}": shape for key, shape in block.items()}
    assert {key: tuple(tensor.shape) for key, tensor in load_file(saved).items()} == wanted


def test_the_metadata_say_what_the_module_is(saved):
    assert emma_entry(saved) == {
        "format_version": 1, "condition": "object", "gate_scale": 0.7, "separable_gates": True, "width": 64, "heads": 4,
        "layers": 3, "features": {"global": {"dim": 24, "tokens_per_vector": 1},
                                  "local": {"dim": 20, "tokens_per_vector": 1}}, **EXTRAS,
    }
    assert metadata_of(saved)["modelspec.title"] == "Objects"


def test_unknown_keys_and_modelspec_keys_survive_saving_again(saved):
    entry = emma_entry(saved) | {"mixing": {"a": [1, 2]}, "note": "hello"}
    entry["features"]["local"]["grid"] = [3, 3]
    entry["encoder"]["resize"] = "bicubic"
    foreign = {"emma": json.dumps(entry), "modelspec.title": "Objects", "modelspec.license": "MIT", "tool": "x"}
    newer = rewrite(saved, saved.with_name("newer.safetensors"), lambda tensors: None, foreign)
    again = saved.with_name("again.safetensors")
    save_module(load_module(newer), again, metadata={"modelspec.title": "Things"})
    assert emma_entry(again) == entry
    assert metadata_of(again) == {**foreign, "modelspec.title": "Things", "emma": metadata_of(again)["emma"]}


@pytest.mark.parametrize("calibration", [{}, {"strength": None}, {"pictures": 3}])
def test_a_file_without_a_calibrated_strength_has_one(saved, calibration):
    assert load_module(saved).config.calibrated_strength == 1.0
    entry = emma_entry(saved) | {"calibration": calibration}
    assert load_module(with_entry(saved, **entry)).config.calibrated_strength == 1.0


def test_strength_one_stands_for_the_calibrated_strength(saved):
    entry = emma_entry(saved) | {"calibration": {"strength": 1.25, "by": "error"}}
    calibrated, plain, connector = load_module(with_entry(saved, **entry)), load_module(saved), small_connector()
    for strength in (1.0, -0.4):
        found, wanted = (connector.tokens(small_text(), 500, Assembly([Reference(module, small_features(module), used)]))
                         for module, used in ((calibrated, strength), (plain, 1.25 * strength)))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    again = saved.with_name("again.safetensors")
    save_module(calibrated, again)
    assert emma_entry(again)["calibration"] == entry["calibration"]


@pytest.mark.parametrize(("strength", "message"), [
    (0, "strength 1 stands for 0; wanted a number above 0. Correct the calibration"), (-1.5, "stands for -1.5; wanted"),
    (float("nan"), "stands for nan; wanted"), ("1.25", "value of the wrong kind.*strength is a str, wanted a float"),
    (True, "strength is a bool, wanted a float")])
def test_a_calibrated_strength_that_is_no_strength_is_refused(saved, strength, message):
    with pytest.raises(ModuleFileError, match=message):
        load_module(with_entry(saved, **(emma_entry(saved) | {"calibration": {"strength": strength}})))


def test_calibrate_writes_the_strength_and_nothing_else(saved, capsys):
    half = saved.with_name("half.safetensors")
    save_module(load_module(saved), half, dtype=torch.float16)
    before, entry, others = load_file(half), emma_entry(half), metadata_of(half)
    assert main(["calibrate", str(half), "1.25", "--by", "pictures"]) == 0
    assert emma_entry(half) == {**entry, "calibration": {"strength": 1.25, "by": "pictures"}}
    assert {**metadata_of(half), "emma": ""} == {**others, "emma": ""}
    after = load_file(half)
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert main(["inspect", str(half)]) == 0
    assert "strength 1   stands for 1.25 of what was trained (pictures)" in capsys.readouterr().out
    assert main(["inspect", str(saved)]) == 0
    assert "strength 1   stands for 1 of what was trained\n" in capsys.readouterr().out


@pytest.mark.parametrize("strength", ["0", "-1", "nan"])
def test_calibrate_refuses_what_is_no_strength_and_leaves_the_file(saved, capsys, strength):
    before = saved.read_bytes()
    assert main(["calibrate", "--", str(saved), strength]) == 1
    assert "object.safetensors: strength 1 stands for" in capsys.readouterr().err
    assert saved.read_bytes() == before


@pytest.mark.parametrize(("draws", "is_subject"), [("subject", True), ("manner", False), (None, True)])
def test_what_a_module_says_is_read_from_the_file_or_follows_from_its_condition(saved, draws, is_subject):
    loaded = load_module(with_entry(saved, **(emma_entry(saved) | ({"draws": draws} if draws else {}))))
    assert loaded.config.draws_subject == is_subject


def test_the_order_of_features_is_that_of_the_metadata(saved):
    entry = emma_entry(saved)
    entry["features"] = dict(reversed(entry["features"].items()))
    assert list(load_module(with_entry(saved, **entry)).config.features) == ["local", "global"]


def test_a_half_precision_file_loads_as_its_float32_values(module, saved):
    half = saved.with_name("half.safetensors")
    save_module(module, half, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(half).values()} == {torch.float16}
    assert half.stat().st_size < 0.55 * saved.stat().st_size
    loaded = load_module(half)
    for name, weight in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float()), name
    assert {weight.dtype for weight in load_module(saved, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_module_without_separable_gates_may_leave_their_weights_out(saved):
    def drop_gates(tensors):
        for key in [key for key in tensors if ".gate." in key]:
            del tensors[key]

    metadata = {"emma": json.dumps(emma_entry(saved) | {"separable_gates": False})}
    ablated = load_module(rewrite(saved, saved.with_name("ablated.safetensors"), drop_gates, metadata))
    assert torch.equal(ablated.gate(0, torch.ones(1, 2, SMALL.width)), torch.full((1, 2, 1), 0.7))
    with pytest.raises(ModuleFileError, match=r"6 missing keys \(blocks.0.gate.bias"):
        load_module(rewrite(saved, saved.with_name("broken.safetensors"), drop_gates, metadata_of(saved)))


def test_a_loaded_module_is_frozen_and_in_evaluation_mode(saved):
    loaded = load_module(saved)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())


@pytest.mark.parametrize("header_bytes", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_size_looks_like_a_pickle_is_read(module, tmp_path, header_bytes):
    """The first bytes of a file are its header's size, and b"\\x80\\x02" also starts a pickle."""
    tensors = {"only": torch.zeros(2)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"pad": ""})
    missing = header_bytes - int.from_bytes(path.read_bytes()[:8], "little")
    save_file(tensors, path, metadata={"pad": "." * missing})
    assert int.from_bytes(path.read_bytes()[:8], "little") == header_bytes
    with pytest.raises(ModuleFileError, match=r"has no `emma` metadata"):
        load_module(path)


# --- writing -------------------------------------------------------------------------------------------------------

def test_a_failing_write_leaves_the_old_file_as_it_was(module, saved, monkeypatch):
    before = saved.read_bytes()

    def disk_full(tensors, filename, metadata):
        with open(filename, "wb") as stream:
            stream.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module_file, "save_file", disk_full)
    with pytest.raises(WriteError, match=r"cannot be written: the disk is full. Make room there"):
        save_module(module, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_weights_that_are_not_numbers_are_not_written(saved):
    broken = load_module(saved)
    gate = broken.get_parameter("blocks.1.ffn_gate")
    gate.fill_(float("inf"))
    before = saved.read_bytes()
    with pytest.raises(ModuleFileError, match=r"blocks.1.ffn_gate holds NaN or infinite"):
        save_module(broken, saved)
    gate.fill_(1e6)
    with pytest.raises(ModuleFileError, match=r"blocks.1.ffn_gate holds NaN or infinite"):
        save_module(broken, saved, dtype=torch.float16)
    assert saved.read_bytes() == before


def test_a_folder_that_does_not_exist_is_named(module, tmp_path):
    with pytest.raises(FileError, match=r"the folder .*nowhere does not exist"):
        save_module(module, tmp_path / "nowhere" / "object.safetensors")


# --- refusals: the file --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("make", "message"), NOT_SAFETENSORS)
def test_a_file_that_is_not_safetensors_is_refused(saved, make, message):
    path = saved.with_name("given.safetensors")
    make(path, saved.read_bytes())
    with pytest.raises(ModuleFileError, match=message.format(name="given.safetensors") + "(.|\n)*an EMMA module"):
        load_module(path)


def test_a_checkpoint_is_refused(tmp_path):
    save_file(CHECKPOINT, tmp_path / "sd15.safetensors")
    with pytest.raises(ModuleFileError, match=r"sd15.safetensors has no `emma` metadata, so it is not an EMMA module"):
        load_module(tmp_path / "sd15.safetensors")


def test_an_ella_file_is_refused(tmp_path):
    save_connector(small_connector(), tmp_path / "ella.safetensors")
    with pytest.raises(ModuleFileError, match=r"has no `emma` metadata.*found ella.*models/emma"):
        load_module(tmp_path / "ella.safetensors")


# --- refusals: the metadata ----------------------------------------------------------------------------------------

def test_metadata_that_are_not_json_are_refused(saved):
    path = rewrite(saved, saved.with_name("x.safetensors"), lambda tensors: None, {"emma": "{broken"})
    with pytest.raises(ModuleFileError, match=r"x.safetensors: its `emma` metadata is not JSON"):
        load_module(path)


def test_metadata_that_are_not_an_object_are_refused(saved):
    path = rewrite(saved, saved.with_name("x.safetensors"), lambda tensors: None, {"emma": "[1]"})
    with pytest.raises(ModuleFileError, match=r"is a list, wanted a JSON object"):
        load_module(path)


@pytest.mark.parametrize("version", [3, 0, "1"])
def test_an_unknown_format_version_is_refused(saved, version):
    with pytest.raises(ModuleFileError, match=rf"format version {version!r}, this version .* reads 1 and 2. Update"):
        load_module(with_entry(saved, format_version=version))


@pytest.mark.parametrize("key", ["condition", "gate_scale", "separable_gates", "width", "heads", "layers", "features"])
def test_a_missing_metadata_key_is_named(saved, key):
    with pytest.raises(ModuleFileError, match=rf"its `emma` metadata lacks {key}"):
        load_module(with_entry(saved, **{key: None}))


@pytest.mark.parametrize("changes", [
    {"features": "global"}, {"features": {"global": 3}}, {"features": {"global": {"tokens_per_vector": 4}}},
    {"width": "wide"}, {"gate_scale": "loud"}, {"condition": 3}, {"separable_gates": "no"}, {"encoder": "clip"},
    {"ella": ["sha"]}, {"layers": float("inf")},
])
def test_metadata_of_the_wrong_kind_are_refused(saved, changes):
    with pytest.raises(ModuleFileError, match=r"changed.safetensors: its `emma` metadata has a value of the wrong kind"):
        load_module(with_entry(saved, **changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"heads": 7}, "width 64 is not a multiple of 7 heads"),
    ({"heads": 0}, "sizes below 1 .*'heads': 0"),
    ({"layers": -1}, "sizes below 1 .*'layers': -1"),
    ({"gate_scale": float("nan")}, "gate scale nan is not finite"),
    ({"features": {}}, "at least one feature, found none"),
    ({"features": {"glo.bal": {"dim": 24}}}, "'glo.bal' is not made of letters"),
    ({"features": {"keys": {"dim": 24}}}, "'keys' .*reserved word"),
    ({"features": {"global": {"dim": 0}}}, "'global' has dim 0"),
])
def test_impossible_sizes_are_refused_with_the_files_name(saved, changes, message):
    with pytest.raises(ModuleFileError, match=rf"changed.safetensors: .*{message}"):
        load_module(with_entry(saved, **changes))


# --- refusals: the weights -----------------------------------------------------------------------------------------

def changed_weights(saved, change):
    return rewrite(saved, saved.with_name("changed.safetensors"), change, metadata_of(saved))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_numbers_are_refused(saved, value):
    path = changed_weights(saved, lambda tensors: tensors["blocks.2.attn.in_proj_weight"][5].fill_(value))
    with pytest.raises(ModuleFileError, match=r"blocks.2.attn.in_proj_weight holds NaN or infinite values"):
        load_module(path)


def test_a_missing_weight_is_named(saved):
    path = changed_weights(saved, lambda tensors: tensors.pop("blocks.1.mlp.c_fc.bias"))
    with pytest.raises(ModuleFileError, match=r"1 missing keys \(blocks.1.mlp.c_fc.bias\)"):
        load_module(path)


def test_an_extra_weight_is_named(saved):
    path = changed_weights(saved, lambda tensors: tensors.update({"blocks.3.attn_gate": torch.zeros(1)}))
    with pytest.raises(ModuleFileError, match=r"1 unexpected keys \(blocks.3.attn_gate\)"):
        load_module(path)


def test_a_misshapen_weight_is_named(saved):
    path = changed_weights(saved, lambda tensors: tensors.update({"proj.local.weight": torch.zeros(64, 21)}))
    with pytest.raises(ModuleFileError, match=r"proj.local.weight has shape \(64, 21\), wanted \(64, 20\)"):
        load_module(path)


def test_weights_of_another_width_than_the_metadata_are_refused(saved):
    with pytest.raises(ModuleFileError, match=r"has shape \(192, 64\), wanted \(96, 32\)"):
        load_module(with_entry(saved, width=32))


# --- on a connector ------------------------------------------------------------------------------------------------

def test_a_module_of_another_width_is_refused_on_a_connector(tmp_path):
    config = ModuleConfig(condition="style", width=32, heads=4, layers=3, features={"global": FeatureSpec(24)},
                          time_width=48)
    save_module(GatedResampler(config), tmp_path / "narrow.safetensors")
    save_connector(small_connector(), tmp_path / "ella.safetensors")
    connector = load_connector(tmp_path / "ella.safetensors")
    with pytest.raises(ConnectorMismatchError, match=r"narrow.safetensors \(style\) was made for a connector of width "
                                                     r"32, .*ella.safetensors has width 64"):
        connector.check_fits(load_module(tmp_path / "narrow.safetensors"))


def test_a_module_made_for_another_ella_warns(module, tmp_path, recwarn):
    save_connector(small_connector(seed=1), tmp_path / "one.safetensors")
    save_connector(small_connector(seed=2), tmp_path / "two.safetensors")
    one, two = (load_connector(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.sha256 and one.sha256 != two.sha256
    made_for_one = GatedResampler(replace(module.config, ella={"sha256": one.sha256}))
    one.check_fits(made_for_one)
    two.check_fits(module)  # names no ELLA
    assert not recwarn.list
    with pytest.warns(EmmaWarning, match=rf"trained on another ELLA file .*{one.sha256[:12]}.* than two.safetensors"):
        two.check_fits(made_for_one)
