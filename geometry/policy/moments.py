"""Adam's moments of the head, for the rows that were ever touched only."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS_AT_ONCE = 512
"""Rows of the head that are worked on at once."""


class SparseMoments:
    """First and second moments of the gradient's rows, one row a token of the vocabulary, kept for those seen.

    The moments are those that a head-only Adam would hold, to rounding: a row without a gradient decays like the
    others. To make that free, rows are stored over a common scale that decays in their stead.

    The gradient of a step is, row by row, the mean over the tokens in whose support the row is (as in the paper's
    code), so that moments live on the scale of a single token's gradient.

    Args:
        beta1: decay of the first moment.
        beta2: decay of the second.
        max_rows: rows to hold; beyond it the rows not touched for longest give way.

    Attributes:
        step: updates made.
    """

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, max_rows: int | None = None) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: must be at least 1")
        self.beta1, self.beta2, self.max_rows = beta1, beta2, max_rows
        self.step = 0
        self._scale = [1.0, 1.0]
        self._slots = torch.zeros(0, dtype=torch.long)  # of each token; 0, a row of zeros, if it has none
        self._ids = torch.zeros(1, dtype=torch.long)  # of each row
        self._touched = torch.zeros(1, dtype=torch.long)  # the step that touched the row last
        self._rows = torch.zeros(0)  # [2, capacity, H]
        self._used = 1

    def __len__(self) -> int:
        return self._used - 1

    def bias_corrections(self) -> tuple[float, float]:
        """Return ``1 - beta^(t + 1)`` for the update to come, of both moments."""
        return 1 - self.beta1 ** (self.step + 1), 1 - self.beta2 ** (self.step + 1)

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """Return copies of stored rows [*ids.shape, H] of both moments, and the scales that make moments of them.

        There must be a row at all: see ``len``.
        """
        known = len(self._slots)
        flat = ids.flatten()
        slots = torch.where(flat < known, self._slots[flat.clamp(max=known - 1)], 0)
        first, second = (rows.index_select(0, slots).unflatten(0, ids.shape) for rows in self._rows)
        return first, second, self._scale[0], self._scale[1]

    def dense(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Return both moments as [V, H] tensors: for tests and small heads."""
        first, second, a, b = self.gather(torch.arange(vocabulary, device=self._rows.device))
        return first * a, second * b

    def update(self, hidden: Tensor, ids: Tensor, pull: Tensor) -> None:
        """Make one Adam update from the gradient rows ``pull[i, j] hidden[i]`` of the tokens ``ids[i, j]``.

        Args:
            hidden: [n, H].
            ids: support of each token [n, k], tokens of the vocabulary.
            pull: what multiplies the hidden state in each row of the support [n, k].
        """
        self.step += 1
        self._scale = [self._scale[0] * self.beta1, self._scale[1] * self.beta2]
        self._rescale()
        if not ids.numel():
            return
        for rows, gradient in mean_rows(hidden, ids, pull):
            slots = self._slots_for(rows, gradient)
            kept = slots > 0  # a row that found no place is forgotten
            slots, gradient = slots[kept], gradient[kept]
            self._rows[0].index_add_(0, slots, gradient, alpha=(1 - self.beta1) / self._scale[0])
            self._rows[1].index_add_(0, slots, gradient.square_(), alpha=(1 - self.beta2) / self._scale[1])
            self._touched[slots] = self.step

    def _rescale(self) -> None:
        for i, scale in enumerate(self._scale):
            if scale < 1e-6:
                self._rows[i : i + 1].mul_(scale)
                self._scale[i] = 1.0

    def _slots_for(self, ids: Tensor, like: Tensor) -> Tensor:
        """Return the rows of tokens, made where there are none yet."""
        top = int(ids.max()) + 1
        if top > len(self._slots):
            self._slots = torch.cat([self._slots.to(ids.device), ids.new_zeros(top - len(self._slots))])
        new = ids[self._slots[ids] == 0]
        if len(new):
            self._make_room(len(new), like)
            new = new[: self._capacity() - self._used] if self.max_rows is not None else new
            slots = torch.arange(self._used, self._used + len(new), device=ids.device)
            self._slots[new], self._ids[slots] = slots, new
            self._used += len(new)
        return self._slots[ids]

    def _capacity(self) -> int:
        return self._rows.shape[1] if self._rows.ndim == 3 else 0

    def _make_room(self, rows: int, like: Tensor) -> None:
        limit = self._used + rows if self.max_rows is None else self.max_rows + 1
        if self._used + rows > limit:
            self._drop(self._used + rows - limit)
        needed, held = min(self._used + rows, limit), self._capacity()
        if needed <= held:
            return
        size = max(needed, 2 * held)
        size = size if self.max_rows is None else min(size, limit)
        grown = like.new_zeros(2, size, like.shape[-1])
        if self._capacity():
            grown[:, : self._used] = self._rows[:, : self._used]
        self._rows = grown
        self._ids = _longer(self._ids.to(like.device), size)
        self._touched = _longer(self._touched.to(like.device), size)

    def _drop(self, rows: int) -> None:
        """Forget the rows that were touched longest ago, but none of this step."""
        touched = self._touched[1 : self._used]
        rows = min(rows, int((touched < self.step).sum()))
        order = touched.argsort(stable=True)
        kept = 1 + order[rows:].sort().values
        self._slots[self._ids[1 + order[:rows]]] = 0
        end = 1 + len(kept)
        for held in (self._ids, self._touched):
            held[1:end] = held[kept]
        for held in self._rows:
            held[1:end] = held[kept]
            held[end : self._used] = 0.0
        self._slots[self._ids[1:end]] = torch.arange(1, end, device=self._slots.device)
        self._used = end

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and ids, moments and ages of the rows held."""
        used = slice(1, self._used)
        rows = self._rows[:, used].clone() if self._capacity() else torch.zeros(2, 0, 0)
        return {
            "step": self.step,
            "scale": list(self._scale),
            "ids": self._ids[used].clone(),
            "touched": self._touched[used].clone(),
            "rows": rows,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Go on where the state was taken."""
        self.step, self._scale = state["step"], list(state["scale"])
        ids, rows = state["ids"].to(device), state["rows"].to(device)
        self._used = len(ids) + 1
        self._ids = torch.cat([ids.new_zeros(1), ids])
        self._touched = torch.cat([ids.new_zeros(1), state["touched"].to(device)])
        self._rows = torch.cat([rows.new_zeros(2, 1, rows.shape[-1]), rows], dim=1) if len(ids) else torch.zeros(0)
        self._slots = ids.new_zeros(int(ids.max()) + 1 if len(ids) else 0)
        self._slots[ids] = torch.arange(1, self._used, device=ids.device)


def _longer(held: Tensor, size: int) -> Tensor:
    return torch.cat([held, held.new_zeros(size - len(held))])


def mean_rows(hidden: Tensor, ids: Tensor, pull: Tensor, over: float | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of a gradient with few of them, some at a time: token ids [u] and rows [u, H].

    Args:
        hidden: [n, H].
        ids: support of each token [n, k].
        pull: what multiplies the hidden state in each row of the support [n, k].
        over: what sums are divided by; by default the number of tokens in whose support the row is.
    """
    k = ids.shape[1]
    flat, order = ids.flatten().sort(stable=True)
    rows, counts = flat.unique_consecutive(return_counts=True)
    weights, tokens = pull.flatten()[order], order // k
    ends = counts.cumsum(0)
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, len(rows))
        pairs = slice(int(ends[begin] - counts[begin]), int(ends[end - 1]))
        local = torch.repeat_interleave(torch.arange(end - begin, device=ids.device), counts[begin:end])
        shape = (end - begin, len(hidden))
        sums = torch.sparse_coo_tensor(
            torch.stack([local, tokens[pairs]]), weights[pairs], shape, is_coalesced=True, check_invariants=False
        )
        divisor = counts[begin:end].to(hidden).unsqueeze(-1) if over is None else over
        yield rows[begin:end], torch.sparse.mm(sums, hidden) / divisor
