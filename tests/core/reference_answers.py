"""Reading the reference answers in ``data/``, made by implementations independent of this project."""

import json
import zlib
from pathlib import Path

import torch
from safetensors import safe_open

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4


def read(name: str):
    with safe_open(str(DATA / f"{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata()


def filled(shapes, prefix: str = "") -> dict[str, torch.Tensor]:
    """Weights by the fill rule: seeded by the name, scaled by the shape."""
    weights = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32((prefix + name).encode()))
        noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
        if name.endswith("running_var"):
            weights[name] = 1 + 0.1 * noise.abs()
        elif len(shape) >= 2:
            weights[name] = noise / noise[0].numel() ** 0.5
        elif name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = 0.1 * noise
    return weights


def part(tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |a - b| / std(b)."""
    return ((found - wanted).abs().max() / wanted.std()).item()


def emma_module_metadata(modules_json: str, name: str) -> dict[str, str]:
    """The `emma` metadata entry of one of the reference modules."""
    entry = json.loads(modules_json)[name]
    features = {key: {"dim": spec["dim"], "tokens_per_vector": spec["tokens_per_vector"]}
                for key, spec in entry["features"].items()}
    return {"emma": json.dumps({
        "format_version": 1, "condition": name, "gate_scale": entry["gate_scale"], "separable_gates": True,
        "width": entry["width"], "heads": entry["heads"], "layers": entry["layers"], "features": features,
    })}
