"""Frame Strengths and Blend References: what changes over the frames of a video."""

from comfy_api.latest import io

from ..emma_core.model.frame_values import INTERPOLATIONS, parse_keyframes, values_between, values_over_frames
from .types import Reference, schema

_MOST_FRAMES = 4096


class EMMAFrameStrengths(io.ComfyNode):
    """Keyframes in a text -> one number for each frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMAFrameStrengths",
            display_name="EMMA Frame Strengths",
            aliases=("value schedule", "strength schedule", "keyframes", "float list", "animate strength"),
            description="One number for each frame of a video, from keyframes: for the strengths of Assemble EMMA Modules.",
            inputs=[
                io.Int.Input("frames", default=16, min=1, max=_MOST_FRAMES,
                             tooltip="Frames of the video: the batch size of the latent."),
                io.String.Input("keyframes", default="0: 0.0, 15: 1.0", multiline=True,
                                tooltip="Frame: strength, divided by commas or new lines; frames count from 0. Before the "
                                        "first keyframe its strength counts, after the last one its."),
                io.Combo.Input("interpolation", options=list(INTERPOLATIONS), default=INTERPOLATIONS[0],
                               tooltip="Between keyframes: linear, ease (slow at both), or hold (a keyframe's strength stays "
                                       "until the next)."),
            ],
            outputs=[
                io.Float.Output(display_name="strengths", tooltip="A list of numbers, for the strengths of Assemble EMMA "
                                                                  "Modules, or other nodes that take such lists."),
                io.Int.Output(display_name="count", tooltip="The number of frames, for the batch size of the latent."),
            ],
        )

    @classmethod
    def execute(cls, frames, keyframes, interpolation) -> io.NodeOutput:
        return io.NodeOutput(values_over_frames(parse_keyframes(keyframes), frames, interpolation), frames)


class EMMABlendReferences(io.ComfyNode):
    """Two references -> references on the way from one to the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMABlendReferences",
            display_name="Blend References",
            aliases=("emma blend", "mix references", "morph", "interpolate embeds", "style transition"),
            description="Blends two references of one encoder: into one reference, or over the frames of a video from one to "
                        "the other.",
            inputs=[
                Reference.Input("reference_a", tooltip="From Encode Reference Image or Load Reference; weight 0."),
                Reference.Input("reference_b", tooltip="Another, encoded for the same module; weight 1."),
                io.Int.Input("frames", default=16, min=1, max=_MOST_FRAMES,
                             tooltip="Frames of the video: one reference for each. 1 makes a single reference with "
                                     "start_weight, for all frames."),
                io.Float.Input("start_weight", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Share of reference_b in the first frame: 0 is reference_a alone."),
                io.Float.Input("end_weight", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Share of reference_b in the last frame: 1 is reference_b alone."),
                io.Combo.Input("interpolation", options=list(INTERPOLATIONS[:2]), default=INTERPOLATIONS[0],
                               tooltip="How the share changes over the frames: linear, or ease (slow at both ends)."),
            ],
            outputs=[Reference.Output(display_name="EMMA_REFERENCE",
                                      tooltip="Wire this into Assemble EMMA Modules with the module of both.")],
        )

    @classmethod
    def execute(cls, reference_a, reference_b, frames, start_weight, end_weight, interpolation) -> io.NodeOutput:
        from ..emma_core.encoders.matching import blend_references  # here, as the encoders take long to import

        weights = values_between(start_weight, end_weight, frames, interpolation)
        return io.NodeOutput(blend_references(reference_a, reference_b, weights))
