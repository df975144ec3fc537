"""References added up in the predictions: what the host and the patches of other packs see of the evaluations."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from tiny_models import noise, side_by_side, wire
from token_check import check

STEPS = 4


@pytest.fixture(scope="module")
def predict(tiny, model, ella):
    """EMMA Connector that adds an assembly up in the predictions."""
    return lambda assembly, **appended: wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), assembly, "predictions",
                                             **appended)


@pytest.fixture
def added(predict, tiny):
    """Two references that act everywhere."""
    return predict(tiny.style_and_face())


@pytest.fixture
def sample(ksample):
    return lambda wired, **settings: ksample(wired.model, wired.positive, wired.negative, **settings)


def watched(wired, note, wrapper=comfy.patcher_extension.WrappersMP.CALC_COND_BATCH):
    """The MODEL with another pack's wrapper behind ours."""
    model = wired.model.clone()
    model.add_wrapper_with_key(wrapper, "another pack", note)
    return replace(wired, model=model)


def test_one_reference_gives_the_bits_of_the_sum_in_the_blocks(tiny, model, ella, sample, predict, module):
    assembly = tiny.assemble((module, tiny.reference(module), 0.7))
    blocks = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), assembly)
    assert torch.equal(sample(predict(assembly)), sample(blocks))


def test_two_references_give_another_picture_than_in_the_blocks(tiny, model, ella, sample, added):
    blocks = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), tiny.style_and_face())
    assert not torch.allclose(sample(added), sample(blocks), rtol=1e-2)


def test_a_reference_outside_of_its_range_costs_no_evaluation(spy, tiny, sample, predict):
    style, face = tiny.module(), tiny.module("face", seed=7)
    early = predict(tiny.assemble((style, tiny.reference(style)), (face, tiny.reference(face), 1.0, 0.0, 0.5)))
    sample(early, steps=6, scheduler="normal")
    check(spy.calls, early.answers)
    counts = {}
    for call in spy.calls:
        timestep = call.timestep_B[0].item()
        counts[timestep] = counts.get(timestep, 0) + 1
    assert set(counts.values()) == {1, 3}
    assert all((count == 3) == (timestep >= 999 / 2) for timestep, count in counts.items())


def test_behind_their_part_of_the_sampling_references_cost_one_evaluation(spy, tiny, model, ella, sample, pack_import):
    addition = pack_import("emma_core.model.addition").Addition("predictions", 0.3)
    connected = tiny.connecting.connect(model, ella, tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), None, None,
                                        addition)
    blocks = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), tiny.style_and_face())
    wired = wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), "predictions")
    sample(replace(wired, model=connected[0], positive=connected[1], negative=connected[2]), steps=6, scheduler="normal")
    early = [call for call in spy.calls if call.timestep_B[0].item() >= 0.7 * 999]
    late = [call for call in spy.calls if call.timestep_B[0].item() < 0.7 * 999]
    check(early, wired.answers)
    check(late, blocks.answers)
    assert len(early) == 3 * (6 - len(late)) and len(late) == 4


WAYS = {"blocks": ("blocks", 1.0), "tokens": ("tokens", 1.0), "predictions": ("predictions", 1.0),
        "early predictions": ("predictions", 0.2)}


@pytest.mark.parametrize("adding", [None, *WAYS])
def test_the_connector_node_adds_up_as_it_is_told(run_node, tiny, model, ella, ksample, pack_import, adding):
    """A prompt without the input, as programs wrote it before there was one, has the sum in the blocks."""
    inputs = {"model": model, "ella": ella, "positive": tiny.text(), "negative": tiny.text(1, seed=8),
              "assembly": tiny.style_and_face()}
    found = run_node("EMMAConnector", **inputs, **({"adding": adding} if adding else {}))
    addition = pack_import("emma_core.model.addition").Addition(*WAYS[adding or "blocks"])
    wanted = tiny.connecting.connect(model, ella, tiny.text(), tiny.text(1, seed=8), inputs["assembly"], None, None, addition)
    assert torch.equal(ksample(*found, steps=6, scheduler="normal"), ksample(*wanted, steps=6, scheduler="normal"))
    assert found[1][0][1]["model_conds"]["emma"].cond.assembly.addition == addition


def test_patches_see_an_ordinary_positive_in_every_call(spy, sample, added):
    """Many index a pair by `cond_or_uncond`: never more than two lists, and the positive is the first."""
    sample(added, steps=STEPS)
    assert [call.groups for call in spy.calls] == [(1, 0), (0,), (0,)] * STEPS


def test_regions_with_other_numbers_of_references(spy, run_node, tiny, model, ella, sample, added, added_literally, predict):
    """Two, none and three references side by side, the last with one that says what is drawn."""
    thing = tiny.module("object", {"global": (20, 1), "local": (12, 1)}, seed=6)
    three = predict(tiny.assemble((thing, tiny.reference(thing)), *(
        (module, tiny.reference(module, seed=seed)) for seed in (41, 42, 43) for module in (tiny.module(seed=seed),))))
    none = wire(tiny, model, ella, tiny.text(5, seed=21), tiny.text(1, seed=8))
    positive = [*side_by_side(run_node, added, three, 64), *none.positive]
    sample(replace(added, positive=positive))
    entries = [answer for wired in (added, three, none) for answer in wired.answers[0]]
    check(spy.calls, {0: entries, 1: added.answers[1]})
    assert len(spy.calls) >= 3 * 4


def test_a_wrong_sum_is_noticed(monkeypatch, pack_import, sample, added, added_literally):
    """The comparison that many tests here use."""
    monkeypatch.setattr(pack_import("host.seam"), "_added_up", lambda evaluate, evaluations: evaluate(evaluations[-1]))
    with pytest.raises(AssertionError, match="the predictions do not add up"):
        sample(added)


@pytest.mark.parametrize("after", [False, True])
def test_wrappers_of_other_packs_see_one_call_and_the_sum(sample, tiny, model, ella, added, after):
    """Whether they come before or after ours: step caches and windows count calls."""
    seen = []

    def note(executor, model, conds, *rest):
        answer = executor(model, conds, *rest)
        seen.append((len(conds), [one.clone() for one in answer]))
        return answer

    wired = watched(added, note)
    if not after:
        before = model.clone()
        before.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "another pack", note)
        wired = wire(tiny, before, ella, tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), "predictions")
    assert torch.equal(sample(wired, steps=STEPS), sample(added, steps=STEPS))
    assert [count for count, _ in seen] == [2] * STEPS


def test_every_evaluation_has_a_name_of_its_own_that_stays(sample, added):
    """Caches keep by these names what each entry predicted in the last step."""
    names = []

    def note(executor, *arguments, **options):
        names.append(tuple(arguments[-1]["uuids"]))
        return executor(*arguments, **options)

    sample(watched(added, note, comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL), steps=STEPS)
    step, again = names[:3], names[3:6]
    assert step == again and len(names) == 3 * STEPS
    assert len({name for call in step for name in call}) == 4


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_skipped_step_of_easycache_skips_every_evaluation(spy, run_node, sample, tiny, model, ella, added, place):
    settings = {"reuse_threshold": 0.9, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    if place == "before":
        cached = wire(tiny, run_node("EasyCache", model=model, **settings)[0], ella, tiny.text(), tiny.text(1, seed=8),
                      tiny.style_and_face(), "predictions")
    else:
        cached = replace(added, model=run_node("EasyCache", model=added.model, **settings)[0])
    sample(cached, steps=12, sampler_name="euler", scheduler="normal", latent={"samples": torch.zeros(1, 4, 16, 16)})
    counts = {}
    for call in spy.calls:
        timestep = call.timestep_B[0].item()
        counts[timestep] = counts.get(timestep, 0) + 1
    assert set(counts.values()) == {3} and 2 <= len(counts) < 12


def test_an_interrupt_stops_between_the_evaluations(spy, sample, added):
    def interrupt(executor, *arguments, **options):
        answer = executor(*arguments, **options)
        comfy.model_management.interrupt_current_processing()
        return answer

    wired = watched(added, interrupt, comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL)
    sample(added)  # so that all tokens are known
    before = len(spy.calls)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(wired)
    assert len(spy.calls) == before + 1


def test_the_host_estimates_memory_for_each_evaluation_as_for_any_other(monkeypatch, model, sample, added):
    shapes, original = [], model.model.memory_required
    monkeypatch.setattr(model.model, "memory_required", lambda shape, **options: (
        shapes.append(tuple(shape)), original(shape, **options))[1])
    sample(added, steps=STEPS)
    during = [shape for shape in shapes if shape[1:] == (4, 8, 8)]
    assert during.count((1, 4, 8, 8)) >= 2 * STEPS and max(shape[0] for shape in during) == 2


def test_a_negative_with_references_is_added_up_in_the_same_calls(spy, tiny, sample, added, predict, added_literally):
    """Both outputs of two connectors: whoever wires this has the same few calls."""
    other = predict(tiny.style_and_face(seed=15))
    sample(replace(added, negative=other.positive), steps=STEPS)
    assert [call.groups for call in spy.calls] == [(1, 0)] * 3 * STEPS
    check(spy.calls, {0: added.answers[0], 1: other.answers[0]})


def test_masked_pictures_are_added_up_too(spy, sample, added, added_literally):
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    sample(added, latent={"samples": noise((1, 4, 8, 8), 12), "noise_mask": mask}, sampler_name="heun")
    check(spy.calls, added.answers)
