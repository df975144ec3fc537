"""Prompt -> token ids of a T5, from a tokenizer.json."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TextEncoderFileError, TextInputError, short
from ..files.plain_file import check_plain_file
from .t5_file import T5File

# The published tokenizer has 32,100 entries; the published weights round that up to 32,128.
_STANDARD_VOCAB_SIZES = (32100, 32128)
_WHAT = "the tokenizer.json of a T5"
_LARGEST = 64 << 20  # bytes; flan-t5's has 2.4 MB


class PromptTokenizer:
    """Token ids of a prompt, `</s>` appended, neither padded nor truncated."""

    def __init__(self, path: str | Path):
        from tokenizers import Tokenizer

        path = check_plain_file(path, _WHAT, TextEncoderFileError)
        if path.stat().st_size > _LARGEST:
            raise TextEncoderFileError(f"{path} holds {path.stat().st_size:,} bytes, too many for {_WHAT}. Download it again.")
        with _explained(f"{path} cannot be read as a tokenizer.json"):
            self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.name = path.name
        self.eos_id = self._special_id("</s>", path)
        self.pad_id = self._special_id("<pad>", path)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids."""
        return hashlib.sha256(self._tokenizer.to_str().encode("utf-8", "surrogatepass")).hexdigest()

    def _special_id(self, token: str, path: Path) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise TextEncoderFileError(f"{path} has no {token} token; wanted the tokenizer of a T5. "
                                       "Use the tokenizer.json that came with the text encoder.")
        return token_id

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, then `</s>`; an empty prompt is `</s>` alone.

        Raises:
            TextInputError: the prompt holds half of a character.
            TextEncoderFileError: the tokenizer cannot encode it.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as found:
            raise TextInputError(f"the prompt {short(prompt)} holds half of a character at position {found.start}. Write it "
                                 "again.") from None
        with _explained(f"{self.name} cannot encode the prompt {short(prompt)}"):
            return [*self._tokenizer.encode(prompt, add_special_tokens=False).ids, self.eos_id]

    def vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """The faults of the tokenizers library in words: it raises plain Exception, and Rust's panics are not even that."""
    try:
        yield
    except BaseException as found:
        if not isinstance(found, Exception) and type(found).__name__ != "PanicException":
            raise
        raise TextEncoderFileError(f"{what} ({short(str(found), 200)}). Download the tokenizer.json again.") from found


def find_tokenizer(t5_file: T5File, standard_path: str | Path | None = None) -> Path:
    """The tokenizer.json of a text encoder: its own, else the standard one of T5 at ``standard_path``.

    Raises:
        TextEncoderFileError: it has none of its own, and there is no standard one or it is not made for these weights.
    """
    if t5_file.tokenizer_path is not None:
        return t5_file.tokenizer_path
    where = (
        f"{t5_file.path}/tokenizer.json" if t5_file.path.is_dir()
        else str(t5_file.path.with_name(f"{t5_file.path.stem}.tokenizer.json"))
    )
    if standard_path is None:
        raise TextEncoderFileError(
            f"{t5_file.name} comes without a tokenizer: put the tokenizer.json of its model (google/flan-t5-xl on "
            f"Hugging Face has it) at {where}, or on the command line name one (--ella.tokenizer) or a ComfyUI, which has T5's "
            "(--comfyui DIR)."
        )
    if not has_standard_vocabulary(t5_file):
        raise TextEncoderFileError(
            f"{t5_file.name} has a vocabulary of {t5_file.config.vocab_size}, the standard T5 tokenizer needs 32128: "
            f"put the tokenizer.json that came with it at {where}."
        )
    return Path(standard_path)


def has_standard_vocabulary(t5_file: T5File) -> bool:
    """Whether the standard tokenizer of T5 is made for these weights."""
    return t5_file.config.vocab_size in _STANDARD_VOCAB_SIZES


def load_tokenizer(
    t5_file: T5File, standard_path: str | Path | None = None, given: str | Path | None = None
) -> PromptTokenizer:
    """`find_tokenizer`, opened and checked against the vocabulary of the weights.

    Args:
        given: a tokenizer.json in place of what would be found.
    Raises:
        TextEncoderFileError: as `find_tokenizer`, or the tokenizer knows ids that the weights do not have.
    """
    path = Path(given) if given else find_tokenizer(t5_file, standard_path)
    tokenizer = PromptTokenizer(path)
    highest = max(tokenizer.vocab().values())
    if highest >= t5_file.config.vocab_size:
        raise TextEncoderFileError(
            f"{path} has ids up to {highest}, {t5_file.name} has a vocabulary of {t5_file.config.vocab_size}: "
            "use the tokenizer.json that came with these weights."
        )
    return tokenizer
