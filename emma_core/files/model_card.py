"""A module's model card: a README.md with the YAML front matter that Hugging Face reads, of what its file says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.module_config import ModuleConfig

# identifiers of licences that Hugging Face knows; others are "other" with a name
KNOWN_LICENSES = frozenset({
    "apache-2.0", "mit", "openrail", "creativeml-openrail-m", "bigscience-openrail-m", "openrail++", "cc0-1.0", "cc-by-4.0",
    "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0",
    "mpl-2.0", "bsd-2-clause", "bsd-3-clause", "wtfpl", "unlicense", "unknown",
})
_PAPER = "https://arxiv.org/abs/2406.09162"
_TAKES = {"style": "the style of a picture", "object": "an object of a picture", "portrait": "a person of a picture",
          "face": "the face of a person"}


@dataclass(frozen=True)
class Beside:
    """What lies in the folder with the card.

    Args:
        file: name of the module's file.
        sheet, gates, curve: names of pictures; "" where there is none.
        gain: timesteps in words, error with the reference and with text alone, of each part of the timesteps.
        scores: a table in Markdown, of `eval`.
        base_model: the base's address at Hugging Face, "" where it is not said.
    """

    file: str
    sheet: str = ""
    gates: str = ""
    curve: str = ""
    gain: Sequence[tuple[str, float, float]] = ()
    scores: str = ""
    base_model: str = ""


def model_card(config: ModuleConfig, beside: Beside) -> str:
    """README.md of a module; it names no path, and nothing that the file does not say."""
    sections = [_front_matter(config, beside), _head(config, beside), _use(config, beside), _made(config), _results(beside)]
    return "\n".join(section for section in sections if section)


def license_entries(license: str) -> dict[str, str]:
    """The front matter of a licence in the user's words."""
    slug = re.sub(r"[^a-z0-9.+]+", "-", license.strip().lower()).strip("-")
    if not slug:
        return {"license": "unknown"}
    return {"license": slug} if slug in KNOWN_LICENSES else {"license": "other", "license_name": slug}


def _front_matter(config: ModuleConfig, beside: Beside) -> str:
    base = str(config.training.get("base", {}).get("name", ""))
    tags = ["emma", "comfyui", "text-to-image", f"emma-{config.condition}", *([] if config.source else ["ella"])]
    entries: dict[str, Any] = {**license_entries(_spec(config, "license")), "pipeline_tag": "text-to-image", "tags": tags}
    if beside.base_model:
        entries["base_model"] = beside.base_model
    elif base:
        tags.append(f"base:{base}")
    lines = ["---"]
    for key, value in entries.items():  # JSON's strings are YAML's
        lines += [f"{key}:", *(f"- {json.dumps(one)}" for one in value)] if isinstance(value, list) else [
            f"{key}: {json.dumps(value)}"]
    if beside.sheet:
        lines += ["widget:", f"- text: {json.dumps(_spec(config, 'title') or beside.file)}", "  output:",
                  f"    url: {json.dumps(beside.sheet)}"]
    return "\n".join([*lines, "---", ""])


def _head(config: ModuleConfig, beside: Beside) -> str:
    author, license = (_spec(config, key) or "**not stated**" for key in ("author", "license"))
    lines = [f"# {_spec(config, 'title') or beside.file.removesuffix('.safetensors')}", "",
             f"An [EMMA]({_PAPER}) {config.condition} module: from a reference picture it takes "
             f"{_TAKES.get(config.condition, 'what it was trained for')} and adds it to a prompt. Author: {author}; licence: "
             f"{license}.", ""]
    return "\n".join([*lines, f"![what it draws]({beside.sheet})", ""] if beside.sheet else lines)


def _use(config: ModuleConfig, beside: Beside) -> str:
    base = config.training.get("base", {})
    stream = (f"the own tokens of {config.source.family} (width {config.source.width})" if config.source
              else f"an ELLA of width {config.width} with {config.layers} blocks, SHA-256 "
                   f"`{str(config.ella.get('sha256', 'not stated'))[:16]}`")
    told = ("family", "layer", "frame", "background", "masked")
    encoder = {key: config.encoder[key] for key in told if config.encoder.get(key)}
    features = ", ".join(f"{name} ({spec.dim} wide, {spec.tokens_per_vector} tokens for each vector)"
                         for name, spec in config.features.items())
    return "\n".join([
        "## How to use it", "",
        f"Put `{beside.file}` into ComfyUI's `models/emma` and choose it in *Load EMMA Module* of ComfyUI-EMMA, or draw with "
        f"`python -m emma_core generate PROMPT --module {beside.file} PICTURE`.", "",
        "| it needs | |", "| --- | --- |",
        f"| a checkpoint like | {base.get('name', 'not stated')} |", f"| tokens of | {stream} |",
        f"| a reference encoder | {_in_words(encoder) or 'not stated'} |", f"| whose features are | {features} |",
        f"| strength 1 stands for | {config.calibrated_strength:g} of what was trained |", ""])


def _made(config: ModuleConfig) -> str:
    training = config.training
    rows = [(key, _in_words(training[key]) if isinstance(training[key], Mapping) else training[key])
            for key in ("steps", "seconds", "data", "recipe") if training.get(key) not in (None, {}, "")]
    names = {"steps": "updates", "seconds": "seconds of training", "data": "learnt from", "recipe": "settings"}
    table = [f"| {names[key]} | {value} |" for key, value in rows]
    return "\n".join(["## How it was made", "", "| | |", "| --- | --- |", *table, ""]) if table else ""


def _results(beside: Beside) -> str:
    lines = _gain(beside.gain) if beside.gain else []
    lines += [beside.scores.strip(), ""] if beside.scores.strip() else []
    lines += [f"![error while it was trained]({beside.curve})", ""] if beside.curve else []
    if beside.gates:
        lines += ["Where its gates act, token across and block downwards:", "", f"![gates]({beside.gates})", ""]
    return "\n".join(["## Scores", "", *lines]) if lines else ""


def _gain(gain: Sequence[tuple[str, float, float]]) -> list[str]:
    rows = [f"| {timesteps} | {shown:.5f} | {plain:.5f} | {100 * (shown / plain - 1):+.1f}% |"
            for timesteps, shown, plain in gain]
    return ["Mean squared error on training pictures, on the same noise:", "",
            "| timesteps | with reference | text only | change |", "| --- | --- | --- | --- |", *rows, ""]


def _spec(config: ModuleConfig, key: str) -> str:
    """An entry in one line, that cannot end a table's cell."""
    return " ".join(config.file_metadata.get(f"modelspec.{key}", "").replace("|", "/").split())


def _in_words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_in_words(value) if isinstance(value, Mapping) else value}" for key, value in values.items())
