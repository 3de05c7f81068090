"""From documents to fixed windows: the split, the packing, and the bigram floor of a text."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Split:
    """Training and validation texts; no text is in both."""

    train: list[str]
    val: list[str]


def utf8(text: str) -> bytes:
    """Return the UTF-8 bytes of ``text``, lone surrogates (which JSON may carry) included."""
    return text.encode("utf-8", "surrogatepass")


def split_documents(texts: Sequence[str], val_fraction: float, seed: int) -> Split:
    """Split by content, so that equal documents fall on the same side.

    Distinct texts are ordered by a hash of ``(seed, content)``; validation takes them from the front until it holds
    ``val_fraction`` of all bytes, training the rest. A lone text is cut once, at a line end where there is one: its
    last part is the validation text. The order of ``texts`` is kept on both sides.

    Args:
        texts: the documents.
        val_fraction: wanted share of bytes for validation, in (0, 1).
        seed: seed of the order.

    Returns:
        The two lists. Either may be empty when there are too few texts.
    """
    distinct: dict[str, int] = dict.fromkeys(texts, 0)  # bytes of all copies
    for text in texts:
        distinct[text] += len(utf8(text))
    if len(distinct) == 1:
        (text,) = distinct
        cut = int(len(text) * (1 - val_fraction))
        cut = text.rfind("\n", 0, cut) + 1 or cut
        return Split([text[:cut]], [text[cut:]])
    prefix = f"{seed}:".encode()
    ranked = sorted(distinct, key=lambda text: hashlib.sha256(prefix + utf8(text)).digest())
    wanted = val_fraction * sum(distinct.values())
    held: set[str] = set()
    taken = 0
    for text in ranked[:-1]:  # training keeps at least one
        if taken >= wanted:
            break
        held.add(text)
        taken += distinct[text]
    return Split([t for t in texts if t not in held], [t for t in texts if t in held])


class PackedWindows(Dataset[dict[str, Tensor]]):
    """A stream of tokens cut into windows of ``context + 1`` with stride ``context``.

    Each token but the first is the target of exactly one window. An item is ``{"input_ids", "labels"}``, both int64
    ``[context + 1]``, not shifted (the convention of Hugging Face models; a trainer feeds ``[:-1]`` and predicts
    ``[1:]``). Several indices at once give a batch ``[n, context + 1]``, which spares the collation.

    Args:
        stream: token ids, 1-D.
        context: number of predictions a window.
        pad_to: ``None`` drops the tokens that do not fill a window. A number keeps them, fills up the window with
            labels of -100, and adds wholly ignored windows until the number of windows is a multiple of ``pad_to``.
    """

    def __init__(self, stream: NDArray[np.int32], context: int, pad_to: int | None = None) -> None:
        self.targets = max(len(stream) - 1, 0)
        inputs = labels = torch.from_numpy(stream)
        if pad_to is not None and self.targets:
            windows = -(-self.targets // (context * pad_to)) * pad_to
            missing = windows * context - self.targets
            inputs = torch.cat([inputs, inputs[:1].expand(missing)])
            labels = torch.cat([labels, torch.full((missing,), IGNORE_INDEX, dtype=labels.dtype)])
        if len(inputs) <= context:
            inputs = labels = inputs.new_empty((0, context + 1))
        else:
            inputs, labels = (t.unfold(0, context + 1, context) for t in (inputs, labels))
            self.targets = min(self.targets, len(inputs) * context)
        self._inputs, self._labels = inputs, labels

    def __len__(self) -> int:
        return len(self._inputs)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._inputs[index].long(), "labels": self._labels[index].long()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch, ``[len(indices), context + 1]``."""
        return {"input_ids": self._inputs[indices].long(), "labels": self._labels[indices].long()}


def bigram_floor(texts: Iterable[str | bytes]) -> float:
    """Return the entropy of a byte given the one before it, counted on the text itself, in bits per byte.

    No model that sees only the previous byte can code ``texts`` in fewer bits (its counts would have to be these).
    A document's first byte is counted as following a document separator.

    Args:
        texts: the documents; strings are taken as UTF-8.

    Returns:
        ``H(x_t | x_{t-1})`` in bits per byte, with ``n`` the counts: ``-sum n_ij log2(n_ij / n_i) / sum n_ij``.

    Raises:
        ValueError: if there is no byte at all.
    """
    counts = np.zeros((257, 256), dtype=np.int64)
    for text in texts:
        data = np.frombuffer(utf8(text) if isinstance(text, str) else text, dtype=np.uint8)
        if not len(data):
            continue
        counts[256, data[0]] += 1
        pairs = data[:-1].astype(np.int64) * 256 + data[1:]
        counts[:256] += np.bincount(pairs, minlength=65536).reshape(256, 256)
    total = int(counts.sum())
    if not total:
        raise ValueError("bigram_floor: the text is empty")
    rows = counts.sum(1, keepdims=True)
    seen = counts > 0
    bits = counts[seen] * (np.log2(np.broadcast_to(rows, counts.shape)[seen]) - np.log2(counts[seen]))
    return float(bits.sum() / total)
