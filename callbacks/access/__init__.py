"""The one door to gradients, parameters, updates and optimizer state.

Callbacks never read ``p.grad`` or ``optimizer.state`` themselves: what those hold depends on the strategy.
"""

from evolute.callbacks.access.backend import (
    Backend,
    Capabilities,
    Parts,
    PlainBackend,
    backend_for,
    base_optimizer,
    named_parameters,
    require,
    shape_of,
)
from evolute.callbacks.access.cut import CutLoss
from evolute.callbacks.access.pairs import GradientPair, GradientPairs
from evolute.callbacks.access.probe import (
    Head,
    Probe,
    RecordLogits,
    batch_size,
    batch_tensors,
    probing,
    refuse_manual_without_loss,
    refuse_reentrant_checkpointing,
    take_samples,
    with_tensors,
)
from evolute.callbacks.access.ranks import (
    FlatOperator,
    LocalSquares,
    gather_rows,
    gather_values,
    mean_over_ranks,
    over_ranks,
)
from evolute.callbacks.access.rows import GroupView, Rows, gradient_of, listen
from evolute.callbacks.access.shares import joined, shared_out
from evolute.callbacks.access.steps import Action, OptimizerStep, Stage, attach, detach, recover, stepping, underway
from evolute.callbacks.access.tokens import TokenCall, TokenDoor, attach_mask, detach_mask
from evolute.callbacks.access.untouched import untouched

__all__ = [
    "Action",
    "Backend",
    "Capabilities",
    "CutLoss",
    "FlatOperator",
    "GradientPair",
    "GradientPairs",
    "GroupView",
    "Head",
    "LocalSquares",
    "OptimizerStep",
    "Parts",
    "PlainBackend",
    "Probe",
    "RecordLogits",
    "Rows",
    "Stage",
    "TokenCall",
    "TokenDoor",
    "attach",
    "attach_mask",
    "backend_for",
    "base_optimizer",
    "batch_size",
    "batch_tensors",
    "detach",
    "detach_mask",
    "gather_rows",
    "gather_values",
    "gradient_of",
    "joined",
    "listen",
    "mean_over_ranks",
    "named_parameters",
    "over_ranks",
    "probing",
    "recover",
    "refuse_manual_without_loss",
    "refuse_reentrant_checkpointing",
    "require",
    "shape_of",
    "shared_out",
    "stepping",
    "take_samples",
    "underway",
    "untouched",
    "with_tensors",
]
