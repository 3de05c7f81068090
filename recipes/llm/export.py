"""A trained checkpoint as a Hugging Face folder."""

from pathlib import Path
from typing import Any

from evolute.callbacks.zero_checkpoint import load_checkpoint
from evolute.data.tokenizers import HFTokenizer, load_tokenizer, one_line
from evolute.recipes.llm.finetune import merged_weights
from evolute.recipes.llm.pretrain import CONFIG_KEY


def export(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the model of a language-model recipe's checkpoint, adapters merged, as a Hugging Face folder.

    The folder holds config.json, the weights as safetensors, and the tokenizer where it is a Hugging Face one (the
    byte tokenizer has no files: ids are UTF-8 bytes, 256 separates documents). Nothing is unpickled but tensors and
    plain data.

    Args:
        checkpoint: a checkpoint written by a Trainer: a file, or the directory of a run under DeepSpeed.
        folder: where to write; made if missing.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it cannot be read, or is not one of ``Pretrain``.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"export({str(path)!r}): no such checkpoint")
    try:
        state = load_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"export({str(path)!r}): not a readable checkpoint ({one_line(error)})") from error
    if CONFIG_KEY not in state:
        raise ValueError(f"export({str(path)!r}): not a checkpoint of Pretrain (it has no {CONFIG_KEY!r})")

    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**state[CONFIG_KEY]))
    weights = merged_weights(state)
    model.load_state_dict(weights)
    model.to(next(iter(weights.values())).dtype)
    target = Path(folder)
    model.save_pretrained(target)
    tokenizer = load_tokenizer(state.get("datamodule_hyper_parameters", {}).get("tokenizer", "byte"))
    if isinstance(tokenizer, HFTokenizer):
        tokenizer.hf.save_pretrained(target)
    return target
