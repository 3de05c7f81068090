"""Language-model recipes."""

from evolute.recipes.llm.export import export
from evolute.recipes.llm.pretrain import Pretrain

__all__ = ["Pretrain", "export"]
