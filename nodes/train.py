"""Train EMMA Module and Save EMMA Module."""

from comfy_api.latest import io

from .. import host
from ..emma_core.model.conditions import CONDITIONS
from ..emma_core.model.ip_adapter_blocks import BLOCKS
from ..emma_core.training.presets import PRESETS
from .types import Ella, Encoder, Module, Teacher, TrainingSet, advanced, saved_as, schema

_PRESET = "small-card"
_TRAIN, _OBJECTIVE = PRESETS[_PRESET]["train"], PRESETS[_PRESET]["objective"]
# beside latents no empty prompt is wired, and their number says nothing of pictures to spare
_OF_LATENTS = {"objective.drop_text": 0.0, "objective.drop_both": 0.0, "train.held_out": 0.0}
_LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


class EMMATrainModule(io.ComfyNode):
    """Latents, texts and references -> a module that learnt from them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMATrainModule",
            display_name="Train EMMA Module",
            aliases=("train emma", "finetune", "train style", "style transfer", "train face", "distill"),
            description="Trains an EMMA module on pictures, their texts and their references; model, ELLA and encoder stay "
                        "frozen. Checkpoints go into output/emma_training. After Cancel the same run goes on where it was.",
            inputs=[*_wired(), *_settings(), *_optional()],
            outputs=[
                Module.Output(display_name="EMMA_MODULE", tooltip="For Save EMMA Module, Encode Reference Image and Assemble "
                                                                  "EMMA Modules."),
                io.LossMap.Output(display_name="LOSS_MAP", tooltip="Loss of every update, for the host's Plot Loss Graph."),
                io.String.Output(display_name="report", tooltip="What was trained, and what the reference gains."),
            ],
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, encoder, name, condition, steps, batch, accumulate, rate, gate_rate, seed, precision, timestep_power,
        inverse_snr, average, checkpoint_every, ella=(None,), latents=(), positive=(), reference_image=(), start=(None,),
        teacher_model=(None,), teacher_positive=(), teacher=(None,), training_set=(None,), patience=(_TRAIN["patience"],),
        sample_every=(0,),
    ) -> io.NodeOutput:
        from ..emma_core.training.config import resolve  # here, as the trainer takes long to import

        config = resolve({}, _PRESET, {
            "output.folder": name[0], "module.condition": condition[0], "train.steps": steps[0], "train.batch": batch[0],
            "train.accumulate": accumulate[0], "train.rate": rate[0], "train.gate_rate": gate_rate[0], "train.seed": seed[0],
            "train.precision": host.training.precision_of(precision[0]), "train.average": average[0],
            "objective.timestep_power": timestep_power[0], "objective.inverse_snr": inverse_snr[0],
            "train.patience": patience[0], "report.save_every": checkpoint_every[0], "report.keep": 1,
            "report.sample_every": sample_every[0],
            **({} if training_set[0] else _OF_LATENTS),
        })
        inputs = host.training.TrainingInputs(model[0], ella[0], latents, positive, reference_image, encoder[0], start[0],
                                              teacher_model[0], teacher_positive, teacher[0], training_set[0])
        made = host.training.train(inputs, config, cls.hidden and cls.hidden.unique_id)
        return io.NodeOutput(made.module, {"loss": made.losses}, made.report, ui=made.shown)


def _wired() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The checkpoint to train on, with its LoRAs. It stays as it is: a copy is used."),
        Ella.Input("ella", optional=True, tooltip="The connector, from Load ELLA. The module belongs to it. "
                                                  "Leave it empty for modules made for a checkpoint's own tokens."),
        io.Latent.Input("latents", optional=True, tooltip="Pictures to learn from, from VAE Encode: a batch, or a list of any "
                                                          "sizes. Or wire training_set instead."),
        io.Conditioning.Input("positive", optional=True,
                              tooltip="Their texts, encoded with Load ELLA Text Encoder: one for all pictures, or one for each "
                                      "(a list, or combined)."),
        io.Image.Input("reference_image", optional=True, tooltip="References: one for all pictures, or one for each, in the "
                                                                 "same order."),
        io.MultiType.Input("encoder", types=[Encoder, io.ClipVision],
                           tooltip="Load Reference Encoder, or a CLIP_VISION. The module will need the same one."),
    ]


def _settings() -> list[io.Input]:
    conditions = list(CONDITIONS)
    return [
        io.String.Input("name", default="module", tooltip="Folder in output/emma_training. One that holds another run gets a "
                                                          "number; the same run goes on."),
        io.Combo.Input("condition", options=conditions, default=conditions[0],
                       tooltip="What the module takes from a reference: style and face read one vector, object and portrait "
                               "read details too."),
        io.Int.Input("steps", default=_TRAIN["steps"], min=1, max=1_000_000, tooltip="Updates of the module in all."),
        io.Int.Input("batch", default=_TRAIN["batch"], min=1, max=256, tooltip="Pictures at once; more need more memory."),
        io.Int.Input("accumulate", default=_TRAIN["accumulate"], min=1, max=1024,
                     tooltip="Batches for one update: as a larger batch, without more memory."),
        io.Float.Input("rate", default=_TRAIN["rate"], min=0.0, max=1.0, step=1e-6, round=False,
                       tooltip="Learning rate of AdamW. Lower it if the loss rises."),
        io.Float.Input("gate_rate", default=_TRAIN["gate_rate"], min=0.0, max=1000.0, step=0.1,
                       tooltip="Factor on the rate of the global gates, which begin at 0: how fast the module comes in."),
        io.Int.Input("seed", default=0, min=0, max=_LARGEST_SEED, control_after_generate=False,
                     tooltip="Of everything random. Another seed is another run."),
        io.Combo.Input("precision", options=["auto", "fp32", "bf16"], default="auto",
                       tooltip="Of the frozen model. auto: bf16 on GPUs that have it, else fp32."),
        advanced(io.Float.Input("timestep_power", default=_OBJECTIVE["timestep_power"], min=0.05, max=10.0, step=0.05,
                                tooltip="1 draws timesteps evenly; less draws more noise, where a reference shows.")),
        advanced(io.Float.Input("inverse_snr", default=_OBJECTIVE["inverse_snr"], min=0.0, max=1000.0, step=1.0,
                                tooltip="Weight 1/SNR, at most this: stresses high noise. 0 weighs all timesteps alike.")),
        advanced(io.Float.Input("average", default=_TRAIN["average"], min=0.0, max=0.99999, step=1e-5, round=False,
                                tooltip="Decay of averaged weights, which are what comes out. 0: the last weights.")),
        advanced(io.Int.Input("checkpoint_every", default=PRESETS[_PRESET]["report"]["save_every"], min=1, max=1_000_000,
                              tooltip="Updates between checkpoints; Cancel writes one too.")),
    ]


def _optional() -> list[io.Input]:
    return [
        Module.Input("start", optional=True, tooltip="A module to start from, of the same ELLA and condition sizes."),
        io.Model.Input("teacher_model", optional=True,
                       tooltip="Learn this model's prediction instead of the noise, for instance one with a style LoRA."),
        io.Conditioning.Input("teacher_positive", optional=True,
                              tooltip="What the teacher is conditioned on, encoded with its own CLIP: one for all pictures, or "
                                      "one for each."),
        Teacher.Input("teacher", optional=True,
                      tooltip="IP-Adapter Teacher: learn what it makes of each reference. Any picture then serves any text, so "
                              "the numbers of references and latents may differ."),
        TrainingSet.Input("training_set", optional=True,
                          tooltip="From Load Training Folder, in place of latents, positive and reference_image."),
        advanced(io.Int.Input("patience", default=_TRAIN["patience"], min=0, max=1_000_000, optional=True,
                              tooltip="With a training_set of 40 pictures or more: ends when the gain on held-out pictures "
                                      "has not grown for so many updates, not before half of the steps. 0: never.")),
        advanced(io.Int.Input("sample_every", default=500, min=0, max=1_000_000, optional=True,
                              tooltip="With a training_set: updates between sample sheets, which show on the node, as long as "
                                      "they take no more than 5% of the time, and one at the end. 0: none.")),
    ]


class EMMAIPAdapterTeacher(io.ComfyNode):
    """An IP-Adapter that Train EMMA Module learns from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMAIPAdapterTeacher",
            display_name="IP-Adapter Teacher",
            aliases=("distill ip-adapter", "ipadapter teacher", "distil"),
            description="An IP-Adapter whose effect Train EMMA Module distils into a module, for each reference picture.",
            inputs=[
                io.Combo.Input("ip_adapter", options=host.paths.IP_ADAPTER.names(),
                               tooltip="A plain or plus IP-Adapter for SD1.5 or SDXL, in models/ipadapter."),
                io.MultiType.Input("clip_vision", types=[Encoder, io.ClipVision],
                                   tooltip="The CLIP it was trained with: ViT-H for SD1.5 and for files named vit-h."),
                io.Float.Input("weight", default=1.0, min=0.0, max=5.0, step=0.05, tooltip="How strongly it works."),
                io.Combo.Input("blocks", options=list(BLOCKS), default=BLOCKS[0],
                               tooltip="all: everything of the picture. style: its style without its content. no layout: all "
                                       "but its composition."),
            ],
            outputs=[Teacher.Output(display_name="EMMA_TEACHER", tooltip="For Train EMMA Module.")],
        )

    @classmethod
    def execute(cls, ip_adapter, clip_vision, weight, blocks) -> io.NodeOutput:
        path = host.paths.IP_ADAPTER.path(ip_adapter)
        return io.NodeOutput(host.ip_adapter_teacher.load_teacher(path, clip_vision, weight, blocks))

    @classmethod
    def fingerprint_inputs(cls, ip_adapter, **others) -> str:
        return host.paths.IP_ADAPTER.state(ip_adapter)


class EMMASaveModule(io.ComfyNode):
    """EMMA_MODULE -> file in models/emma."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EMMASaveModule",
            display_name="Save EMMA Module",
            aliases=("save emma",),
            description="Saves a module into models/emma, with what it needs and how it was trained in its metadata.",
            inputs=[
                Module.Input("module", tooltip="From Train EMMA Module or Load EMMA Module."),
                io.String.Input("name", default="module",
                                tooltip="File name, with folders if you like: people/ada. A file of that name is never "
                                        "overwritten; the new one gets a number."),
                io.String.Input("title", default="", optional=True, tooltip="Title in model managers. Empty: as it was."),
                io.String.Input("author", default="", optional=True, tooltip="Who made the module. Empty: as it was."),
                io.String.Input("license", default="", optional=True, tooltip="Licence of the module. Empty: as it was."),
                io.Image.Input("thumbnail", optional=True, tooltip="A picture that model managers show; made small."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, module, name, title="", author="", license="", thumbnail=None) -> io.NodeOutput:
        entries = {"title": title, "author": author, "license": license}
        return saved_as(cls, host.module_files.save_named_module(module, name, entries, thumbnail))
