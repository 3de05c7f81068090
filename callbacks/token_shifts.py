"""What CAPO keeps and records of the tokens of a step."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenShifts(NamedTuple):
    """What was predicted and decided in one micro-batch of this rank, all [B, T].

    Attributes:
        actions: the tokens.
        objective: predicted shift of the objective, m_H; NaN at tokens that were not looked at.
        policy: predicted shift of the policy, m_F; NaN likewise.
        rejected: whether this callback rejected the token (in a dry run: would have).
    """

    actions: Tensor
    objective: Tensor
    policy: Tensor
    rejected: Tensor


def joined_shifts(tables: list[TokenShifts]) -> dict[str, Tensor]:
    """Return the tables of a step as one, shorter completions padded: NaN, False, and -1 for tokens."""
    width = max(t.actions.shape[1] for t in tables)
    fill = {"actions": -1, "objective": math.nan, "policy": math.nan, "rejected": False}
    return {name: torch.cat([_wider(getattr(t, name), width, fill[name]) for t in tables]) for name in fill}


def _wider(table: Tensor, width: int, empty: Any) -> Tensor:
    return torch.nn.functional.pad(table, (0, width - table.shape[1]), value=empty)


def statistics(name: str, values: Tensor, percents: tuple[int, int]) -> dict[str, Tensor]:
    """Return mean, extremes and percentiles (nearest rank) of some values."""
    ordered = values.sort().values
    found = {f"{name}/mean": values.mean(), f"{name}/min": ordered[0], f"{name}/max": ordered[-1]}
    found.update({f"{name}/p{p:02d}": ordered[round(p / 100 * (len(ordered) - 1))] for p in percents})
    return found
