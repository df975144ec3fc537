"""The gate map shows g(L0) * A as the paper defines it, one panel per module."""

from __future__ import annotations

import pytest
import torch
from tiny_models import LATENTS, SIZES

TIMESTEP = 640


@pytest.fixture(scope="module")
def modules(tiny):
    return tiny.module(), tiny.module("object", {"global": (20, 1), "local": (12, 1)}, seed=7)


@pytest.fixture(scope="module")
def gate_values(pack_import):
    return pack_import("emma_core.drawing.gate_map").gate_values


@pytest.fixture
def draw(run_node, ella, tiny):
    """EMMA Gate Map."""
    return lambda assembly, timestep=TIMESTEP, text=None: run_node(
        "EMMAGateMap", ella=ella, assembly=assembly, conditioning=text or tiny.text(), timestep=timestep)[0]


def literal_values(connector, references, text_1ND) -> list[torch.Tensor]:
    """Blocks one after another, eqs. (7) and (8) written out; (I, K) of Linear(L0) * A for each reference."""
    temb_1E = connector.activated_time_embedding(torch.tensor([float(TIMESTEP)]))
    text_1NW = connector.project_text(text_1ND)
    latents_1KW = connector.start(text_1NW, temb_1E)
    values = [torch.zeros(SIZES["layers"], LATENTS) for _ in references]
    for index in range(SIZES["layers"]):
        entry_1KW = connector.block(index, latents_1KW, text_1NW, temb_1E)
        attended_1KW = entry_1KW.clone()
        for number, reference in enumerate(references):
            block = reference.module.blocks[index]
            gate_1K1 = entry_1KW @ block.gate.weight.T + block.gate.bias
            values[number][index] = (gate_1K1 * block.attn_gate)[0, :, 0]
            context_1CW = reference.module.context(reference.features, text_1NW)
            weight = reference.strength * reference.module.config.gate_scale * gate_1K1
            attended_1KW += weight * block.attn_gate * block.attention(entry_1KW, context_1CW, temb_1E)
        latents_1KW = attended_1KW.clone()
        for reference in references:
            block = reference.module.blocks[index]
            gate_1K1 = entry_1KW @ block.gate.weight.T + block.gate.bias
            weight = reference.strength * reference.module.config.gate_scale * gate_1K1
            latents_1KW += weight * block.ffn_gate * block.feed_forward(attended_1KW, temb_1E)
    return values


def test_values_equal_a_literal_computation(tiny, ella, modules, gate_values):
    assembly = tiny.assemble(*((module, tiny.reference(module), 0.9) for module in modules))
    text_1ND = tiny.text()[0][0]
    with torch.inference_mode():
        found = gate_values(ella.connector, text_1ND, TIMESTEP, tiny.assembly_class(assembly.references))
        wanted = literal_values(ella.connector, assembly.references, text_1ND)
    assert len(found) == 2
    for found_IK, wanted_IK in zip(found, wanted, strict=True):
        torch.testing.assert_close(found_IK, wanted_IK, rtol=1e-4, atol=1e-5)
        assert wanted_IK.std() > 0.01
    assert not torch.allclose(found[0], found[1], rtol=0.1), "modules act in different places"


def test_two_references_of_one_module_have_maps_of_their_own(tiny, ella, modules, gate_values):
    module = modules[0]
    assembly = tiny.assemble((module, tiny.reference(module, seed=91)), (module, tiny.reference(module, seed=92), 0.4))
    text_1ND = tiny.text()[0][0]
    with torch.inference_mode():
        found = gate_values(ella.connector, text_1ND, TIMESTEP, tiny.assembly_class(assembly.references))
        wanted = literal_values(ella.connector, assembly.references, text_1ND)
    for found_IK, wanted_IK in zip(found, wanted, strict=True):
        torch.testing.assert_close(found_IK, wanted_IK, rtol=1e-4, atol=1e-5)


def test_module_that_does_not_act_is_zero(tiny, ella, modules, gate_values):
    members = [(modules[0], tiny.reference(modules[0]), 0.0), (modules[1], tiny.reference(modules[1]), 1.0, 0.8, 1.0)]
    assembly = tiny.assembly_class(tiny.assemble(*members).references)
    silent, late = gate_values(ella.connector, tiny.text()[0][0], TIMESTEP, assembly)
    assert not silent.any() and not late.any()
    assert gate_values(ella.connector, tiny.text()[0][0], 50, assembly)[1].any()


def test_without_separable_gates_the_map_is_the_global_gate(tiny, ella, gate_values):
    module = tiny.module(separable_gates=False)
    assembly = tiny.assembly_class(tiny.assemble((module, tiny.reference(module))).references)
    (found_IK,) = gate_values(ella.connector, tiny.text()[0][0], TIMESTEP, assembly)
    for index, block in enumerate(module.module.blocks):
        assert torch.equal(found_IK[index], block.attn_gate.expand(LATENTS))


def test_picture_is_an_image_with_a_panel_per_module(tiny, modules, draw):
    one = draw(tiny.assemble((modules[0], tiny.reference(modules[0]))))
    two = draw(tiny.assemble(*((module, tiny.reference(module)) for module in modules)))
    three = draw(tiny.assemble(*((module, tiny.reference(module)) for module in (*modules, modules[0]))))
    for image in (one, two, three):
        assert image.ndim == 4 and image.shape[0] == 1 and image.shape[-1] == 3
        assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    panel = two.shape[1] - one.shape[1]
    assert panel > 80 and three.shape[1] - two.shape[1] == panel


def test_colours_show_sign_and_zero(tiny, ella, modules, draw, gate_values, pack_import):
    """Red is positive, blue negative, white nothing: as many pixels as there are cells of that sign."""
    layout = pack_import("emma_core.drawing.gate_map")
    assembly = tiny.assemble((modules[0], tiny.reference(modules[0])))
    (values_IK,) = gate_values(ella.connector, tiny.text()[0][0], TIMESTEP, tiny.assembly_class(assembly.references))
    share_IK = values_IK / values_IK.abs().max()
    cell_px = 320 // LATENTS * layout._CELL_HEIGHT

    def pixels(image_1HW3):
        map_HW3 = image_1HW3[0, :, : -(layout._BAR_GAP + layout._BAR_WIDTH + layout._BAR_LABELS)]
        redness_HW = (map_HW3[..., 0] - map_HW3[..., 2]) * 255
        return int((redness_HW > 1.5).sum()), int((redness_HW < -1.5).sum())

    # 135 and 139 levels of red and blue at the extremes
    red, blue = int(((share_IK * 135).round() > 1.5).sum()), int(((share_IK * 139).round() < -1.5).sum())
    assert red > 3 and blue > 3
    assert pixels(draw(assembly)) == pytest.approx((red * cell_px, blue * cell_px), rel=0.02)
    assert pixels(draw(tiny.assemble((modules[0], tiny.reference(modules[0]), 0.0)))) == (0, 0)


def test_map_depends_on_timestep_and_prompt(tiny, modules, draw):
    assembly = tiny.assemble((modules[0], tiny.reference(modules[0])))
    first = draw(assembly)
    assert torch.equal(first, draw(assembly))
    assert not torch.equal(first, draw(assembly, 100))
    assert not torch.equal(first, draw(assembly, text=tiny.text(seed=93)))


def test_per_frame_references_are_refused(tiny, modules, draw, pack_import):
    frames = tiny.assemble((modules[0], tiny.reference(modules[0], references=3)))
    error = pack_import("emma_core.errors").ReferenceMismatchError
    with pytest.raises(error, match="Encode a single picture, or combine them"):
        draw(frames)
