"""Everything frozen that a picture takes, from the files that settings name; the playground brings its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..encoders.base import ReferenceEncoder
from ..errors import SettingsError
from ..files.connector_file import load_connector
from ..model.connector import Connector, ConnectorConfig
from ..model.own_tokens import OwnTokens
from ..playground import PLAYGROUND, PLAYGROUND_DIR
from ..text.clip_encoder import ClipTextEncoder
from ..text.encoder import TextEncoder, load_text_encoder, usual_dtype
from .backbones import Backbone, load_backbone
from .config import BaseConfig, EllaConfig, check_files, uses_ella
from .lora import merge_text_lora
from .own_text import load_own_text

UNET, AUTOENCODER, TEXT_ENCODER, REFERENCE_ENCODER = "UNet", "autoencoder", "text encoder", "reference encoder"


@dataclass(eq=False)
class Parts:
    """Everything frozen: diffusion model, connector (or the base's own tokens), text encoder, reference encoder.

    An encoder is None where nothing is left for it to do.
    """

    backbone: Backbone
    connector: Connector | OwnTokens
    text_encoder: TextEncoder | ClipTextEncoder | None
    reference_encoder: ReferenceEncoder | None
    device: torch.device

    @property
    def on_own_tokens(self) -> bool:
        """Whether modules act on the tokens of the checkpoint's own text encoders."""
        return isinstance(self.connector, OwnTokens)

    def connector_on_device(self) -> Connector | OwnTokens:
        """The connector, on the device; own tokens have no weights."""
        return self.connector if isinstance(self.connector, OwnTokens) else self.connector.to(self.device)

    def pooled(self, prompts: Sequence[str], weighted: bool = False) -> list[torch.Tensor]:
        """The pooled vector (1, P) of each prompt, where the base reads one; else nothing. See `ClipTextEncoder.pooled`."""
        if not self.backbone.spec.pooled_width or not isinstance(self.text_encoder, ClipTextEncoder):
            return []
        return self.text_encoder.pooled(prompts, weighted)

    def place(self, *names: str) -> None:
        """Put these models (UNET, AUTOENCODER, TEXT_ENCODER, REFERENCE_ENCODER) on the device, and the others off it.

        With flan-t5-xl and CLIP ViT-H/14 all of them would take 7 GB.
        """
        models = {UNET: self.backbone.unet, AUTOENCODER: self.backbone.autoencoder,
                  TEXT_ENCODER: self.text_encoder and self.text_encoder.model,
                  REFERENCE_ENCODER: self.reference_encoder and self.reference_encoder.model}
        for here in (False, True):  # room is made first
            for name, model in models.items():
                if model is not None and (name in names) == here:
                    torch.nn.Module.to(model, self.device if here else "cpu")


def load_base_parts(
    base: BaseConfig, ella: EllaConfig, dtype: torch.dtype, device: torch.device, new_ella: bool = False
) -> Parts:
    """All but a reference encoder, still on the CPU: the UNet in ``dtype``, the connector in float32. `Parts.place` moves them.

    Args:
        base, ella: what settings name.
        dtype: of the UNet's weights.
        device: that they are for.
        new_ella: where no ELLA is named, a connector of the released size at random.
    Raises:
        SettingsError: a part is not named, or two do not fit together.
        EmmaError: a file that cannot be used, see the loaders.
    """
    check_files(base, ella, new_ella=new_ella)
    on_own_tokens = not uses_ella(base, ella) and not new_ella
    backbone = load_backbone(base, dtype, on_own_tokens)
    backbone.alphas_cumprod_T = backbone.alphas_cumprod_T.to(device)
    if on_own_tokens:
        text_encoder = load_own_text(Path(base.checkpoint), backbone.spec, usual_dtype(device))
        if base.lora:
            merge_text_lora(text_encoder, Path(base.lora))
        return Parts(backbone, backbone.spec.own_tokens, text_encoder, None, device)
    return Parts(backbone, *_ella_of(base, ella, backbone, device), None, device)


def _ella_of(
    base: BaseConfig, ella: EllaConfig, backbone: Backbone, device: torch.device
) -> tuple[Connector, TextEncoder]:
    """The connector and its text encoder."""
    playground = base.checkpoint == PLAYGROUND
    file = ella.file or (PLAYGROUND_DIR / "ella.safetensors" if playground else "")
    text = ella.text_encoder or (PLAYGROUND_DIR / "t5.safetensors" if playground else "")
    width, connector = backbone.spec.context_width, load_connector(file) if file else None
    text_encoder = load_text_encoder(text, usual_dtype(device), width=connector.config.text_dim if connector else None,
                                     tokenizer=ella.tokenizer or None)
    connector = connector or Connector(ConnectorConfig(width=width, text_dim=text_encoder.width))
    if connector.width != width:
        raise SettingsError(f"the ELLA has tokens of width {connector.width}, {backbone.name} reads width {width}. Choose an "
                            "ELLA made for this kind of checkpoint.")
    return connector, text_encoder
