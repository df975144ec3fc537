"""Gate maps as the host's IMAGE."""

import comfy.model_management
import numpy as np
import torch

from ..emma_core.drawing.gate_map import GateMap, draw_gate_maps, gate_values
from ..emma_core.errors import ReferenceMismatchError
from ..emma_core.model.assembly import Assembly
from .loaded import LoadedConnector
from .payload import HostAssembly
from .text_rows import LENGTHS, text_rows


def gate_map_image(ella: LoadedConnector, assembly: HostAssembly, conditioning: list, timestep: int) -> torch.Tensor:
    """One panel per reference, IMAGE (1, H, W, 3).

    Raises:
        ReferenceMismatchError: per-frame references or strengths, for which one prompt gives no single map.
        ConnectorMismatchError: text or modules do not fit the connector.
    """
    if any(reference.rows > 1 for reference in assembly.references):
        raise ReferenceMismatchError("a gate map of per-frame references or strengths was asked for; wanted one of each per "
                                     "module. Encode a single picture, or combine them by concat or average; disconnect "
                                     "lists of strengths.")
    comfy.model_management.load_models_gpu([ella.patcher, *assembly.patchers])
    text_BND, options = conditioning[0]
    text_1ND = text_rows(text_BND, options.get(LENGTHS))[0].to(comfy.model_management.get_torch_device())
    values = gate_values(ella.connector, text_1ND, timestep, Assembly(assembly.references))
    maps = [GateMap(f"{reference.module.name}, strength {float(reference.strength) * reference.keyframes.at(timestep):g}",
                    values_IK.numpy())
            for reference, values_IK in zip(assembly.references, values, strict=True)]
    sheet = draw_gate_maps(maps, f"separable gate x global gate at timestep {timestep}")
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]
