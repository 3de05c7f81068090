"""A learning rate of its own for each parameter, for one step: parameter groups split and put back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class SplitGroups:
    """The optimizer's parameter groups, split into one group a scaled parameter until :meth:`restore`.

    The list object and the original group objects stay the same ones, so schedulers and checkpoints never see it.

    Args:
        optimizer: about to step.
        params: its parameters by name.
        ratios: factor of the learning rate by name; parameters without one stay in their group.
    """

    OWN_KEYS = ("params", "param_names", "lr")

    def __init__(self, optimizer: Optimizer, params: Mapping[str, Tensor], ratios: Mapping[str, float]) -> None:
        self._list = optimizer.param_groups
        self._originals = list(self._list)
        self._pieces: list[list[dict[str, Any]]] = []
        ratio_of = {id(p): ratios[name] for name, p in params.items() if name in ratios}
        for group in self._originals:
            rest = [i for i, p in enumerate(group["params"]) if id(p) not in ratio_of]
            pieces = [_piece(group, [i], ratio_of[id(p)]) for i, p in enumerate(group["params"]) if id(p) in ratio_of]
            if rest or not pieces:
                pieces.append(_piece(group, rest, None))
            for piece in pieces[1:]:  # a counter kept as a tensor must go up once a step, not once a piece
                piece.update({k: v.clone() for k, v in piece.items() if isinstance(v, Tensor) and k != "lr"})
            self._pieces.append(pieces)
        self._list[:] = [piece for pieces in self._pieces for piece in pieces]

    def restore(self) -> None:
        """Put the original groups back, with what the optimizer itself wrote into a group (a counter, say)."""
        self._list[:] = self._originals
        for group, pieces in zip(self._originals, self._pieces, strict=True):
            for key, value in pieces[0].items():
                if key not in self.OWN_KEYS and (key not in group or group[key] is not value):
                    group[key] = value


def _piece(group: dict[str, Any], members: list[int], ratio: float | None) -> dict[str, Any]:
    piece = {**group, "params": [group["params"][i] for i in members]}
    if "param_names" in group:
        piece["param_names"] = [group["param_names"][i] for i in members]
    if ratio is not None:
        piece["lr"] = group["lr"] * ratio
    return piece
