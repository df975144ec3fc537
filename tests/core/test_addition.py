"""Where references are added up: in the blocks, in the tokens, or in what the diffusion model predicts."""

import pytest
import torch
from reference_answers import relative_error
from small_models import OBJECT, small_connector, small_features, small_module, small_text

from emma_core import Assembly, Reference
from emma_core.base.pipeline import Pipeline, Request, Sampling, generate
from emma_core.base.schedule import Ddim
from emma_core.base.spec import SD15
from emma_core.errors import ModuleFileError, ReferenceMismatchError
from emma_core.model.addition import BLOCKS, PREDICTIONS, TOKENS, WAYS, Addition, joined
from emma_core.model.assembly import terms_over_schedule, token_terms
from emma_core.model.strength_keyframes import StrengthKeyframe, StrengthKeyframes

EXACT = 1e-9  # relative; in float64, sums in another order and passes of another size
CLEARLY = 1e-2  # relative; the least that a difference on purpose makes here


@pytest.fixture(scope="module")
def connector():
    return small_connector().double()


@pytest.fixture(scope="module")
def style():
    return small_module("style", seed=2, gate_scale=0.7).double()


@pytest.fixture(scope="module")
def face():
    return small_module("face", seed=5).double()


@pytest.fixture(scope="module")
def thing():
    return small_module("object", seed=6, features=OBJECT).double()


def reference(module, rows=1, seed=4, **changes):
    return Reference(module, small_features(module, rows, seed=seed), **changes)


def assembly(way, *references, until=1.0, then=BLOCKS):
    return Assembly(references, Addition(way, until, then))


def predicted(tokens_BKW):
    """A diffusion model: any function of the tokens that is not linear."""
    return torch.tanh(tokens_BKW).mean(1) + torch.sin(tokens_BKW).mean(1) ** 2


def prediction(connector, assembly, text=None, timestep=500.0):
    """What the assembly predicts, (B, W)."""
    terms = token_terms(connector, small_text() if text is None else text, timestep, assembly)
    return terms.added(predicted(terms.stacked))


def evaluations(connector, assembly, timestep=500.0):
    return len(token_terms(connector, small_text(), timestep, assembly).rows)


# --- what is added up ----------------------------------------------------------------------------------------------

def test_predictions_are_the_texts_plus_what_each_module_alone_changes(connector, style, face):
    references = [reference(style, strength=0.5), reference(face, strength=1.5), reference(style, seed=9)]
    text, *alone = (prediction(connector, Assembly(one)) for one in ([], *([one] for one in references)))
    found = prediction(connector, assembly(PREDICTIONS, *references))
    assert relative_error(found, text + sum(one - text for one in alone)) <= EXACT
    assert relative_error(found, prediction(connector, Assembly(references))) > CLEARLY


def test_tokens_are_the_texts_plus_what_each_module_alone_changes(connector, style, face):
    references = [reference(style, strength=0.5), reference(face, strength=1.5), reference(style, seed=9)]
    text, *alone = (connector.tokens(small_text(), 500, Assembly(one)) for one in ([], *([one] for one in references)))
    found = connector.tokens(small_text(), 500, assembly(TOKENS, *references))
    assert relative_error(found, text + sum(one - text for one in alone)) <= EXACT
    assert relative_error(found, connector.tokens(small_text(), 500, Assembly(references))) > CLEARLY


@pytest.mark.parametrize("way", [TOKENS, PREDICTIONS])
def test_a_module_that_says_what_is_drawn_belongs_to_what_differences_are_taken_against(connector, style, face, thing, way):
    what, *how = references = reference(thing), reference(style), reference(face)
    answer = {TOKENS: lambda added: connector.tokens(small_text(), 500, added),
              PREDICTIONS: lambda added: prediction(connector, added)}[way]
    base, *alone = answer(Assembly([what])), *(answer(Assembly([what, one])) for one in how)
    found = answer(assembly(way, *references))
    assert relative_error(found, base + sum(one - base for one in alone)) <= EXACT
    text = answer(Assembly())
    against_text = text + sum(answer(Assembly([one])) - text for one in references)
    assert relative_error(found, against_text) > CLEARLY


def test_what_a_module_says_is_declared_and_else_follows_from_its_condition(style, thing):
    portrait, other = small_module("portrait"), small_module("pose")
    said = {module.config.condition: module.config.draws_subject for module in (style, thing, portrait, other)}
    assert said == {"style": False, "object": True, "portrait": True, "pose": False}
    assert style.config.replace(draws="subject").draws_subject
    assert not thing.config.replace(draws="manner").draws_subject
    with pytest.raises(ModuleFileError, match=r"draws 'both'; wanted 'subject' .* or 'manner'"):
        style.config.replace(draws="both")


@pytest.mark.parametrize("way", [TOKENS, PREDICTIONS])
def test_two_subjects_and_one_manner_are_summed_in_the_blocks_bit_for_bit(connector, style, thing, way):
    references = [reference(thing), reference(thing, seed=8), reference(style)]
    found = connector.tokens(small_text(), 500, assembly(way, *references))
    assert torch.equal(found, connector.tokens(small_text(), 500, Assembly(references)))


# --- identities ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", [TOKENS, PREDICTIONS])
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_references_are_the_same_in_every_way_bit_for_bit(connector, style, way, count):
    references = [reference(style, strength=0.8)][:count]
    wanted = connector.tokens(small_text(), 500, Assembly(references))
    assert torch.equal(connector.tokens(small_text(), 500, assembly(way, *references)), wanted)
    assert evaluations(connector, assembly(way, *references)) == 1


@pytest.mark.parametrize("way", [TOKENS, PREDICTIONS])
def test_strength_zero_is_absence_bit_for_bit(connector, style, face, way):
    heard, other = reference(style, strength=0.8), reference(face)
    silent = reference(face, seed=8, strength=0.0)
    for present in ([heard], [heard, other]):
        for references in ([silent, *present], [*present, silent]):
            found, wanted = assembly(way, *references), assembly(way, *present)
            assert torch.equal(prediction(connector, found), prediction(connector, wanted))
            assert evaluations(connector, found) == evaluations(connector, wanted)


@pytest.mark.parametrize("way", WAYS)
def test_order_does_not_matter(connector, style, face, thing, way):
    references = [reference(style), reference(face, strength=0.7), reference(thing), reference(style, seed=8, strength=0.2)]
    forth = prediction(connector, assembly(way, *references))
    back = prediction(connector, assembly(way, *reversed(references)))
    assert relative_error(back, forth) <= EXACT


def test_an_assembly_adds_up_in_the_blocks_unless_it_is_told_otherwise(connector, style, face):
    references = [reference(style), reference(face)]
    assert Assembly(references).addition == Addition(BLOCKS)
    assert torch.equal(prediction(connector, Assembly(references)), prediction(connector, assembly(BLOCKS, *references)))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_made_of_an_assembly_is_added_up_as_it_is(style, way):
    made = assembly(way, until=0.25, then=TOKENS).with_reference(reference(style))
    assert {one.addition for one in (made, made.of_row(0), made.on_schedule([999.0]))} == {Addition(way, 0.25, TOKENS)}


# --- rows, ranges, keyframes, frames -------------------------------------------------------------------------------

@pytest.mark.parametrize("then", WAYS)
@pytest.mark.parametrize("way", WAYS)
def test_rows_with_strengths_ranges_keyframes_and_frames_of_their_own_equal_rows_alone(connector, style, face, way, then):
    text_BND, timestep_B = small_text(5), torch.tensor([900.0, 700.0, 500.0, 300.0, 100.0])
    ranged = reference(face, start_percent=0.2, end_percent=0.8)
    keyed = reference(style, seed=8, keyframes=StrengthKeyframes([StrengthKeyframe(0.0, 0.0), StrengthKeyframe(0.6, 1.3)]))
    frames = reference(face, rows=5, seed=9, strength=torch.tensor([1.0, 0.0, 0.4, 1.0, -0.5]))
    together = assembly(way, ranged, keyed, frames, until=0.6, then=then)
    found = prediction(connector, together, text_BND, timestep_B)
    for row in range(5):
        alone = prediction(connector, together.of_row(row), text_BND[row:row + 1], timestep_B[row])
        assert relative_error(found[row:row + 1], alone) <= EXACT


def test_a_reference_costs_an_evaluation_only_where_it_acts(connector, style, face):
    early = reference(face, seed=8, end_percent=0.5)
    late = reference(style, seed=9, keyframes=StrengthKeyframes([StrengthKeyframe(0.0, 0.0), StrengthKeyframe(0.8, 1.0)]))
    together = assembly(PREDICTIONS, reference(style), early, late)
    counts = {timestep: evaluations(connector, together, timestep) for timestep in (999.0, 600.0, 400.0, 100.0)}
    assert counts == {999.0: 3, 600.0: 3, 400.0: 1, 100.0: 3}
    for timestep, acting in ((600.0, [reference(style), early]), (400.0, [reference(style)])):
        wanted = prediction(connector, assembly(PREDICTIONS, *acting), timestep=timestep)
        assert torch.equal(prediction(connector, together, timestep=timestep), wanted)


def test_rows_that_have_one_reference_each_cost_no_evaluation_more(connector, style, face):
    first = reference(style, strength=torch.tensor([1.0, 0.0, 1.0]))
    second = reference(face, strength=torch.tensor([0.0, 1.0, 0.5]))
    together = assembly(PREDICTIONS, first, second)
    terms = token_terms(connector, small_text(), 500, together)
    assert terms.rows.tolist() == [0, 1, 2, 2, 2]
    blocks = connector.tokens(small_text(), 500, Assembly([first, second]))
    assert relative_error(terms.tokens_BKW[:2], blocks[:2]) <= EXACT


@pytest.mark.parametrize(("way", "then"), [(way, then) for way in WAYS for then in WAYS if way != then])
def test_behind_its_part_of_the_sampling_another_way_follows(connector, style, face, way, then):
    references = [reference(style), reference(face)]
    timestep_B = torch.tensor([999.0, 700.0, 699.0, 0.0])
    found = prediction(connector, assembly(way, *references, until=(999 - 700) / 999, then=then), timestep=timestep_B)
    elsewhere = prediction(connector, assembly(then, *references), timestep=timestep_B)
    everywhere = prediction(connector, assembly(way, *references), timestep=timestep_B)
    assert relative_error(found[:2], everywhere[:2]) <= EXACT
    assert relative_error(found[2:], elsewhere[2:]) <= EXACT
    assert min(relative_error(everywhere[row], elsewhere[row]) for row in range(4)) > CLEARLY


def test_a_schedule_holds_what_each_timestep_has_alone(connector, style, face):
    timestep_T = torch.tensor([999.0, 600.0, 300.0])
    early = reference(face, end_percent=0.5, strength=torch.tensor([0.0, 1.0]))
    together = assembly(PREDICTIONS, reference(style, rows=2), early)
    over = terms_over_schedule(connector, small_text(2), timestep_T, together)
    assert [terms.rows.tolist() for terms in over] == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1]]
    for timestep, terms in zip(timestep_T, over, strict=True):
        wanted = token_terms(connector, small_text(2), timestep, together)
        assert torch.equal(terms.rows, wanted.rows)
        assert relative_error(terms.stacked, wanted.stacked) <= EXACT


def test_joined_terms_predict_what_each_predicts(connector, style, face):
    each = [token_terms(connector, small_text(2), 500, one) for one in (
        assembly(PREDICTIONS, reference(style), reference(face)), Assembly(),
        assembly(PREDICTIONS, reference(style), reference(face), reference(face, seed=9)))]
    together = joined(each)
    wanted = torch.cat([terms.added(predicted(terms.stacked)) for terms in each])
    assert torch.equal(together.added(predicted(together.stacked)), wanted)
    assert len(together.rows) == 2 * (3 + 1 + 4)


# --- pictures ------------------------------------------------------------------------------------------------------

class Model:
    """A diffusion model that counts what it is asked."""

    def __init__(self):
        self.rows: list[int] = []

    def predict_noise(self, latent_B4hw, timestep_B, context_BKW):
        self.rows.append(len(latent_B4hw))
        wanted_B4 = torch.tanh(context_BKW).mean(1)[:, :4] * (1 + timestep_B[:, None] / 1000)
        return 0.9 * torch.tanh(latent_B4hw) + wanted_B4[..., None, None]


def drawn(connector, assembly, at_once=16, prompts=("one",)):
    model = Model()
    pipeline = Pipeline(lambda prompts: [small_text(seed=len(prompt)) for prompt in prompts], connector, model.predict_noise,
                        lambda latent_B4hw: torch.tanh(latent_B4hw[:, :3]), SD15)
    requests = [Request(prompt, assembly, seed=number) for number, prompt in enumerate(prompts)]
    return generate(pipeline, requests, Sampling(steps=4, width_px=32, height_px=32), at_once), model.rows


@pytest.mark.parametrize(("way", "until", "rows"), [
    (BLOCKS, 1.0, 2 * 4), (TOKENS, 1.0, 2 * 4), (PREDICTIONS, 1.0, 4 * 4), (PREDICTIONS, 0.6, 4 * 2 + 2 * 2)])
def test_pictures_take_as_many_evaluations_as_the_way_says(connector, style, face, way, until, rows):
    picture, counted = drawn(connector, assembly(way, reference(style), reference(face), until=until))
    assert sum(counted) == rows
    sum_in_the_blocks, _ = drawn(connector, Assembly([reference(style), reference(face)]))
    assert torch.equal(picture, sum_in_the_blocks) == (way == BLOCKS)


def test_pictures_with_one_reference_are_the_same_in_every_way_bit_for_bit(connector, style):
    pictures = [drawn(connector, assembly(way, reference(style)))[0] for way in WAYS]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_a_picture_added_up_in_predictions_follows_their_sum_at_every_step(connector, style, face):
    """The sampler's loop written down with e = e_T + sum_m (e_Tm - e_T)."""
    references, model = [reference(style), reference(face, strength=0.6)], Model()
    scheduler = Ddim(SD15.alphas_cumprod_T, SD15.prediction, 4)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    latent = scheduler.begin(noise)
    for timestep in scheduler.timesteps:
        def predict(prompt, *assembled, timestep=timestep, latent=latent):
            context = connector.tokens(small_text(seed=len(prompt)), timestep, Assembly(assembled))
            return model.predict_noise(latent, timestep[None], context)

        text, without = predict("one"), predict("")
        added = text + sum(predict("one", one) - text for one in references)
        latent = scheduler.step(without + 4.0 * (added - without), int(timestep), latent)
    wanted = ((torch.tanh(latent[:, :3]) + 1) / 2).permute(0, 2, 3, 1)
    found, _ = drawn(connector, assembly(PREDICTIONS, *references))
    assert relative_error(found, wanted) <= 1e-4


def test_no_more_rows_are_evaluated_at_once_than_without_references(connector, style, face):
    _, counted = drawn(connector, assembly(PREDICTIONS, reference(style), reference(face)), prompts=("one", "three", "four"))
    assert max(counted) == 6
    assert sum(counted) == 4 * 3 * 4


def test_gradients_reach_every_module_through_the_added_predictions(connector, style):
    modules = [small_module(condition).double().requires_grad_() for condition in ("style", "face")]
    prediction(connector, assembly(PREDICTIONS, *(reference(module) for module in modules))).sum().backward()
    for module in modules:
        assert all(float(weight.grad.abs().max()) > 0 for weight in module.parameters())


# --- refusals ------------------------------------------------------------------------------------------------------

def test_unknown_ways_and_parts_are_refused():
    with pytest.raises(ReferenceMismatchError, match=r"in 'weights'; choose one of blocks, tokens, predictions"):
        Addition("weights")
    with pytest.raises(ReferenceMismatchError, match=r"in 'nowhere'; choose one of blocks"):
        Addition(PREDICTIONS, 0.5, "nowhere")
    with pytest.raises(ReferenceMismatchError, match=r"predictions until 1.2 of the sampling; wanted 0 to 1"):
        Addition(PREDICTIONS, 1.2)


def test_single_tokens_are_refused_where_predictions_are_added_up(connector, style, face):
    together = assembly(PREDICTIONS, reference(style), reference(face))
    with pytest.raises(ReferenceMismatchError, match=r"no single tokens say it all. Use `token_terms`"):
        connector.tokens(small_text(), 500, together)
