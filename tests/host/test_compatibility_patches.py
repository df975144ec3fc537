"""Stock nodes that patch the MODEL, before and after EMMA Connector: they act, and every call has the right tokens.

Those of test_seam_composition.py (FreeU, PAG, RescaleCFG, ModelSamplingDiscrete, LoRA) are not repeated.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import UNET, call_node, empty_latent, noise
from token_check import Constant, check

STEPS = 4
SETTINGS = {"seed": 11, "steps": STEPS, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "normal", "denoise": 1.0}


@pytest.fixture(scope="module")
def plain(connect, model):
    return connect(model)


@pytest.fixture
def sample(ksample):
    """KSampler from a seed that also serves nodes which draw numbers of their own."""

    def run(model, wired, **settings):
        torch.manual_seed(5)
        return ksample(model, wired.positive, wired.negative, latent=empty_latent(1, 16), **{**SETTINGS, **settings})

    return run


@pytest.fixture(scope="module")
def plain_samples(host_nodes, plain):
    """What `sample` gives without a patch."""
    return call_node(host_nodes, "KSampler", model=plain.model, positive=plain.positive, negative=plain.negative,
                     latent_image=empty_latent(1, 16), **SETTINGS)[0]["samples"]


@pytest.fixture
def patch_model(host_nodes):
    """A MODEL through a stock node; skips the test where the host has no such node."""

    def run(node, model, settings):
        if node not in host_nodes.NODE_CLASS_MAPPINGS:
            pytest.skip(f"this host has no node {node}")
        with torch.inference_mode():
            answer = host_nodes.NODE_CLASS_MAPPINGS[node].execute(model=model, **settings) if node == "HyperTile" else None
        # HyperTile answers with a bare tuple, which the host takes as well
        return answer[0] if answer else call_node(host_nodes, node, model=model, **settings)[0]

    return run


PATCHES = [
    ("HyperTile", {"tile_size": 64, "swap_size": 2, "max_depth": 0, "scale_depth": False}), ("TomePatchModel", {"ratio": 0.4}),
    ("CFGZeroStar", {}), ("Mahiro", {}), ("TCFG", {}), ("APG", {"eta": 0.5, "norm_threshold": 2.0, "momentum": -0.5}),
    ("CFGNorm", {"strength": 0.8}), ("RenormCFG", {"cfg_trunc": 100.0, "renorm_cfg": 0.5}),
    ("FreSca", {"scale_low": 0.8, "scale_high": 1.5, "freq_cutoff": 3}), ("VideoLinearCFGGuidance", {"min_cfg": 1.0}),
    ("UNetSelfAttentionMultiply", {"q": 1.2, "k": 1.0, "v": 0.9, "out": 1.0}),
    ("UNetCrossAttentionMultiply", {"q": 1.2, "k": 1.0, "v": 0.9, "out": 1.0}),
    ("PatchModelAddDownscale", {"block_number": 1, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.6,
                                "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic"}),
    ("NAGuidance", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}),
    ("CFGOverride", {"cfg": 3.0, "start_percent": 0.0, "end_percent": 0.5}),
    ("TemporalScoreRescaling", {"tsr_k": 0.7, "tsr_sigma": 1.0}),
]


@pytest.mark.parametrize(("node", "settings"), PATCHES, ids=[node for node, _ in PATCHES])
def test_model_patches_before_or_after(spy, patch_model, sample, connect, plain, plain_samples, model, node, settings):
    """The picture changes, in either order by the same."""
    before = connect(patch_model(node, model, settings))
    patched = sample(before.model, before)
    assert check(spy.calls, before.answers).total == STEPS * before.evaluations
    assert torch.equal(patched, sample(patch_model(node, plain.model, settings), plain))
    assert not torch.equal(patched, plain_samples)


@pytest.mark.parametrize("place", ["before", "after"])
def test_self_attention_guidance(spy, run_node, sample, connect, plain, model, place):
    """It evaluates the negative alone once more in every step."""
    settings = {"scale": 0.7, "blur_sigma": 2.0}
    if place == "before":
        wired = connect(run_node("SelfAttentionGuidance", model=model, **settings)[0])
        patched = wired.model
    else:
        wired, patched = plain, run_node("SelfAttentionGuidance", model=plain.model, **settings)[0]
    samples = sample(patched, wired, sampler_name="dpmpp_sde")
    pairs = [call for call in spy.calls if len(call.groups) == 2]
    alone = [call for call in spy.calls if len(call.groups) == 1]
    check(pairs, wired.first)
    check(alone, {0: [*wired.answers[0][1:], *wired.answers[1]]})
    assert len(alone) == len(pairs) * wired.evaluations
    assert not torch.equal(samples, sample(plain.model, plain, sampler_name="dpmpp_sde"))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_step_caches(spy, run_node, sample, connect, plain, model, node, place):
    """Skipped steps are not evaluated; the others have their own tokens."""
    settings = {"reuse_threshold": 0.9, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    if place == "before":
        wired = connect(run_node(node, model=model, **settings)[0])
        cached = wired.model
    else:
        wired, cached = plain, run_node(node, model=plain.model, **settings)[0]
    # both look at every eighth pixel
    sample(cached, wired, steps=12, sampler_name="euler")
    verdict = check(spy.calls, wired.answers)
    assert 2 <= verdict.total / wired.evaluations < 12, f"{verdict.total} evaluations in 12 steps"


def test_differential_diffusion(spy, run_node, ksample, plain):
    """A mask of greys, where each pixel starts at its own step."""
    patched = run_node("DifferentialDiffusion", model=plain.model)[0]
    latent = {"samples": noise((1, 4, 8, 8), 12), "noise_mask": torch.linspace(0, 1, 64).expand(1, 64, 64)}
    samples = ksample(patched, plain.positive, plain.negative, latent=latent, steps=STEPS)
    check(spy.calls, plain.answers)
    assert not torch.equal(samples, ksample(plain.model, plain.positive, plain.negative, latent=latent, steps=STEPS))


def test_hypernetwork(spy, run_node, sample, connect, plain, model, base_directory):
    """It works on what enters to_k and to_v: the tokens that reach it are the right ones."""
    path = base_directory / "models" / "hypernetworks" / "tiny.pt"
    path.parent.mkdir(exist_ok=True)
    width = 64  # of the cross-attention
    layers = {f"linear.{index}.weight": 0.3 * noise((width, width), index) for index in (0, 1)}
    layers |= {f"linear.{index}.bias": torch.zeros(width) for index in (0, 1)}
    torch.save({width: (layers, layers), "activation_func": "linear", "is_layer_norm": False, "use_dropout": False,
                "activate_output": False, "last_layer_dropout": False, "layer_structure": [1, 1, 1]}, path)
    settings = {"hypernetwork_name": path.name, "strength": 0.6}
    before = connect(run_node("HypernetworkLoader", model=model, **settings)[0])
    patched = sample(before.model, before)
    assert torch.equal(patched, sample(run_node("HypernetworkLoader", model=plain.model, **settings)[0], plain))
    changed = len(spy.calls)
    assert not torch.equal(patched, sample(plain.model, plain))
    check(spy.calls[changed:], plain.answers)


@pytest.mark.parametrize("node", ["ModelMergeSimple", "ModelMergeBlocks"])
def test_merged_models(spy, run_node, tiny, sample, connect, plain, plain_samples, model, node):
    """The merge of a connected MODEL with another is as the merge, connected."""
    ratios = {"ratio": 0.4} if node == "ModelMergeSimple" else {"input": 0.2, "middle": 0.5, "out": 0.9}
    other = tiny.model(seed=70)
    before = connect(run_node(node, model1=model, model2=other, **ratios)[0])
    merged = sample(before.model, before)
    check(spy.calls, before.answers)
    assert torch.equal(merged, sample(run_node(node, model1=plain.model, model2=other, **ratios)[0], plain))
    assert not torch.equal(merged, plain_samples)


def test_connected_model_as_second_of_a_merge_is_refused(run_node, tiny, pack_import, sample, plain):
    """The host keeps the first one's patches only."""
    merged = run_node("ModelMergeSimple", model1=tiny.model(seed=70), model2=plain.model, ratio=0.4)[0]
    with pytest.raises(pack_import("emma_core.errors").UnconnectedModelError, match="Wire the MODEL output of EMMA Connector"):
        sample(merged, plain)


def test_compiled_model(run_node, tiny, sample, connect):
    """With torch's tracing alone: the backends that the node offers need a compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wired = connect(tiny.model(sizes={**UNET, "channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [0],
                                      "transformer_depth_output": [0, 0]}))
    compiled = run_node("TorchCompileModel", model=wired.model, backend="eager")[0]
    samples = sample(compiled, wired, steps=2)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0, "nothing was compiled"
    torch.testing.assert_close(samples, sample(wired.model, wired, steps=2), rtol=1e-4, atol=1e-4)


def test_clip_conditioning_on_a_patched_model_passes(spy, run_node, tiny, ksample, plain):
    """Our patch takes nothing from prompts of a CLIP, behind others' patches too."""
    patched = run_node("EasyCache", model=run_node("TomePatchModel", model=plain.model, ratio=0.4)[0], reuse_threshold=0.1,
                       start_percent=0.1, end_percent=0.95, verbose=False)[0]
    prompts = tiny.clip_text(), tiny.clip_text(seed=36)
    ksample(patched, *prompts, latent=empty_latent(1, 16))
    check(spy.calls, {group: [Constant(prompt[0][0])] for group, prompt in enumerate(prompts)})
