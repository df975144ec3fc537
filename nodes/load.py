"""Loaders: ELLA, its text encoder, EMMA modules, reference encoders."""

from comfy_api.latest import io

from .. import host
from ..emma_core.encoders.open_clip_names import model_names as open_clip_names
from ..host import paths, text_options
from ..host.messages import show_on_node
from .types import Ella, Encoder, Module, advanced, schema

RECOGNISE = "recognise"
PLAYGROUND_ENCODER = "playground (shipped)"


class EMMALoadELLA(io.ComfyNode):
    """File in models/ella -> ELLA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMALoadELLA",
            display_name="Load ELLA",
            aliases=("ella loader", "t5 connector"),
            description="Loads an ELLA connector, which turns T5 text features into cross-attention tokens, anew at every "
                        "timestep. Files go into models/ella.",
            inputs=[
                io.Combo.Input("ella_name", options=paths.ELLA.names(),
                               tooltip="ELLA file in models/ella, for instance ella-sd1.5-tsc-t5xl.safetensors."),
            ],
            outputs=[Ella.Output(display_name="ELLA", tooltip="Wire this into EMMA Connector.")],
        )

    @classmethod
    def fingerprint_inputs(cls, ella_name) -> str:
        """A file that was replaced is read again."""
        return paths.ELLA.state(ella_name)

    @classmethod
    def execute(cls, ella_name) -> io.NodeOutput:
        return io.NodeOutput(host.loaded.load_ella(paths.ELLA.path(ella_name)))


class EMMALoadTextEncoder(io.ComfyNode):
    """T5 encoder -> CLIP, for the stock CLIP Text Encode."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMALoadTextEncoder",
            display_name="Load ELLA Text Encoder",
            aliases=("t5", "flan-t5", "ella text encoder", "t5 loader"),
            description="Loads the T5 encoder that an ELLA reads (flan-t5-xl for the released one). Use its CLIP output with "
                        "the usual CLIP Text Encode nodes, and wire their conditioning into EMMA Connector.",
            inputs=[
                io.Combo.Input("text_encoder_name", options=paths.TEXT_ENCODER.names(),
                               tooltip="A .safetensors file or a Hugging Face folder in models/text_encoders or "
                                       "models/ella_encoder."),
                io.Combo.Input("dtype", options=list(text_options.DTYPES), default="auto",
                               tooltip="Precision of the encoder. auto: float16 on GPUs (ELLA was trained with it), float32 "
                                       "on the CPU. Pictures differ visibly between precisions."),
                io.Combo.Input("empty_prompt", options=list(text_options.EMPTY_PROMPT_LENGTHS), default="natural length",
                               tooltip="How an empty (negative) prompt is encoded: at its natural length of one token, or "
                                       "padded to 128 tokens as in ELLA's training."),
            ],
            outputs=[io.Clip.Output(display_name="CLIP",
                                    tooltip="Wire this into CLIP Text Encode or Encode Prompt List. Their T5 features are for "
                                            "EMMA Connector, EMMA Gate Map and Train EMMA Module.")],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder_name, dtype, empty_prompt) -> str:
        """A file that was replaced is read again."""
        return paths.TEXT_ENCODER.state(text_encoder_name)

    @classmethod
    def execute(cls, text_encoder_name, dtype, empty_prompt) -> io.NodeOutput:
        path = paths.TEXT_ENCODER.path(text_encoder_name)
        return io.NodeOutput(host.text_encoder.load_text_encoder_clip(path, dtype=dtype, empty_prompt=empty_prompt))


class EMMALoadModule(io.ComfyNode):
    """File in models/emma -> EMMA_MODULE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMALoadModule",
            display_name="Load EMMA Module",
            aliases=("emma loader", "module loader", "style transfer", "ip-adapter model", "ipadapter model"),
            description="Loads an EMMA module: small gated blocks that inject one kind of reference (a style, an object, a "
                        "portrait, a face) into ELLA's tokens or a checkpoint's own; the node says which. Files go into "
                        "models/emma.",
            hidden=[io.Hidden.unique_id],
            inputs=[io.Combo.Input("module_name", options=paths.MODULE.names(), tooltip="EMMA module in models/emma.")],
            outputs=[Module.Output(display_name="EMMA_MODULE",
                                   tooltip="Wire this into Encode Reference Image and Assemble EMMA Modules.")],
        )

    @classmethod
    def fingerprint_inputs(cls, module_name) -> str:
        """A file that was replaced is read again."""
        return paths.MODULE.state(module_name)

    @classmethod
    def execute(cls, module_name) -> io.NodeOutput:
        module = host.loaded.load_emma_module(paths.MODULE.path(module_name))
        show_on_node(module.in_words, cls.hidden and cls.hidden.unique_id)
        return io.NodeOutput(module)


class EMMALoadReferenceEncoder(io.ComfyNode):
    """Reference encoder -> EMMA_ENCODER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMALoadReferenceEncoder",
            display_name="Load Reference Encoder",
            aliases=("clip vision", "open_clip", "siglip", "adaface", "face recognition"),
            description="Loads the encoder that reference pictures go through. Each EMMA module says which one it needs; a "
                        "wrong one is refused. The kind of a file is recognised by its contents, whatever its name. (The "
                        "licence of AdaFace's published weights is unclear: check it before you use or share what they make.)",
            inputs=[
                io.Combo.Input("encoder_name", options=[PLAYGROUND_ENCODER, *paths.REFERENCE_ENCODER.names()],
                               tooltip="The shipped playground encoder, a CLIP vision file in models/clip_vision, a model of "
                                       "open_clip in models/open_clip, or AdaFace in models/adaface. Files or folders."),
                advanced(io.Combo.Input(
                    "open_clip_model", options=[RECOGNISE, *open_clip_names()], default=RECOGNISE, optional=True,
                    tooltip="For open_clip models whose kind their file does not tell: open_clip's name of it.")),
            ],
            outputs=[Encoder.Output(display_name="EMMA_ENCODER", tooltip="Wire this into Encode Reference Image.")],
        )

    @classmethod
    def fingerprint_inputs(cls, encoder_name, open_clip_model=RECOGNISE) -> str:
        """A file that was replaced is read again."""
        if encoder_name == PLAYGROUND_ENCODER:
            return paths.playground_state()
        return paths.REFERENCE_ENCODER.state(encoder_name)

    @classmethod
    def execute(cls, encoder_name, open_clip_model=RECOGNISE) -> io.NodeOutput:
        if encoder_name == PLAYGROUND_ENCODER:
            return io.NodeOutput(host.encoders.load_playground_reference_encoder())
        name = None if open_clip_model == RECOGNISE else open_clip_model
        return io.NodeOutput(host.encoders.load_reference_encoder(paths.REFERENCE_ENCODER.path(encoder_name), name))
