"""Supervised fine-tuning: learn completions, not prompts."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from evolute.recipes.llm.finetune import FineTune


class SFT(FineTune):
    """Learn to continue prompts as the data does, with the loss on completions only.

    A batch is that of :class:`evolute.data.CompletionDataModule`: ``input_ids``, ``labels`` (-100 on prompts and
    padding) and ``position_ids``, ``[b, t + 1]``, not shifted. Positions that begin at 0 again keep pairs packed into
    a row from seeing each other.

    Logs what :class:`Pretrain` does, per predicted token of a completion.

    Args:
        init_from: checkpoint of another language-model recipe whose weights the run begins with.
        lora: arguments of PEFT's ``LoraConfig``; None trains every weight.
        **pretrain: arguments of :class:`Pretrain`.
    """

    def __init__(self, init_from: str | None = None, lora: dict[str, Any] | None = None, **pretrain: Any) -> None:
        super().__init__(init_from=init_from, lora=lora, **pretrain)

    @override
    def loss_on(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return completion_loss(self.model, batch)


def completion_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean cross entropy over labelled tokens in nats, the logits ``[n, vocab]`` and the targets ``[n]``.

    A batch without any labelled token has a loss of 0 that is connected to the graph.
    """
    positions = batch.get("position_ids")
    out = model(
        input_ids=batch["input_ids"][:, :-1],
        position_ids=None if positions is None else positions[:, :-1],
        use_cache=False,
    )
    logits = out.logits.flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    total = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1), logits, targets
