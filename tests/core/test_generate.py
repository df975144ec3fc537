"""Bare generation with a pipeline of small random parts."""

from dataclasses import replace

import pytest
import torch
from small_models import small_connector

from emma_core.base.pipeline import Pipeline, Request, Sampling, generate, initial_noise
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.errors import ImageInputError

TEXT_DIM = 40


def text_features(prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(prompt))
    return torch.randn(1, 1 + len(prompt) % 5, TEXT_DIM, generator=generator)


@pytest.fixture
def calls():
    return []


@pytest.fixture
def pipeline(calls):
    connector = small_connector()

    def predict_noise(latent, timestep, context):
        calls.append((timestep.clone(), context.clone()))
        return latent * 0.5 + context.mean(dim=(1, 2))[:, None, None, None]

    return Pipeline(
        encode_text=lambda prompts: [text_features(prompt) for prompt in prompts], connector=connector,
        predict_noise=predict_noise, decode=lambda latent: latent[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3),
        spec=PLAYGROUND_SPEC,
    )


def test_each_step_gets_the_tokens_of_its_timestep(pipeline, calls):
    generate(pipeline, [Request("abc", negative="x")], Sampling(steps=5))
    assert [int(timestep[0]) for timestep, _ in calls] == [801, 601, 401, 201, 1]
    for timestep_C, context_CKW in calls:
        for row, prompt in enumerate(("abc", "x")):
            wanted = pipeline.connector.tokens(text_features(prompt), timestep_C[:1])
            torch.testing.assert_close(context_CKW[row:row + 1], wanted, rtol=1e-5, atol=1e-5)


def test_a_picture_does_not_depend_on_the_others_in_the_batch(pipeline):
    requests = [Request("abc", seed=1), Request("abcdef", seed=2), Request("abc", seed=3)]
    together = generate(pipeline, requests, Sampling(steps=3))
    for row, request in enumerate(requests):
        alone = generate(pipeline, [request], Sampling(steps=3))
        torch.testing.assert_close(together[row:row + 1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[2])


def test_latents_are_float32_whatever_the_tokens_are(pipeline):
    """Half precision would round them at every step."""
    pipeline.connector.to(torch.bfloat16)
    seen = []

    def predict_noise(latent, timestep, context):
        seen.append((latent.dtype, context.dtype))
        return latent * 0.5

    generate(replace(pipeline, predict_noise=predict_noise), [Request("abc")], Sampling(steps=3))
    assert seen == [(torch.float32, torch.bfloat16)] * 3


def test_more_requests_than_one_batch(pipeline):
    pictures = generate(pipeline, [Request("ab", seed=seed) for seed in range(18)], Sampling(steps=1, width_px=16, height_px=8))
    assert pictures.shape == (18, 8, 16, 3)
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_noise_is_that_of_torch_manual_seed():
    torch.manual_seed(5)
    assert torch.equal(initial_noise(5, Sampling(), PLAYGROUND_SPEC), torch.randn(1, 4, 16, 16))


@pytest.mark.parametrize("options", [{"steps": 0}, {"width_px": 100}, {"height_px": 7}])
def test_impossible_sampling_is_refused(options):
    with pytest.raises(ImageInputError, match="multiples of 8"):
        Sampling(**options)
