"""References that vary over the frames of a batch reach their frames, in context windows too."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import comfy.context_windows
import comfy.samplers
import pytest
import torch
from context_windows import NO_WINDOWS, takes
from tiny_models import empty_latent, noise, wire
from token_check import check

pytestmark = pytest.mark.usefixtures("added_literally")

FRAMES = 6
WINDOWS = ([0, 1, 2, 3], [2, 3, 4, 5])


@pytest.fixture(scope="module")
def per_frame(tiny, model, way):
    """One style for each frame, one face for all."""
    assembly = tiny.style_and_face(references=FRAMES)
    return wire(tiny, model, tiny.ella(), tiny.text(), tiny.text(1, seed=8), assembly, way)


def frames_of_calls(calls, windows: list[list[int]], evaluations: int) -> list[list[int]]:
    """The frames of each call, where each window is evaluated so often."""
    assert len(calls) == len(windows) * evaluations
    return [window for window in windows for _ in range(evaluations)]


class WindowGuider(comfy.samplers.CFGGuider):
    """Evaluates the frames in overlapping windows and averages them.

    ``announce`` writes the window's frames into transformer_options, as the packs that make windows do.
    """

    announce: Callable
    frames_of_calls: list

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        total, count = torch.zeros_like(x), torch.zeros(x.shape[0], 1, 1, 1)
        options = (model_options or {})["transformer_options"]
        for window in WINDOWS:
            self.announce(options, window)
            self.frames_of_calls.append(window)
            total[window] += comfy.samplers.sampling_function(
                self.inner_model, x[window], timestep[window], self.conds["negative"], self.conds["positive"], self.cfg,
                model_options=model_options, seed=seed)
            count[window] += 1
        return total / count


def native(options, window):
    parameters = inspect.signature(comfy.context_windows.IndexListContextWindow).parameters
    total = {"total_frames": FRAMES} if "total_frames" in parameters else {}
    options["context_window"] = comfy.context_windows.IndexListContextWindow(window, **total)


def animatediff(options, window):
    options["ad_params"] = {"sub_idxs": window, "full_length": FRAMES, "context_length": len(window)}


def window_sample(wired, announce, sampler="dpmpp_2m"):
    guider = WindowGuider(wired.model)
    guider.announce, guider.frames_of_calls = announce, []
    guider.set_conds(wired.positive, wired.negative)
    guider.set_cfg(5.0)
    with torch.inference_mode():
        guider.sample(noise((FRAMES, 4, 8, 8), 41), empty_latent(FRAMES)["samples"], comfy.samplers.sampler_object(sampler),
                      torch.tensor([8.0, 3.0, 1.0, 0.0]), seed=1)
    return guider.frames_of_calls


def test_frames_have_different_tokens(per_frame):
    first, second = (per_frame.answers[0][per_frame.evaluations // 2].at(500.0, frame) for frame in (0, 1))
    assert not torch.allclose(first, second, rtol=1e-2)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun"])
def test_each_frame_gets_its_own_reference(spy, per_frame, ksample, sampler):
    ksample(per_frame.model, per_frame.positive, per_frame.negative, latent=empty_latent(FRAMES), sampler_name=sampler)
    check(spy.calls, per_frame.answers)


@pytest.mark.parametrize("announce", [native, animatediff])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_sde"])
def test_windows_get_their_frames(spy, per_frame, announce, sampler):
    windows = window_sample(per_frame, announce, sampler)
    check(spy.calls, per_frame.answers, frames_of_calls(spy.calls, windows, per_frame.evaluations))
    assert {call.timestep_B.shape[0] for call in spy.calls[::per_frame.evaluations]} == {8}


def test_animatediff_leftovers_do_not_count_outside_windows(spy, per_frame, ksample):
    """AnimateDiff leaves the last window's frames behind; the whole batch has another length."""
    stale = per_frame.model.clone()
    animatediff(stale.model_options["transformer_options"], WINDOWS[-1])
    ksample(stale, per_frame.positive, per_frame.negative, latent=empty_latent(FRAMES))
    check(spy.calls, per_frame.answers)


@pytest.mark.parametrize("frame_before", [False, True])
def test_hosts_own_context_windows(
    request, spy, host_nodes, windowed, windows_run_over_the_batch, per_frame, ksample, frame_before
):
    """Newer hosts can put the frame before a window in front of it."""
    if frame_before and not takes(host_nodes, "causal_window_fix"):
        pytest.skip("this host puts no frame before a window")
    if not windows_run_over_the_batch:
        request.applymarker(pytest.mark.xfail(strict=True, raises=RuntimeError, reason=NO_WINDOWS))
    model = windowed(per_frame.model, 4, 0, causal_window_fix=frame_before)
    ksample(model, per_frame.positive, per_frame.negative, latent=empty_latent(FRAMES))
    first, second = WINDOWS
    windows = [first, [1, *second] if frame_before else second] * (len(spy.calls) // per_frame.evaluations // 2)
    check(spy.calls, per_frame.answers, frames_of_calls(spy.calls, windows, per_frame.evaluations))


def test_one_reference_of_each_module_serves_all_frames_of_windows(spy, tiny, model, way):
    wired = wire(tiny, model, tiny.ella(), tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), way)
    window_sample(wired, animatediff)
    check(spy.calls, wired.answers)


def test_strength_for_each_frame(spy, tiny, model, ksample, way):
    """The first frame has no style, so that its face is in the first evaluation."""
    style, face = tiny.module(), tiny.module("face", seed=7)
    assembly = tiny.assemble((style, tiny.reference(style), torch.linspace(0, 1.5, FRAMES)), (face, tiny.reference(face)))
    wired = wire(tiny, model, tiny.ella(), tiny.text(), tiny.text(1, seed=8), assembly, way)
    ksample(wired.model, wired.positive, wired.negative, latent=empty_latent(FRAMES))
    check(spy.calls, wired.answers)


def test_per_frame_references_with_another_batch_are_refused(per_frame, ksample, pack_import):
    error = pack_import("emma_core.errors").ReferenceMismatchError
    with pytest.raises(error, match=r"6 per-frame references, the latent batch has 4 frames\. Encode one reference per frame"):
        ksample(per_frame.model, per_frame.positive, per_frame.negative, latent=empty_latent(4))
