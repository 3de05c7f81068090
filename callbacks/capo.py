"""Reject the tokens whose own step would move the policy, or the objective, too far (CAPO)."""

import math
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from evolute.callbacks.access import TokenCall, gather_rows
from evolute.callbacks.capo_head import HeadReader
from evolute.callbacks.realized_kl import RealizedKL
from evolute.callbacks.record import record, record_arrays
from evolute.callbacks.token_mask import REJECTED, Denominator, TokenMask
from evolute.callbacks.token_shifts import TokenShifts, joined_shifts, statistics
from evolute.geometry import (
    PredictedShifts,
    ShiftLimits,
    SparseMoments,
    joint_logit_steps,
    logit_steps,
    predicted_shifts,
    score_rest,
    sgd_shifts,
    token_support,
)

PRESETS: dict[str, tuple[float, float]] = {"capo": (1e-4, 1e-2), "dr_capo": (1e-3, 5e-4), "rein_capo": (1e-5, 1e-1)}
"""delta_F and delta_H of the paper's recipes, for GRPO, Dr. GRPO and REINFORCE at a learning rate of 1.5e-5."""

TOO_MANY, PATIENCE = 0.2, 3
OBJECTIVE, POLICY, POLICY_FAILS, OBJECTIVE_FAILS, NONFINITE, MASS, INSIDE = range(4, 11)


class _Seen(NamedTuple):
    """Tokens that were looked at [n]: what the head's moments and the records need of them."""

    rows: Tensor
    hidden: Tensor
    ids: Tensor
    pull: Tensor
    columns: Tensor


class CAPO(TokenMask):
    """Curvature-aware policy optimisation (arXiv 2510.00819): a gate between a policy's forward pass and its loss.

    For each token the callback predicts, from a model of the language-model head and its optimizer alone, how far the
    token's own update would move the policy (m_F, nats) and the objective (m_H), and masks tokens beyond thresholds
    from the loss. Predictions are in closed form; besides the moments (two float32 rows of the head for each token of
    the vocabulary that was ever a candidate) it holds nothing. They rank tokens by danger: a token counts with weight
    1, not with its share of the batch, and everything below the head is taken as fixed.

    The module must call a loss over tokens (``PolicyLoss`` among the models is one) with ``hidden``, the
    inputs of the head. Give it ``logits`` too if they exist: otherwise the head runs once more. With LoRA on the head,
    or a frozen or tied one, the model is a proxy; the callback says so once.

    Example::

        Trainer(callbacks=[CAPO(preset="capo", optimizer_model="adam")])

    Args:
        preset: thresholds of the paper for ``"capo"`` (GRPO), ``"dr_capo"``, ``"rein_capo"``. They belong to its
            learning rate and model size (m_F grows with the square of the rate): look at ``capo/m_f/p99`` of a dry run
            at full learning rate, and choose thresholds that reject a few percent.
        delta_f: threshold of m_F, over the preset's; ``.inf`` switches the test off.
        delta_h: threshold of ``|m_H|``, over the preset's; ``.inf`` switches the test off.
        delta_h_low: lower edge of m_H; by default ``-delta_h``, as in the paper's recipes.
        optimizer_model: ``"adam"``, with moments of the callback's own; ``"sgd"``, over the whole vocabulary.
        top_k: candidates a token's gradient is restricted to, as in sampling; null for the whole vocabulary.
        fisher: ``"sampled"`` is the paper's m_F at the sampled action; ``"expected"`` its mean over actions.
        model: ``"taylor"`` or ``"exact"`` (the KL of the token's distribution, and the surrogate's exact change).
        granularity: what is accepted or rejected as one, with one common step: ``"token"``, ``"sequence"``, or
            ``"batch"`` (a rank's micro-batch).
        max_reject_frac: reject at most this share of a micro-batch's tokens (sequences), the worst.
        max_rows: rows of moments to hold; beyond it those not touched for longest are forgotten.
        realized_every_n_steps: after each so many steps, evaluate the batch once more and record the KL that the step
            really brought on the candidates (``capo/realized_kl``), and its rank correlation with the predicted shift;
            0 for never. Under the SGD model it needs ``model="exact"``.
        log_tokens: write every token's shifts and fate to ``arrays/capo`` each so many steps; 0 for never.
        denominator: see :class:`TokenMask`, as are the others.
        start_step: first step that is acted on.
        dry_run: decide and record, change nothing.

    Attributes:
        last: :class:`TokenShifts` of the latest step, one a micro-batch of this rank.

    Raises:
        MisconfigurationException: as :class:`TokenMask` does; if the loss is not given hidden states; if the head is
            not linear.
    """

    prefix = "capo"
    columns = 11
    needs_linear_head = True

    def __init__(
        self,
        preset: Literal["capo", "dr_capo", "rein_capo"] = "capo",
        delta_f: float | None = None,
        delta_h: float | None = None,
        delta_h_low: float | None = None,
        optimizer_model: Literal["adam", "sgd"] = "adam",
        top_k: int | None = 50,
        fisher: Literal["sampled", "expected"] = "sampled",
        model: Literal["taylor", "exact"] = "taylor",
        granularity: Literal["token", "sequence", "batch"] = "token",
        max_reject_frac: float | None = None,
        max_rows: int | None = None,
        realized_every_n_steps: int = 0,
        log_tokens: int = 0,
        denominator: Denominator = "kept",
        start_step: int = 0,
        dry_run: bool = False,
    ) -> None:
        super().__init__(denominator, start_step, dry_run)
        choices = {
            "preset": (preset, tuple(PRESETS)),
            "optimizer_model": (optimizer_model, ("adam", "sgd")),
            "fisher": (fisher, ("sampled", "expected")),
            "model": (model, ("taylor", "exact")),
            "granularity": (granularity, ("token", "sequence", "batch")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise MisconfigurationException(f"CAPO({name}={value!r}): one of {', '.join(map(repr, known))}")
        delta_f, delta_h = (PRESETS[preset][i] if d is None else d for i, d in enumerate((delta_f, delta_h)))
        for name, value in (("delta_f", delta_f), ("delta_h", delta_h), ("top_k", top_k), ("max_rows", max_rows)):
            if value is not None and not value > 0:
                raise MisconfigurationException(f"CAPO({name}={value}): must be above 0")
        if delta_h_low is not None and not delta_h_low < delta_h:
            raise MisconfigurationException(f"CAPO(delta_h_low={delta_h_low}): must be below delta_h={delta_h}")
        if max_reject_frac is not None and not 0.0 < max_reject_frac <= 1.0:
            raise MisconfigurationException(f"CAPO(max_reject_frac={max_reject_frac}): a share in (0, 1], or None")
        for name, value in (("log_tokens", log_tokens), ("realized_every_n_steps", realized_every_n_steps)):
            if value < 0:
                raise MisconfigurationException(f"CAPO({name}={value}): must be at least 0")
        if realized_every_n_steps and optimizer_model == "sgd" and model == "taylor" and granularity == "token":
            raise MisconfigurationException(
                f"CAPO(realized_every_n_steps={realized_every_n_steps}): the SGD model over the whole vocabulary keeps "
                "no candidates to compare; take model='exact'"
            )
        self.limits = ShiftLimits(delta_f, delta_h, delta_h_low)
        self.optimizer_model = optimizer_model
        self.top_k = top_k
        self.fisher = fisher
        self.model = model
        self.granularity = granularity
        self.max_reject_frac = max_reject_frac
        self.log_tokens = log_tokens
        self.realized_every_n_steps = realized_every_n_steps
        self._realized, self._due = RealizedKL(), False
        self.last: list[TokenShifts] = []
        self._moments = SparseMoments(max_rows=max_rows)
        self._saved: dict[str, Any] | None = None
        self._seen: _Seen | None = None
        self._accepted: list[tuple[Tensor, Tensor, Tensor]] = []
        self._probs: Tensor | None = None
        self._new_step = True
        self._high, self._warned = 0, False

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._reader = HeadReader(trainer, self._backend)
        self._accepted, self._new_step = [], True
        names = [type(c).__name__ for c in trainer.callbacks if getattr(c, "reject", None) == "low"]  # type: ignore[attr-defined]
        if "EntropyMask" in names:
            rank_zero_warn("CAPO rejects uncertain tokens and EntropyMask(reject='low') certain ones: few may be left")

    @override
    def choose(self, call: TokenCall) -> Tensor:
        if self._new_step:
            self.last, self._new_step = [], False
        self._restore(call.actions.device)
        return super().choose(call)

    def _restore(self, device: torch.device) -> None:
        """Take up the moments of a checkpoint, which some strategies bring only after ``on_fit_start``."""
        if self._saved is not None:
            self._moments.load_state_dict(self._saved, device)
            self._saved = None

    @override
    def wanted(self, call: TokenCall, rows: Tensor) -> Tensor:
        self._reader.check(call, rows)
        rate = self._reader.rate(call)
        self._moments.beta1, self._moments.beta2 = rate.betas
        hidden = call.hidden(rows)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.optimizer_model == "sgd" and self.model == "taylor" and self.granularity == "token":
            seen, shifts = self._whole_vocabulary(call, rows, hidden, rate.lr)
        else:
            seen, shifts = self._on_support(call, rows, hidden, rate.lr, rate.eps)
        policy = shifts.policy if self.fisher == "sampled" else shifts.expected_policy
        objective, policy = (
            (shifts.objective, policy) if self.model == "taylor" else (shifts.exact_objective, shifts.kl)
        )
        unit = self._unit(call, rows)
        if self.granularity != "token":
            objective, policy = (_group_mean(x, unit) for x in (objective, policy))
        fails = (self.limits.policy_fails(policy), self.limits.objective_fails(objective))
        broken = ~(objective.isfinite() & policy.isfinite())
        rejected = broken | self._capped(fails[0] | fails[1], self.limits.excess(objective, policy), unit)
        columns = torch.stack([x.double() for x in (objective, policy, *fails, broken)], dim=1)
        self._seen = seen._replace(columns=torch.cat([columns, seen.columns.double()], dim=1))
        self._keep_last(call, rows, objective, policy, rejected)
        if self._probs is not None and self._measures():
            self._realized.remember(rows, seen.ids, self._probs, policy)
        self._probs = None
        return rejected

    def _measures(self) -> bool:
        every = self.realized_every_n_steps
        return every > 0 and self._steps_seen % every == 0

    def _whole_vocabulary(
        self, call: TokenCall, rows: Tensor, hidden: Tensor, lr: float
    ) -> tuple[_Seen, PredictedShifts]:
        """Return the shifts under SGD, from sums over the vocabulary."""
        actions, parts = call.actions.flatten(), []
        for some, z in call.logits(rows):
            parts.append(torch.stack(score_rest(z, actions[some]), dim=1))
        rest, squares, cubes = torch.cat(parts).to(hidden).unbind(1)
        weight = _weights(call, rows, torch.log1p(-rest))
        shifts = sgd_shifts(rest, squares, cubes, hidden.square().sum(-1), weight, lr, call.temperature)
        columns = torch.ones(len(rows), 2, device=rows.device)
        none = rows.new_zeros(len(rows), 0)
        return _Seen(rows, hidden[:, :0], none, none.to(hidden), columns), shifts

    def _on_support(
        self, call: TokenCall, rows: Tensor, hidden: Tensor, lr: float, eps: float
    ) -> tuple[_Seen, PredictedShifts]:
        """Return the shifts from the change of the logits of the candidates."""
        actions = call.actions.flatten()
        parts = [token_support(z, actions[some], self.top_k) for some, z in call.logits(rows)]
        ids, probs, action, mass, inside = (torch.cat(columns) for columns in zip(*parts, strict=True))
        support = type(parts[0])(ids, probs.to(hidden), action, mass, inside)
        sampled = support.probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        weight = _weights(call, rows, (sampled * mass.to(hidden)).log())
        pull = weight.unsqueeze(-1) * support.score() / call.temperature
        moments = self._moments if self.optimizer_model == "adam" else None
        if self.granularity == "token":
            steps = logit_steps(hidden, ids, pull, lr, call.temperature, moments, eps)
        else:
            steps, unit = torch.empty_like(pull), self._unit(call, rows)
            for group in unit.unique():
                some = unit == group
                steps[some] = joint_logit_steps(hidden[some], ids[some], pull[some], lr, call.temperature, moments, eps)
        self._probs = support.probs
        shifts = predicted_shifts(steps, support.probs, action, weight)
        shifts = PredictedShifts(*(torch.where(weight == 0, 0.0, x) for x in shifts))  # momentum moves clipped ones too
        return _Seen(rows, hidden, ids, pull, torch.stack([mass, inside.to(mass)], dim=1)), shifts

    def _unit(self, call: TokenCall, rows: Tensor) -> Tensor:
        """Return what each token is accepted or rejected with [n]."""
        if self.granularity == "token":
            return torch.arange(len(rows), device=rows.device)
        return rows // call.mask.shape[1] if self.granularity == "sequence" else torch.zeros_like(rows)

    def _capped(self, rejected: Tensor, excess: Tensor, unit: Tensor) -> Tensor:
        """Return the rejected tokens, or of the worst units as many as ``max_reject_frac`` allows."""
        if self.max_reject_frac is None:
            return rejected
        units, index = unit.unique(return_inverse=True)
        worst = excess.new_zeros(len(units)).scatter_(0, index, torch.where(rejected, excess, -1.0))
        order = worst.argsort(descending=True, stable=True)
        allowed = torch.zeros_like(worst, dtype=torch.bool)
        allowed[order[: math.floor(self.max_reject_frac * len(units))]] = True
        return rejected & allowed[index]

    def _keep_last(self, call: TokenCall, rows: Tensor, objective: Tensor, policy: Tensor, rejected: Tensor) -> None:
        def table(values: Tensor, empty: Any) -> Tensor:
            whole = torch.full((call.mask.numel(),), empty, dtype=values.dtype, device=values.device)
            return whole.index_copy_(0, rows, values).view(call.mask.shape)

        tables = (table(objective, math.nan), table(policy, math.nan), table(rejected, False))
        self.last.append(TokenShifts(call.actions.clone(), *tables))

    @override
    def extra(self) -> Tensor | None:
        return None if self._seen is None else self._seen.columns

    @override
    def settled(self, call: TokenCall, kept: Tensor) -> None:
        seen, self._seen = self._seen, None
        if seen is None or self.optimizer_model == "sgd":
            return
        used = kept.flatten()[seen.rows] & seen.pull.any(-1) & (seen.columns[:, 4] == 0)
        self._accepted.append((seen.hidden[used], seen.ids[used], seen.pull[used]))

    @override
    def probed(self, call: TokenCall) -> None:
        if self._due:
            self._realized.hear(call)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due:
            found = self._realized.measure(trainer, pl_module, self._backend, batch, batch_idx)
            record(trainer, "capo", found, self._steps_seen - 1)
            self._due = False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def finish(self, trainer: L.Trainer) -> None:
        self._new_step = True
        self._due = self._measures()
        if self.log_tokens and self._steps_seen % self.log_tokens == 0 and self.last:
            record_arrays(trainer, "capo", joined_shifts(self.last), self._steps_seen)
        if self.optimizer_model == "sgd":
            return
        self._restore(trainer.lightning_module.device)
        mine = self._accepted or [_nothing(trainer.lightning_module.device)]
        self._accepted = []
        joined = (gather_rows(torch.cat(parts), trainer) for parts in zip(*mine, strict=True))
        self._moments.update(*joined)

    @override
    def summary(self, noted: Tensor) -> dict[str, Tensor | float]:
        values = super().summary(noted)
        count = max(1, len(noted))
        for name, column in (("reject_frac_fisher", POLICY_FAILS), ("reject_frac_hessian", OBJECTIVE_FAILS)):
            values[name] = noted[:, column].sum() / count
        values["nonfinite"] = noted[:, NONFINITE].sum()
        values["topk_mass"] = noted[:, MASS].sum() / count
        values["action_in_topk"] = noted[:, INSIDE].sum() / count
        values["moment_rows"] = float(len(self._moments))
        finite = noted[noted[:, NONFINITE] == 0]
        for suffix, some in (("", finite), ("_kept", finite[finite[:, REJECTED] == 0])):
            if len(some):
                values.update(statistics(f"m_f{suffix}", some[:, POLICY], (50, 99)))
                values.update(statistics(f"m_h{suffix}", some[:, OBJECTIVE], (1, 99)))
        self._warn(float(values["reject_frac"]))
        return values

    def _warn(self, rejected: float) -> None:
        self._high = self._high + 1 if rejected > TOO_MANY else 0
        if self._high == PATIENCE and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"CAPO rejected more than {TOO_MANY:.0%} of the tokens in {PATIENCE} steps in a row "
                f"({rejected:.0%} at step {self._steps_seen}): its thresholds do not fit this learning rate. Choose "
                "delta_f and delta_h near capo/m_f/p99 and capo/m_h/p99 of a dry run, or set max_reject_frac"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        moments = self._moments.state_dict() if self._saved is None else self._saved
        return {**super().state_dict(), "moments": moments, "high": self._high}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved, self._high = state_dict["moments"], state_dict["high"]


def _weights(call: TokenCall, rows: Tensor, log_probs: Tensor) -> Tensor:
    """Return what multiplies the score of each token in the objective's gradient [n]."""
    advantage = call.advantages.flatten()[rows].to(log_probs)
    pull, old = getattr(call.loss, "pull", None), call.of("old_log_probs", rows)
    return advantage if pull is None or old is None else pull(log_probs, old.to(log_probs), advantage)


def _group_mean(values: Tensor, unit: Tensor) -> Tensor:
    _, index, counts = unit.unique(return_inverse=True, return_counts=True)
    return (values.new_zeros(len(counts)).index_add_(0, index, values) / counts)[index]


def _nothing(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.zeros(0, 0, device=device)
    return empty, empty.long(), empty
