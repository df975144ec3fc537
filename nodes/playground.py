"""Load EMMA Playground, and its reference pictures."""

from comfy_api.latest import io, ui

from .. import host
from ..emma_core.playground import reference_names
from ..host import paths
from .types import Ella, Encoder, Module, schema


class EMMAPlayground(io.ComfyNode):
    """The shipped small world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMAPlayground",
            display_name="Load EMMA Playground",
            aliases=("emma demo", "emma example", "emoji", "style transfer"),
            description="A small world of emoji (people, animals, food, things, places) that runs at once on any CPU, with "
                        "nothing to download: a tiny SD1.5-like model with its T5, VAE, ELLA, a style, a face and an object "
                        "module and their encoder. Pictures are 128 x 128.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="Tiny UNet in SD1.5 layout; use latents of 128 x 128."),
                io.Clip.Output(display_name="CLIP",
                               tooltip="Tiny T5 text encoder; prompts such as 'a cat' or 'woman astronaut'."),
                io.Vae.Output(display_name="VAE", tooltip="Small autoencoder in SD's latent layout."),
                Ella.Output(display_name="ELLA", tooltip="Small ELLA connector."),
                Module.Output(display_name="style module", tooltip="Takes the drawing style of a reference."),
                Module.Output(display_name="face module", tooltip="Takes the skin tone of a reference."),
                Encoder.Output(display_name="EMMA_ENCODER", tooltip="The encoder all modules need."),
                Module.Output(display_name="object module",
                              tooltip="Takes what is shown; prompt its kind alone ('person', 'nature', 'food', 'place', "
                                      "'object') and let the reference say the rest."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls) -> str:
        """Files that were replaced are read again."""
        return paths.playground_state()

    @classmethod
    def execute(cls) -> io.NodeOutput:
        parts = host.playground.load_playground()
        return io.NodeOutput(parts.model, parts.clip, parts.vae, parts.ella, parts.style, parts.face, parts.encoder,
                             parts.object)


class EMMAPlaygroundPicture(io.ComfyNode):
    """A shipped reference picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMAPlaygroundPicture",
            display_name="Load Playground Picture",
            aliases=("emma example picture", "emoji"),
            description="One of the reference pictures shipped with the playground.",
            is_output_node=True,  # shows its picture at every run, kept results or not
            inputs=[io.Combo.Input("picture", options=reference_names(), tooltip="style-* names an emoji "
                                   "set's style, face-* a skin tone, object-* what is shown."),
                    io.Image.Input("pictures", optional=True, tooltip="An earlier Load Playground Picture: this picture is "
                                                                      "added behind its own, to one batch.")],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="Wire this into Encode Reference Image.")],
        )

    @classmethod
    def fingerprint_inputs(cls, picture, pictures=None) -> str:
        """Files that were replaced are read again."""
        return paths.playground_state()

    @classmethod
    def execute(cls, picture, pictures=None) -> io.NodeOutput:
        chosen = host.playground.reference_picture(picture)
        return io.NodeOutput(host.playground.batch_of(pictures, chosen), ui=ui.PreviewImage(chosen))
