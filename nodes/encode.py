"""Encode Reference Image."""

from comfy_api.latest import io

from ..emma_core.reference_features import COMBINATIONS
from ..host import encoders
from .types import CATEGORY, Encoder, Module, Reference


class EMMAEncodeReference(io.ComfyNode):
    """Pictures -> the features that one module reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EMMAEncodeReference",
            display_name="Encode Reference Image",
            category=CATEGORY,
            description="Encodes reference pictures for one EMMA module. The module knows which features it needs; the "
                        "second output shows what the encoder saw.",
            inputs=[
                Module.Input("module", tooltip="The module that will read this reference."),
                io.MultiType.Input("encoder", types=[Encoder, io.ClipVision],
                                   tooltip="Load Reference Encoder, or a CLIP_VISION where the module needs CLIP."),
                io.Image.Input("image", tooltip="One or several reference pictures (a batch)."),
                io.Combo.Input("combine", options=list(COMBINATIONS), default=COMBINATIONS[0],
                               tooltip="Several pictures: concat shows all of them to the module, average and normalised "
                                       "average blend them, per frame gives each picture to its own frame of the batch."),
                io.Mask.Input("mask", optional=True,
                              tooltip="Object-centric mask: white is kept, the background becomes white. One for all or one "
                                      "per picture, any size."),
            ],
            outputs=[
                Reference.Output(display_name="EMMA_REFERENCE", tooltip="Wire this into Assemble EMMA Modules."),
                io.Image.Output(display_name="seen", tooltip="What the encoder saw, after mask, crop and resizing."),
            ],
        )

    @classmethod
    def execute(cls, module, encoder, image, combine, mask=None) -> io.NodeOutput:
        return io.NodeOutput(*encoders.encode_reference(module, encoder, image, mask, combine))
