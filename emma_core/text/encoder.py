"""T5 text features on a bare machine, through transformers.

Shapes: N tokens of a prompt with its `</s>`, D width of the features.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

from .prompt_weights import weighted_parts
from .t5_file import T5File, load_t5_parts, open_t5_file
from .t5_layout import T5EncoderConfig, check_text_width
from .t5_tokenizer import PromptTokenizer, load_tokenizer

_REMEMBERED = 64  # prompts
# fp16 overflows in this layer of the larger T5, so that transformers keeps it in fp32 too.
_FLOAT32_IN_HALF_PRECISION = ("wo.weight",)


class TextEncoder:
    """A T5 encoder and its tokenizer: prompts -> last hidden states; the latest prompts are remembered."""

    def __init__(self, model: torch.nn.Module, tokenizer: PromptTokenizer, config: T5EncoderConfig):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self._known: OrderedDict[tuple[tuple[int, ...], int], torch.Tensor] = OrderedDict()

    @property
    def width(self) -> int:
        return self.config.d_model

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.tokenizer.fingerprint

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Features (1,N,D) of each prompt at its natural length: no padding, no truncation."""
        return [self._features(self.tokenizer.ids(prompt)) for prompt in prompts]

    def encode_weighted(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """As `encode`, with the weights that brackets give as in ComfyUI, see `weighted_parts`.

        A token of weight w becomes e + w (z - e): z its feature, e the one at its place in an empty prompt of that length.

        Raises:
            TextInputError: a weight that is no finite number.
        """
        return [self._weighted(weighted_parts(prompt)) for prompt in prompts]

    def _weighted(self, parts: list[tuple[str, float]]) -> torch.Tensor:
        ids, weights = [], []
        for part, weight in parts:
            found = self.tokenizer.ids(part)[:-1]
            ids += found
            weights += [weight] * len(found)
        ids, weights = [*ids, self.tokenizer.eos_id], [*weights, 1.0]
        features_1ND = self._features(ids)
        if all(weight == 1.0 for weight in weights):
            return features_1ND
        empty_1ND = self._features([self.tokenizer.eos_id, *[self.tokenizer.pad_id] * (len(ids) - 1)], 1)
        weight_N1 = torch.tensor(weights, dtype=features_1ND.dtype, device=features_1ND.device)[:, None]
        return torch.where(weight_N1 == 1.0, features_1ND, empty_1ND + weight_N1 * (features_1ND - empty_1ND))

    @torch.no_grad()
    def _features(self, ids: list[int], seen: int | None = None) -> torch.Tensor:
        """Features of token ids, of which the first ``seen`` (all) are attended to; once for each prompt among the latest."""
        seen = len(ids) if seen is None else seen
        key = (tuple(ids), seen)
        if key not in self._known:
            ids_1N = torch.tensor([ids], device=self.device)
            mask_1N = (torch.arange(len(ids), device=self.device) < seen).long()[None]
            self._known[key] = self.model(input_ids=ids_1N, attention_mask=mask_1N).last_hidden_state
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key].clone()


def usual_dtype(device: torch.device) -> torch.dtype:
    """Of the weights, where nothing else is said: fp32 on the CPU and fp16 elsewhere."""
    return torch.float32 if device.type == "cpu" else torch.float16


def load_text_encoder(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None, width: int | None = None,
    tokenizer: str | Path | None = None,
) -> TextEncoder:
    """Load a T5 v1.1 encoder from a .safetensors file or a Hugging Face folder, strictly.

    Args:
        path: file or folder; its tokenizer.json lies in the folder, or beside the file as `<file stem>.tokenizer.json` or in a
            folder `<file stem>`.
        dtype: of the weights; by default `usual_dtype` of the device.
        device: the CPU by default.
        width: D that the connector reads; another is refused before the weights are read.
        tokenizer: another tokenizer.json than its own.
    Raises:
        TextEncoderFileError: the file, its tokenizer or its weights cannot be used; the message says why.
    """
    device = torch.device("cpu" if device is None else device)
    t5_file = open_t5_file(path)
    if width is not None:
        check_text_width(t5_file.config.d_model, width, Path(path).name)
    words = load_tokenizer(t5_file, given=tokenizer)
    return TextEncoder(_load_model(t5_file, dtype or usual_dtype(device), device), words, t5_file.config)


def _load_model(t5_file: T5File, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**vars(t5_file.config), feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False)
    # On the meta device it takes no memory until the weights take the place of its own.
    with torch.device("meta"):
        model = T5EncoderModel(config)
    model.requires_grad_(False)
    load_t5_parts(model, t5_file, dtype, device, _FLOAT32_IN_HALF_PRECISION if dtype == torch.float16 else ())
    model.set_input_embeddings(model.shared)
    return model.eval()
