"""Save Reference and Load Reference."""

from comfy_api.latest import io

from .. import host
from ..host import paths
from .types import Reference, saved_as, schema


class EMMASaveReference(io.ComfyNode):
    """EMMA_REFERENCE -> file in models/emma_references."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMASaveReference",
            display_name="Save Reference",
            aliases=("save emma reference", "embeds"),
            description="Saves an encoded reference into models/emma_references, so that it can be used again, or shared, "
                        "without the picture and its encoder.",
            inputs=[
                Reference.Input("reference", tooltip="From Encode Reference Image."),
                io.String.Input("name", default="reference",
                                tooltip="File name, with folders if you like: people/ada. A file of that name is never "
                                        "overwritten; the new one gets a number."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, reference, name) -> io.NodeOutput:
        return saved_as(cls, host.references.save_named_reference(reference, name))


class EMMALoadReference(io.ComfyNode):
    """File in models/emma_references -> EMMA_REFERENCE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMALoadReference",
            display_name="Load Reference",
            aliases=("load emma reference", "embeds"),
            description="Loads a reference that Save Reference wrote. A module that was trained with another encoder refuses "
                        "it.",
            inputs=[io.Combo.Input("reference_name", options=paths.REFERENCE.names(),
                                   tooltip="File in models/emma_references.")],
            outputs=[Reference.Output(display_name="EMMA_REFERENCE", tooltip="Wire this into Assemble EMMA Modules.")],
        )

    @classmethod
    def fingerprint_inputs(cls, reference_name) -> str:
        """A file that was replaced is read again."""
        return paths.REFERENCE.state(reference_name)

    @classmethod
    def execute(cls, reference_name) -> io.NodeOutput:
        return io.NodeOutput(host.references.load_named_reference(reference_name))
