"""Language-model recipes."""

from evolute.recipes.llm.export import export
from evolute.recipes.llm.grpo import GRPO
from evolute.recipes.llm.pretrain import Pretrain
from evolute.recipes.llm.sft import SFT

__all__ = ["GRPO", "SFT", "Pretrain", "export"]
