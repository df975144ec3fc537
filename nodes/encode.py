"""Encode Reference Image."""

from functools import partial

from comfy_api.latest import io

from .. import host
from ..emma_core.encoders.face_alignment import parse_keypoints
from ..emma_core.encoders.options import BACKGROUNDS, FACES, FRAMES, FaceChoice, Framing
from ..emma_core.model.reference_features import COMBINATIONS
from ..host.messages import show_on_node
from .types import Encoder, Module, Reference, advanced, schema


class EMMAEncodeReference(io.ComfyNode):
    """Pictures -> the features that one module reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMAEncodeReference",
            display_name="Encode Reference Image",
            aliases=("emma reference", "reference image", "style reference", "style transfer", "multi modal", "multimodal",
                     "ipadapter", "ip-adapter", "face id", "portrait", "image prompt"),
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
                              tooltip="Object-centric mask: white is kept, the rest becomes the background colour. One for all "
                                      "or one per picture, any size. For a face module: where the face is, instead of "
                                      "detecting it."),
                io.Combo.Input("frame", options=list(FRAMES), default=FRAMES[0], optional=True,
                               tooltip="Which part of a picture that is not square the encoder sees: a crop at this position, "
                                       "the whole picture padded, or stretched. As trained: what the module was trained with."),
                advanced(io.Combo.Input(
                    "background", options=list(BACKGROUNDS), default=BACKGROUNDS[0], optional=True,
                    tooltip="Colour behind a masked object and beside a padded picture. Mean colour is what the encoder reads "
                            "as nothing.")),
                io.Boolean.Input("crop_to_mask", default=False, optional=True,
                                 tooltip="Show the encoder only the masked object, as large as fits."),
                advanced(io.Float.Input(
                    "margin", default=0.1, min=0.0, max=4.0, step=0.05, optional=True,
                    tooltip="Room around the object when cropping to the mask, in shares of its longer side.")),
                io.Combo.Input("face", options=list(FACES), default=FACES[0], optional=True,
                               tooltip="Face modules: the largest face of a picture, one by its index, or all of them (each "
                                       "becomes a reference of its own)."),
                advanced(io.Int.Input("face_index", default=0, min=0, max=999, optional=True,
                                      tooltip="For 'by index': 0 is the leftmost face.")),
                advanced(io.String.Input(
                    "keypoints", default="", optional=True,
                    tooltip="Face modules: five points instead of detection, in pixels: left eye, right eye, nose, left and "
                            "right corner of the mouth as the picture shows them: x y x y x y x y x y; faces divided by ';'. "
                            "For several pictures as JSON: pictures, in each its faces, in each five [x, y].")),
            ],
            outputs=[
                Reference.Output(display_name="EMMA_REFERENCE", tooltip="Wire this into Assemble EMMA Modules."),
                io.Image.Output(display_name="seen", tooltip="What the encoder saw, after mask, crop and resizing."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, module, encoder, image, combine, mask=None, frame=FRAMES[0], background=BACKGROUNDS[0], crop_to_mask=False,
        margin=0.1, face=FACES[0], face_index=0, keypoints="",
    ) -> io.NodeOutput:
        framing = Framing(frame, background, crop_to_mask, margin)
        faces = FaceChoice(face, face_index, parse_keypoints(keypoints))
        tell = partial(show_on_node, node_id=cls.hidden and cls.hidden.unique_id)
        return io.NodeOutput(*host.encoders.encode_reference(module, encoder, image, mask, combine, framing, faces, tell))
