"""At every model evaluation of every sampler, the UNet gets the connector's tokens of the timestep it sees."""

from __future__ import annotations

import re

import comfy.samplers
import pytest
import torch
from tiny_models import empty_latent, noise, wire
from token_check import check, judge, same

pytestmark = pytest.mark.usefixtures("added_literally")

SCHEDULERS = ("normal", "karras", "exponential", "sgm_uniform")
STEPS = 3
_VARIANT = re.compile(r"_(gpu|cfg_pp|ancestral|pece|bh2|v|x0)\b|_(gpu|cfg_pp|ancestral|pece|bh2|v|x0)(?=_)")


def family_of(sampler: str) -> str:
    """dpmpp_2m_sde_gpu -> dpmpp_2m_sde."""
    return _VARIANT.sub("", sampler)


@pytest.fixture(scope="module")
def wired(tiny, model, way):
    """Three modules assembled, one of them for a part of the sampling only; the negative is shorter than the positive."""
    style, face = tiny.module(), tiny.module("face", seed=7)
    thing = tiny.module("object", {"global": (20, 1), "local": (12, 1)}, seed=6)
    assembly = tiny.assemble((style, tiny.reference(style), 0.8), (face, tiny.reference(face), 1.2, 0.1, 0.9),
                             (thing, tiny.reference(thing)))
    return wire(tiny, model, tiny.ella(), tiny.text(), tiny.text(1, seed=8), assembly, way)


@pytest.fixture
def sample(ksample, wired):
    """KSampler on what the connector gave."""
    return lambda **settings: ksample(wired.model, wired.positive, wired.negative, **settings)


@pytest.fixture
def sample_custom(run_node):
    """SamplerCustomAdvanced with a guider."""

    def run(guider, sigmas, sampler="dpmpp_2m"):
        return run_node("SamplerCustomAdvanced", noise=run_node("RandomNoise", noise_seed=11)[0], guider=guider,
                        sampler=run_node("KSamplerSelect", sampler_name=sampler)[0], sigmas=sigmas,
                        latent_image=empty_latent())[0]["samples"]

    return run


@pytest.fixture
def karras(run_node, wired):
    return run_node("BasicScheduler", model=wired.model, scheduler="karras", steps=STEPS, denoise=1.0)[0]


def test_neighbouring_timesteps_have_different_tokens(wired):
    """Otherwise a wrong timestep would pass the checks below."""
    for answer in (*wired.answers[0], *wired.answers[1]):
        for timestep in range(0, 999, 37):
            assert not same(answer.at(float(timestep)), answer.at(float(timestep + 1)))


@pytest.mark.parametrize(("way", "scheduler"), [*(("blocks", name) for name in SCHEDULERS), ("predictions", "karras")],
                         indirect=["way"])
@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_sampler_gets_tokens_of_its_timesteps(spy, sample, wired, count_timesteps, sampler, scheduler):
    samples = sample(sampler_name=sampler, scheduler=scheduler, steps=STEPS)
    count_timesteps(family_of(sampler), judge(spy.calls, wired.answers))
    verdict = check(spy.calls, wired.answers)
    assert verdict.total >= STEPS - 1 and len(set(verdict.timesteps)) >= 2
    assert torch.isfinite(samples).all()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "dpm_adaptive"])
def test_image_to_image(spy, sample, wired, count_timesteps, sampler):
    sample(sampler_name=sampler, steps=4, denoise=0.5, latent={"samples": noise((1, 4, 8, 8), 12)})
    verdict = check(spy.calls, wired.answers)
    count_timesteps("image to image", verdict)
    assert max(verdict.timesteps) < 900


def test_inpainting(spy, sample, wired, count_timesteps):
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    sample(sampler_name="heun", latent={"samples": noise((1, 4, 8, 8), 12), "noise_mask": mask})
    count_timesteps("inpainting", check(spy.calls, wired.answers))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_sde"])
def test_split_ksampler_advanced(spy, run_node, wired, count_timesteps, sampler):
    def part(latent, start, end):
        return run_node("KSamplerAdvanced", model=wired.model, positive=wired.positive, negative=wired.negative, cfg=7.0,
                        add_noise="enable" if start == 0 else "disable", noise_seed=11, steps=5, sampler_name=sampler,
                        scheduler="karras", start_at_step=start, end_at_step=end, latent_image=latent,
                        return_with_leftover_noise="enable" if end < 5 else "disable")[0]

    first = part(empty_latent(), 0, 2)
    split = len(spy.calls)
    part(first, 2, 10000)
    verdict = check(spy.calls, wired.answers)
    count_timesteps("KSamplerAdvanced, split", verdict)
    assert min(verdict.timesteps[:split]) > max(verdict.timesteps[split:])


def test_cfg_1_samples_the_positive_alone(spy, sample, wired, count_timesteps):
    sample(cfg=1.0)
    count_timesteps("cfg 1", check(spy.calls, {0: wired.answers[0]}))
    assert all(call.context_BSW.shape[0] == 1 for call in spy.calls)


def test_cfg_guider(spy, run_node, sample_custom, wired, karras, count_timesteps):
    guider = run_node("CFGGuider", model=wired.model, positive=wired.positive, negative=wired.negative, cfg=5.0)[0]
    sample_custom(guider, karras)
    count_timesteps("CFGGuider", check(spy.calls, wired.answers))


def test_basic_guider(spy, run_node, sample_custom, wired, karras, count_timesteps):
    sample_custom(run_node("BasicGuider", model=wired.model, conditioning=wired.positive)[0], karras)
    count_timesteps("BasicGuider", check(spy.calls, {0: wired.answers[0]}))


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_guider(spy, run_node, sample_custom, tiny, model, karras, count_timesteps, way, style):
    ella = tiny.ella()
    first = wire(tiny, model, ella, tiny.text(5, seed=21), tiny.text(1, seed=22), tiny.style_and_face(), way)
    second = wire(tiny, first.model, ella, tiny.text(9, seed=23), tiny.text(1, seed=22), tiny.style_and_face(seed=15), way)
    guider = run_node("DualCFGGuider", model=second.model, cond1=first.positive, cond2=second.positive,
                      negative=first.negative, cfg_conds=6.0, cfg_cond2_negative=3.0, style=style)[0]
    sample_custom(guider, karras)
    # the guider hands over [negative, cond2, cond1]
    answers = {0: first.answers[1], 1: second.answers[0], 2: first.answers[0]}
    count_timesteps("DualCFGGuider", check(spy.calls, answers))


@pytest.fixture(scope="module")
def with_empty(tiny, model, way):
    """A third, empty prompt, as perpendicular negatives want it."""
    ella = tiny.ella()
    return (wire(tiny, model, ella, tiny.text(5, seed=21), tiny.text(4, seed=22), tiny.style_and_face(), way),
            wire(tiny, model, ella, tiny.text(1, seed=24), tiny.text(1, seed=24)))


def test_perp_neg_guider(spy, run_node, sample_custom, with_empty, karras, count_timesteps):
    prompts, empty = with_empty
    guider = run_node("PerpNegGuider", model=prompts.model, positive=prompts.positive, negative=prompts.negative,
                      empty_conditioning=empty.negative, cfg=6.0, neg_scale=1.0)[0]
    sample_custom(guider, karras)
    count_timesteps("PerpNegGuider", check(spy.calls, {**prompts.answers, 2: empty.answers[1]}))


def test_perp_neg_model_patch(spy, run_node, ksample, with_empty, count_timesteps):
    """Its third prompt never is in a guider: it enters inside the CFG function, as a batch of its own."""
    prompts, empty = with_empty
    patched = run_node("PerpNeg", model=prompts.model, empty_conditioning=empty.negative, neg_scale=1.0)[0]
    ksample(patched, prompts.positive, prompts.negative, sampler_name="dpmpp_sde")
    pairs = [call for call in spy.calls if len(call.groups) == 2]
    alone = [call for call in spy.calls if len(call.groups) == 1]
    count_timesteps("PerpNeg", check(pairs, prompts.first))
    count_timesteps("PerpNeg", check(alone, {0: [*prompts.answers[0][1:], *empty.answers[1]]}))
    assert len(alone) == len(pairs) * prompts.evaluations


def test_custom_sigmas(spy, run_node, sample_custom, wired, count_timesteps):
    """Sigmas between the model's own, out of even steps, and not ending at 0."""
    guider = run_node("CFGGuider", model=wired.model, positive=wired.positive, negative=wired.negative, cfg=5.0)[0]
    for sampler in ("euler", "heun", "dpmpp_3m_sde"):
        sample_custom(guider, torch.tensor([9.31, 7.7, 2.005, 0.4321, 0.05]), sampler)
    count_timesteps("custom sigmas", check(spy.calls, wired.answers))


class PerRowGuider(comfy.samplers.CFGGuider):
    """Evaluates the model at another sigma for every row, as the host's training samplers do."""

    factors_B = torch.tensor([1.0, 0.5, 0.11])

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        entries = [self.conds["positive"], self.conds["negative"]]
        sigma_B = timestep * self.factors_B
        return comfy.samplers.calc_cond_batch(self.inner_model, entries, x, sigma_B, model_options)[0]


def test_another_sigma_for_every_row(spy, wired, count_timesteps):
    guider = PerRowGuider(wired.model)
    guider.set_conds(wired.positive, wired.negative)
    with torch.inference_mode():
        guider.sample(noise((3, 4, 8, 8), 13), torch.zeros(3, 4, 8, 8), comfy.samplers.sampler_object("euler"),
                      torch.tensor([8.0, 3.0, 1.0, 0.0]), seed=1)
    count_timesteps("a sigma for each row", check(spy.calls, wired.answers))
    assert all(len(call.timestep_B[:3].unique()) == 3 for call in spy.calls)


def test_batch_of_three(spy, sample, wired, count_timesteps):
    sample(sampler_name="dpmpp_sde", latent=empty_latent(3))
    count_timesteps("batch of 3", check(spy.calls, wired.answers))
    assert {call.context_BSW.shape[0] for call in spy.calls if len(call.groups) == 2} == {6}
