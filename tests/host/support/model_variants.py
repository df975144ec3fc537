"""MODELs as other nodes hand them out: loaded inside a node, with a LoRA, predicting the velocity."""

from __future__ import annotations

import comfy.model_sampling
import torch
from tiny_models import noise


def made_in_inference_mode(tiny, **options):
    """A MODEL as the host's loaders make it, inside a node."""
    with torch.inference_mode():
        model = tiny.model(**options)
    assert all(value.is_inference() for value in model.model.diffusion_model.parameters())
    return model


def with_lora(model, strength: float = 0.5):
    """A clone with a patched cross-attention."""
    patched = model.clone()
    keys = [f"diffusion_model.{name}" for name, _ in model.model.diffusion_model.named_parameters() if "attn2.to_v" in name]
    added = {key: (noise(tuple(model.model.state_dict()[key].shape), 50),) for key in keys}
    assert set(patched.add_patches(added, strength)) == set(keys)
    return patched


def with_velocity(model):
    class Velocity(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    patched = model.clone()
    patched.add_object_patch("model_sampling", Velocity(model.model.model_config))
    return patched
