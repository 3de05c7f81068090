"""Optimizers whose step is defined by a norm or a metric."""

from evolute.optim.groups import parameter_groups, parameter_norms
from evolute.optim.muon_adamw import MuonAdamW
from evolute.optim.scion import Scion

__all__ = ["MuonAdamW", "Scion", "parameter_groups", "parameter_norms"]
