"""The batch that a monitor measures on: kept, carried by checkpoints, and evaluated as the same function every time."""

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from evolute.callbacks.access import Backend, Probe, batch_size, batch_tensors, probing, take_samples, with_tensors

BatchNorm = Literal["eval", "train"]


class ProbeBatch:
    """Samples of a training batch, with the index of that batch.

    Args:
        who: the callback's name, for messages.
        samples: how many; None for a sixteenth of the batch.
        fixed: keep the first ones for the whole run; otherwise every capture takes new ones.
        batch_norm: ``"eval"`` measures with running statistics, ``"train"`` with those of the probe batch, as the loss
            that is trained does; the running statistics are put back either way.

    Raises:
        MisconfigurationException: if ``samples`` is below 1, or ``batch_norm`` is unknown.
    """

    def __init__(self, who: str, samples: int | None, fixed: bool, batch_norm: BatchNorm = "eval") -> None:
        if samples is not None and samples < 1:
            raise MisconfigurationException(f"{who}(samples={samples}): must be at least 1, or None")
        if batch_norm not in ("eval", "train"):
            raise MisconfigurationException(f"{who}(batch_norm={batch_norm!r}): 'eval' or 'train'")
        self.who, self.samples, self.fixed, self.batch_norm = who, samples, fixed, batch_norm
        self._held: tuple[Any, int] | None = None
        self._saved: tuple[list[list[Tensor]], int] | None = None
        self._ranks = 1

    @property
    def held(self) -> bool:
        """Whether there is a batch to measure on."""
        return self._held is not None

    def capture(self, trainer: L.Trainer, batch: Any, batch_idx: int) -> None:
        """Take samples of this batch, unless those held are to be kept; after a resume, those of the checkpoint."""
        if self.held and self.fixed:
            return
        self._ranks = trainer.world_size
        if self._saved is None:
            self._held = (take_samples(batch, self.samples), batch_idx)
        else:
            batches, batch_idx = self._saved
            mine = batches[trainer.global_rank if trainer.global_rank < len(batches) else 0]
            self._held, self._saved = (with_tensors(batch, mine), batch_idx), None

    @contextmanager
    def open(self, trainer: L.Trainer, backend: Backend) -> Generator[Probe]:
        """Open a probe on the batch held; see :func:`~evolute.callbacks.access.probing`."""
        assert self._held is not None
        module = trainer.lightning_module
        with probing(trainer, module, backend, *self._held) as probe:
            if self.batch_norm == "train":
                for norm in _batch_norms(module):
                    norm.train()  # flags and buffers come back when the probe closes
            yield probe

    def check(self, module: L.LightningModule, loss: "Repeatable") -> Tensor:
        """Evaluate the loss once, say what differs from the one that is trained, and return it with its graph.

        Raises:
            MisconfigurationException: if batch norm is to use the statistics of a single sample.
        """
        assert self._held is not None
        if self.batch_norm == "train" and _batch_norms(module) and batch_size(self._held[0]) == 1:
            raise MisconfigurationException(
                f'{self.who}(batch_norm="train") takes statistics of the probe batch, which is 1 sample: pass samples'
            )
        value = loss()
        said = [
            ("without dropout", any(m.p > 0 for m in module.modules() if isinstance(m, _DropoutNd))),
            ("with batch norm's running statistics", self.batch_norm == "eval" and bool(_batch_norms(module))),
            ("with one draw of the random numbers that it asks for", loss.random()),
        ]
        if any(true for _, true in said):
            rank_zero_info(f"{self.who}: the loss is measured {', '.join(text for text, true in said if true)}")
        return value

    def state_dict(self) -> tuple[list[list[Tensor]], int] | None:
        """Return every rank's samples, if they are kept: without them a resumed run would measure something else.

        Their tensors alone: a checkpoint that loads with weights_only holds no containers of others.
        """
        if self._held is None or not self.fixed:
            return self._saved
        mine = batch_tensors(self._held[0])
        if self._ranks == 1:
            return [mine], self._held[1]
        batches: list[Any] = [None] * self._ranks  # a checkpoint is written by one of the ranks
        torch.distributed.all_gather_object(batches, [t.cpu() for t in mine])
        return batches, self._held[1]

    def load_state_dict(self, saved: tuple[list[list[Tensor]], int] | None) -> None:
        """Take the samples of a checkpoint up at the next capture."""
        self._held, self._saved = None, saved


class Repeatable:
    """A loss that draws the same random numbers at every call, so that it is one function of the weights.

    Use inside a probe, which puts the generators back when it closes.
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self._loss = loss
        self._torch, self._python, self._numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
        initialized = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cuda = torch.cuda.get_rng_state_all() if initialized else None

    def __call__(self, *args: Any) -> Tensor:
        """Return the loss, after winding the generators back."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        return self._loss(*args)

    def random(self) -> bool:
        """Say whether random numbers were drawn since the last call began."""
        moved = not torch.equal(torch.get_rng_state(), self._torch) or random.getstate() != self._python
        if self._cuda is not None and not moved:
            now = torch.cuda.get_rng_state_all()
            moved = any(not torch.equal(a, b) for a, b in zip(now, self._cuda, strict=True))
        return moved or not all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), self._numpy, strict=True))


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
