"""Names in files against names in our layers: attention's fused projection is stored whole and used in two parts."""

from collections.abc import Mapping

import torch


def to_layer_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``attn.in_proj_{weight,bias}`` (3W, ...) -> ``attn.q_proj.*`` (W, ...) and ``attn.kv_proj.*`` (2W, ...)."""
    renamed = {}
    for key, tensor in state.items():
        stem, _, kind = key.rpartition(".in_proj_")
        if stem:
            width = tensor.shape[0] // 3
            renamed[f"{stem}.q_proj.{kind}"] = tensor[:width]
            renamed[f"{stem}.kv_proj.{kind}"] = tensor[width:]
        else:
            renamed[key] = tensor
    return renamed


def to_file_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``attn.q_proj.*`` (W, ...) and ``attn.kv_proj.*`` (2W, ...) -> ``attn.in_proj_{weight,bias}`` (3W, ...)."""
    renamed = {}
    for key, tensor in state.items():
        stem, _, kind = key.rpartition(".q_proj.")
        if stem:
            renamed[f"{stem}.in_proj_{kind}"] = torch.cat([tensor, state[f"{stem}.kv_proj.{kind}"]])
        elif ".kv_proj." not in key:
            renamed[key] = tensor
    return renamed
