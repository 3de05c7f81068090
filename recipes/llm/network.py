"""The Hugging Face model a recipe trains: built from a configuration, or loaded."""

from typing import Any

from torch import nn

from evolute.callbacks.access import shape_of
from evolute.data.tokenizers import Tokenizer, gguf_arguments, one_line

# A Llama of 0.83 M parameters with the byte vocabulary.
DEFAULT_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
VOCAB_MULTIPLE = 64
"""A vocabulary is rounded up to a multiple of this: matrix kernels like it, and 257 rows are odd for all."""


def _transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{what} needs transformers: pip install 'evolute[llm]'") from error
    return transformers


def build(config: dict[str, Any] | None, vocab_size: int | None, tokenizer: Tokenizer | None, attention: str) -> Any:
    """Return a freshly initialised causal LM.

    Args:
        config: arguments of the Hugging Face configuration; ``model_type`` (default ``"llama"``) picks it. Given
            values stand on top of ``DEFAULT_CONFIG`` when the type is llama, else alone.
        vocab_size: rows of the embedding; by default the tokenizer's, rounded up.
        tokenizer: the tokenizer of the data, if known.
        attention: attention implementation.

    Raises:
        ValueError: if no size of vocabulary is known, or the configuration is refused.
    """
    transformers = _transformers("Pretrain")
    config = config or {}
    values = config if config.get("model_type", "llama") != "llama" else DEFAULT_CONFIG | config
    vocab_size = vocab_size or values.get("vocab_size")
    if vocab_size is None:
        if tokenizer is None:
            raise ValueError("Pretrain: set vocab_size, for the data module has no tokenizer to take it from")
        vocab_size = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    special = {} if tokenizer is None else {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    try:
        hf_config = transformers.AutoConfig.for_model(**({"pad_token_id": None} | special | values))
        hf_config.vocab_size = vocab_size
        return transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention)
    except Exception as error:  # strict configurations raise their own types, over many lines
        raise ValueError(f"Pretrain(config={config}): Hugging Face refuses it ({one_line(error)})") from error


def load(name: str, attention: str) -> Any:
    """Return the causal LM of that name, folder or .gguf file, in float32 (quantised weights are dequantised).

    Raises:
        ValueError: if it cannot be loaded.
    """
    transformers = _transformers(f"Pretrain(model={name!r})")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **gguf_arguments(name), attn_implementation=attention, dtype="float32"
        )
        # The weights are in float32 now; and a checkpoint's configuration must be plain data.
        if "gguf_file" in gguf_arguments(name) and hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        return model
    except ImportError as error:
        raise ImportError(f"Pretrain(model={name!r}): {one_line(error)}") from error
    except Exception as error:  # hub, network, file and format errors of a dozen types
        raise ValueError(f"Pretrain(model={name!r}): cannot be loaded ({one_line(error)})") from error


def check_fit(model: nn.Module, tokenizer: Tokenizer | None) -> int:
    """Return the model's vocabulary size, after checking that the tokenizer's ids are within it.

    Raises:
        ValueError: if the tokenizer has more ids than the model.
    """
    size = int(shape_of(model.get_input_embeddings().weight)[0])  # pyright: ignore
    if tokenizer is not None and tokenizer.vocab_size > size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, the model's vocabulary {size}: "
            "use the model's own tokenizer, or a model with a larger vocabulary"
        )
    return size
