"""LightningDataModules, the sources behind them, and samplers that remember where they were."""

from evolute.data.packing import PackedWindows, bigram_floor, split_documents
from evolute.data.samplers import ResumableLoader, ResumableSampler
from evolute.data.sources import STDLIB_MODULES, Document, documents
from evolute.data.text import TextDataModule
from evolute.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "STDLIB_MODULES",
    "ByteTokenizer",
    "Document",
    "HFTokenizer",
    "PackedWindows",
    "ResumableLoader",
    "ResumableSampler",
    "TextDataModule",
    "Tokenizer",
    "bigram_floor",
    "documents",
    "load_tokenizer",
    "split_documents",
]
