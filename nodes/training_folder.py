"""Load Training Folder."""

from comfy_api.latest import io

from .. import host
from ..host.messages import show_on_node
from ..host.picture_folders import WIRED, folder_names, folder_state
from .types import TrainingSet, advanced, schema


class EMMALoadTrainingFolder(io.ComfyNode):
    """A folder of captioned pictures -> EMMA_TRAINING_SET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMALoadTrainingFolder",
            display_name="Load Training Folder",
            aliases=("load dataset", "training folder", "dataset folder", "captions"),
            description="Reads a folder of pictures with captions, groups and masks for Train EMMA Module, and checks all of "
                        "it. What is encoded lies in output/emma_training/cache and is used again.",
            inputs=[*_pictures(), *_settings(), *_wired()],
            outputs=[
                TrainingSet.Output(display_name="EMMA_TRAINING_SET", tooltip="Pictures, texts and references for Train EMMA "
                                                                             "Module."),
                io.String.Output(display_name="report", tooltip="How many pictures, groups, sizes and captions there are, and "
                                                                "what to know of them."),
            ],
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, **others) -> str:
        """A folder whose files changed is read again."""
        return folder_state(folder[0])

    @classmethod
    def execute(
        cls, folder, vae, clip, resolution, use_masks, flip, reference_crops, own_reference, images=(), texts=(),
    ) -> io.NodeOutput:
        data = {"resolution_px": resolution[0], "flip": flip[0], "reference_crops": reference_crops[0],
                "own_reference": own_reference[0]}
        loaded, report = host.training_folder.load_training_folder(folder[0], data, use_masks[0], vae[0], clip[0], images,
                                                                   texts)
        show_on_node(report, cls.hidden and cls.hidden.unique_id)
        return io.NodeOutput(loaded, report)


def _pictures() -> list[io.Input]:
    return [
        io.Combo.Input("folder", options=folder_names(), default=WIRED,
                       tooltip="A folder in ComfyUI's input folder: pictures with captions in .txt files of the same name. "
                               "Folders in it are groups (a person, a style): a reference comes from the picture's own group. "
                               "Or the pictures that are wired."),
        io.Vae.Input("vae", tooltip="The VAE of the checkpoint that is trained on."),
        io.Clip.Input("clip", tooltip="What texts are encoded with: Load ELLA Text Encoder, or without an ELLA the "
                                      "checkpoint's own CLIP."),
    ]


def _settings() -> list[io.Input]:
    return [
        io.Int.Input("resolution", default=512, min=64, max=4096, step=64,
                     tooltip="Side of a square picture; other shapes get about its area. 512 for SD1.5, 1024 for SDXL, 128 on "
                             "the playground."),
        io.Boolean.Input("use_masks", default=False,
                         tooltip="Remove the background of references with their masks: <name>.mask.png, white on the object."),
        advanced(io.Boolean.Input("flip", default=False, tooltip="Learn mirrored pictures too.")),
        advanced(io.Int.Input("reference_crops", default=2, min=0, max=16,
                              tooltip="Randomly cropped variants of each reference, beside the whole picture.")),
        advanced(io.Boolean.Input("own_reference", default=False,
                                  tooltip="A picture may be its own reference, even where its group has others.")),
    ]


def _wired() -> list[io.Input]:
    return [
        io.Image.Input("images", optional=True, tooltip="In place of a folder: a batch, or the list of the host's dataset "
                                                        "nodes, for instance Load Image-Text (from Folder)."),
        io.String.Input("texts", optional=True, force_input=True, tooltip="A text for each of these pictures, or one for all."),
    ]
