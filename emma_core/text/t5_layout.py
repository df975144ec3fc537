"""The T5 v1.1 encoder (flan-t5) as files name it: its sizes from tensor shapes, and what else a file may be.

Shapes: V vocabulary, D width of the features, F feed-forward width, H heads, I = H * width of a head.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import TextEncoderFileError, short
from ..files.tensor_file import count_blocks

ATTENTION_BUCKETS = 32
_WANTED = "a T5 v1.1 encoder (flan-t5; ELLA was trained with flan-t5-xl)"
_BIAS_KEY = "layer.0.SelfAttention.relative_attention_bias.weight"

# Anything else a declaration says is about training or the decoder.
_DECLARED_CONSTANTS = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": ATTENTION_BUCKETS,
    "relative_attention_max_distance": 128,
}

# (key pattern, what a file with such a key is, what to do)
_OTHER_MODELS = (
    (r"connector\.latents$", "an ELLA connector", "It belongs in models/ella: choose it in Load ELLA."),
    (r"blocks\.\d+\.attn_gate$", "an EMMA module", "It belongs in models/emma: choose it in Load EMMA Module."),
    (r"(.*\.)?text_model\.", "a CLIP model", "Choose the flan-t5-xl encoder."),
    (r"(model\.)?layers\.\d+\.self_attn\.", "a decoder-only language model", "Choose the flan-t5-xl encoder."),
    (r"(.*\.)?(diffusion_model|first_stage_model)\.", "a diffusion checkpoint", "Choose the flan-t5-xl encoder."),
)


@dataclass(frozen=True)
class T5EncoderConfig:
    """Sizes of a T5 v1.1 encoder, under the names that transformers uses."""

    vocab_size: int
    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int


def encoder_parts(config: T5EncoderConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Submodule of the encoder -> its tensors and their shapes, in the order they are loaded."""
    width, hidden, inner = config.d_model, config.d_ff, config.num_heads * config.d_kv
    block: dict[str, tuple[int, ...]] = {f"layer.0.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
    block |= {
        "layer.0.SelfAttention.o.weight": (width, inner),
        "layer.0.layer_norm.weight": (width,),
        "layer.1.DenseReluDense.wi_0.weight": (hidden, width),
        "layer.1.DenseReluDense.wi_1.weight": (hidden, width),
        "layer.1.DenseReluDense.wo.weight": (width, hidden),
        "layer.1.layer_norm.weight": (width,),
    }
    parts: dict[str, dict[str, tuple[int, ...]]] = {"shared": {"weight": (config.vocab_size, width)}}
    for index in range(config.num_layers):
        parts[f"encoder.block.{index}"] = dict(block)
    parts["encoder.block.0"][_BIAS_KEY] = (ATTENTION_BUCKETS, config.num_heads)
    parts["encoder.final_layer_norm"] = {"weight": (width,)}
    return parts


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], name: str) -> T5EncoderConfig:
    """Read the sizes of an encoder off its tensors.

    Raises:
        TextEncoderFileError: one of the few tensors that tell the sizes is missing.
    """

    def size(key: str, axis: int) -> int:
        shape = shapes.get(key, ())
        if len(shape) <= axis or not shape[axis]:
            found = f"has {key} of shape {shape}, and a weight" if key in shapes else f"lacks {key}, which"
            raise TextEncoderFileError(f"{name} {found} {_WANTED} has. Download the file again.")
        return shape[axis]

    first = "encoder.block.0."
    inner, heads = size(first + "layer.0.SelfAttention.q.weight", 0), size(first + _BIAS_KEY, 1)
    if inner % heads:
        raise TextEncoderFileError(
            f"{name}: {heads} attention heads do not divide the attention width {inner}; wanted {_WANTED}. "
            "Get the file again from its author."
        )
    return T5EncoderConfig(
        vocab_size=size("shared.weight", 0),
        d_model=size("shared.weight", 1),
        d_ff=size(first + "layer.1.DenseReluDense.wi_0.weight", 0),
        d_kv=inner // heads,
        num_heads=heads,
        num_layers=count_blocks(shapes, "encoder.block.", name, TextEncoderFileError),
    )


def refuse_other_models(keys: Iterable[str], name: str) -> None:
    """Raise TextEncoderFileError if the keys are not those of a T5 v1.1 encoder, saying what they are instead."""
    keys = sorted(keys)

    def holding(pattern: str) -> list[str]:
        return [key for key in keys if re.match(pattern, key)]

    if not holding(r"encoder\.block\."):
        for pattern, what, advice in _OTHER_MODELS:
            if holding(pattern):
                raise TextEncoderFileError(f"{name} is {what}; wanted {_WANTED}. {advice}")
        if holding(r"decoder\.block\."):
            raise TextEncoderFileError(
                f"{name} holds only the decoder of a T5; wanted {_WANTED}. Choose the file with the encoder "
                "(of a sharded model, the folder with all parts)."
            )
        some = ", ".join(map(short, keys[:4])) or "none"
        raise TextEncoderFileError(f"{name} is not a T5: its keys are {some}, ...; wanted {_WANTED} with keys like "
                                   "encoder.block.0.layer.0.SelfAttention.q.weight. Choose the flan-t5-xl encoder.")
    if holding(r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wi\.weight$"):
        raise TextEncoderFileError(
            f"{name} is a T5 v1.0 (one DenseReluDense.wi per layer); wanted {_WANTED}, which has wi_0 and wi_1. "
            "Choose flan-t5-xl."
        )
    if len(holding(r"encoder\.block\.\d+\." + re.escape(_BIAS_KEY))) > 1:
        raise TextEncoderFileError(
            f"{name} is a UMT5 (a relative_attention_bias in every layer), as Wan uses; wanted {_WANTED}. "
            "Choose flan-t5-xl."
        )


def check_declared(config: T5EncoderConfig, declared: Mapping[str, object], name: str, where: str) -> None:
    """Raise TextEncoderFileError if a config.json or metadata contradicts the tensors beside it."""
    wanted = {**_DECLARED_CONSTANTS, **vars(config)}
    for key, value in wanted.items():
        if key in declared and declared[key] != value:
            raise TextEncoderFileError(
                f"{name}: {where} says {key} = {short(declared[key])}, the tensors need {value} for {_WANTED}. "
                f"Use the {where} that came with these weights."
            )


def check_text_width(found_width: int, wanted_width: int, name: str) -> None:
    """Raise TextEncoderFileError if text features of ``found_width`` cannot enter a connector made for another."""
    if found_width != wanted_width:
        known = {512: "small", 768: "base", 1024: "large", 2048: "xl", 4096: "xxl"}
        advice = f"flan-t5-{known[wanted_width]}" if wanted_width in known else f"a T5 of width {wanted_width}"
        raise TextEncoderFileError(
            f"{name} gives text features of width {found_width}, this ELLA was trained on {wanted_width}. "
            f"Choose {advice}."
        )
