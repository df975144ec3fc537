"""CONDITIONING of the host into conditioning that answers the timestep, and back."""

import node_helpers
import torch

from ..emma_core.errors import ConnectorMismatchError
from ..emma_core.model.addition import Addition
from ..emma_core.model.own_tokens import OwnTokens
from .families import Family
from .loaded import LoadedConnector
from .own_tokens import OwnTokensPayload
from .payload import KEY, CONDEmma, EmmaPayload, HostAssembly
from .text_rows import LENGTHS


def connect_conditioning(
    ella: LoadedConnector, conditioning: list, assembly: HostAssembly, clip_conditioning: list | None,
    addition: Addition | None = None,
) -> list:
    """Each entry keeps its own text, area, mask and range, and gets the tokens of the connector.

    Args:
        ella: the connector.
        conditioning: the host's CONDITIONING, holding T5 features (B, N, D), of Encode Prompt List too.
        assembly: references for every entry; empty for the negative.
        clip_conditioning: CLIP's CONDITIONING, appended behind the tokens (ELLA+CLIP); one entry for all, or one each.
        addition: where the references are added up.
    Raises:
        ConnectorMismatchError: connected before, not T5's width, or CLIP of another width or number of entries or prompts.
    """
    appended = _clip_entries(ella, clip_conditioning, len(conditioning))
    connected = []
    for (text_BND, options), clip_1SW in zip(conditioning, appended, strict=True):
        _check_first(options)
        if text_BND is None:
            raise ConnectorMismatchError("this conditioning holds no text features. Wire a CLIP Text Encode node that uses "
                                         "the CLIP of Load ELLA Text Encoder.")
        payload = EmmaPayload(ella, text_BND, assembly, addition, options.get(LENGTHS))
        context_1SW = payload.placeholder_1KW
        if clip_1SW is not None:
            _check_clip_rows(clip_1SW.shape[0], payload.frames)
            context_1SW = torch.cat([context_1SW.expand(clip_1SW.shape[0], -1, -1), clip_1SW.to(context_1SW)], dim=1)
        connected += node_helpers.conditioning_set_values(
            [[context_1SW, {key: value for key, value in options.items() if key != LENGTHS}]], _carried(options, payload))
    return connected


def check_own_text(model, source: OwnTokens, conditioning: list) -> None:
    """Refuse conditioning that this MODEL does not read as it is.

    Raises:
        ConnectorMismatchError: connected before, of no or another text encoder, as ELLA's T5.
    """
    for tokens_CSD, options in conditioning:
        _check_first(options)
        if tokens_CSD is None:
            raise ConnectorMismatchError("this conditioning holds no text. Wire CLIP Text Encode with the checkpoint's CLIP.")
        lacks_vector = getattr(model.model, "adm_channels", 0) and options.get("pooled_output") is None
        if tokens_CSD.shape[-1] != source.width or LENGTHS in options or lacks_vector:
            vector = " without a pooled vector" if lacks_vector else ""
            raise ConnectorMismatchError(
                f"the conditioning has width {tokens_CSD.shape[-1]}{vector}, and {source.name} reads width {source.width} from "
                "its own text encoder. Encode it with the checkpoint's own CLIP; or, if this is Load ELLA Text Encoder's, wire "
                "Load ELLA into ella.")


def add_references(
    conditioning: list, family: Family, assembly: HostAssembly, addition: Addition | None = None
) -> list:
    """Each entry stays as it is, and carries the references; without any it is the very same conditioning."""
    connected = []
    for entry in conditioning if assembly.references else ():
        payload = OwnTokensPayload(family, assembly, addition)
        connected += node_helpers.conditioning_set_values([entry], _carried(entry[1], payload))
    return connected or conditioning


def _carried(options: dict, payload: EmmaPayload | OwnTokensPayload) -> dict:
    """What an entry with a payload has in its options."""
    return {"model_conds": {**options.get("model_conds", {}), KEY: CONDEmma(payload)},
            "additional_models": [*options.get("additional_models", []), *payload.patchers]}


def _check_first(options: dict) -> None:
    if KEY in options.get("model_conds", {}):
        raise ConnectorMismatchError("this conditioning went through EMMA Connector before. Wire the text encoder's "
                                     "conditioning into the connector, and assemble all modules before it.")


def _check_clip_rows(found: int, wanted: int) -> None:
    if found > 1 and wanted > 1 and found != wanted:
        raise ConnectorMismatchError(f"the CLIP conditioning holds {found} prompts for {wanted} prompts or frames of T5; "
                                     f"wanted 1 or {wanted}. Encode the same list of prompts with both.")


def _clip_entries(ella: LoadedConnector, clip_conditioning: list | None, count: int) -> list:
    if not clip_conditioning:
        return [None] * count
    if len(clip_conditioning) not in (1, count):
        raise ConnectorMismatchError(f"the CLIP conditioning has {len(clip_conditioning)} entries for {count} of T5; wanted 1 "
                                     "or as many. Combine them in the same way.")
    width = ella.connector.width
    for tokens_1SW, options in clip_conditioning:
        if KEY in options.get("model_conds", {}):
            raise ConnectorMismatchError("the CLIP conditioning comes from an EMMA Connector, whose tokens cannot be appended. "
                                         "Wire the conditioning of a CLIP Text Encode with the checkpoint's own CLIP.")
        if tokens_1SW.shape[-1] != width:
            raise ConnectorMismatchError(f"the CLIP conditioning has width {tokens_1SW.shape[-1]}, the ELLA's tokens {width}. "
                                         "Encode it with the CLIP of the checkpoint that samples.")
    entries = [tokens_1SW for tokens_1SW, _ in clip_conditioning]
    return entries * count if len(entries) == 1 else entries
