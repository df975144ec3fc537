"""`python -m emma_core inspect FILE`: what an EMMA module says of itself, and its gate map."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ..base.own_text import load_own_text
from ..base.pairing import check_module
from ..base.recognition import recognised
from ..drawing.gate_map import GateMap, draw_gate_maps, gate_values
from ..errors import EmmaError, short
from ..files.connector_file import load_connector
from ..files.module_file import load_module
from ..files.writing import check_new_folder
from ..model.assembly import Assembly, Reference, TokenSource
from ..model.gated_resampler import GatedResampler
from ..model.module_config import ModuleConfig
from ..playground import PLAYGROUND_DIR
from ..text.encoder import load_text_encoder
from .flags import add_comfyui, find_files

_TIMESTEP = 700
_LONGEST_VALUE = 800  # letters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `inspect`."""
    parser.add_argument("file", type=Path, help="an EMMA module")
    parser.add_argument("--gate-map", type=Path, metavar="PNG", help="draw its gates: token index across, block depth down")
    parser.add_argument("--ella", type=Path, help="the ELLA it was trained on; a playground module finds its own")
    parser.add_argument("--text-encoder", type=Path, help="ELLA's text encoder")
    parser.add_argument("--checkpoint", type=Path, help="of a module on a checkpoint's own tokens: such a file or diffusers "
                                                        "folder")
    parser.add_argument("--prompt", default="a woman", help="text that the gates see")
    parser.add_argument("--timestep", type=float, default=_TIMESTEP, help="0 to 999")
    add_comfyui(parser)


def run(options: argparse.Namespace) -> int:
    """Print, and draw if asked to."""
    try:
        options = find_files(options)
        module = load_module(options.file)
        if options.gate_map:
            check_new_folder(options.gate_map.parent, "--gate-map")
        print(describe(module, options.file.name))
        if options.gate_map:
            draw(module, options)
            print(f"gate map: {options.gate_map}")
        return 0
    except EmmaError as found:
        print(f"error: {found}", file=sys.stderr)
        return 1


def describe(module: GatedResampler, name: str) -> str:
    """Metadata, sizes and global gates in lines."""
    config = module.config
    count = sum(value.numel() for value in module.parameters())
    features = ", ".join(f"{short(key)} ({spec.dim} wide, tokens per vector: {spec.tokens_per_vector})"
                         for key, spec in config.features.items())
    lines = [f"{short(name)}: EMMA {short(config.condition)} module, {count / 1e6:.2f} M parameters",
             acts_on(config),
             f"  features     {features}",
             f"  encoder      {short(json.dumps(dict(config.encoder)), _LONGEST_VALUE) if config.encoder else 'not stated'}",
             f"  gate scale   {config.gate_scale:g}; separable gates {'on' if config.separable_gates else 'off (g = 1)'}",
             f"  strength 1   stands for {config.calibrated_strength:g} of what was trained"
             + (f" ({short(config.calibration['by'])})" if config.calibration.get("by") else "")]
    gates = [(block.attn_gate.item(), block.ffn_gate.item()) for block in module.blocks]
    lines += [f"  global gates block {index}: A {a:+.3f} F {f:+.3f}" for index, (a, f) in enumerate(gates)]
    lines += [f"  {short(key):<12} {short(json.dumps(value), _LONGEST_VALUE)}" for key, value in config.training.items()]
    entries = {key.removeprefix("modelspec."): value for key, value in config.file_metadata.items()
               if key.startswith("modelspec.") and not value.startswith("data:")}
    lines += [f"  {short(key):<12} {short(value, _LONGEST_VALUE)}" for key, value in entries.items()]
    return "\n".join(lines)


def acts_on(config: ModuleConfig) -> str:
    """Which of the two kinds it is: for an ELLA, or for the own tokens of any checkpoint of a family."""
    blocks = f"{config.layers} blocks, {config.heads} heads"
    if config.source is None:
        return f"  connector    width {config.width}, {blocks}; ELLA {str(config.ella.get('sha256', '?'))[:12]}"
    return (f"  own tokens   of {config.source.family} (width {config.source.width}, {config.time.kind} time), no ELLA; width "
            f"{config.width}, {blocks}")


def draw(module: GatedResampler, options: argparse.Namespace) -> None:
    """The gate map as a picture. Gates see the text and the timestep through the tokens; the reference adds little.

    Raises:
        EmmaError: ELLA and its text encoder, or the checkpoint, is not named, or does not fit.
    """
    source, text = (_of_ella if module.config.source is None else _of_checkpoint)(module, options)
    features = {name: torch.zeros(1, 1, spec.dim) for name, spec in module.config.features.items()}
    [values] = gate_values(source, text, options.timestep, Assembly([Reference(module, features)]))
    title = f"{options.file.name} ({module.config.condition})"
    sheet = draw_gate_maps([GateMap(title, values.numpy())], f"separable gate x global gate at timestep {options.timestep:g}, "
                                                             f"prompt: {options.prompt}, no reference")
    sheet.save(options.gate_map)


def _of_checkpoint(module: GatedResampler, options: argparse.Namespace) -> tuple[TokenSource, torch.Tensor]:
    """The own tokens of a checkpoint, and the prompt as it reads it."""
    if options.checkpoint is None:
        raise EmmaError(f"{options.file.name} acts on the own tokens of {module.config.source.family}: name such a "
                        "checkpoint with --checkpoint to draw its gate map.")
    spec = recognised(options.checkpoint)
    check_module(module.config, options.file.name, spec, on_ella=False)
    [text] = load_own_text(options.checkpoint, spec, torch.float32).encode([options.prompt])
    return spec.own_tokens, text


def _of_ella(module: GatedResampler, options: argparse.Namespace) -> tuple[TokenSource, torch.Tensor]:
    """An ELLA, the playground's if none is named, and the prompt as it reads it."""
    own = None if options.ella and options.text_encoder else load_connector(PLAYGROUND_DIR / "ella.safetensors")
    if own and module.config.ella.get("sha256") != own.sha256:
        raise EmmaError(f"{options.file.name} was not trained on the playground: name its ELLA and text encoder with --ella "
                        "and --text-encoder to draw its gate map.")
    connector = load_connector(options.ella) if options.ella else own
    text_encoder = load_text_encoder(options.text_encoder or PLAYGROUND_DIR / "t5.safetensors", width=connector.config.text_dim,
                                     tokenizer=options.tokenizer or None)
    [text] = text_encoder.encode([options.prompt])
    return connector, text
