"""Tokenizers: bytes, which need no download, or any Hugging Face tokenizer."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from evolute.data.packing import utf8


class Tokenizer(Protocol):
    """What a data module and a recipe ask of a tokenizer."""

    name: str
    vocab_size: int
    """Number of ids, special ones included: every id is below it."""
    eos_id: int
    """The id that separates documents."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of ``text``, ``[n]``, without special tokens."""
        ...

    def decode(self, ids: Any) -> str:
        """Return the text of a sequence of ids."""
        ...


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, and 256 between documents."""

    name = "byte"
    vocab_size = 257
    eos_id = 256

    @override
    def encode(self, text: str) -> NDArray[np.int32]:
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int32)

    @override
    def decode(self, ids: Any) -> str:
        # The separator shows as a line of its own; ids above it are padding of a model's vocabulary.
        parts = (bytes([i]) if i < 256 else b"\n<|end|>\n" if i == self.eos_id else b"" for i in map(int, ids))
        return b"".join(parts).decode("utf-8", "replace")


class HFTokenizer(Tokenizer):
    """Any Hugging Face tokenizer.

    Args:
        name: name on the Hub or a folder.

    Raises:
        ImportError: if transformers is missing.
        ValueError: if it cannot be loaded, or has no token that could separate documents.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(f"tokenizer={name!r} needs transformers: pip install 'evolute[llm]'") from error
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # the libraries below raise a dozen types here, over many lines
            raise ValueError(f"tokenizer={name!r} cannot be loaded: {one_line(error)}") from error
        self.name = name
        self.vocab_size = len(self.hf)
        eos = next((i for i in (self.hf.eos_token_id, self.hf.sep_token_id, self.hf.bos_token_id) if i is not None), -1)
        if eos < 0:
            raise ValueError(f"tokenizer={name!r} has no eos, sep or bos token to put between documents")
        self.eos_id = int(eos)

    @override
    def encode(self, text: str) -> NDArray[np.int32]:
        return np.asarray(self.hf.encode(text, add_special_tokens=False), dtype=np.int32)

    @override
    def decode(self, ids: Any) -> str:
        return str(self.hf.decode([int(i) for i in ids if int(i) < self.vocab_size]))


def load_tokenizer(name: str) -> Tokenizer:
    """Return the byte tokenizer for ``"byte"``, else the Hugging Face tokenizer of that name or folder.

    Raises:
        FileNotFoundError: if ``name`` looks like a path and is not there.
        ValueError: if it cannot be loaded.
    """
    if name == "byte":
        return ByteTokenizer()
    if (name.startswith((".", "/", "~")) or os.sep + os.sep in name) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"tokenizer={name!r}: no such file or folder")
    return HFTokenizer(str(Path(name).expanduser()) if name.startswith("~") else name)


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return an exception's message on one line, cut at ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
