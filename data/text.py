"""Text for language models: documents, packed windows, and a place in them that survives a restart."""

import hashlib
import math
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from typing_extensions import override

from evolute.data.packing import PackedWindows, bigram_floor, split_documents, utf8
from evolute.data.resumable import TokenizedDataModule
from evolute.data.sources import documents


class TextDataModule(TokenizedDataModule):
    """Windows of ``context + 1`` tokens from any text, split by document.

    A batch is ``{"input_ids", "labels"}``, both int64 ``[batch_size, context + 1]``, not shifted. The order of
    training batches depends on ``seed`` alone, not on ``num_workers``; a resumed run continues at the next batch. In
    training the last partial batch of an epoch is dropped; validation predicts every token of its text exactly once.

    Example::

        trainer.fit(Pretrain(), TextDataModule("stdlib", context=256, batch_size=16))

    Args:
        source: ``"stdlib"`` (source code of the running Python's standard library), a file or folder of .txt, .py,
            .md, .jsonl, .parquet, a folder written by ``save_to_disk``, or a data set's name on the Hugging Face Hub.
        tokenizer: ``"byte"``, or name or folder of a Hugging Face tokenizer.
        context: predictions a window.
        batch_size: windows a batch, on each rank.
        val_fraction: share of the bytes that validation holds out, in whole documents.
        seed: seed of the split and of the order of batches.
        num_workers: loader processes.
        max_bytes: stop reading before the document that would exceed this many bytes; ``None`` reads all.
        text_column: column with the text, in .jsonl, .parquet and data sets.
        subset: configuration of a data set.
        split: split of a data set that the corpus is taken from.
        sha256: hash the corpus must have; ``None`` accepts any.

    Attributes:
        corpus_sha256: hash over the documents in order (after ``setup``).
        tokenizer: the tokenizer.
        val_texts: the validation documents.
        val_bytes_per_token: UTF-8 bytes of the validation text over its number of predicted tokens (separators
            included): bits per byte are bits per token divided by it.

    Raises:
        ValueError: if an argument is out of range, or (in ``setup``) the corpus does not serve.
    """

    def __init__(
        self,
        source: str = "stdlib",
        tokenizer: str = "byte",
        context: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        max_bytes: int | None = None,
        text_column: str = "text",
        subset: str | None = None,
        split: str = "train",
        sha256: str | None = None,
    ) -> None:
        super().__init__(tokenizer)
        if not source:
            raise ValueError(f"TextDataModule(source={source!r}): must name a corpus")
        for name, value, least in (
            ("context", context, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("max_bytes", 1 if max_bytes is None else max_bytes, 1),
        ):
            if value < least:
                raise ValueError(f"TextDataModule({name}={value}): must be at least {least}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"TextDataModule(val_fraction={val_fraction}): must lie between 0 and 1")
        self.save_hyperparameters()
        self.source = source
        self.context = context
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.max_bytes = max_bytes
        self.sha256 = sha256
        self._columns: dict[str, Any] = {"text_column": text_column, "subset": subset, "split": split}
        self.corpus_sha256 = ""
        self.val_texts: list[str] = []
        self.val_bytes_per_token = math.nan

    @override
    def prepare_data(self) -> None:
        # On one process a node: what comes from the Hub is downloaded here and read from the cache in setup.
        next(documents(self.source, **self._columns), None)
        self.tokenizer  # noqa: B018

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._windows is not None:
            return
        texts = self._read()
        halves = split_documents(texts, self.val_fraction, self.seed)
        train = PackedWindows(self._stream(halves.train), self.context)
        val = PackedWindows(self._stream(halves.val), self.context, pad_to=self._world[1])
        size = sum(len(utf8(text)) for text in texts)
        corpus = f"source={self.source!r} ({len(texts)} documents, {size} bytes)"
        needed = self.batch_size * self._world[1]
        if len(train) < needed:
            raise ValueError(
                f"{corpus} gives {len(train)} training windows of {self.context} tokens, a batch takes {needed}: "
                "use more text, or a smaller context or batch_size"
            )
        if not halves.val or val.targets < self.context:
            raise ValueError(
                f"{corpus} gives no validation window of {self.context} tokens: "
                "use more text, a smaller context or a larger val_fraction"
            )
        self.val_texts = halves.val
        self.val_bytes_per_token = sum(len(utf8(text)) for text in halves.val) / val.targets
        self._windows = train, val
        rank_zero_info(
            f"corpus {self.source}: {len(texts)} documents, {size:,} bytes, sha256 {self.corpus_sha256}; "
            f"{len(train):,} training and {len(val):,} validation windows of {self.context} tokens"
        )

    def _read(self) -> list[str]:
        """Read the documents that are not empty, up to ``max_bytes``, and check their hash."""
        texts: list[str] = []
        digest = hashlib.sha256()
        size = 0
        for document in documents(self.source, **self._columns):
            data = utf8(document.text)
            if not data:
                continue
            size += len(data)
            if self.max_bytes is not None and size > self.max_bytes:
                if not texts:
                    raise ValueError(
                        f"max_bytes={self.max_bytes} is less than the first document of source={self.source!r}, "
                        f"{document.name} ({len(data)} bytes)"
                    )
                break
            # With its length in front, so that text moved from one document to the next changes the hash.
            digest.update(len(data).to_bytes(8, "big") + data)
            texts.append(document.text)
        if not texts:
            raise ValueError(f"source={self.source!r}: the corpus is empty")
        self.corpus_sha256 = digest.hexdigest()
        if self.sha256 is not None and self.sha256 != self.corpus_sha256:
            raise ValueError(
                f"source={self.source!r} has sha256 {self.corpus_sha256}, but sha256={self.sha256!r} is asked for: "
                "the corpus changed (another Python version changes stdlib); restore it, or set sha256 to null"
            )
        return texts

    def _stream(self, texts: list[str]) -> NDArray[np.int32]:
        """Join documents: a separator before each and one at the end, so that every token of a text is predicted."""
        eos = np.array([self.tokenizer.eos_id], dtype=np.int32)
        parts = [eos]
        for text in texts:
            parts += [self.tokenizer.encode(text), eos]
        return np.concatenate(parts)

    def bigram_floor(self) -> float:
        """Return the conditional entropy of the validation bytes given the byte before, in bits per byte.

        What the best byte bigram model could reach on that text, whatever the tokenizer.
        """
        self._packed()
        return bigram_floor(self.val_texts)

    def resolved_hparams(self) -> dict[str, Any]:
        """Return what was only known after ``setup``, for a run's resolved configuration."""
        self._packed()
        return {"sha256": self.corpus_sha256}

    @override
    def _identity(self) -> dict[str, Any]:
        return {
            "corpus_sha256": self.corpus_sha256,
            "tokenizer": self.tokenizer_name,
            "context": self.context,
            # Over all ranks: they share out what one process would take, so their number may change.
            "samples a batch": self.batch_size * self._world[1],
            "val_fraction": self.val_fraction,
            "seed": self.seed,
        }
