"""Everything frozen that a picture takes, from the files that settings name; the playground brings its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..encoders.base import ReferenceEncoder
from ..errors import SettingsError
from ..files.connector_file import load_connector
from ..model.connector import Connector, ConnectorConfig
from ..playground import PLAYGROUND, PLAYGROUND_DIR
from ..text.encoder import TextEncoder, load_text_encoder, usual_dtype
from .backbones import Backbone, load_backbone
from .config import BaseConfig, EllaConfig, check_files

UNET, AUTOENCODER, TEXT_ENCODER, REFERENCE_ENCODER = "UNet", "autoencoder", "text encoder", "reference encoder"


@dataclass(eq=False)
class Parts:
    """Everything frozen: diffusion model, connector, text encoder, reference encoder.

    An encoder is None where nothing is left for it to do.
    """

    backbone: Backbone
    connector: Connector
    text_encoder: TextEncoder | None
    reference_encoder: ReferenceEncoder | None
    device: torch.device

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
    playground = base.checkpoint == PLAYGROUND
    file = ella.file or (PLAYGROUND_DIR / "ella.safetensors" if playground else "")
    text = ella.text_encoder or (PLAYGROUND_DIR / "t5.safetensors" if playground else "")
    check_files(base, ella, new_ella=new_ella)
    backbone = load_backbone(base, dtype)
    backbone.alphas_cumprod_T = backbone.alphas_cumprod_T.to(device)
    width, connector = backbone.spec.context_width, load_connector(file) if file else None
    text_encoder = load_text_encoder(text, usual_dtype(device), width=connector.config.text_dim if connector else None,
                                     tokenizer=ella.tokenizer or None)
    connector = connector or Connector(ConnectorConfig(width=width, text_dim=text_encoder.width))
    if connector.width != width:
        raise SettingsError(f"the ELLA has tokens of width {connector.width}, {backbone.name} reads width {width}. Choose an "
                            "ELLA made for this kind of checkpoint.")
    return Parts(backbone, connector, text_encoder, None, device)
