"""Gate maps as the host's IMAGE."""

import comfy.model_management
import numpy as np
import torch

from ..emma_core.drawing.gate_map import GateMap, draw_gate_maps, gate_values
from ..emma_core.errors import ConnectorMismatchError, ReferenceMismatchError
from ..emma_core.model.assembly import Assembly, TokenSource
from ..emma_core.model.own_tokens import OwnTokens
from .loaded import LoadedConnector
from .payload import HostAssembly
from .text_rows import LENGTHS, text_rows


def gate_map_image(
    ella: LoadedConnector | None, assembly: HostAssembly, conditioning: list, timestep: int
) -> torch.Tensor:
    """One panel per reference, IMAGE (1, H, W, 3).

    Args:
        ella: the connector; None: modules on a checkpoint's own tokens.
        assembly: modules and their references.
        conditioning: of ELLA's text encoder, or of the checkpoint's own.
        timestep: 999 (noise) to 0 (picture).
    Raises:
        ReferenceMismatchError: per-frame references or strengths, for which one prompt gives no single map.
        ConnectorMismatchError: text or modules do not fit the connector.
    """
    if any(reference.rows > 1 for reference in assembly.references):
        raise ReferenceMismatchError("a gate map of per-frame references or strengths was asked for; wanted one of each per "
                                     "module. Encode a single picture, or combine them by concat or average; disconnect "
                                     "lists of strengths.")
    source, patchers = _source(ella, assembly)
    comfy.model_management.load_models_gpu([*patchers, *assembly.patchers])
    text_BND, options = conditioning[0]
    text_1ND = text_rows(text_BND, options.get(LENGTHS))[0].to(comfy.model_management.get_torch_device())
    values = gate_values(source, text_1ND, timestep, Assembly(assembly.references))
    maps = [GateMap(f"{reference.module.name}, strength {float(reference.strength) * reference.keyframes.at(timestep):g}",
                    values_IK.numpy())
            for reference, values_IK in zip(assembly.references, values, strict=True)]
    sheet = draw_gate_maps(maps, f"separable gate x global gate at timestep {timestep}")
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def _source(ella: LoadedConnector | None, assembly: HostAssembly) -> tuple[TokenSource, list]:
    if ella is not None:
        return ella.connector, [ella.patcher]
    for config in (reference.module.config for reference in assembly.references):
        if config.source is None:
            raise ConnectorMismatchError(f"the {config.condition} module was made for an ELLA, and none is wired. Wire Load "
                                         "ELLA into ella.")
    config = assembly.references[0].module.config
    return OwnTokens(config.source, config.time), []
