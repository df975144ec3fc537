"""CLIP vision towers with random weights, in the layouts of transformers and open_clip."""

from __future__ import annotations

import torch

from emma_core.encoders.clip_vision import clip_shapes
from emma_core.encoders.families import ClipTower

TINY = ClipTower("CLIP ViT-tiny", 32, 3, 14, 28, 16, 4, 64, "gelu")
_LAYERS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
           "mlp.fc2": "mlp.c_proj"}
_EMBEDDINGS = {"class_embedding": "class_embedding", "patch_embedding.weight": "conv1.weight",
               "position_embedding.weight": "positional_embedding"}


def random_tower(tower: ClipTower, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under transformers' names, of a scale at which activations neither grow nor vanish with depth."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for key, shape in clip_shapes(tower).items():
        value = torch.randn(shape, generator=generator)
        if "norm" in key or "layrnorm" in key:
            weights[key] = value * 0.1 + (1 if key.endswith("weight") else 0)
        elif key.endswith("bias"):
            weights[key] = value * 0.02
        else:
            weights[key] = value / max(1, value[0].numel()) ** 0.5 if value.ndim > 1 else value * 0.1
    return weights


def transformers_model(tower: ClipTower, weights):
    """As a Hugging Face user would build it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=tower.hidden, intermediate_size=tower.mlp, projection_dim=tower.projected, num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads, image_size=tower.input_px, patch_size=tower.patch_px, hidden_act=tower.hidden_act)
    model = CLIPVisionModelWithProjection(config).eval()
    model.load_state_dict(weights)
    return model


def open_clip_tower(tower: ClipTower, weights):
    """open_clip's own vision transformer with the same weights."""
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(
        image_size=tower.input_px, patch_size=tower.patch_px, width=tower.hidden, layers=tower.layers, heads=tower.heads,
        mlp_ratio=tower.mlp / tower.hidden, output_dim=tower.projected).eval()
    model.load_state_dict({key.removeprefix("visual."): value for key, value in to_open_clip(weights).items()
                           if key.startswith("visual.")})
    return model


def to_open_clip(weights) -> dict[str, torch.Tensor]:
    """The same weights under open_clip's names, with a piece of a text tower beside them."""
    found: dict[str, torch.Tensor] = {"positional_embedding": torch.zeros(77, 8), "logit_scale": torch.tensor(1.0)}
    for key, value in weights.items():
        if key == "visual_projection.weight":
            found["visual.proj"] = value.t().contiguous()
        elif key.startswith("vision_model.embeddings."):
            found[f"visual.{_EMBEDDINGS[key.removeprefix('vision_model.embeddings.')]}"] = value
        elif key.startswith("vision_model.encoder.layers."):
            layer, _, rest = key.removeprefix("vision_model.encoder.layers.").partition(".")
            module, _, kind = rest.rpartition(".")
            if module in _LAYERS:
                found[f"visual.transformer.resblocks.{layer}.{_LAYERS[module]}.{kind}"] = value
        else:
            module, _, kind = key.removeprefix("vision_model.").rpartition(".")
            found[f"visual.{'ln_pre' if module == 'pre_layrnorm' else 'ln_post'}.{kind}"] = value
    for layer in range(sum(key.endswith("layer_norm1.bias") for key in weights)):
        for kind in ("weight", "bias"):
            parts = [weights[f"vision_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"visual.transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return found


def with_text_tower(weights) -> dict[str, torch.Tensor]:
    """As the whole CLIP of a Hugging Face repository."""
    return {**weights, "text_model.embeddings.token_embedding.weight": torch.zeros(9, 8), "logit_scale": torch.tensor(1.0),
            "text_projection.weight": torch.zeros(8, 8)}
