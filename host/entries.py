"""Entries of the host's conditioning, as they are at one evaluation: with the tokens of its timestep.

Shapes: B rows of the latent batch, C rows of a conditioning, S context tokens, K of them the connector's, W token width.
"""

import comfy.utils
import torch

from ..emma_core.errors import ConnectorMismatchError
from .evaluation import Evaluation
from .families import check_timesteps
from .own_tokens import OwnTokensPayload
from .payload import KEY, EmmaPayload, holds_placeholder


def copies_of(entry: dict, evaluation: Evaluation) -> list[dict]:
    """The entry with its tokens, and a copy for each difference to add to what these predict; one that is not ours stays.

    Raises:
        ConnectorMismatchError: a node changed the entry so that its tokens cannot be put in.
        ReferenceMismatchError: it holds prompts or references for another number of frames.
    """
    carrier = entry["model_conds"].get(KEY)
    if carrier is None:
        return [entry]
    _check_boxes(entry)
    payload = carrier.cond
    model_conds = {name: cond for name, cond in entry["model_conds"].items() if name != KEY}
    if not evaluation.meets(entry) or "c_crossattn" not in model_conds:
        return [{**entry, "model_conds": model_conds}]
    context = model_conds["c_crossattn"]
    if isinstance(payload, OwnTokensPayload):
        contexts = payload.contexts(context.cond, _mask_of(entry), evaluation)
    else:
        check_timesteps(evaluation.sampling)  # it may have been exchanged after the connector
        appended = _what_was_appended(context.cond, payload)
        times = evaluation.times(evaluation.sampling.timestep)
        contexts = [_join(tokens_BKW, appended) for tokens_BKW in payload.tokens(*times, evaluation.frames)]
    return [{**entry, "model_conds": {**model_conds, "c_crossattn": context._copy_with(one)}} for one in contexts]


def _mask_of(entry: dict) -> torch.Tensor | None:
    """0 where a token is padding, as the text encoder or the model says; some models are not told."""
    carried = entry["model_conds"].get("attention_mask")
    return entry.get("attention_mask") if carried is None else carried.cond


def _check_boxes(entry) -> None:
    """GLIGEN's boxes hold a pooled vector each."""
    _, _, boxes = entry.get("gligen", (None, None, ()))
    if any(pooled is None for pooled, *_ in boxes):
        raise ConnectorMismatchError(
            "a box of GLIGENTextBoxApply was encoded with a T5, which gives no pooled vector. Wire the checkpoint's own CLIP "
            "into GLIGENTextBoxApply; the prompt stays with Load ELLA Text Encoder."
        )


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
    check_stray_tokens(context_BSW[:, count:])
    return context_BSW[:, count:]


def check_stray_tokens(context_BSW: torch.Tensor) -> None:
    """Refuse tokens of ours inside another conditioning.

    Raises:
        ConnectorMismatchError: the placeholder of a connected conditioning stands in it.
    """
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
