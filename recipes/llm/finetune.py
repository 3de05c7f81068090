"""What supervised and reinforcement fine-tuning share: low-rank adapters, and weights to begin from."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from evolute.callbacks.zero_checkpoint import load_checkpoint
from evolute.data.tokenizers import one_line
from evolute.recipes.llm.pretrain import CONFIG_KEY, Pretrain

LORA_KEY = "lora"
"""Key of the adapter's configuration in a checkpoint."""


class FineTune(Pretrain):
    """A causal LM that begins from given weights and trains all of them, or low-rank adapters.

    Args:
        init_from: checkpoint of another language-model recipe whose weights the run begins with.
        lora: arguments of PEFT's ``LoraConfig``, ``{"r": 16, "lora_alpha": 32}``; ``target_modules`` is
            ``"all-linear"`` by default. None trains every weight.
        **pretrain: arguments of :class:`Pretrain`.

    Raises:
        ValueError: as ``Pretrain`` does, or if the adapter or the checkpoint is refused.
    """

    def __init__(self, init_from: str | None = None, lora: dict[str, Any] | None = None, **pretrain: Any) -> None:
        super().__init__(**pretrain)
        self.init_from = init_from
        self.lora = lora

    @override
    def _prepare(self, model: Any) -> None:
        if self.init_from is not None:
            load_weights(model, self.init_from)
        self._warm_up(model)
        if self.lora is not None:
            add_lora(model, self.lora)

    def _warm_up(self, model: Any) -> None:
        """Train the model before adapters are added and weights are sharded; nothing by default."""

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[LORA_KEY] = self.lora


def load_weights(model: nn.Module, path: str) -> None:
    """Load the model's weights out of a checkpoint of a language-model recipe; adapters are merged.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it cannot be read, is of another kind, or of a model of other shapes.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"init_from={path!r}: no such checkpoint")
    try:
        state = load_checkpoint(Path(path))
    except ValueError as error:
        raise ValueError(f"init_from={path!r}: not a readable checkpoint ({one_line(error)})") from error
    if CONFIG_KEY not in state:
        raise ValueError(f"init_from={path!r}: not a checkpoint of a language-model recipe")
    try:
        model.load_state_dict(merged_weights(state))
    except RuntimeError as error:
        raise ValueError(f"init_from={path!r}: its weights are not this model's ({one_line(error)})") from error


def merged_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the Hugging Face model's own weights from a recipe's checkpoint, adapters merged into them."""
    weights = {k.removeprefix("model."): v for k, v in state["state_dict"].items() if k.startswith("model.")}
    if not state.get(LORA_KEY):
        return weights
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**state[CONFIG_KEY]))
    add_lora(model, state[LORA_KEY])
    model.load_state_dict(weights)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if hasattr(layer, "base_layer"):
                layer.merge()
                setattr(parent, name, layer.base_layer)
    return dict(model.state_dict())


def add_lora(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Put PEFT's low-rank adapters into a model and freeze everything else.

    Raises:
        ImportError: if peft is missing.
        ValueError: if peft refuses the arguments, or they match no layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"lora={arguments} needs peft: pip install 'evolute[llm]'") from error
    options: dict[str, Any] = {"target_modules": "all-linear", **arguments}
    try:
        inject_adapter_in_model(LoraConfig(**options), model)
    except Exception as error:  # peft's own types, TypeError for unknown arguments
        raise ValueError(f"lora={arguments}: peft refuses it ({one_line(error)})") from error


@contextmanager
def without_lora(model: nn.Module) -> Generator[None]:
    """Let a model answer as if it had no adapters."""
    layers = [m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "enable_adapters")]
    asked = {p: p.requires_grad for p in model.parameters()}
    for layer in layers:
        layer.enable_adapters(False)  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # pyright: ignore[reportCallIssue]
        for parameter, grad in asked.items():
            parameter.requires_grad_(grad)


def effective_weight(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear layer with its active adapters merged in, in the weight's type."""
    base = getattr(linear, "base_layer", None)
    if base is None:
        return linear.weight, linear.bias
    weight = base.weight
    if not linear.merged and not linear.disable_adapters:
        for adapter in linear.active_adapters:
            if adapter in linear.lora_A:
                weight = weight + linear.get_delta_weight(adapter).to(weight)
    return weight, base.bias
