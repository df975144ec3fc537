"""Modules on a checkpoint's own tokens: the equations, the identities, padding, time, and who fits whom."""

import json

import pytest
import torch
from literal_equations import TokenModule, Used, tokens_with_modules
from reference_answers import relative_error
from small_models import (
    OBJECT,
    SMALL,
    TOKEN_WIDTH,
    fill_,
    small_connector,
    small_features,
    small_module,
    small_text,
    small_tokens,
    token_config,
    token_module,
)

from emma_core import Assembly, Reference, load_module, save_module
from emma_core.errors import ConnectorMismatchError, ModuleFileError
from emma_core.files.module_file import module_tensors
from emma_core.model.addition import Addition
from emma_core.model.assembly import token_terms, tokens_over_schedule
from emma_core.model.own_tokens import OwnTokens
from emma_core.model.source_spec import SourceSpec, TimeSpec
from emma_core.model.token_resampler import resampler_for

CLEARLY = 1e-2  # relative; the least that a difference on purpose makes here
SOURCE = OwnTokens(SourceSpec("small", TOKEN_WIDTH), TimeSpec("ddpm"))
FLOW = OwnTokens(SourceSpec("small", TOKEN_WIDTH), TimeSpec("flow"))


@pytest.fixture(scope="module")
def style():
    return token_module("style", gate_scale=0.7)


@pytest.fixture(scope="module")
def portrait():
    """Of another inner width, another time width and one block more."""
    return token_module("object", seed=15, features=OBJECT, width=64, time_width=40, layers=3)


def reference(module, rows=1, seed=4, **changes):
    return Reference(module, small_features(module, rows, seed=seed), **changes)


def literal_tokens(tokens_1SD, timestep, references):
    """The same weights in the plain transcription of the equations."""
    assembly = []
    for one in references:
        module = TokenModule(one.module.config)
        module.load_state_dict(module_tensors(one.module))
        assembly.append(Used(module, one.features, one.strength))
    with torch.no_grad():
        return tokens_with_modules(tokens_1SD, timestep, assembly)


# --- the equations -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("timestep", [0, 1, 480, 999])
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_one_module_equals_equations_3_to_6(style, timestep, strength):
    references = [reference(style, strength=strength)]
    found = SOURCE.tokens(small_tokens(), timestep, Assembly(references))
    wanted = literal_tokens(small_tokens(), timestep, references)
    assert relative_error(found - small_tokens(), wanted - small_tokens()) <= 1e-5
    assert relative_error(found[:, 1:], small_tokens()[:, 1:]) > CLEARLY


def test_assembled_modules_of_unlike_sizes_equal_equations_7_and_8(style, portrait):
    references = [reference(style, strength=0.5), reference(portrait, strength=1.5), reference(style, seed=9)]
    found = SOURCE.tokens(small_tokens(), 300, Assembly(references))
    wanted = literal_tokens(small_tokens(), 300, references)
    assert relative_error(found - small_tokens(), wanted - small_tokens()) <= 1e-5


def test_without_separable_gates_g_is_one(style):
    ablated = resampler_for(style.config.replace(separable_gates=False)).eval().requires_grad_(False)
    ablated.load_state_dict(style.state_dict())
    references = [reference(ablated)]
    found = SOURCE.tokens(small_tokens(), 500, Assembly(references))
    assert relative_error(found, literal_tokens(small_tokens(), 500, references)) <= 1e-5
    assert relative_error(found[:, 1:], SOURCE.tokens(small_tokens(), 500, Assembly([reference(style)]))[:, 1:]) > CLEARLY


def test_flow_time_is_embedded_as_it_is():
    module = token_module(time=TimeSpec("flow"))
    references = [reference(module)]
    found = FLOW.tokens(small_tokens(), 731.5, Assembly(references))
    assert relative_error(found - small_tokens(), literal_tokens(small_tokens(), 731.5, references) - small_tokens()) <= 1e-5


def test_the_module_listens_to_the_time(style):
    early, late = (SOURCE.tokens(small_tokens(), timestep, Assembly([reference(style)])) for timestep in (900, 100))
    assert relative_error(early[:, 1:], late[:, 1:]) > CLEARLY


# --- gates, strengths, order ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_references_the_tokens_are_the_models_bit_for_bit(style, dtype):
    tokens_1SD = small_tokens().to(dtype)
    for assembly in (Assembly(), Assembly([reference(style, strength=0.0)])):
        assert torch.equal(SOURCE.tokens(tokens_1SD, 500, assembly), tokens_1SD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_gates_are_the_model_bit_for_bit_in_every_dtype_of_the_module(style, dtype):
    module = resampler_for(style.config, dtype=dtype)
    module.load_state_dict({key: torch.zeros_like(value) if key.endswith(("attn_gate", "ffn_gate")) else value
                            for key, value in style.state_dict().items()})
    assert torch.equal(SOURCE.tokens(small_tokens(), 500, Assembly([reference(module)])), small_tokens())


def test_a_new_module_is_the_model_bit_for_bit():
    assert torch.equal(SOURCE.tokens(small_tokens(), 500, Assembly([reference(resampler_for(token_config()))])), small_tokens())


def test_the_text_keeps_its_precision_beside_a_half_precision_module(style):
    """What is added is rounded, not what is there."""
    module = resampler_for(style.config, dtype=torch.float16).eval()
    module.load_state_dict(style.state_dict())
    found = SOURCE.tokens(small_tokens(), 500, Assembly([reference(module)]))
    exact = SOURCE.tokens(small_tokens(), 500, Assembly([reference(style)]))
    assert found.dtype == torch.float32
    assert relative_error(found - small_tokens(), exact - small_tokens()) <= 1e-2


@pytest.mark.parametrize("start_percent", [0.0, 0.4])
def test_the_tokens_keep_their_dtype_whatever_the_modules(style, start_percent):
    """In a part of the rows and in all."""
    module = resampler_for(style.config, dtype=torch.bfloat16).eval()
    timestep_2, tokens_2SD = torch.tensor([900.0, 100.0]), small_tokens(2).half()
    assembly = Assembly([reference(module, start_percent=start_percent)])
    assert SOURCE.tokens(tokens_2SD, timestep_2, assembly).dtype == torch.float16


@pytest.mark.parametrize("way", ["tokens", "predictions"])
def test_modules_are_added_up_behind_the_last_block_or_in_the_predictions(style, portrait, way):
    """Each alone, as with an ELLA: on the text, and on what an object's module says is drawn."""
    assembly = Assembly([reference(style), reference(style, seed=9)], Addition(way))
    terms = token_terms(SOURCE, small_tokens(), 500, assembly)
    alone = [SOURCE.tokens(small_tokens(), 500, Assembly([one])) for one in assembly.references]
    if way == "tokens":
        wanted = alone[0] + alone[1] - small_tokens()
        assert relative_error(terms.single() - small_tokens(), wanted - small_tokens()) <= 1e-4
    else:
        assert torch.equal(terms.tokens_BKW, small_tokens())
        for difference, tokens in zip(terms.differences, alone, strict=True):
            assert relative_error(difference.tokens_AKW, tokens) <= 1e-5
        with_object = Assembly([reference(portrait), *assembly.references], Addition(way))
        base = SOURCE.tokens(small_tokens(), 500, Assembly([reference(portrait)]))
        assert relative_error(token_terms(SOURCE, small_tokens(), 500, with_object).tokens_BKW, base) <= 1e-5


def test_assembly_ignores_the_order_of_modules(style, portrait):
    references = [reference(style), reference(portrait, strength=0.7)]
    one, other = (SOURCE.tokens(small_tokens(), 500, Assembly(order)) for order in (references, references[::-1]))
    assert relative_error(one, other) <= 1e-6


def test_strength_zero_beside_another_module_is_absence_bit_for_bit(style, portrait):
    found = SOURCE.tokens(small_tokens(), 500, Assembly([reference(style, strength=0.0), reference(portrait)]))
    assert torch.equal(found, SOURCE.tokens(small_tokens(), 500, Assembly([reference(portrait)])))


# --- rows ----------------------------------------------------------------------------------------------------------

def test_rows_equal_one_by_one(style, portrait):
    tokens_3SD, timestep_3 = small_tokens(3), torch.tensor([950.0, 500.0, 20.0])
    together = SOURCE.tokens(tokens_3SD, timestep_3, Assembly([reference(style, rows=3), reference(portrait)]))
    for row in range(3):
        alone = SOURCE.tokens(tokens_3SD[row:row + 1], timestep_3[row],
                              Assembly([reference(style, rows=3).of_row(row), reference(portrait)]))
        assert relative_error(together[row:row + 1], alone) <= 1e-5


def test_a_schedule_equals_its_timesteps_one_by_one(style, portrait):
    timestep_T = torch.tensor([999.0, 640.0, 7.0])
    assembly = Assembly([reference(style, rows=2), reference(portrait, start_percent=0.2)])
    schedule = tokens_over_schedule(SOURCE, small_tokens(), timestep_T, assembly)
    assert schedule.shape == (3, 2, 11, TOKEN_WIDTH)
    for tokens, timestep in zip(schedule, timestep_T, strict=True):
        assert relative_error(tokens, SOURCE.tokens(small_tokens(), timestep, assembly)) <= 1e-5


# --- padding -------------------------------------------------------------------------------------------------------

def test_padding_is_untouched_and_unseen(style, portrait):
    kept_2S = torch.ones(2, 11, dtype=torch.bool)
    kept_2S[0, 7:] = False
    source = OwnTokens(SOURCE.source, SOURCE.time, kept_2S)
    assembly, tokens_2SD = Assembly([reference(style), reference(portrait)]), small_tokens(2)
    found = source.tokens(tokens_2SD, 500, assembly)
    assert torch.equal(found[0, 7:], tokens_2SD[0, 7:])
    assert relative_error(found[0, :7], SOURCE.tokens(tokens_2SD[:1, :7], 500, assembly)[0]) <= 1e-5
    assert relative_error(found[1], SOURCE.tokens(tokens_2SD[1:], 500, assembly)[0]) <= 1e-5
    other = tokens_2SD.clone()
    other[0, 7:] = 5.0
    assert torch.equal(source.tokens(other, 500, assembly)[0, :7], found[0, :7])


def test_padding_of_each_text_where_only_some_rows_have_a_reference(style):
    """Ranges and per-row timesteps pick rows, and each must keep its own padding."""
    kept_3S = torch.ones(3, 11, dtype=torch.bool)
    kept_3S[1, 4:] = False
    source = OwnTokens(SOURCE.source, SOURCE.time, kept_3S)
    timestep_3, tokens_3SD = torch.tensor([900.0, 300.0, 250.0]), small_tokens(3)
    found = source.tokens(tokens_3SD, timestep_3, Assembly([reference(style, start_percent=0.5)]))
    assert torch.equal(found[0], tokens_3SD[0]) and torch.equal(found[1, 4:], tokens_3SD[1, 4:])
    alone = SOURCE.tokens(tokens_3SD[1:2, :4], timestep_3[1], Assembly([reference(style)]))
    assert relative_error(found[1, :4], alone[0]) <= 1e-5


# --- percents ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_percents_of_flow_models_are_shares_of_the_sampling(shift):
    """As the host counts them: sigma = s u / (1 + (s - 1) u) at the share 1 - u."""
    source = OwnTokens(FLOW.source, FLOW.time, shift=shift)
    for percent in (0.0, 0.25, 0.5, 0.9, 1.0):
        u = 1 - percent
        sigma = torch.tensor([shift * u / (1 + (shift - 1) * u)])
        assert abs(float(source.strength_timestep(1000 * sigma)) - 999 * u) < 0.05


def test_a_range_on_a_flow_model_is_counted_with_its_shift():
    module = token_module(time=TimeSpec("flow"))
    assembly = Assembly([reference(module, end_percent=0.5)])
    acts = {shift: [not torch.equal(OwnTokens(FLOW.source, FLOW.time, shift=shift).tokens(small_tokens(), time, assembly),
                                    small_tokens()) for time in (1000.0, 760.0, 740.0, 510.0, 490.0)] for shift in (1.0, 3.0)}
    assert acts == {1.0: [True, True, True, True, False], 3.0: [True, True, False, False, False]}


@pytest.mark.parametrize(("shift", "evaluations"), [(1.0, [1, 1, 1, 1, 3]), (3.0, [1, 1, 3, 3, 3])])
def test_the_part_of_a_way_of_adding_up_is_counted_with_the_shift(shift, evaluations):
    modules = [token_module(time=TimeSpec("flow")), token_module("face", seed=5, time=TimeSpec("flow"))]
    assembly = Assembly([reference(module) for module in modules], Addition("tokens", 0.5, "predictions"))
    source = OwnTokens(FLOW.source, FLOW.time, shift=shift)
    found = [len(token_terms(source, small_tokens(), time, assembly).rows) for time in (1000.0, 760.0, 740.0, 510.0, 490.0)]
    assert found == evaluations


# --- learning ------------------------------------------------------------------------------------------------------

def test_a_new_module_learns_its_gates_first_and_then_everything():
    module = resampler_for(token_config())
    fill_(module, seed=6)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith(("attn_gate", "ffn_gate")):
                weight.zero_()

    def gradients():
        module.zero_grad()
        found = SOURCE.tokens(small_tokens(), 500, Assembly([reference(module)]))
        torch.nn.functional.mse_loss(found, small_tokens(seed=14)).backward()
        return {name: float(weight.grad.abs().max()) for name, weight in module.named_parameters()}

    for name, size in gradients().items():
        assert (size > 0) == name.endswith(("attn_gate", "ffn_gate")), name
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert all(size > 0 for size in gradients().values())


# --- files ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(style, tmp_path):
    save_module(style, tmp_path / "style.safetensors", metadata={"modelspec.title": "Styles"})
    return tmp_path / "style.safetensors"


def entry_of(path) -> dict:
    return json.loads(load_module(path).config.to_json())


def with_entry(style, path, **changes):
    """The style module's weights with another `emma` entry."""
    from safetensors.torch import save_file

    entry = {**json.loads(style.config.to_json()), **changes}
    save_file({key: value.contiguous() for key, value in module_tensors(style).items()}, path,
              metadata={"emma": json.dumps({key: value for key, value in entry.items() if value is not None})})
    return path


def test_saving_and_loading_keeps_every_bit(style, saved):
    loaded = load_module(saved)
    assert loaded.config == style.config.replace(file_metadata=loaded.config.file_metadata)
    for name, weight in style.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    before, after = (SOURCE.tokens(small_tokens(), 500, Assembly([reference(module)])) for module in (style, loaded))
    assert torch.equal(before, after)


def test_the_metadata_say_on_what_it_acts(saved):
    assert entry_of(saved) == {
        "format_version": 2, "condition": "style", "gate_scale": 0.7, "separable_gates": True, "width": 32, "heads": 4,
        "layers": 2, "features": {"global": {"dim": 24, "tokens_per_vector": 4}},
        "source": {"kind": "tokens", "width": TOKEN_WIDTH, "inner": 32, "family": "small"},
        "time": {"kind": "ddpm", "last": 999},
    }


def test_the_file_has_the_promised_keys_and_shapes(saved):
    from safetensors.torch import load_file

    shapes = {key: tuple(value.shape) for key, value in load_file(saved).items()}
    assert shapes["time_embedding.linear_1.weight"] == (48, 320) and shapes["time_embedding.linear_2.weight"] == (48, 48)
    assert shapes["proj.global.weight"] == (128, 24)
    for block in ("blocks.0", "blocks.1"):
        assert shapes[f"{block}.proj_in.weight"] == (32, TOKEN_WIDTH) and shapes[f"{block}.proj_in.bias"] == (32,)
        assert shapes[f"{block}.proj_out.weight"] == (TOKEN_WIDTH, 32) and shapes[f"{block}.proj_out.bias"] == (TOKEN_WIDTH,)
        assert shapes[f"{block}.gate.weight"] == (1, 32)
        assert shapes[f"{block}.attn.in_proj_weight"] == (96, 32)


def test_unknown_keys_of_the_source_survive_saving_again(style, tmp_path):
    source = {**json.loads(style.config.to_json())["source"], "layer": -2}
    path = with_entry(style, tmp_path / "newer.safetensors", source=source)
    save_module(load_module(path), tmp_path / "again.safetensors")
    assert entry_of(tmp_path / "again.safetensors")["source"] == source


def test_version_2_on_ella_is_an_ella_module_and_is_saved_for_older_versions(tmp_path):
    ella = small_module()
    source = {"kind": "ella", "width": SMALL.width, "inner": SMALL.width, "family": "sd15"}
    path = with_entry(ella, tmp_path / "two.safetensors", format_version=2, source=source, time={"kind": "ddpm", "last": 999})
    loaded = load_module(path)
    tokens = [small_connector().tokens(small_text(), 500, Assembly([reference(module)])) for module in (ella, loaded)]
    assert torch.equal(*tokens)
    assert entry_of(path) == json.loads(ella.config.to_json()) and entry_of(path)["format_version"] == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"source": None}, r"lacks source\. Save"),
    ({"time": None}, r"lacks time\. Save"),
    ({"source": {"kind": "pixels", "width": 96, "inner": 32, "family": "small"}}, r"source is 'pixels'.*Update ComfyUI-EMMA"),
    ({"source": {"kind": "tokens", "width": 96, "inner": 64, "family": "small"}}, r"inner width 64, its blocks 32"),
    ({"source": {"kind": "tokens", "width": 96, "inner": 32, "family": ""}}, r"of family '' and width 96"),
    ({"source": {"kind": "tokens", "width": 64, "inner": 32, "family": "small"}}, r"has shape \(32, 96\), wanted \(32, 64\)"),
    ({"source": {"kind": "tokens", "inner": 32, "family": "small"}}, r"a value of the wrong kind \(KeyError\('width'\)\)"),
    ({"source": "tokens"}, r"source is a str, wanted a dict"),
    ({"time": {"kind": "edm", "last": 80}}, r"time is 'edm'.*Update ComfyUI-EMMA"),
    ({"time": {"kind": "flow", "last": 1}}, r"time is flow up to 1; .*up to 1000"),
    ({"format_version": 3}, r"format version 3, .* reads 1 and 2\. Update ComfyUI-EMMA"),
])
def test_metadata_that_cannot_be_are_refused(style, tmp_path, changes, message):
    path = with_entry(style, tmp_path / "wrong.safetensors", **changes)
    with pytest.raises(ModuleFileError, match=rf"wrong\.safetensors.*{message}"):
        load_module(path)


# --- who fits whom -------------------------------------------------------------------------------------------------

def test_a_module_of_own_tokens_is_refused_on_an_ella(saved):
    with pytest.raises(ConnectorMismatchError, match=r"style.safetensors \(style\) acts on the own tokens of small "
                                                     r"\(width 96\), not on an ELLA's.*Leave ELLA out"):
        small_connector().tokens(small_text(), 500, Assembly([reference(load_module(saved))]))


def test_a_module_for_an_ella_is_refused_on_own_tokens():
    with pytest.raises(ConnectorMismatchError, match=r"the style module was made for an ELLA \(width 64, 3 blocks\), and none "
                                                     r"is wired. Wire Load ELLA"):
        SOURCE.tokens(small_tokens(), 500, Assembly([reference(small_module())]))


@pytest.mark.parametrize(("source", "message"), [
    (SourceSpec("large", TOKEN_WIDTH), r"tokens of small models \(width 96, ddpm time\); this is a large model \(width 96"),
    (SourceSpec("small", 64), r"\(width 96, ddpm time\); this is a small model \(width 64"),
])
def test_a_module_of_another_family_or_width_is_refused(style, source, message):
    with pytest.raises(ConnectorMismatchError, match=message):
        OwnTokens(source, SOURCE.time).check_fits(style)


def test_a_module_that_counts_time_otherwise_is_refused(style):
    with pytest.raises(ConnectorMismatchError, match=r"ddpm time\); this is a small model \(width 96, flow time\)"):
        FLOW.check_fits(style)


def test_tokens_of_another_width_are_refused(style):
    with pytest.raises(ConnectorMismatchError, match=r"shape \(1, 11, 95\), a small model reads \(prompts, tokens, 96\)"):
        SOURCE.tokens(small_tokens()[..., :95], 500, Assembly([reference(style)]))
