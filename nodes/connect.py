"""EMMA Connector."""

from comfy_api.latest import io

from .. import host
from ..emma_core.model.addition import ADDITIONS, BLOCKS, RECOMMENDED
from .types import Assembly, Ella, schema


class EMMAConnector(io.ComfyNode):
    """MODEL and T5 conditioning -> MODEL and conditioning whose tokens follow every timestep."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMAConnector",
            display_name="EMMA Connector",
            aliases=("apply emma", "apply ella", "ella apply", "t5", "image prompt", "multi modal", "multimodal", "ipadapter",
                     "ip-adapter"),
            description="Connects ELLA, and the assembled EMMA modules, to a model. At every step of any sampler the "
                        "cross-attention gets the tokens of that step's timestep. Wire all three outputs into the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="A checkpoint of the ELLA's family (SD1.5 for the released one), with its "
                                                "LoRAs and other patches."),
                Ella.Input("ella", optional=True, tooltip="The connector, from Load ELLA. Leave it empty for"
                                                          " modules made for a checkpoint's own tokens."),
                io.Conditioning.Input("positive", tooltip="The prompt, encoded with Load ELLA Text Encoder."),
                io.Conditioning.Input("negative", tooltip="The negative prompt (often empty), encoded the same way. It gets no "
                                                          "references."),
                Assembly.Input("assembly", optional=True, tooltip="References. Without it this is ELLA alone."),
                io.Conditioning.Input("clip_positive", optional=True,
                                      tooltip="The prompt encoded with the checkpoint's own CLIP, appended to the tokens "
                                              "(ELLA+CLIP). Keeps LoRA trigger words and a community checkpoint's look."),
                io.Conditioning.Input("clip_negative", optional=True,
                                      tooltip="The negative prompt encoded with the checkpoint's own CLIP. Give both or "
                                              "none: equal lengths sample in one pass."),
                # graphs that were saved before it was there: web/old_graphs.js
                io.Combo.Input("adding", options=list(ADDITIONS), default=RECOMMENDED, optional=True,
                               tooltip="Where several references are added up; a single one is the same in all. early "
                                       "predictions: at first each works alone and is added to the picture, and they stay "
                                       "nearly as strong as alone for a little more time. predictions: the same to the end, "
                                       "with one more evaluation of the model in every step for each reference. blocks: no "
                                       "more time, but the references weaken each other. tokens: no more time either, and "
                                       "in between."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="Sample with this model; the one you gave stays as it was."),
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler or ControlNet."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler or ControlNet."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, ella=None, assembly=None, clip_positive=None, clip_negative=None, adding=BLOCKS
    ) -> io.NodeOutput:
        return io.NodeOutput(*host.connecting.connect(
            model, ella, positive, negative, assembly, clip_positive, clip_negative, ADDITIONS[adding]))
