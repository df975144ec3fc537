"""EMMA Gate Map."""

from comfy_api.latest import io

from .. import host
from ..emma_core.model.strength_keyframes import LAST_TIMESTEP
from .types import Assembly, Ella, schema


class EMMAGateMap(io.ComfyNode):
    """Gate values of each module over token index and block depth."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMAGateMap",
            display_name="EMMA Gate Map",
            aliases=("emma gates", "heat map"),
            description="Draws where each module of an assembly acts: token index across, block depth down, one panel per "
                        "module. Sparse maps that differ between modules are why modules can be assembled.",
            inputs=[
                Ella.Input("ella", optional=True, tooltip="The ELLA that the modules are used with. Leave it empty for"
                                                          " modules made for a checkpoint's own tokens."),
                Assembly.Input("assembly", tooltip="The assembly to look into."),
                io.Conditioning.Input("conditioning", tooltip="The prompt, encoded with Load ELLA Text Encoder. The first "
                                                              "entry is drawn."),
                io.Int.Input("timestep", default=700, min=0, max=LAST_TIMESTEP,
                             tooltip="Timestep to look at: 999 is pure noise, 0 the finished picture."),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The gate map, for Preview Image.")],
        )

    @classmethod
    def execute(cls, assembly, conditioning, timestep, ella=None) -> io.NodeOutput:
        return io.NodeOutput(host.gate_maps.gate_map_image(ella, assembly, conditioning, timestep))
