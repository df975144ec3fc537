"""ELLA's text encoder as the host's CLIP: the stock CLIPTextEncode then gives T5 features, at any prompt length.

The host's own T5 layers and memory management are used; only names, sizes and the tokenizer are ours.
"""

from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.text_encoders.t5
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy.supported_models_base import ClipTarget

from ..emma_core.text.prompt_weights import weighted_parts
from ..emma_core.text.t5_file import T5File, load_t5_parts, open_t5_file
from ..emma_core.text.t5_tokenizer import PromptTokenizer, load_tokenizer
from .text_options import DTYPES, EMPTY_PROMPT_LENGTHS

_NAME = "ella_t5"
_EMPTY_LENGTH_OPTION = "ella_t5_empty_prompt_length"
_UNLIMITED = 99_999_999
_STANDARD_TOKENIZER = Path(comfy.text_encoders.t5.__file__).parent / "t5_tokenizer" / "tokenizer.json"
_DTYPE_FLAGS = ("fp8_e4m3fn_text_enc", "fp8_e5m2_text_enc", "fp16_text_enc", "fp32_text_enc", "bf16_text_enc")


def load_text_encoder_clip(
    path: str | Path, dtype: str = "auto", empty_prompt: str = "natural length"
) -> comfy.sd.CLIP:
    """Load a T5 v1.1 encoder (flan-t5) as a CLIP of the host. Nothing enters the GPU before a prompt is encoded.

    Args:
        path: a .safetensors file or a Hugging Face folder.
        dtype: of the weights, a key of `DTYPES`; "auto" is fp16 on GPUs and fp32 on the CPU, unless ComfyUI was started
            with a flag that says otherwise.
        empty_prompt: a key of `EMPTY_PROMPT_LENGTHS`: how an empty (negative) prompt is encoded.
    Raises:
        TextEncoderFileError: the file, its tokenizer or its weights cannot be used; the message says why.
    """
    clip = _load_clip(path, dtype)
    clip.set_tokenizer_option(_EMPTY_LENGTH_OPTION, EMPTY_PROMPT_LENGTHS[empty_prompt])
    # Newer hosts make a second copy of the model this way, for hooks and for several GPUs.
    clip.patcher.cached_patcher_init = (_load_patcher, (path, dtype))
    return clip


def _load_patcher(path: str | Path, dtype: str, disable_dynamic: bool = False):
    return _load_clip(path, dtype, **({"disable_dynamic": True} if disable_dynamic else {})).patcher


def _load_clip(path: str | Path, dtype: str, **clip_options) -> comfy.sd.CLIP:
    t5_file = open_t5_file(path)
    prompt_tokenizer = load_tokenizer(t5_file, _STANDARD_TOKENIZER)

    class Model(EllaT5Model):
        def __init__(self, device, dtype: torch.dtype, model_options: dict):
            super().__init__(t5_file, prompt_tokenizer, device, dtype, model_options)

    class Tokenizer(SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            def part(**_) -> EllaT5Tokenizer:
                return EllaT5Tokenizer(prompt_tokenizer, t5_file.config.d_model)

            super().__init__(name=_NAME, tokenizer=part)

    offload_device = comfy.model_management.text_encoder_offload_device()
    model_options = {"dtype": _weight_dtype(dtype), "initial_device": offload_device}
    return comfy.sd.CLIP(ClipTarget(Tokenizer, Model), model_options=model_options, **clip_options)


def _weight_dtype(choice: str) -> torch.dtype:
    device = comfy.model_management.text_encoder_device()
    flagged = any(getattr(args, flag, False) for flag in _DTYPE_FLAGS)
    if choice == "auto" and not flagged and comfy.model_management.is_device_cpu(device):
        return torch.float32
    return DTYPES[choice] or comfy.model_management.text_encoder_dtype(device)


class EllaT5Model(SD1ClipModel):
    """The host's wrapper around one text encoder."""

    def __init__(self, t5_file: T5File, tokenizer: PromptTokenizer, device, dtype: torch.dtype, model_options: dict):
        def encoder(device, dtype, model_options) -> EllaT5Encoder:
            return EllaT5Encoder(t5_file, tokenizer, device, dtype, model_options)

        super().__init__(device=device, dtype=dtype, model_options=model_options, name=_NAME, clip_model=encoder)


class EllaT5Encoder(SDClipModel):
    """The host's T5 with a file's weights; padding is masked, and its features are kept as ELLA's training did."""

    def __init__(self, t5_file: T5File, tokenizer: PromptTokenizer, device, dtype: torch.dtype, model_options: dict):
        config = {
            **vars(t5_file.config), "model_type": "t5", "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh",
        }
        # On the meta device it takes no memory until the file's weights take the place of its own.
        super().__init__(
            device="meta", textmodel_json_config=config, dtype=dtype, model_class=comfy.text_encoders.t5.T5,
            special_tokens={"end": tokenizer.eos_id, "pad": tokenizer.pad_id}, enable_attention_masks=True,
            zero_out_masked=False, model_options=model_options,
        )
        progress = comfy.utils.ProgressBar(t5_file.config.num_layers)

        def after_part() -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update(1)

        load_t5_parts(self.transformer, t5_file, dtype, device, after_part=after_part)
        self.freeze()


class EllaT5Tokenizer(SDTokenizer):
    """The host's prompt syntax over a tokenizer.json, without padding; an empty prompt may be padded."""

    def __init__(self, tokenizer: PromptTokenizer, embedding_size: int):
        super().__init__(
            tokenizer, tokenizer_class=_HostTokenizer, embedding_size=embedding_size, embedding_key=_NAME,
            has_start_token=False, pad_with_end=False, pad_token=tokenizer.pad_id, pad_to_max_length=False,
            max_length=_UNLIMITED, min_length=1,
        )

    def tokenize_with_weights(self, text: str, return_word_ids=False, tokenizer_options=None, **kwargs):
        tokenizer_options = tokenizer_options or {}
        if not kwargs.get("disable_weights"):
            weighted_parts(text)  # refuses weights that are no numbers, which the host takes
        empty_length = tokenizer_options.get(_EMPTY_LENGTH_OPTION)
        if empty_length is not None and not text.strip():
            tokenizer_options = {**tokenizer_options, f"{_NAME}_min_length": empty_length}
        return super().tokenize_with_weights(text, return_word_ids, tokenizer_options=tokenizer_options, **kwargs)


class _HostTokenizer:
    """A `PromptTokenizer` with the methods that SDTokenizer calls."""

    def __init__(self, tokenizer: PromptTokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, tokenizer: PromptTokenizer) -> "_HostTokenizer":
        return cls(tokenizer)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.ids(text)}

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.vocab()
