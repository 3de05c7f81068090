"""Checkpoints for strategies that read whole ones, wherever they were written."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from evolute.callbacks.zero_checkpoint import load_checkpoint


class AnyCheckpointIO(TorchCheckpointIO):
    """torch's files, and the directories that DeepSpeed writes, which are read whole."""

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return load_checkpoint(path) if Path(path).is_dir() else super().load_checkpoint(path, *args, **kwargs)
