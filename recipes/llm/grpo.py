"""Group-relative policy optimisation: learn from rewards of one's own answers."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from evolute.callbacks.record import run_folder
from evolute.models.advantages import Baseline, Scale, group_advantages
from evolute.models.policy_loss import Objective, PolicyLoss, PolicyLossOutput
from evolute.recipes.llm.cold_start import ColdStart, cold_start
from evolute.recipes.llm.completions_log import CompletionsLog, forget_completions
from evolute.recipes.llm.finetune import FineTune, without_lora
from evolute.recipes.llm.passes import pass_at_k
from evolute.recipes.llm.policy import completion_states, nonlinear_head
from evolute.recipes.llm.rewards import Rewards, Scores, imported
from evolute.recipes.llm.rollout_metrics import rollout_metrics
from evolute.recipes.llm.rollouts import Rollout, RolloutEngine, draw_uniforms, sample_completions

Item = dict[str, Tensor]


class GRPO(FineTune):
    """Reinforcement learning of any Hugging Face causal LM on problems with a verifier.

    Answers are drawn from the model itself, ``group_size`` for each prompt, rewarded, and compared within the group. A
    rollout is cut into ``minibatches`` and replayed ``inner_epochs`` times; each piece is one training batch and
    optimisation is automatic. The data module is :class:`evolute.data.PromptDataModule`.

    A training batch is a dict of tensors with one row a completion: ``input_ids [n, L]`` (prompt and completion, padded
    on the right), ``prompt_length [n]``, ``actions [n, T]``, ``mask [n, T]``, ``advantages [n, T]``,
    ``sampled_log_probs [n, T]``, with replays ``old_log_probs [n, T]``, and with a reference ``ref_log_probs [n, T]``.

    The loss is the submodule ``policy_loss``, to which mask callbacks such as ``CAPO`` attach.

    Logs, under TRL's names, ``reward``, ``reward_std``, ``frac_reward_zero_std``, ``rewards/<function>/mean`` and
    ``/std``, ``completions/*``, ``entropy``, ``kl``, ``clip_ratio/*``, ``sampling/*``, ``num_tokens``;
    ``rewards/<function>/failures`` so far; at validation ``val/greedy``, ``val/pass@1`` and ``val/pass@k``.

    Args:
        rewards: import paths of reward functions (or callables), the verifier first; see
            :class:`evolute.recipes.llm.rewards.Rewards`.
        reward_weights: one for each; all 1 by default.
        reward_timeout: seconds a reward function may take for a rollout.
        success: a completion passes at evaluation when the verifier gives at least this.
        objective: ``"grpo"``, ``"dr_grpo"`` or ``"reinforce"``.
        clip_low: lower clip of the probability ratio, ``1 - clip_low``.
        clip_high: upper clip, ``1 + clip_high``.
        kl_coef: weight of the KL to the weights the run began with; above 0 they are kept beside the model (with
            adapters, the model without them serves).
        temperature: of sampling, and of the policy in the loss.
        group_size: completions a prompt.
        max_completion: longest completion in tokens.
        inner_epochs: times a rollout is replayed.
        minibatches: pieces a rollout is cut into, prompt by prompt.
        baseline: what advantages are measured from; by default the mean of the others for ``"reinforce"``, else
            the group's mean.
        scale_rewards: what advantages are divided by.
        mask_truncated: leave completions that met the limit out of the loss.
        cold_start: supervised training on the data's answers before the first rollout; None for none.
        val_samples: completions drawn for each held-out problem.
        pass_k: the k of ``val/pass@k``, at most ``val_samples``.
        log_completions: rollouts between two tables of completions; 0 for none.
        rollout_engine: import path of, or, a :class:`evolute.recipes.llm.rollouts.RolloutEngine`; by default the
            trained model samples itself.
        init_from: checkpoint of another language-model recipe whose weights the run begins with.
        lora: arguments of PEFT's ``LoraConfig``; None trains every weight.
        **pretrain: arguments of :class:`evolute.recipes.llm.Pretrain`.

    Raises:
        ValueError: if an argument is out of range, or a reward cannot be imported.
    """

    def __init__(
        self,
        rewards: Sequence[str] = ("evolute.recipes.llm.rewards.exact_match",),
        reward_weights: Sequence[float] | None = None,
        reward_timeout: float | None = None,
        success: float = 1.0,
        objective: Objective = "grpo",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_coef: float = 0.0,
        temperature: float = 1.0,
        group_size: int = 8,
        max_completion: int = 64,
        inner_epochs: int = 1,
        minibatches: int = 1,
        baseline: Baseline | None = None,
        scale_rewards: Scale = "group",
        mask_truncated: bool = False,
        cold_start: ColdStart | None = None,
        val_samples: int = 4,
        pass_k: int = 4,
        log_completions: int = 20,
        rollout_engine: str | None = None,
        init_from: str | None = None,
        lora: dict[str, Any] | None = None,
        **pretrain: Any,
    ) -> None:
        super().__init__(init_from=init_from, lora=lora, **pretrain)
        for name, value, least in (
            ("group_size", group_size, 2 if objective != "reinforce" or baseline is None else 1),
            ("max_completion", max_completion, 1),
            ("inner_epochs", inner_epochs, 1),
            ("minibatches", minibatches, 1),
            ("val_samples", val_samples, 1),
            ("pass_k", pass_k, 1),
            ("log_completions", log_completions, 0),
        ):
            if value < least:
                raise ValueError(f"GRPO({name}={value}): must be at least {least}")
        if pass_k > val_samples:
            raise ValueError(f"GRPO(pass_k={pass_k}): needs at least as many val_samples, which is {val_samples}")
        if baseline not in (None, "mean", "median", "leave_one_out"):
            raise ValueError(f"GRPO(baseline={baseline!r}): 'mean', 'median' or 'leave_one_out'")
        if scale_rewards not in ("group", "batch", "none"):
            raise ValueError(f"GRPO(scale_rewards={scale_rewards!r}): 'group', 'batch' or 'none'")
        self.rewards = Rewards(rewards, reward_weights, reward_timeout)
        # Plain data alone: a checkpoint is read without unpickling anything else.
        self.hparams["rewards"] = self.rewards.names if any(map(callable, rewards)) else list(rewards)
        self.hparams["cold_start"] = None if cold_start is None else asdict(cold_start)
        self.success = success
        self.policy_loss = PolicyLoss(objective, clip_low, clip_high, kl_coef, temperature, max_length=max_completion)
        self.temperature = temperature
        self.group_size = group_size
        self.max_completion = max_completion
        self.inner_epochs = inner_epochs
        self.minibatches = minibatches
        self.baseline: Baseline = baseline or ("leave_one_out" if objective == "reinforce" else "mean")
        self.scale_rewards: Scale = scale_rewards
        self.mask_truncated = mask_truncated
        self.cold_start = cold_start
        self.val_samples = val_samples
        self.pass_k = pass_k
        self.engine: RolloutEngine = sample_completions if rollout_engine is None else _engine(rollout_engine)
        self.completions_log = CompletionsLog(log_completions)
        self.reference: Any = None
        self._rollout_metrics: dict[str, float] = {}
        self._num_tokens = 0
        self._passes: list[Tensor] = []

    @property
    def items_per_rollout(self) -> int:
        """Training batches a rollout gives."""
        return self.inner_epochs * self.minibatches

    @override
    def _warm_up(self, model: Any) -> None:
        data: Any = getattr(self._trainer, "datamodule", None)
        resumed = self._trainer is not None and self._trainer.ckpt_path is not None
        fits = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if self.cold_start is not None and fits and not resumed:
            with torch.random.fork_rng():
                cold_start(model, data.train_examples, data.tokenizer, self.cold_start)

    @override
    def _prepare(self, model: Any) -> None:
        super()._prepare(model)
        if self.policy_loss.kl_coef and self.lora is None:
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()

    @override
    def on_fit_start(self) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        prompts = getattr(data, "batch_size", 0)
        if prompts % self.minibatches:
            raise ValueError(f"minibatches={self.minibatches} does not divide batch_size={prompts}")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        needed = getattr(data, "context", 0) + self.max_completion
        if limit is not None and needed > limit:
            raise ValueError(
                f"context={needed - self.max_completion} and max_completion={self.max_completion} need {needed} "
                f"positions, the model has {limit}"
            )
        bent = nonlinear_head(self.model)
        callbacks: list[Any] = list(getattr(self.trainer, "callbacks", []))
        asking = [type(c).__name__ for c in callbacks if getattr(c, "needs_linear_head", False)]
        if bent and asking:
            raise ValueError(
                f"{asking[0]} models a linear head, and this model's logits are more than that: "
                f"{bent}={getattr(self.model.config, bent)}; leave {asking[0]} out"
            )

    # Rollouts

    @torch.no_grad()
    def collect(self, prompts: dict[str, Any], number: int) -> list[Item]:
        """Answer prompts with the present weights, score the answers, and return the training batches in order.

        Args:
            prompts: a batch of :class:`evolute.data.PromptDataModule`.
            number: of the rollout; with the prompts and the data's seed it decides all draws.
        """
        rollout = self._draw(prompts, self.group_size, number)
        scores = self._score(prompts, rollout, self.group_size)
        rewards = scores.total.view(-1, self.group_size)
        advantages, equal = group_advantages(rewards.float(), self.baseline, self.scale_rewards)
        mask = rollout.mask & scores.total.isfinite().unsqueeze(1)
        if self.mask_truncated:
            mask &= rollout.finished.unsqueeze(1)
        batch = _assemble(prompts["ids"], rollout, mask, advantages.flatten(), self.group_size)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        if self.items_per_rollout > 1:
            batch["old_log_probs"] = self._log_probs(self.model, batch)
        if self.policy_loss.kl_coef:
            with without_lora(self.model):
                batch["ref_log_probs"] = self._log_probs(self.reference or self.model, batch)
        self._num_tokens += int(rollout.mask.sum()) + self.group_size * sum(map(len, prompts["ids"]))
        self._rollout_metrics = self._reduced(
            rollout_metrics(rollout, scores, self.rewards, rewards, equal, advantages)
        )
        drawn = batch | {"drawn": rollout.mask.sum(1)}
        self.completions_log.begin(number, prompts["prompts"], drawn, scores.total, self._tokenizer)
        rows = len(batch["actions"]) // self.minibatches
        pieces = [{k: v[i * rows : (i + 1) * rows] for k, v in batch.items()} for i in range(self.minibatches)]
        return [{k: v.cpu() for k, v in piece.items()} for piece in pieces] * self.inner_epochs

    def _draw(self, prompts: dict[str, Any], group_size: int, number: int | None) -> Rollout:
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        uniforms = None
        if number is not None:
            uniforms = draw_uniforms(data.seed, number, prompts["indices"], group_size, self.max_completion)
        eos = data.tokenizer.eos_id
        return self.engine(self.model, prompts["ids"], group_size, self.max_completion, self.temperature, uniforms, eos)

    def _score(self, prompts: dict[str, Any], rollout: Rollout, group_size: int) -> Scores:
        tokenizer = self._tokenizer
        assert tokenizer is not None
        lengths = rollout.mask.sum(1).tolist()
        ids = [row[:length] for row, length in zip(rollout.ids.tolist(), lengths, strict=True)]
        ended = [row[:-1] if done else row for row, done in zip(ids, rollout.finished.tolist(), strict=True)]
        texts = [tokenizer.decode(row) for row in ended]
        repeated = [text for text in prompts["prompts"] for _ in range(group_size)]
        columns = {k: [v for v in values for _ in range(group_size)] for k, values in prompts["columns"].items()}
        return self.rewards(repeated, texts, ids, columns)

    def _log_probs(self, model: Any, batch: Item) -> Tensor:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            found = PolicyLoss(temperature=self.temperature)(
                **completion_states(model, batch, self._pieces), actions=batch["actions"],
                advantages=torch.zeros_like(batch["advantages"]), mask=batch["mask"],
            )  # fmt: skip
        model.train(was_training)
        return found.log_probs

    @property
    def _pieces(self) -> bool:
        """Whether the weights of the model are spread over processes, so that only its whole forward sees them."""
        strategy: Any = None if self._trainer is None else self._trainer.strategy
        return self.device_mesh is not None or (isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3)

    def _reduced(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.trainer.world_size == 1:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=self.device)
        mean: Any = self.trainer.strategy.reduce(values, reduce_op="mean")
        return dict(zip(metrics, mean.tolist(), strict=True))

    # Training

    def _loss(self, batch: Item) -> PolicyLossOutput:
        states = completion_states(self.model, batch, self._pieces)
        names = ("actions", "advantages", "mask", "old_log_probs", "ref_log_probs")
        return self.policy_loss(**states, **{name: batch[name] for name in names if name in batch})

    @override
    def loss_on(self, batch: Item) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the policy loss of a training batch: a fixed rollout, so it can be taken as often as one likes."""
        return self._loss(batch).loss

    @override
    def training_step(self, batch: Item, batch_idx: int) -> Tensor:
        out = self._loss(batch)
        self._window_losses.append(out.loss.detach())
        self.log("train/loss", out.loss.detach(), prog_bar=True, batch_size=len(batch["actions"]))
        gap = torch.where(batch["mask"], (out.log_probs - batch["sampled_log_probs"]).abs(), 0.0)
        values = {k: v for k, v in self._rollout_metrics.items() if k != "reward"}
        values |= {f"{k}_mean" if k.startswith("clip_ratio/") else k: v for k, v in out.metrics.items()}
        values["sampling/sampling_logp_difference/mean"] = gap.sum() / batch["mask"].sum().clamp(min=1)
        values["sampling/sampling_logp_difference/max"] = gap.max()
        values["num_tokens"] = float(self._num_tokens)
        self.log_dict(values, batch_size=len(batch["actions"]))
        self.log("reward", self._rollout_metrics.get("reward", float("nan")), prog_bar=True, batch_size=1)
        return out.loss

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.trainer.is_global_zero:
            forget_completions(run_folder(self.trainer), self.trainer.global_step)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Item, batch_idx: int) -> None:
        if self._ends_window(batch_idx):
            self.completions_log.end(self.trainer, self.trainer.global_step - 1)

    # Evaluation

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        drawn = self._draw(batch, self.val_samples, -1 - batch_idx)
        greedy = self._draw(batch, 1, None)
        passed: list[Tensor] = []
        for rollout, size in ((drawn, self.val_samples), (greedy, 1)):
            scores = self._score(batch, rollout, size)
            passed.append((scores.each[0] >= self.success).view(-1, size))
        one, several = (pass_at_k(passed[0], k) for k in (1, self.pass_k))
        self._passes.append(torch.stack([one, several, passed[1][:, 0].double()], 1))

    @override
    def on_validation_epoch_end(self) -> None:
        found = torch.cat(self._passes)
        self._passes.clear()
        sums = torch.cat([found.sum(0), torch.tensor([len(found)], dtype=torch.float64)]).to(self.device)
        total: Any = self.trainer.strategy.reduce(sums, reduce_op="sum")
        names = ["val/pass@1", f"val/pass@{self.pass_k}", "val/greedy"]
        values = dict(zip(names, (total[:3] / total[3]).tolist(), strict=True))
        self.log_dict(values, prog_bar=True, sync_dist=False)
        if self.trainer.sanity_checking:  # whose numbers Lightning drops: the accuracy that the run begins with
            rank_zero_info("before the first step: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollout"] = {
            "metrics": self._rollout_metrics,
            "num_tokens": self._num_tokens,
            "failures": self.rewards.failures,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("rollout", {})
        self._rollout_metrics = saved.get("metrics", {})
        self._num_tokens = saved.get("num_tokens", 0)
        self.rewards.failures.update(saved.get("failures", {}))


def _assemble(prompts: list[list[int]], rollout: Rollout, mask: Tensor, advantages: Tensor, group_size: int) -> Item:
    """Put prompts and completions together as rows of one training batch."""
    n, width = rollout.ids.shape
    lengths = torch.tensor([len(p) for p in prompts]).repeat_interleave(group_size)
    ids = torch.zeros((n, int(lengths.max()) + width), dtype=torch.long)
    for row in range(n):
        start = int(lengths[row])
        ids[row, :start] = torch.tensor(prompts[row // group_size])
        ids[row, start : start + width] = rollout.ids[row]
    return {
        "input_ids": ids,
        "prompt_length": lengths,
        "actions": rollout.ids,
        "mask": mask,
        "advantages": advantages.unsqueeze(1).expand(n, width).contiguous(),
        "sampled_log_probs": rollout.log_probs,
    }


def _engine(path: str) -> RolloutEngine:
    engine: Callable[..., Any] = imported(path, "rollout_engine")
    return engine
