"""The one door to gradients, parameters, updates and optimizer state.

Callbacks never read ``p.grad`` or ``optimizer.state`` themselves: what those hold depends on the strategy.
"""

from evolute.callbacks.access.backend import Backend, Capabilities, backend_for, named_parameters, require
from evolute.callbacks.access.pairs import GradientPair, GradientPairs
from evolute.callbacks.access.probe import Probe, RecordLogits, probing, refuse_manual_without_loss, take_samples
from evolute.callbacks.access.ranks import FlatOperator, over_ranks
from evolute.callbacks.access.steps import Action, OptimizerStep, Stage, attach, detach, recover
from evolute.callbacks.access.untouched import untouched

__all__ = [
    "Action",
    "Backend",
    "Capabilities",
    "FlatOperator",
    "GradientPair",
    "GradientPairs",
    "OptimizerStep",
    "Probe",
    "RecordLogits",
    "Stage",
    "attach",
    "backend_for",
    "detach",
    "named_parameters",
    "over_ranks",
    "probing",
    "recover",
    "refuse_manual_without_loss",
    "require",
    "take_samples",
    "untouched",
]
