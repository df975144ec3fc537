"""Small random models in the host's own classes, and the nodes as a graph would call them.

Shapes: N text tokens, D text width, V vectors, R references.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import pytest
import torch
from safetensors.torch import save_file
from token_check import Answer
from tokenizers import Tokenizer, models, pre_tokenizers

TEXT_DIM = 24
WIDTH = 64
LATENTS = 8
SIZES = {"width": WIDTH, "latents": LATENTS, "layers": 2, "heads": 4, "text_dim": TEXT_DIM, "time_channels": 32,
         "time_width": 48}
STYLE = {"global": (20, 4)}
OBJECT = {"global": (20, 1), "local": (12, 1)}
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
    "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "context_dim": WIDTH, "num_heads": 4, "num_head_channels": -1,
    "use_linear_in_transformer": False, "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None,
    "use_temporal_attention": False,
}


def noise(shape, seed: int) -> torch.Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill_(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights that keep activations near 1; every global gate is 0.5 or -0.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if name.endswith(("attn_gate", "ffn_gate")):
                weight.copy_(0.5 * values.sign())
            else:
                weight.copy_(values * (0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5))
    return model.eval().requires_grad_(False)


class TinyWorld:
    """Makes small models of ours and of the host; the same arguments give the same weights."""

    def __init__(self, pack_import):
        self._connector = pack_import("emma_core.model.connector")
        self._resampler = pack_import("emma_core.model.gated_resampler")
        self._config = pack_import("emma_core.model.module_config")
        self._source = pack_import("emma_core.model.source_spec")
        self._token_resampler = pack_import("emma_core.model.token_resampler")
        self._connector_file = pack_import("emma_core.files.connector_file")
        self._module_file = pack_import("emma_core.files.module_file")
        self._features = pack_import("emma_core.model.reference_features")
        self._loaded = pack_import("host.loaded")
        self._payload = pack_import("host.payload")
        self.connecting = pack_import("host.connecting")
        self.assembly_class = pack_import("emma_core.model.assembly").Assembly
        self.addition_class = pack_import("emma_core.model.addition").Addition

    def model(self, seed: int = 0, family=comfy.supported_models.SD15, sizes=UNET):
        """MODEL, of the SD1.5 family with 32 channels if nothing else is said."""
        config = family(dict(sizes))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", device=comfy.model_management.unet_offload_device())
        fill_(model.diffusion_model, seed)
        return self._loaded.patcher_for(model)

    def ella(self, seed: int = 1, **changes):
        """ELLA, as Load ELLA hands it out."""
        config = self._connector.ConnectorConfig(**{**SIZES, **changes})
        connector = fill_(self._connector.Connector(config, comfy.ops.manual_cast), seed)
        return self._loaded.LoadedConnector(connector, self._loaded.patcher_for(connector))

    def module(self, condition: str = "style", features=None, seed: int = 2, **changes):
        """EMMA_MODULE, as Load EMMA Module hands it out."""
        specs = {name: self._config.FeatureSpec(*sizes) for name, sizes in (features or STYLE).items()}
        config = self._config.ModuleConfig(condition=condition, width=WIDTH, heads=4, layers=SIZES["layers"],
                                           features=specs, time_width=SIZES["time_width"]).replace(**changes)
        module = fill_(self._resampler.GatedResampler(config, comfy.ops.manual_cast), seed)
        return self._loaded.LoadedModule(module, self._loaded.patcher_for(module))

    def patcher_for(self, model):
        """A ModelPatcher with the host's usual devices."""
        return self._loaded.patcher_for(model)

    def token_module(self, family, condition: str = "style", features=None, seed: int = 12, **changes):
        """EMMA_MODULE on a family's own tokens (`model_families`)."""
        specs = {name: self._config.FeatureSpec(*sizes) for name, sizes in (features or STYLE).items()}
        width = family.text(0).shape[-1]
        config = self._config.ModuleConfig(
            condition=condition, width=32, heads=4, layers=2, features=specs, time_width=40,
            source=self._source.SourceSpec(family.name, width), time=self._source.TimeSpec(family.time)).replace(**changes)
        module = fill_(self._token_resampler.resampler_for(config, comfy.ops.manual_cast), seed)
        return self._loaded.LoadedModule(module, self._loaded.patcher_for(module))

    def reference(self, module, seed: int = 3, references: int = 1):
        """EMMA_REFERENCE for a module; several references are one per frame."""
        features = {name: noise((references, 1 if name == "global" else 5, spec.dim), seed + index)
                    for index, (name, spec) in enumerate(module.module.config.features.items())}
        return self._features.ReferenceFeatures(features, dict(module.module.config.encoder), per_frame=references > 1)

    def assemble(self, *members):
        """EMMA_ASSEMBLY of (module, reference, strength, start percent, end percent); the last three may be left out."""
        assembly = None
        for member in members:
            complete = (*member, *(1.0, 0.0, 1.0)[len(member) - 2:])
            assembly = self.connecting.assemble(*complete, assembly)
        return assembly

    def style_and_face(self, **changes):
        """EMMA_ASSEMBLY of two modules that say how something is drawn; ``changes`` are of the style's reference."""
        style, face = self.module(), self.module("face", seed=7)
        return self.assemble((style, self.reference(style, **changes)), (face, self.reference(face, seed=9), 0.8))

    def text(self, tokens: int = 7, seed: int = 4, rows: int = 1) -> list:
        """CONDITIONING of T5 features."""
        return [[noise((rows, tokens, TEXT_DIM), seed), {"pooled_output": None}]]

    def clip_text(self, tokens: int = 77, seed: int = 5) -> list:
        """CONDITIONING as the checkpoint's own CLIP gives it."""
        return [[noise((1, tokens, WIDTH), seed), {"pooled_output": None}]]

    def payload_of(self, ella, text_FND, references, assembly, options, in_place_of):
        """A payload with some of the references, which can stand in an entry in place of another."""
        subset = self._payload.HostAssembly(tuple(references), assembly.patchers if assembly else ())
        payload = self._payload.EmmaPayload(ella, text_FND, subset, lengths=options.get("emma_text_lengths"))
        payload.placeholder_1KW = in_place_of.placeholder_1KW
        return payload

    def save_files(self, folder: Path, ella, module) -> None:
        """ella.safetensors, module.safetensors and t5/model.safetensors with its tokenizer, as users have them."""
        folder.mkdir(parents=True, exist_ok=True)
        self._connector_file.save_connector(ella.connector, folder / "ella.safetensors")
        self._module_file.save_module(module.module, folder / "module.safetensors")
        save_t5(folder / "t5")

    def controlnet(self, seed: int = 6) -> comfy.controlnet.ControlNet:
        """CONTROL_NET for `model`, from the host's own class."""
        names = ("image_size", "in_channels", "model_channels", "channel_mult", "num_res_blocks", "transformer_depth",
                 "transformer_depth_middle", "context_dim", "num_heads", "use_spatial_transformer", "legacy")
        model = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.disable_weight_init,
                                           **{name: UNET[name] for name in names})
        return comfy.controlnet.ControlNet(fill_(model, seed), load_device=comfy.model_management.get_torch_device())


@dataclass(frozen=True)
class Wired:
    """What EMMA Connector gave for one prompt, and what to expect of it.

    Args:
        answers: by group (0 positive, 1 negative).
        first: those of the evaluation that has the negative too.
        evaluations: calls of the model that the positive takes in a step.
    """

    model: object
    positive: list
    negative: list
    answers: dict[int, list[Answer]]
    first: dict[int, list[Answer]]
    evaluations: int = 1


def wire(tiny: TinyWorld, model, ella, text, negative_text, assembly=None, way: str = "blocks", **appended) -> Wired:
    """EMMA Connector, with the answers its outputs must give."""
    clips = appended.get("clip_positive"), appended.get("clip_negative")
    connected, positive, negative = tiny.connecting.connect(
        model, ella, text, negative_text, assembly, *clips, tiny.addition_class(way))
    parts = parts_of(assembly.references if assembly else (), way)
    for entry, (text_FND, options) in zip(positive, text, strict=True):
        payload = entry[1]["model_conds"]["emma"].cond
        payload.alone = [tiny.payload_of(ella, text_FND, part, assembly, options, payload) for part in parts]

    def answers(conditioning, parts, clip):
        tails = [None] * len(conditioning) if clip is None else [entry[0] for entry in clip]
        tails *= len(conditioning) if len(tails) < len(conditioning) else 1
        return [Answer(ella.connector, entry[0], tiny.assembly_class(part), tail)
                for part in parts for entry, tail in zip(conditioning, tails, strict=True)]

    negative_answers = answers(negative_text, [()], clips[1])
    return Wired(connected, positive, negative, {0: answers(text, parts, clips[0]), 1: negative_answers},
                 {0: answers(text, parts[:1], clips[0]), 1: negative_answers}, len(parts))


def parts_of(references, way: str) -> list[tuple]:
    """The references of each evaluation: all at once, or what says what is drawn, and that with each of the others."""
    base = tuple(one for one in references if one.module.config.condition in ("object", "portrait"))
    others = [one for one in references if one not in base]
    return [tuple(references)] if way != "predictions" or len(others) < 2 else [base, *((*base, one) for one in others)]


def save_t5(folder: Path, width: int = TEXT_DIM) -> None:
    """A Hugging Face folder with a random T5 encoder of two layers that knows six words."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "dog", "blue"]
    sizes = {"vocab_size": len(words), "d_model": width, "d_kv": 8, "num_heads": 3, "d_ff": 32, "num_layers": 2}
    shapes = {"shared.weight": (len(words), width), "encoder.final_layer_norm.weight": (width,),
              "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 3)}
    for block in ("encoder.block.0", "encoder.block.1"):
        shapes |= {f"{block}.layer.0.SelfAttention.{name}.weight": (24, width) for name in "qkv"}
        shapes |= {f"{block}.layer.0.SelfAttention.o.weight": (width, 24), f"{block}.layer.0.layer_norm.weight": (width,),
                   f"{block}.layer.1.layer_norm.weight": (width,), f"{block}.layer.1.DenseReluDense.wo.weight": (width, 32)}
        shapes |= {f"{block}.layer.1.DenseReluDense.{name}.weight": (32, width) for name in ("wi_0", "wi_1")}
    state = {name: noise(shape, seed) * 0.4 + (len(shape) == 1) for seed, (name, shape) in enumerate(shapes.items())}
    save_file(state, folder / "model.safetensors")
    config = {**sizes, "feed_forward_proj": "gated-gelu", "architectures": ["T5EncoderModel"], "model_type": "t5"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def side_by_side(run_node, left, right, side_px: int) -> list:
    """CONDITIONING of two prompts, each masked to its half of a square picture."""
    mask = torch.zeros(1, side_px, side_px)
    mask[:, :, :side_px // 2] = 1
    halves = [run_node("ConditioningSetMask", conditioning=one.positive, mask=part, strength=1.0, set_cond_area="default")[0]
              for one, part in ((left, mask), (right, 1 - mask))]
    return run_node("ConditioningCombine", conditioning_1=halves[0], conditioning_2=halves[1])[0]


def empty_latent(batch: int = 1, size: int = 8) -> dict:
    """LATENT of zeros."""
    return {"samples": torch.zeros(batch, 4, size, size)}


def call_node(host_nodes, node_id: str, **inputs):
    """What a node gives, called as the host's execution does: in inference mode, by its declared function."""
    node = host_nodes.NODE_CLASS_MAPPINGS[node_id]
    with torch.inference_mode():
        if hasattr(node, "define_schema"):
            return node.execute(**inputs).result
        return getattr(node(), node.FUNCTION)(**inputs)


@pytest.fixture(scope="session")
def tiny(pack_import) -> TinyWorld:
    """Maker of small models."""
    return TinyWorld(pack_import)


@pytest.fixture(scope="module")
def model(tiny):
    """A MODEL in SD1.5's layout."""
    return tiny.model()


@pytest.fixture(scope="module")
def ella(tiny):
    """An ELLA that fits it."""
    return tiny.ella()


@pytest.fixture(scope="module")
def module(tiny):
    """A style module on that ELLA."""
    return tiny.module()


@pytest.fixture(scope="module", params=["blocks", "predictions"])
def way(request) -> str:
    """Where references are added up."""
    return request.param


@pytest.fixture(scope="module")
def connect(tiny, ella, way):
    """EMMA Connector, with two references, on a MODEL."""
    return lambda model: wire(tiny, model, ella, tiny.text(), tiny.text(1, seed=8), tiny.style_and_face(), way)


@pytest.fixture(scope="module")
def wired(connect, model):
    """The MODEL connected."""
    return connect(model)


@pytest.fixture(scope="module")
def vae():
    """VAE, of the small kind that the host takes at any weights."""
    return comfy.sd.VAE(sd=fill_(comfy.taesd.taesd.TAESD(), 81).state_dict())


@pytest.fixture(scope="session")
def run_node(host_nodes, pack):
    """`run_node("KSampler", model=..., ...)`: the node's outputs, of ours and of the host's."""
    return lambda node_id, **inputs: call_node(host_nodes, node_id, **inputs)


@pytest.fixture(scope="session")
def ksample(run_node):
    """KSampler with the usual settings; returns the latent tensor."""

    def run(model, positive, negative, latent=None, **settings):
        usual = {"seed": 11, "steps": 3, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
        return run_node("KSampler", model=model, positive=positive, negative=negative,
                        latent_image=latent or empty_latent(), **{**usual, **settings})[0]["samples"]

    return run
