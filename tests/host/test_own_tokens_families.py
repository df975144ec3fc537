"""Modules on a model's own tokens: what enters the text input of every family is the equations' answer at its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_families import FAMILIES
from text_input import LiteralAnswer, TextEntry, TextSpy, check_text, judge_text
from token_check import same

SAMPLERS = (("euler", "normal"), ("heun", "simple"), ("dpmpp_2m", "karras"), ("dpmpp_sde", "simple"), ("uni_pc", "normal"))
SETTINGS = {"steps": 3, "cfg": 4.0}


@dataclass(frozen=True)
class Connected:
    """One family's small model, connected, and how it samples without us."""

    family: Any
    model: Any
    positive: list
    negative: list
    connected: Any
    with_references: list
    answer: LiteralAnswer
    plain_calls: list
    plain: dict[int, torch.Tensor]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def wired(request, tiny, ksample, pack_import):
    family = FAMILIES[request.param]
    model = family.patcher(tiny.patcher_for)
    positive, negative = family.conditioning(4), family.conditioning(8)
    style = tiny.token_module(family)
    subject = tiny.token_module(family, "object", {"global": (20, 1), "local": (12, 1)}, seed=7, width=24, layers=3)
    assembly = tiny.assemble((style, tiny.reference(style), 0.8), (subject, tiny.reference(subject), 1.2, 0.1, 0.7))
    connected = tiny.connecting.connect(model, None, positive, negative, assembly, None, None)
    with TextSpy(model.model.diffusion_model) as spy:
        ksample(model, positive, negative, family.latent(), sampler_name="euler", scheduler="simple", **SETTINGS)
    weights_of = pack_import("emma_core.files.module_file").module_tensors
    answer = LiteralAnswer(assembly.references, model.get_model_object("model_sampling"), family.time, weights_of)
    return Connected(family, model, positive, negative, connected[0], connected[1], answer, spy.calls,
                     {group: spy.calls[0].of_group(group) for group in (0, 1)})


def kept_of(wired) -> torch.Tensor | None:
    """By the masks and rows of zeros of the small models' conditioning."""
    mask = wired.family.options.get("attention_mask")
    return mask[0].bool() if mask is not None else wired.plain[0].ne(0).any(-1)


@pytest.mark.parametrize(("sampler", "scheduler"), SAMPLERS)
def test_the_text_input_gets_the_equations_answer_at_every_evaluation(wired, ksample, count_timesteps, sampler, scheduler):
    with TextSpy(wired.model.model.diffusion_model) as spy:
        samples = ksample(wired.connected, wired.with_references, wired.negative, wired.family.latent(), sampler_name=sampler,
                          scheduler=scheduler, **SETTINGS)
    entries = {0: [TextEntry(wired.plain[0][None], wired.answer, kept_of(wired))], 1: [TextEntry(wired.plain[1][None])]}
    count_timesteps(f"own tokens, {wired.family.host_class}", judge_text(spy.calls, entries))
    verdict = check_text(spy.calls, entries)
    assert verdict.total >= 3 and len(set(verdict.timesteps)) >= 2
    assert torch.isfinite(samples).all()


def test_neighbouring_times_have_different_tokens(wired):
    """Otherwise a wrong time would pass."""
    for sigma, timestep in ((0.5, 500.0), (0.05, 50.0)):
        answers = [wired.answer.at(wired.plain[0], sigma + shift / 1000, timestep + shift, kept_of(wired)) for shift in (0, 1)]
        assert not same(*answers)


def test_padding_is_as_it_was(wired, ksample):
    with TextSpy(wired.model.model.diffusion_model) as spy:
        ksample(wired.connected, wired.with_references, wired.negative, wired.family.latent(), **SETTINGS)
    kept_S = kept_of(wired)
    for call in spy.calls:
        assert torch.equal(call.of_group(0)[~kept_S], wired.plain[0][~kept_S])
        assert not torch.equal(call.of_group(0)[kept_S], wired.plain[0][kept_S])
    assert kept_S.all() == (wired.family.name not in ("z-image", "qwen-image", "anima", "wan"))


def test_all_else_that_the_model_is_told_stays(wired, ksample):
    """Pooled vectors and size ids, guidance, masks, counts of tokens."""
    with TextSpy(wired.model.model.diffusion_model) as spy:
        ksample(wired.connected, wired.with_references, wired.negative, wired.family.latent(), sampler_name="euler",
                scheduler="simple", **SETTINGS)
    assert len(spy.calls) == len(wired.plain_calls)
    for found, wanted in zip(spy.calls, wired.plain_calls, strict=True):
        assert found.groups == wanted.groups and set(found.others) == set(wanted.others)
        for name, value in wanted.others.items():
            equal = torch.equal(value, found.others[name]) if isinstance(value, torch.Tensor) else value == found.others[name]
            assert equal, name
    if wired.family.name in ("sdxl", "sd3", "flux"):
        assert "y" in spy.calls[0].others


def test_a_zero_module_is_the_model_bit_for_bit(wired, tiny, ksample):
    silent = tiny.token_module(wired.family)
    for name, weight in silent.module.named_parameters():
        if name.endswith(("attn_gate", "ffn_gate")):
            weight.zero_()
    assembly = tiny.assemble((silent, tiny.reference(silent)))
    connected = tiny.connecting.connect(wired.model, None, wired.positive, wired.negative, assembly, None, None)
    settings = {**SETTINGS, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    found = ksample(*connected, wired.family.latent(), **settings)
    assert torch.equal(found, ksample(wired.model, wired.positive, wired.negative, wired.family.latent(), **settings))
    loud = ksample(wired.connected, wired.with_references, wired.negative, wired.family.latent(), **settings)
    assert not torch.equal(found, loud)


def test_a_second_run_gives_the_same_bits_and_the_model_stays(wired, ksample):
    before = {name: value.clone() for name, value in wired.model.model_state_dict().items()}
    runs = [ksample(wired.connected, wired.with_references, wired.negative, wired.family.latent(), **SETTINGS)
            for _ in range(2)]
    assert torch.equal(*runs)
    assert all(torch.equal(value, before[name]) for name, value in wired.model.model_state_dict().items())
