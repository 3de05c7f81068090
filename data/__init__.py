"""LightningDataModules, the sources behind them, and samplers that remember where they were."""

from evolute.data.completions import CompletionDataModule
from evolute.data.interactions import InteractionDataModule
from evolute.data.item_vectors import ItemVectors, encode_items, encode_texts
from evolute.data.movielens import movielens_folder, set_up_movielens
from evolute.data.packing import PackedWindows, bigram_floor, split_documents
from evolute.data.prompts import PromptDataModule
from evolute.data.samplers import ResumableLoader, ResumableSampler
from evolute.data.sources import STDLIB_MODULES, Document, documents
from evolute.data.text import TextDataModule
from evolute.data.tokenizers import ByteTokenizer, CharTokenizer, HFTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "STDLIB_MODULES",
    "ByteTokenizer",
    "CharTokenizer",
    "CompletionDataModule",
    "Document",
    "HFTokenizer",
    "InteractionDataModule",
    "ItemVectors",
    "PackedWindows",
    "PromptDataModule",
    "ResumableLoader",
    "ResumableSampler",
    "TextDataModule",
    "Tokenizer",
    "bigram_floor",
    "documents",
    "encode_items",
    "encode_texts",
    "load_tokenizer",
    "movielens_folder",
    "set_up_movielens",
    "split_documents",
]
