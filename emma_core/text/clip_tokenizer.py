"""Prompt -> token ids of a CLIP text encoder: by the tokenizer beside it, else by the published vocabulary.

All CLIPs of Stable Diffusion's family share one vocabulary, which open_clip_torch brings with it: a single-file checkpoint
holds none, and nothing is downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TextEncoderFileError, TextInputError, short
from ..files.json_file import read_json
from ..files.plain_file import read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_MERGES = 49152 - 256 - 2  # of those in the file; the rest were never used
_LARGEST = 16 << 20  # bytes
_SHORT_PART = 8  # tokens; what is shorter stays together
# CLIP's own split into words, numbers one digit at a time, and the rest
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Token ids of a prompt as the rows that the encoder reads: the start mark, ids, the end mark, filled to full length."""

    def __init__(self, tokenizer: Tokenizer, name: str):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self.name = tokenizer, name
        self.start_id, self.end_id = (self._special_id(token) for token in (START, END))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids."""
        return hashlib.sha256(self._tokenizer.to_str().encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def highest_id(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def rows(self, parts: Sequence[tuple[str, float]], length: int, pad_id: int) -> list[list[tuple[int, float]]]:
        """(id, weight) of a prompt's parts, see `weighted_parts`; a text that is too long takes several rows as in ComfyUI: a
        short part is not broken in two.

        Raises:
            TextInputError: the prompt holds half of a character.
        """
        room, filled = length - 2, [[]]
        for text, weight in parts:
            group = [(token_id, weight) for token_id in self._ids(text)]
            while group:
                left = room - len(filled[-1])
                taken = min(left, len(group)) if len(group) <= left or len(group) >= _SHORT_PART else 0
                filled[-1] += group[:taken]
                group = group[taken:]
                filled += [[]] if group else []
        pad = (pad_id, 1.0)
        return [[(self.start_id, 1.0), *row, (self.end_id, 1.0), *[pad] * (room - len(row))] for row in filled]

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as found:
            raise TextInputError(f"the prompt {short(text)} holds half of a character at position {found.start}. Write it "
                                 "again.") from None
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _special_id(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise TextEncoderFileError(f"{self.name} has no {token} token; wanted the tokenizer of a CLIP. Use the one that "
                                       "came with the checkpoint.")
        return token_id


def load_clip_tokenizer(folder: Path | None) -> ClipTokenizer:
    """The tokenizer in a folder (tokenizer.json, or vocab.json and merges.txt); None: the published one.

    Raises:
        TextEncoderFileError: files that are missing or damaged, open_clip_torch is not installed.
    """
    if folder is None:
        return ClipTokenizer(_byte_pairs(*_published()), "CLIP's published vocabulary")
    whole, name = folder / "tokenizer.json", f"{folder.parent.name}/{folder.name}"
    try:
        if whole.is_file():
            from tokenizers import Tokenizer

            return ClipTokenizer(Tokenizer.from_str(read_text(whole, "a tokenizer.json", TextEncoderFileError, _LARGEST)), name)
        vocabulary = read_json(folder / "vocab.json", "the vocabulary of a CLIP tokenizer", TextEncoderFileError)
        lines = read_text(folder / "merges.txt", "the merges of a CLIP tokenizer", TextEncoderFileError, _LARGEST).splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        return ClipTokenizer(_byte_pairs(vocabulary, merges), name)
    except TextEncoderFileError:
        raise
    except Exception as found:  # the tokenizers library raises plain Exception
        raise TextEncoderFileError(f"{name} cannot be read as a tokenizer ({short(str(found), 200)}). Download it again."
                                   ) from found


def _published() -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Vocabulary and merges of open_clip's package, without importing it."""
    package = importlib.util.find_spec("open_clip")
    path = Path(package.submodule_search_locations[0]) / _VOCABULARY if package and package.submodule_search_locations else None
    if path is None or not path.is_file():
        raise TextEncoderFileError("a single-file checkpoint has no tokenizer, and the package open_clip_torch, which brings "
                                   "CLIP's, is not installed. Run `pip install open_clip_torch`, or name a diffusers folder.")
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != _VOCABULARY_SHA256:
        raise TextEncoderFileError(f"{path} is not CLIP's vocabulary as it was published. Install open_clip_torch again.")
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().splitlines()[1:_MERGES + 1]]
    letters = _letters()
    names = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return {name: number for number, name in enumerate(names)}, merges


def _letters() -> list[str]:
    """What stands for each byte in byte-level vocabularies, in the order of CLIP's ids: first those that can be printed."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [number for number in range(256) if number not in shown]
    return [chr(number) for number in shown] + [chr(256 + place) for place in range(len(hidden))]


def _byte_pairs(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> Tokenizer:
    """CLIP's tokenizer of these parts."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    model: Any = models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False,
                            unk_token=END)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (START, END)])
    return tokenizer
