"""The seam: at every model evaluation our entries get the tokens of that evaluation's timestep.

One keyed CALC_COND_BATCH wrapper on a clone of the MODEL. It runs inside context windows and before ControlNet, so both
see the same tokens; nothing in the attention is patched. Where references are added up in the predictions, it has the model
evaluated once more for each of them, in calls that look like any other to the host and to other packs' patches.
"""

import uuid
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch

from ..emma_core.errors import ConnectorMismatchError
from .entries import check_stray_tokens, copies_of
from .evaluation import Evaluation
from .families import check_timesteps, context_width
from .payload import KEY

WRAPPER = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH


def connect_model(
    model: comfy.model_patcher.ModelPatcher, patchers: Sequence[comfy.model_patcher.ModelPatcher]
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` that answers our conditioning; the connector and modules are loaded and offloaded with it."""
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
            _check_foreign(model_conds["c_crossattn"].cond, context_width(model))
    payloads = [model_conds[KEY].cond for model_conds in all_model_conds if KEY in model_conds]
    if not payloads:
        return executor(model, conds, x_in, timestep, model_options)
    inner = executor.wrappers[executor.idx + 1:]
    if inner and any(payload.evaluates_more for payload in payloads):
        # other packs' wrappers see one call and its answer, however many evaluations it takes (step caches count calls)
        outermost = type(executor).new_executor(executor.original, [*inner, swap_in_tokens])
        return outermost.execute(model, conds, x_in, timestep, model_options)
    evaluation = Evaluation.of_call(model, x_in, timestep, model_options.get("transformer_options", {}))
    copies = [entries and [copies_of(entry, evaluation) for entry in entries] for entries in conds]
    evaluations = _evaluations(copies)
    return _added_up(lambda lists: executor(model, lists, x_in, timestep, model_options), evaluations)


def _evaluations(copies: Sequence[list[list[dict]] | None]) -> list[list[list[dict] | None]]:
    """The lists of entries of each evaluation, from the copies of every entry: first all lists with their base, then those
    that have a difference to add, and another one. An entry that has none (any more) counts as its base there.
    """
    counts = [max((len(of_entry) for of_entry in entries or ()), default=1) for entries in copies]
    first = [entries and [_told_apart(of_entry[0], 0) if len(of_entry) > 1 else of_entry[0] for of_entry in entries]
             for entries in copies]
    further = [[[_told_apart(of_entry[number if number < len(of_entry) else 0], number) for of_entry in entries]
                if number < count else None for entries, count in zip(copies, counts, strict=True)]
               for number in range(1, max(counts, default=1))]
    return [first, *further]


def _told_apart(entry: dict, number: int) -> dict:
    """The entry under a name of its own, the same in every step: step caches keep what each entry predicted by its name."""
    return {**entry, "uuid": uuid.uuid5(entry["uuid"], f"{KEY} {number}")}


def _added_up(evaluate: Callable[[list], list[torch.Tensor]], evaluations: Sequence[list]) -> list[torch.Tensor]:
    """What the lists predict, a tensor each."""
    first, *further = evaluations
    base = evaluate(first)
    total = list(base)
    for lists in further:
        comfy.model_management.throw_exception_if_processing_interrupted()
        for index, predicted in enumerate(evaluate(lists)):
            if lists[index] is not None:
                # e = e_T + sum_m (e_Tm - e_T)
                total[index] = total[index] + (predicted - base[index])
    return total


def _check_foreign(context_BSW: torch.Tensor, width: int | None) -> None:
    """A conditioning that is not ours, beside ours: the checkpoint's CLIP's, most often.

    Raises:
        ConnectorMismatchError: the model cannot read it, as a T5's, or it holds tokens of ours.
    """
    if width and context_BSW.shape[-1] != width:
        raise ConnectorMismatchError(
            f"a prompt of width {context_BSW.shape[-1]} goes into the sampler straight from a text encoder; this MODEL's "
            f"cross-attention reads width {width}. If it was encoded with Load ELLA Text Encoder, wire it into positive or "
            "negative of EMMA Connector, and the connector's output into the sampler. Otherwise encode it with the "
            "checkpoint's own CLIP."
        )
    check_stray_tokens(context_BSW)


def check_takes_ella(model: comfy.model_patcher.ModelPatcher, token_width: int) -> None:
    """Refuse a MODEL that an ELLA's tokens cannot enter.

    Raises:
        ConnectorMismatchError: its cross-attention has another width than the tokens, or it knows no timesteps.
    """
    width = model.model.model_config.unet_config.get("context_dim")
    if width != token_width:
        found = f"a cross-attention of width {width}" if width else "no cross-attention that ELLA's tokens could enter"
        raise ConnectorMismatchError(
            f"this MODEL ({type(model.model).__name__}) has {found}; the ELLA makes tokens of width {token_width}. Use a "
            f"checkpoint of the {'Stable Diffusion 1.5 family' if token_width == 768 else 'family this ELLA was made for'}."
        )
    check_timesteps(model.get_model_object("model_sampling"))
