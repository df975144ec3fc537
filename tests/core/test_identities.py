"""What must hold for any connector and any modules, whatever their weights."""

import pytest
import torch
from literal_equations import EllaConnector, EmmaModule, Used
from reference_answers import relative_error
from small_models import (
    OBJECT,
    SMALL,
    STYLE,
    fill_,
    small_config,
    small_connector,
    small_features,
    small_module,
    small_text,
)

from emma_core import Assembly, GatedResampler, Reference
from emma_core.errors import ConnectorMismatchError, ReferenceMismatchError
from emma_core.files.connector_file import connector_tensors
from emma_core.files.module_file import module_tensors
from emma_core.model.assembly import tokens_over_schedule

EXACT = 1e-6  # relative; float32 sums in another order
CLEARLY = 1e-2  # relative; the least that a difference on purpose makes here


@pytest.fixture(scope="module")
def connector():
    return small_connector()


@pytest.fixture(scope="module")
def style():
    return small_module("style", seed=2, gate_scale=0.7)


@pytest.fixture(scope="module")
def portrait():
    return small_module("object", seed=5, features=OBJECT)


def reference(module, rows=1, seed=4, **changes):
    return Reference(module, small_features(module, rows, seed=seed), **changes)


def literal_tokens(connector, text_1ND, timestep, references):
    """The same weights in the plain transcription of the equations."""
    plain = EllaConnector(connector.config)
    plain.load_state_dict(connector_tensors(connector))
    assembly = []
    for one in references:
        module = EmmaModule(one.module.config)
        module.load_state_dict(module_tensors(one.module))
        assembly.append(Used(module, one.features, one.strength))
    with torch.no_grad():
        return plain(text_1ND, timestep, assembly)


# --- the equations -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("timestep", [0, 1, 480, 999])
def test_ella_alone_equals_equations_1_and_2(connector, timestep):
    found = connector.tokens(small_text(), timestep)
    assert relative_error(found, literal_tokens(connector, small_text(), timestep, [])) <= 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
def test_one_module_equals_equations_3_to_6(connector, style, strength):
    references = [reference(style, strength=strength)]
    found = connector.tokens(small_text(), 700, Assembly(references))
    assert relative_error(found, literal_tokens(connector, small_text(), 700, references)) <= 1e-5
    assert relative_error(found, connector.tokens(small_text(), 700)) > CLEARLY


def test_assembled_modules_equal_equations_7_and_8(connector, style, portrait):
    references = [reference(style, strength=0.5), reference(portrait, strength=1.5), reference(style, seed=9)]
    found = connector.tokens(small_text(), 300, Assembly(references))
    assert relative_error(found, literal_tokens(connector, small_text(), 300, references)) <= 1e-5


def test_assembling_is_not_the_modules_one_after_the_other(connector, style, portrait):
    """The second module must read L0, not what the first one made of it."""
    both = connector.tokens(small_text(), 300, Assembly([reference(style), reference(portrait)]))
    ella = connector.tokens(small_text(), 300)
    alone = [connector.tokens(small_text(), 300, Assembly([reference(module)])) for module in (style, portrait)]
    assert all(relative_error(both, tokens) > CLEARLY for tokens in (ella, *alone))


def test_without_separable_gates_g_is_one(connector, style):
    config = style.config.replace(separable_gates=False)
    ablated = GatedResampler(config).eval().requires_grad_(False)
    ablated.load_state_dict(style.state_dict())
    references = [reference(ablated)]
    found = connector.tokens(small_text(), 500, Assembly(references))
    assert relative_error(found, literal_tokens(connector, small_text(), 500, references)) <= 1e-5
    assert relative_error(found, connector.tokens(small_text(), 500, Assembly([reference(style)]))) > CLEARLY


# --- gates, strengths, order ---------------------------------------------------------------------------------------

def test_zero_gates_equal_ella_bit_for_bit(connector, style):
    module = GatedResampler(style.config)
    module.load_state_dict({key: torch.zeros_like(value) if key.endswith(("attn_gate", "ffn_gate")) else value
                            for key, value in style.state_dict().items()})
    found = connector.tokens(small_text(), 500, Assembly([reference(module)]))
    assert torch.equal(found, connector.tokens(small_text(), 500))


def test_a_new_module_equals_ella_bit_for_bit(connector):
    found = connector.tokens(small_text(), 500, Assembly([reference(GatedResampler(small_config()))]))
    assert torch.equal(found, connector.tokens(small_text(), 500))


def test_strength_zero_alone_is_ella_bit_for_bit(connector, style):
    found = connector.tokens(small_text(), 500, Assembly([reference(style, strength=0.0)]))
    assert torch.equal(found, connector.tokens(small_text(), 500, Assembly([])))


@pytest.mark.parametrize("first", [True, False])
def test_strength_zero_beside_another_module_is_absence_bit_for_bit(connector, style, portrait, first):
    silent, heard = reference(style, strength=0.0), reference(portrait)
    found = connector.tokens(small_text(), 500, Assembly([silent, heard] if first else [heard, silent]))
    assert torch.equal(found, connector.tokens(small_text(), 500, Assembly([heard])))


def test_order_of_modules_does_not_matter(connector, style, portrait):
    references = [reference(style), reference(portrait, strength=0.7), reference(style, seed=8, strength=0.2)]
    forth = connector.tokens(small_text(), 500, Assembly(references))
    back = connector.tokens(small_text(), 500, Assembly(reversed(references)))
    assert (forth - back).abs().max() / forth.abs().max() <= EXACT


def test_gate_scale_and_strength_multiply(connector, style):
    doubled = GatedResampler(style.config.replace(gate_scale=2 * style.config.gate_scale)).eval()
    doubled.load_state_dict(style.state_dict())
    found = connector.tokens(small_text(), 500, Assembly([reference(doubled, strength=0.5)]))
    assert relative_error(found, connector.tokens(small_text(), 500, Assembly([reference(style)]))) <= EXACT


def test_gate_map_values_are_those_of_the_equation(connector, style):
    entry_BKW = small_text(2, 8)[..., :1].expand(-1, -1, SMALL.width).contiguous()
    weights = style.state_dict()
    wanted_BK1 = entry_BKW @ weights["blocks.1.gate.weight"].T + weights["blocks.1.gate.bias"]
    assert relative_error(style.separable_gate(1, entry_BKW), wanted_BK1) <= EXACT
    assert relative_error(style.gate(1, entry_BKW), 0.7 * wanted_BK1) <= EXACT


# --- batches -------------------------------------------------------------------------------------------------------

def test_a_batch_equals_its_rows_alone(connector, style, portrait):
    text_BND = small_text(3)
    assembly = Assembly([reference(style), reference(portrait)])
    batch = connector.tokens(text_BND, 500, assembly)
    for row in range(3):
        assert relative_error(batch[row : row + 1], connector.tokens(text_BND[row : row + 1], 500, assembly)) <= 1e-5
    assert relative_error(batch[0], batch[1]) > CLEARLY


def test_timesteps_per_row_equal_one_at_a_time(connector, style):
    timestep_B = torch.tensor([999.0, 500.5, 3.0])
    batch = connector.tokens(small_text(), timestep_B, Assembly([reference(style)]))
    assert batch.shape == (3, SMALL.latents, SMALL.width)
    for row, timestep in enumerate(timestep_B):
        alone = connector.tokens(small_text(), timestep, Assembly([reference(style)]))
        assert relative_error(batch[row : row + 1], alone) <= 1e-5
    assert relative_error(batch[0], batch[1]) > CLEARLY


def test_references_and_strengths_per_row_equal_rows_alone(connector, style, portrait):
    text_BND, timestep_B = small_text(3), torch.tensor([900.0, 500.0, 100.0])
    frames = small_features(style, rows=3)
    strength_R = torch.tensor([1.0, 0.0, 0.4])
    shared = reference(portrait)
    batch = connector.tokens(text_BND, timestep_B, Assembly([Reference(style, frames, strength_R), shared]))
    for row in range(3):
        features = {name: tensor[row : row + 1] for name, tensor in frames.items()}
        one = Reference(style, features, float(strength_R[row]))
        alone = connector.tokens(text_BND[row : row + 1], timestep_B[row], Assembly([one, shared]))
        assert relative_error(batch[row : row + 1], alone) <= 1e-5


def test_references_per_row_serve_one_prompt(connector, style):
    assembly = Assembly([reference(style, rows=3)])
    assert assembly.rows == 3
    batch = connector.tokens(small_text(), 500, assembly)
    assert batch.shape[0] == 3
    assert relative_error(batch[0], batch[1]) > CLEARLY


@pytest.mark.parametrize("frames", [1, 3])
def test_a_schedule_equals_its_timesteps_one_by_one(connector, style, portrait, frames):
    timestep_T = torch.tensor([999.0, 700.0, 250.0, 1.0])
    assembly = Assembly([reference(style, rows=frames), reference(portrait, start_percent=0.2, end_percent=0.9)])
    schedule = tokens_over_schedule(connector, small_text(), timestep_T, assembly)
    assert schedule.shape == (4, frames, SMALL.latents, SMALL.width)
    for tokens, timestep in zip(schedule, timestep_T, strict=True):
        assert relative_error(tokens, connector.tokens(small_text(), timestep, assembly)) <= 1e-5


def test_a_schedule_longer_than_a_pass_equals_its_timesteps_one_by_one(connector, style):
    timestep_T = torch.linspace(999, 0, 150)
    assembly = Assembly([reference(style, start_percent=0.3)])
    schedule = tokens_over_schedule(connector, small_text(), timestep_T, assembly)
    for step in (0, 14, 15, 149):
        alone = connector.tokens(small_text(), timestep_T[step], assembly)
        assert relative_error(schedule[step], alone) <= 1e-5


def test_the_same_call_gives_the_same_bits(connector, style):
    calls = [connector.tokens(small_text(2), 500, Assembly([reference(style)])) for _ in range(2)]
    assert torch.equal(*calls)


# --- ranges --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("timestep", "acts"), [(999, False), (800, False), (700, True), (500, True), (450, False)])
def test_a_range_switches_a_module_off_outside_it(connector, style, timestep, acts):
    ranged = connector.tokens(small_text(), timestep, Assembly([reference(style, start_percent=0.25, end_percent=0.5)]))
    if acts:
        assert torch.equal(ranged, connector.tokens(small_text(), timestep, Assembly([reference(style)])))
        assert relative_error(ranged, connector.tokens(small_text(), timestep)) > CLEARLY
    else:
        assert torch.equal(ranged, connector.tokens(small_text(), timestep))


def test_the_ends_of_a_range_belong_to_it(style):
    whole = reference(style)
    assert whole.weight_of_rows(torch.tensor([999.0, 0.0])).tolist() == [1.0, 1.0]
    half = reference(style, start_percent=0.0, end_percent=(999 - 400) / 999)
    assert half.weight_of_rows(torch.tensor([401.0, 400.0, 399.0])).tolist() == [1.0, 1.0, 0.0]


def test_timesteps_beyond_ddpm_belong_to_the_ends_of_a_range(style):
    """Flow models begin at timestep 1000."""
    first, middle, last = (reference(style, start_percent=start, end_percent=end)
                           for start, end in ((0.0, 0.5), (0.1, 0.9), (0.5, 1.0)))
    timestep_B = torch.tensor([1000.0, -1.0])
    assert first.weight_of_rows(timestep_B).tolist() == [1.0, 0.0]
    assert middle.weight_of_rows(timestep_B).tolist() == [0.0, 0.0]
    assert last.weight_of_rows(timestep_B).tolist() == [0.0, 1.0]


def test_a_range_in_a_mixed_batch_leaves_the_other_rows_bit_identical_to_ella(connector, style, portrait):
    timestep_B = torch.tensor([999.0, 600.0, 550.0, 100.0])
    ella = connector.tokens(small_text(), timestep_B)
    ranged = reference(style, start_percent=0.3, end_percent=0.5)
    mixed = connector.tokens(small_text(), timestep_B, Assembly([ranged]))
    assert torch.equal(mixed[[0, 3]], ella[[0, 3]])
    everywhere = connector.tokens(small_text(), timestep_B, Assembly([reference(style)]))
    assert relative_error(mixed[1:3], everywhere[1:3]) <= 1e-5
    assert relative_error(mixed[1:3], ella[1:3]) > CLEARLY

    beside = connector.tokens(small_text(), timestep_B, Assembly([reference(portrait), ranged]))
    other_alone = connector.tokens(small_text(), timestep_B, Assembly([reference(portrait)]))
    assert torch.equal(beside[[0, 3]], other_alone[[0, 3]])


# --- training starts -----------------------------------------------------------------------------------------------

def test_a_new_module_learns_its_gates_first(connector):
    """At A = F = 0 only the global gates can get a gradient; after that, every weight must."""
    module = GatedResampler(small_config())
    fill_(module, seed=6)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith(("attn_gate", "ffn_gate")):
                weight.zero_()
    target = small_connector(seed=7).tokens(small_text(), 500)

    def gradients():
        module.zero_grad()
        found = connector.tokens(small_text(), 500, Assembly([reference(module)]))
        torch.nn.functional.mse_loss(found, target).backward()
        return {name: float(weight.grad.abs().max()) for name, weight in module.named_parameters()
                if weight.grad is not None}

    first = gradients()
    assert set(first) == set(dict(module.named_parameters()))
    for name, size in first.items():
        assert (size > 0) == name.endswith(("attn_gate", "ffn_gate")), name
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert all(size > 0 for size in gradients().values())
    assert all(weight.grad is None for weight in connector.parameters())


# --- refusals ------------------------------------------------------------------------------------------------------

def test_text_of_another_width_is_refused(connector):
    with pytest.raises(ConnectorMismatchError, match=r"shape \(1, 11, 20\).*wants \(prompts, tokens, 40\)"):
        connector.tokens(small_text()[..., :20], 500)


@pytest.mark.parametrize("changes", [{"width": 32}, {"layers": 4}, {"time_width": 64}])
def test_a_module_of_another_shape_is_refused(connector, changes):
    config = small_config(**changes)
    module = GatedResampler(config)
    with pytest.raises(ConnectorMismatchError, match=rf"width {config.width}, {config.layers} blocks and time width "
                                                     f"{config.time_width}; .* width 64, 3 blocks and time width 48"):
        connector.tokens(small_text(), 500, Assembly([reference(module)]))


def test_unequal_rows_are_refused(connector, style):
    with pytest.raises(ReferenceMismatchError, match=r"2 references for a batch of 3 rows; wanted 1 or 3"):
        connector.tokens(small_text(3), 500, Assembly([reference(style, rows=2)]))
    with pytest.raises(ReferenceMismatchError, match=r"2 timesteps for a batch of 3 rows"):
        connector.tokens(small_text(3), torch.tensor([1.0, 2.0]))
    with pytest.raises(ReferenceMismatchError, match=r"2 references for 3 frames; wanted 1 or 3"):
        tokens_over_schedule(connector, small_text(3), torch.tensor([1.0]), Assembly([reference(style, rows=2)]))


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.5)])
def test_an_impossible_range_is_refused(style, start, end):
    with pytest.raises(ReferenceMismatchError, match=rf"from {start} to {end} of the sampling"):
        reference(style, start_percent=start, end_percent=end)


def test_strengths_and_features_of_unequal_rows_are_refused(style):
    with pytest.raises(ReferenceMismatchError, match=r"3 strengths for 2 references"):
        reference(style, rows=2, strength=torch.ones(3))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")])])
def test_a_strength_that_is_not_a_number_is_refused(style, strength):
    with pytest.raises(ReferenceMismatchError, match=r"strength .* finite"):
        reference(style, strength=strength)


def test_features_of_other_names_sizes_or_values_are_refused(style, portrait):
    assert set(STYLE) != set(OBJECT)
    with pytest.raises(ReferenceMismatchError, match=r"holds the features global; the object module needs global, local"):
        Reference(portrait, small_features(style))
    wrong = {"global": torch.zeros(1, 1, 25)}
    with pytest.raises(ReferenceMismatchError, match=r"'global' has shape \(1, 1, 25\).*needs .*vectors, 24\)"):
        Reference(style, wrong)
    with pytest.raises(ReferenceMismatchError, match=r"shape \(0, 1, 24\)"):
        Reference(style, {"global": torch.zeros(0, 1, 24)})
    with pytest.raises(ReferenceMismatchError, match=r"NaN or infinite"):
        Reference(style, {"global": torch.full((1, 1, 24), float("nan"))})
    with pytest.raises(ReferenceMismatchError, match=r"unequal numbers of references"):
        Reference(portrait, {"global": torch.zeros(2, 1, 24), "local": torch.zeros(3, 5, 20)})
