"""The seam: at every model evaluation our entries get the tokens of that evaluation's timestep.

One keyed CALC_COND_BATCH wrapper on a clone of the MODEL. It runs inside context windows and before ControlNet, so both
see the same tokens; nothing in the attention is patched.
"""

from collections.abc import Sequence

import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch

from ..emma_core.errors import ConnectorMismatchError
from .payload import KEY, EmmaPayload, holds_placeholder

WRAPPER = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH


def connect_model(
    model: comfy.model_patcher.ModelPatcher, patchers: Sequence[comfy.model_patcher.ModelPatcher], token_width: int
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` that answers our conditioning; the connector and modules are loaded and offloaded with it.

    Raises:
        ConnectorMismatchError: the model's cross-attention has another width than the tokens, or it knows no timesteps.
    """
    _check_width(model, token_width)
    _check_timesteps(model.get_model_object("model_sampling"))
    connected = model.clone()
    connected.remove_wrappers_with_key(WRAPPER, KEY)
    connected.add_wrapper_with_key(WRAPPER, KEY, swap_in_tokens)
    known = connected.get_additional_models_with_key(KEY)
    fresh = [patcher for patcher in patchers if not any(patcher.is_clone(other) for other in known)]
    connected.set_additional_models(KEY, [*known, *fresh])
    return connected


def swap_in_tokens(executor, model, conds, x_in, timestep, model_options):
    """CALC_COND_BATCH wrapper: ``timestep`` is the host's sigma (B,), ``conds`` lists of entries (or None)."""
    all_model_conds = [entry["model_conds"] for entries in conds for entry in entries or ()]
    for model_conds in all_model_conds:
        if KEY not in model_conds and "c_crossattn" in model_conds:
            _check_foreign(model_conds["c_crossattn"].cond, _width(model))
    if any(KEY in model_conds for model_conds in all_model_conds):
        sampling = model.model_sampling
        _check_timesteps(sampling)  # it may have been exchanged after the connector
        transformer_options = model_options.get("transformer_options", {})
        timestep_B = sampling.timestep(timestep).to(x_in.device).expand(x_in.shape[0])
        schedule = _schedule(sampling, transformer_options.get("sample_sigmas"))
        frames = _frame_indices(transformer_options, x_in.shape[0])
        conds = [
            entries and [_with_tokens(entry, timestep, timestep_B, schedule, frames) for entry in entries]
            for entries in conds
        ]
    return executor(model, conds, x_in, timestep, model_options)


def _with_tokens(entry, sigma_B, timestep_B, schedule, frames):
    carrier = entry["model_conds"].get(KEY)
    if carrier is None:
        return entry
    _check_boxes(entry)
    payload: EmmaPayload = carrier.cond
    model_conds = {name: cond for name, cond in entry["model_conds"].items() if name != KEY}
    if _acts(entry, sigma_B):
        placeholder = model_conds["c_crossattn"]
        appended = _what_was_appended(placeholder.cond, payload)
        tokens_BKW = payload.tokens(timestep_B, schedule, frames)
        model_conds["c_crossattn"] = placeholder._copy_with(_join(tokens_BKW, appended))
    return {**entry, "model_conds": model_conds}


def _check_boxes(entry) -> None:
    """GLIGEN's boxes hold a pooled vector each."""
    _, _, boxes = entry.get("gligen", (None, None, ()))
    if any(pooled is None for pooled, *_ in boxes):
        raise ConnectorMismatchError(
            "a box of GLIGENTextBoxApply was encoded with a T5, which gives no pooled vector. Wire the checkpoint's own CLIP "
            "into GLIGENTextBoxApply; the prompt stays with Load ELLA Text Encoder."
        )


def _acts(entry, sigma_B: torch.Tensor) -> bool:
    """Whether the host will use this entry at this sigma (it drops entries outside their timestep range)."""
    started = sigma_B[0] <= entry.get("timestep_start", sigma_B[0])
    return bool(started and sigma_B[0] >= entry.get("timestep_end", sigma_B[0]))


def _what_was_appended(context_BSW: torch.Tensor, payload: EmmaPayload) -> torch.Tensor:
    """Tokens behind our placeholder: CLIP's, or what Conditioning (Concat) added.

    Raises:
        ConnectorMismatchError: the placeholder was changed by a node that mixes or zeroes conditioning.
    """
    placeholder_1KW = payload.placeholder_1KW
    count = placeholder_1KW.shape[1]
    found = context_BSW[:1, :count]
    # the host may have moved or cast it
    if not torch.equal(found, placeholder_1KW.to(found.device, found.dtype)):
        raise ConnectorMismatchError(
            "the conditioning was changed after EMMA Connector (by Conditioning Average, Zero Out or a similar node). Its "
            "tokens are made anew at every step, so such a change would be lost. Put that node before EMMA Connector, on "
            "the text encoder's conditioning, or encode an empty prompt for an empty negative."
        )
    _check_stray_tokens(context_BSW[:, count:])
    return context_BSW[:, count:]


def _check_foreign(context_BSW: torch.Tensor, width: int | None) -> None:
    """A conditioning that is not ours, beside ours: the checkpoint's CLIP's, most often.

    Raises:
        ConnectorMismatchError: the model cannot read it, as a T5's, or it holds tokens of ours.
    """
    if context_BSW.shape[-1] != width:
        raise ConnectorMismatchError(
            f"a prompt of width {context_BSW.shape[-1]} goes into the sampler straight from a text encoder; this MODEL's "
            f"cross-attention reads width {width}. If it was encoded with Load ELLA Text Encoder, wire it into positive or "
            "negative of EMMA Connector, and the connector's output into the sampler. Otherwise encode it with the "
            "checkpoint's own CLIP."
        )
    _check_stray_tokens(context_BSW)


def _check_stray_tokens(context_BSW: torch.Tensor) -> None:
    if holds_placeholder(context_BSW):
        raise ConnectorMismatchError(
            "tokens of EMMA Connector were appended to another conditioning (by Conditioning Concat or a similar node). They "
            "are made anew at every step, and would stay at one timestep there. Concatenate before EMMA Connector, on the "
            "text encoder's conditioning; CLIP's goes into the connector's clip inputs."
        )


def _join(tokens_BKW: torch.Tensor, appended_CSW: torch.Tensor) -> torch.Tensor:
    if not appended_CSW.shape[1]:
        return tokens_BKW
    rows = max(tokens_BKW.shape[0], appended_CSW.shape[0])
    appended = appended_CSW.to(tokens_BKW)
    if rows > 1:
        tokens_BKW = comfy.utils.repeat_to_batch_size(tokens_BKW, rows)
        appended = comfy.utils.repeat_to_batch_size(appended, rows)
    return torch.cat([tokens_BKW, appended], dim=1)


def _schedule(sampling, sigmas: torch.Tensor | None) -> list[float]:
    """Distinct timesteps of the sigmas that the sampler announced, in its order, without the final 0."""
    if sigmas is None:
        return []
    return list(dict.fromkeys(sampling.timestep(sigmas[sigmas > 0]).tolist()))


def _frame_indices(transformer_options, batch: int) -> Sequence[int] | None:
    """Frames in the current context window: the host's own, or AnimateDiff-Evolved's; None outside of windows."""
    window = transformer_options.get("context_window")
    for indices in (_window_frames(window), transformer_options.get("ad_params", {}).get("sub_idxs")):
        # outside of a window AnimateDiff leaves the last window's indices behind: only a matching length counts
        if indices is not None and len(indices) == batch:
            return list(indices)
    return None


def _window_frames(window) -> Sequence[int] | None:
    """Frames of the host's context window; newer hosts put an earlier frame before them, whose result they drop."""
    indices = getattr(window, "index_list", None)
    before = getattr(window, "causal_anchor_index", None)
    return indices if indices is None or before is None or before < 0 else [before, *indices]


def _check_width(model: comfy.model_patcher.ModelPatcher, token_width: int) -> None:
    width = _width(model.model)
    if width != token_width:
        found = f"a cross-attention of width {width}" if width else "no cross-attention that ELLA's tokens could enter"
        raise ConnectorMismatchError(
            f"this MODEL ({type(model.model).__name__}) has {found}; the ELLA makes tokens of width {token_width}. Use a "
            f"checkpoint of the {'Stable Diffusion 1.5 family' if token_width == 768 else 'family this ELLA was made for'}."
        )


def _width(model) -> int | None:
    """What the cross-attention of the host's model reads."""
    return model.model_config.unet_config.get("context_dim")


def _check_timesteps(sampling) -> None:
    last = float(sampling.timestep(sampling.sigma_max.reshape(1)))
    if last < 100:
        raise ConnectorMismatchError(
            f"this MODEL's sampling ({type(sampling).__name__}) counts time from {last:.2f}, ELLA needs timesteps 0 to 999. "
            "Remove the node that changes the model's sampling to EDM or continuous sigmas."
        )
