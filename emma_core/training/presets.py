"""Presets of training runs, by section and key of the configuration."""

from __future__ import annotations

from typing import Any

Sections = dict[str, dict[str, Any]]
_FEW_PICTURES: Sections = {
    "train": {"steps": 2000, "batch": 2, "accumulate": 4, "rate": 5e-4, "gate_rate": 5.0, "warmup": 50,
              "schedule": "cosine", "gradient_checkpointing": True, "average": 0.99, "held_out": 0.1, "patience": 600},
    "objective": {"timestep_power": 0.4, "inverse_snr": 60.0, "place_weight": True},
    "report": {"save_every": 200, "log_every": 20},
    "output": {"calibrate": True},
}


def _on_card(**train: Any) -> Sections:
    """On a checkpoint's own tokens in bf16, whose range is that of float32: no scaler, and no update is left out."""
    return {**_FEW_PICTURES, "train": {**_FEW_PICTURES["train"], "precision": "bf16", **train}}


# "paper" is the configuration's own defaults (section 4.2)
PRESETS: dict[str, Sections] = {
    "paper": {},
    "small-card": _FEW_PICTURES,
    # what an IP-Adapter makes of any reference picture, on latents that the model draws of prompts itself; the teacher sees
    # references whole, so they are neither cropped nor mirrored
    "distil": {
        **_FEW_PICTURES,
        "data": {"reference_crops": 0, "reference_flip": False},
        "train": {**_FEW_PICTURES["train"], "steps": 3000},
        "objective": {**_FEW_PICTURES["objective"], "place_weight": False},
        "teacher": {"own_latents": True, "samples": 2},
    },
    "sd15-8gb": _on_card(),
    "sdxl-12gb": _on_card(batch=1, accumulate=8),
}
