"""The shipped playground: complete, small, whole, and of one piece."""

from pathlib import Path

import pytest
import torch

from emma_core import load_connector, load_module
from emma_core.base.spec import PLAYGROUND_SPEC
from emma_core.encoders.loading import load_encoder
from emma_core.files.tensor_file import read_tensors
from emma_core.playground import PLAYGROUND_DIR, load_autoencoder, load_unet
from emma_core.text.encoder import load_text_encoder

MOST_BYTES = 40_000_000
CONDITIONS = ("style", "face", "object")


def shipped_files() -> list[Path]:
    return [path for path in PLAYGROUND_DIR.rglob("*") if path.is_file()]


def test_the_playground_is_small():
    assert sum(path.stat().st_size for path in shipped_files()) <= MOST_BYTES


def test_all_weights_are_float16():
    for path in PLAYGROUND_DIR.glob("*.safetensors"):
        assert {tensor.dtype for tensor in read_tensors(path, "weights")[0].values()} == {torch.float16}, path.name


def test_every_part_loads_strictly_and_fits_the_others():
    connector = load_connector(PLAYGROUND_DIR / "ella.safetensors")
    unet, text_encoder = load_unet(), load_text_encoder(PLAYGROUND_DIR / "t5.safetensors")
    assert unet.config["cross_attention_dim"] == connector.width == PLAYGROUND_SPEC.context_width
    assert text_encoder.width == connector.config.text_dim
    text_1ND = text_encoder.encode(["woman astronaut"])[0]
    tokens_1KW = connector.tokens(text_1ND, torch.tensor([500]))
    assert unet(torch.zeros(1, 4, 16, 16), torch.tensor([500]), tokens_1KW).sample.shape == (1, 4, 16, 16)
    assert load_autoencoder(PLAYGROUND_SPEC.latent_scale).decode(torch.zeros(1, 4, 16, 16)).shape == (1, 3, 128, 128)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_modules_belong_to_the_shipped_ella_and_encoder(condition):
    module = load_module(PLAYGROUND_DIR / f"emma-{condition}.safetensors")
    connector = load_connector(PLAYGROUND_DIR / "ella.safetensors")
    encoder = load_encoder(PLAYGROUND_DIR / "encoder.safetensors")
    assert module.config.condition == condition
    assert module.config.ella == {"sha256": connector.sha256, "latents": connector.latents}
    assert encoder.description.items() <= module.config.encoder.items()
    assert (module.config.width, module.config.layers) == (connector.width, connector.layers)
    assert module.config.file_metadata["modelspec.license"] == "Apache-2.0"


@pytest.mark.parametrize("condition", CONDITIONS)
def test_modules_are_trained(condition):
    module = load_module(PLAYGROUND_DIR / f"emma-{condition}.safetensors")
    assert module.config.training["steps"] > 100
    assert max(abs(block.attn_gate.item()) for block in module.blocks) > 0.01


def test_credits_name_every_vendor_and_licence():
    text = (PLAYGROUND_DIR / "CREDITS.md").read_text(encoding="utf-8")
    for name in ("Noto", "Google", "Apache-2.0", "Twemoji", "CC-BY-4.0", "Fluent", "Microsoft", "MIT"):
        assert name in text
