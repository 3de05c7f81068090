"""Pretrain, or go on training, a causal language model."""

import math
import time
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from evolute.callbacks.access import shape_of
from evolute.data.tokenizers import Tokenizer
from evolute.recipes.llm.network import build, check_fit, load
from evolute.recipes.llm.samples import forget_samples, sample, write_samples
from evolute.recipes.llm.schedules import Schedule, lr_factor
from evolute.recipes.llm.sharding import born_in_pieces, loaded_in_pieces, refuse_whole_matrices, shard

CONFIG_KEY = "hf_config"
"""Key of the Hugging Face configuration in a checkpoint."""


class Pretrain(L.LightningModule):
    """Next-token training of any Hugging Face causal LM.

    A batch is a dict with ``input_ids`` and (optionally) ``labels``, ``[b, t + 1]``, not shifted: position ``i``
    predicts label ``i + 1``; labels of -100 are ignored. The model is made in ``configure_model``, when the data
    module's tokenizer is known.

    Logs ``train/loss`` (nats a token), ``train/tokens_per_s``, ``train/nonfinite`` (steps skipped so far),
    ``val/loss``, ``val/perplexity`` (per token), and ``val/bits_per_byte`` where the data module knows its bytes per
    token, which compares across tokenizers and with compressors.

    Example::

        trainer = L.Trainer(max_steps=1000, gradient_clip_val=1.0)
        trainer.fit(Pretrain(optimizer="adamw", lr=3e-3), TextDataModule())

    Args:
        model: name on the Hugging Face Hub or folder to load; ``None`` builds one from ``config``.
        config: arguments of the Hugging Face configuration on top of the default Llama of 0.8 M parameters; another
            ``model_type`` stands alone.
        vocab_size: rows of a built model's embedding; default: the tokenizer's, rounded up to a multiple of 64.
        optimizer: ``"scion"``, ``"muon_adamw"``, ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        lr: peak learning rate.
        weight_decay: decoupled decay; AdamW applies it to matrices only.
        norms: for scion and muon_adamw, the norm of parameters by name pattern (``{".*gate.*": "rms"}``) over the
            automatic choice of :func:`evolute.optim.parameter_norms`.
        warmup: optimizer steps if at least 1, else share of the run.
        schedule: ``"cosine"``, ``"wsd"`` or ``"constant"``.
        attn_implementation: attention of the model, as transformers names it.
        samples: held-out prompts continued at each validation; 0 turns it off.
        sample_tokens: tokens drawn for each.
        on_nonfinite: what a non-finite loss does: ``"skip"`` takes no optimizer step (on any rank, for the whole
            accumulation window), ``"raise"`` ends the run.
        max_nonfinite: skips in a row after which ``"skip"`` raises as well.

    Raises:
        ValueError: if an argument is out of range, or (at ``configure_model``) the model cannot be had or does not
            fit the tokenizer.
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        optimizer: Literal["scion", "muon_adamw", "adamw", "sgd"] = "adamw",
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        norms: dict[str, Literal["spectral", "sign", "rms"]] | None = None,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        attn_implementation: str = "sdpa",
        samples: int = 2,
        sample_tokens: int = 64,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        max_nonfinite: int = 5,
    ) -> None:
        super().__init__()
        if model is not None and config is not None:
            raise ValueError(f"Pretrain(model={model!r}, config={config}): give one, a model to load or one to build")
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"Pretrain(lr={lr}): must be positive")
        for name, value, least in (
            ("vocab_size", 1 if vocab_size is None else vocab_size, 1),
            ("weight_decay", weight_decay, 0),
            ("warmup", warmup, 0),
            ("samples", samples, 0),
            ("sample_tokens", sample_tokens, 1),
            ("max_nonfinite", max_nonfinite, 1),
        ):
            if not value >= least:
                raise ValueError(f"Pretrain({name}={value}): must be at least {least}")
        for name, value, known in (
            ("optimizer", optimizer, ("scion", "muon_adamw", "adamw", "sgd")),
            ("schedule", schedule, ("cosine", "wsd", "constant")),
            ("on_nonfinite", on_nonfinite, ("skip", "raise")),
        ):
            if value not in known:
                raise ValueError(f"Pretrain({name}={value!r}): must be one of {', '.join(map(repr, known))}")
        self.save_hyperparameters()
        self.model: Any = None
        self.optimizer_name = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.norms = norms
        self.warmup = warmup
        self.schedule: Schedule = schedule
        self.samples = samples
        self.sample_tokens = sample_tokens
        self.on_nonfinite = on_nonfinite
        self.max_nonfinite = max_nonfinite
        self._nonfinite = 0
        self._nonfinite_in_a_row = 0
        self._window_losses: list[Tensor] = []
        self._val: list[tuple[Tensor, Tensor]] = []
        self._prompts: Tensor | None = None
        self._tokens, self._since = 0, 0.0

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        arguments: Any = self.hparams
        tokenizer = self._tokenizer
        if arguments.model is None:
            with born_in_pieces(self._trainer):
                model = build(arguments.config, arguments.vocab_size, tokenizer, arguments.attn_implementation)
        else:
            with loaded_in_pieces(self._trainer):
                model = load(arguments.model, arguments.attn_implementation)
            model.train()
        # Kept with the arguments, so that a checkpoint makes the same model without the data.
        self.hparams["vocab_size"] = check_fit(model, tokenizer)
        self._prepare(model)
        if self.device_mesh is not None:
            shard(model, self.device_mesh)
        self.model = model

    def _prepare(self, model: Any) -> None:
        """Change the model before it is sharded; nothing here."""

    @property
    def _tokenizer(self) -> Tokenizer | None:
        datamodule = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        return getattr(datamodule, "tokenizer", None)

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits ``[b, t, vocab]`` of ids ``[b, t]``."""
        return self.model(input_ids=input_ids, use_cache=False).logits

    def loss_on(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean cross entropy in nats, the logits and the targets, without logging or other effects.

        Args:
            batch: see the class.

        Returns:
            The scalar loss in float32, logits ``[n, vocab]`` and targets ``[n]``, with ``n = b t``; ignored
            targets are -100.
        """
        ids = batch["input_ids"]
        logits = self(ids[:, :-1]).flatten(0, 1)
        targets = batch.get("labels", ids)[:, 1:].flatten()
        return F.cross_entropy(logits.float(), targets, ignore_index=-100), logits, targets

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, _, targets = self.loss_on(batch)
        self._window_losses.append(loss.detach())
        self.log("train/loss", loss.detach(), prog_bar=True)
        self._tokens += targets.numel()
        trainer: Any = self.trainer
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0 and self._ends_window(batch_idx):
            now = time.perf_counter()
            self.log("train/tokens_per_s", self._tokens * trainer.world_size / max(now - self._since, 1e-9))
            self._tokens, self._since = 0, now
        return loss

    def _ends_window(self, batch_idx: int) -> bool:
        return (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0

    @override
    def on_train_start(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # pyright: ignore
            forget_samples(self.trainer.default_root_dir, self.trainer.global_step)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # One host synchronisation an optimizer step, and one decision for all ranks.
        finite = torch.stack(self._window_losses).isfinite().all()
        self._window_losses.clear()
        good = bool(self.trainer.strategy.reduce(finite.float(), reduce_op="mean") == 1)
        self._nonfinite += not good
        self._nonfinite_in_a_row = 0 if good else self._nonfinite_in_a_row + 1
        self.log("train/nonfinite", float(self._nonfinite))  # at every step: Lightning drops what falls between rows
        if good:
            return
        if self.on_nonfinite == "raise" or self._nonfinite_in_a_row >= self.max_nonfinite:
            raise RuntimeError(
                f"the loss was not finite {self._nonfinite_in_a_row} step(s) in a row, last at step "
                f"{self.trainer.global_step}: lower lr={self.lr}, clip gradients, or look at the data"
            )
        # An optimizer passes over parameters without a gradient: no step, no decay, moments as they were. DeepSpeed,
        # which holds the gradients elsewhere, makes no step of its own accord when their norm is not finite.
        for parameter in self.parameters():
            parameter.grad = None

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, _, targets = self.loss_on(batch)
        count = (targets != -100).sum()
        # A batch of nothing but padding (on one of several ranks) has a loss of 0/0.
        self._val.append((torch.where(count > 0, loss * count, 0.0), count.to(loss.dtype)))
        if batch_idx == 0:
            self._prompts = batch["input_ids"][: self.samples, : max(1, min(32, targets.numel()))]

    @override
    def on_validation_epoch_end(self) -> None:
        nats, count = (torch.stack(column).sum() for column in zip(*self._val, strict=True))
        self._val.clear()
        total = self.trainer.strategy.reduce(torch.stack([nats, count]), reduce_op="sum")
        assert isinstance(total, Tensor)
        loss = total[0] / total[1]
        metrics = {"val/loss": loss, "val/perplexity": loss.exp()}
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "val_bytes_per_token", None)
        if bytes_per_token:
            metrics["val/bits_per_byte"] = loss / (math.log(2) * bytes_per_token)
        self.log_dict(metrics, prog_bar=True, sync_dist=True)
        self._sample()

    @override
    def on_validation_end(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()  # validation is not training throughput

    def _sample(self) -> None:
        prompts, tokenizer = self._prompts, self._tokenizer
        idle = self.trainer.sanity_checking or self.trainer.fast_dev_run  # pyright: ignore
        if (
            idle
            or self.trainer.state.fn != TrainerFn.FITTING
            or prompts is None
            or not len(prompts)
            or tokenizer is None
        ):
            return
        # All ranks draw (a sharded model needs them all), the first one writes.
        drawn = sample(self.model, prompts, self.sample_tokens, tokenizer.vocab_size, temperature=0.8, seed=0)
        if self.trainer.is_global_zero:
            step = self.trainer.global_step
            pairs = zip(prompts.tolist(), drawn.tolist(), strict=True)
            rows = [{"step": step, "prompt": tokenizer.decode(p), "text": tokenizer.decode(t)} for p, t in pairs]
            write_samples(rows, self.trainer.default_root_dir, self.trainer.loggers)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = self.model.config.to_dict()
        checkpoint["nonfinite"] = {"total": self._nonfinite, "in_a_row": self._nonfinite_in_a_row}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if CONFIG_KEY not in checkpoint:
            raise ValueError(f"the checkpoint is not one of Pretrain (it has no {CONFIG_KEY!r})")
        counts = checkpoint.get("nonfinite", {})
        self._nonfinite, self._nonfinite_in_a_row = counts.get("total", 0), counts.get("in_a_row", 0)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._optimizer()
        factor = lr_factor(self.schedule, self.warmup, self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

    def _optimizer(self) -> Optimizer:
        if self.optimizer_name in ("scion", "muon_adamw"):
            refuse_whole_matrices(self.trainer, self.optimizer_name)
        if self.optimizer_name == "scion":
            from evolute.optim import Scion

            return Scion(self, lr=self.lr, momentum=0.95, weight_decay=self.weight_decay, overrides=self.norms)
        if self.optimizer_name == "muon_adamw":
            from evolute.optim import MuonAdamW

            return MuonAdamW(self, lr=self.lr, weight_decay=self.weight_decay, overrides=self.norms)
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(trained, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        matrices: list[nn.Parameter] = [p for p in trained if len(shape_of(p)) >= 2]
        vectors: list[nn.Parameter] = [p for p in trained if len(shape_of(p)) < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=(0.9, 0.95))
