"""Encode Prompt List."""

from comfy_api.latest import io

from .. import host
from .types import schema


class EMMAPromptList(io.ComfyNode):
    """Many prompts -> one CONDITIONING with a text for each picture of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMAPromptList",
            display_name="Encode Prompt List",
            aliases=("emma story", "prompt batch", "batch prompts", "storyboard"),
            description="Encodes one prompt per line, for a batch with one picture per prompt: a story with one character, "
                        "whose reference serves all pictures.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of Load ELLA Text Encoder; for the clip inputs of EMMA Connector the "
                                              "checkpoint's own."),
                io.String.Input("prompts", default="", multiline=True,
                                tooltip="One prompt per line; empty lines are skipped. (word:1.3) works as usual."),
                io.String.Input("prefix", default="", optional=True, tooltip="Written before every prompt: who the story is "
                                                                             "about."),
                io.String.Input("suffix", default="", optional=True, tooltip="Written behind every prompt: how the pictures "
                                                                             "look."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="One text for each picture, for EMMA Connector."),
                io.Int.Output(display_name="count", tooltip="The number of prompts: wire it into the batch size of Empty "
                                                            "Latent Image."),
                io.String.Output(display_name="texts", is_output_list=True,
                                 tooltip="The prompts as they were encoded, one by one, for file names or to look at."),
            ],
        )

    @classmethod
    def execute(cls, clip, prompts, prefix="", suffix="") -> io.NodeOutput:
        lines = host.prompt_list.prompt_lines(prompts, prefix, suffix)
        return io.NodeOutput(host.prompt_list.encode_prompts(clip, lines), len(lines), lines)
