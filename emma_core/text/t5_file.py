"""A T5 encoder on disk: one .safetensors file, or a Hugging Face folder, whole or in parts; read part by part.

Only headers are read on opening. `T5File.parts` then yields one layer at a time, so that loading needs the memory of
the model and of one layer, not of the file twice.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import TextEncoderFileError, short
from ..files.json_file import entry_of, parse_json, read_json
from ..files.plain_file import is_plain_name, visible
from ..files.tensor_file import check_finite, check_shapes, open_tensors
from .t5_layout import T5EncoderConfig, check_declared, config_from_shapes, encoder_parts, refuse_other_models

_WHAT = "a T5 text encoder (flan-t5)"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_FLOATS = {"F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_MOST_LISTED = 5
_SCALES = (".scale_weight", ".weight_scale")
# The decoder, and what other tools add to a file without changing the encoder.
_IGNORED = re.compile(
    r"decoder\.|lm_head\.|scaled_fp8$|spiece_model$|logit_scale$|.*\.(scale_input|input_scale|comfy_quant)$"
)


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class T5File:
    """A checked T5 encoder on disk: sizes, tokenizer, and its tensors on demand."""

    name: str
    path: Path
    config: T5EncoderConfig
    tokenizer_path: Path | None
    weights: Mapping[str, _Stored]
    scales: Mapping[str, _Stored]

    def parts(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", float32_names: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield (submodule, its tensors) in ``dtype``; names ending in one of ``float32_names`` in float32.

        The tensors are copies: the files can be moved or overwritten afterwards.

        Raises:
            TextEncoderFileError: NaN or infinite weights, or weights that ``dtype`` cannot hold.
        """
        for part, shapes in encoder_parts(self.config).items():
            stored = {name: self.weights[f"{part}.{name}"] for name in shapes}
            tensors = {}
            for path in sorted({entry.path for entry in stored.values()}):
                here = {name: entry for name, entry in stored.items() if entry.path == path}
                tensors |= self._read(path, part, here, dtype, device, float32_names)
            yield part, tensors

    def _read(self, path, part, stored: Mapping[str, _Stored], dtype, device, float32_names) -> dict:
        tensors = {}
        # Opened for each part, as an open file keeps every page that was read in memory.
        with open_tensors(path, _WHAT, TextEncoderFileError) as file:
            for name, entry in stored.items():
                target = torch.float32 if name.endswith(float32_names or ("\0",)) else dtype
                source = file.tensor(entry.key)
                scale = self.scales.get(f"{part}.{name}")
                if scale is not None:
                    source = source.float() * self._scale(scale, entry)
                tensors[name] = self._cast(source, target, f"{part}.{name}").to(device)
                del source
        return tensors

    def _scale(self, scale: _Stored, weight: _Stored) -> torch.Tensor:
        with open_tensors(scale.path, _WHAT, TextEncoderFileError) as file:
            value = file.tensor(scale.key).float()
        return value.reshape(()) if value.numel() == 1 else value.reshape(weight.shape[0], 1)

    def _cast(self, source: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        cast = source.to(dtype, copy=True)
        # aminmax passes NaN on and, unlike isfinite, takes no memory.
        if not torch.stack((cast.float() if cast.itemsize == 1 else cast).aminmax()).isfinite().all():
            check_finite({name: source}, self.name, TextEncoderFileError)
            raise TextEncoderFileError(
                f"{self.name}: {name} has values up to {source.float().abs().max():.3g}, more than {dtype} can hold. "
                "Load the text encoder as bf16 or fp32."
            )
        return cast


def open_t5_file(path: str | Path) -> T5File:
    """Open a T5 encoder: a .safetensors file or a folder with one, in Hugging Face's key names.

    Raises:
        TextEncoderFileError: nothing there, a pickle, a part of a sharded model, another kind of model, another T5
            than v1.1, missing or unexpected keys, wrong shapes, or a config.json or metadata that contradicts them.
    """
    path = Path(path)
    files = _files_of(path)
    entries: dict[str, _Stored] = {}
    declared: dict[str, object] = {}
    for file in files:
        with open_tensors(file, _WHAT, TextEncoderFileError) as tensors:
            declared |= _declared_in_metadata(tensors.metadata(), file.name)
            entries |= {key: _Stored(file, key, stored.shape, stored.kind) for key, stored in tensors.stored.items()}
    refuse_other_models(entries, path.name)
    weights, scales = _sort(entries, path.name)
    config = config_from_shapes({key: entry.shape for key, entry in weights.items()}, path.name)
    _check_weights(weights, scales, config, path.name)
    check_declared(config, declared, path.name, "metadata `t5`")
    folder_config = _folder_config(path, files[0])
    check_declared(config, folder_config, path.name, "config.json")
    tokenizer = _tokenizer_of(path, files[0], declared, bool(folder_config))
    return T5File(path.name, path, config, tokenizer, weights, scales)


def load_t5_parts(
    encoder: nn.Module, t5_file: T5File, dtype: torch.dtype, device: torch.device | str = "cpu",
    float32_names: tuple[str, ...] = (), after_part: Callable[[], None] | None = None,
) -> None:
    """Put a file's weights, strictly, in place of those of an encoder that names its layers as transformers does.

    ``after_part`` is called after each layer, for progress; what it raises ends the loading.
    """
    for part, tensors in t5_file.parts(dtype, device, float32_names):
        encoder.get_submodule(part).load_state_dict(tensors, strict=True, assign=True)
        if after_part is not None:
            after_part()


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return _files_in_folder(path)
    shard = _SHARD.fullmatch(path.name)
    if shard and path.exists():
        raise TextEncoderFileError(
            f"{path.name} is part {int(shard[2])} of {int(shard[3])} of a model; wanted all parts. "
            f"Choose the folder {path.parent.name} in place of the file."
        )
    _refuse_suffix(path)
    return [path]


def _files_in_folder(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        weight_map = entry_of(read_json(folder / _INDEX, _WHAT, TextEncoderFileError), "weight_map", dict, f"{folder}/{_INDEX}",
                              TextEncoderFileError, {})
        odd = next((value for value in weight_map.values() if not is_plain_name(value)), None)
        if odd is not None:
            raise TextEncoderFileError(f"{folder}/{_INDEX} names the part {short(odd)}; wanted names of files beside it. "
                                       "Download it again.")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing or not names:
            raise TextEncoderFileError(
                f"{folder} lacks {', '.join(missing[:_MOST_LISTED]) or 'the parts'}, which its {_INDEX} names. Download them."
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    files = visible(folder.glob("*.safetensors"))
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if shards and len(shards) == len(files) == int(shards[0][3]):
        return files
    if shards:
        raise TextEncoderFileError(f"{folder} holds {len(shards)} of {int(shards[0][3])} parts of a model. "
                                   "Download the missing parts.")
    if len(files) == 1:
        return files
    if not files:
        for file in visible(folder.iterdir()):
            _refuse_suffix(file)
    raise TextEncoderFileError(
        f"{folder} holds {len(files)} .safetensors files and no model.safetensors; wanted one model. "
        "Choose the file itself, or give the model a folder of its own."
    )


def _refuse_suffix(path: Path) -> None:
    if path.exists() and path.suffix.lower() in _PICKLES:
        raise TextEncoderFileError(
            f"{path.name} is a pickled PyTorch file, which can run code when opened; wanted {_WHAT} as .safetensors. "
            "google/flan-t5-xl on Hugging Face has safetensors files: download those, or convert this one."
        )
    if path.exists() and path.suffix.lower() == ".gguf":
        raise TextEncoderFileError(f"{path.name} is a GGUF file; wanted {_WHAT} as .safetensors. "
                                   "Download the safetensors of google/flan-t5-xl (fp16, or fp8 for less memory).")


def _sort(entries: Mapping[str, _Stored], name: str) -> tuple[dict[str, _Stored], dict[str, _Stored]]:
    weights, scales = {}, {}
    for key, entry in entries.items():
        stem = next((key.removesuffix(end) for end in _SCALES if key.endswith(end)), None)
        if _IGNORED.match(key):
            continue
        if stem is not None:
            scales[f"{stem}.weight"] = entry
        else:
            weights[key] = entry
    embedding = weights.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        weights.setdefault("shared.weight", embedding)
        if "encoder.embed_tokens.weight" in scales:
            scales.setdefault("shared.weight", scales["encoder.embed_tokens.weight"])
    scales.pop("encoder.embed_tokens.weight", None)
    orphans = sorted(set(scales) - set(weights))
    if orphans:
        raise TextEncoderFileError(f"{name} has a scale for {orphans[0]} but not the weight. Download the file again.")
    return weights, scales


def _check_weights(weights, scales, config: T5EncoderConfig, name: str) -> None:
    wanted = {
        f"{part}.{key}": shape for part, shapes in encoder_parts(config).items() for key, shape in shapes.items()
    }
    check_shapes(weights, wanted, name, _WHAT, TextEncoderFileError)
    for key, entry in weights.items():
        if entry.dtype not in _FLOATS:
            raise TextEncoderFileError(
                f"{name}: {key} is stored as {entry.dtype} (a quantised file); wanted fp32, fp16, bf16 or fp8. "
                "Use the fp16 or fp8 safetensors."
            )
    for key, scale in scales.items():
        if scale.shape not in ((), (1,), (1, 1), wanted[key][:1], (wanted[key][0], 1)):
            raise TextEncoderFileError(
                f"{name}: the scale of {key} has shape {scale.shape}; wanted one number for the tensor or for each of "
                f"its {wanted[key][0]} rows. This quantisation is not supported: use the fp16 or plain fp8 file."
            )


def _declared_in_metadata(metadata: Mapping[str, str], name: str) -> dict[str, object]:
    if "t5" not in metadata:
        return {}
    return parse_json(metadata["t5"], f"{name}: its metadata `t5`", TextEncoderFileError, advice="Save the file again.")


def _folder_config(path: Path, file: Path) -> dict:
    """The config.json of a folder made for one model; of a folder of many models, nothing."""
    config_path = file.parent / "config.json"
    alone = path.is_dir() or file.name == "model.safetensors" or len(visible(file.parent.glob("*.safetensors"))) == 1
    return read_json(config_path, _WHAT, TextEncoderFileError) if alone and config_path.exists() else {}


def _tokenizer_of(path: Path, file: Path, declared: Mapping[str, object], own_folder: bool) -> Path | None:
    for beside in (file.with_name(f"{file.stem}.tokenizer.json"), file.with_name(file.stem) / "tokenizer.json"):
        if beside.exists():
            return beside
    named = declared.get("tokenizer")
    if named is not None:
        if not is_plain_name(named):
            raise TextEncoderFileError(
                f"{file.name}: its metadata `t5` names the tokenizer {short(repr(named))}; wanted the plain name of a file "
                "beside it. Save the file again."
            )
        if not (file.parent / named).exists():
            raise TextEncoderFileError(f"{file.name} needs its own tokenizer {named}, which is not in {file.parent}. "
                                       "Copy it there from where the text encoder came from.")
        return file.parent / named
    # A loose tokenizer.json in a folder of many models may belong to any of them.
    in_folder = file.parent / "tokenizer.json"
    return in_folder if in_folder.exists() and (path.is_dir() or own_folder) else None
