"""DeepSpeed ZeRO, stages 1 to 3: every rank holds a piece of each parameter's float32 master, gradient and moments.

``p.grad`` is None there, and in stage 3 ``p`` itself is empty. What DeepSpeed's public ``safe_get_*`` functions give is
whole tensors; the pieces behind them are what scales, so this module reads those. They are private: the range of
versions in ``pyproject.toml`` is the one that the tests cover.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from evolute.callbacks.access.backend import Capabilities, Parts, Restorable, base_optimizer, norms_of, shape_of
from evolute.callbacks.access.shares import sent_to_owners
from evolute.callbacks.access.untouched import without_hooks_of


class Piece(NamedTuple):
    """Where this rank's piece of a parameter lies.

    Attributes:
        flat: the flat float32 master that holds it, which is what the optimizer steps.
        offset: where it begins in ``flat``.
        start: where it begins in the flattened parameter.
        length: its size; 0 if other ranks hold all of the parameter.
    """

    flat: Tensor
    offset: int
    start: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the piece of a tensor laid out as ``self.flat``."""
        return flat.narrow(0, self.offset, self.length)


class ZeroBackend:
    """DeepSpeed ZeRO: gradients, weights and moments in pieces, one a rank."""

    capabilities = Capabilities(local_gradients=False, double_backward=False)

    def __init__(self, trainer: L.Trainer, who: str) -> None:
        self._trainer = trainer
        strategy = cast(DeepSpeedStrategy, trainer.strategy)
        config = strategy.config if isinstance(strategy.config, dict) else {}
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        if self.stage not in (1, 2, 3):
            raise MisconfigurationException(
                f"{who} works with DeepSpeed ZeRO at stages 1 to 3, and the configuration says stage {self.stage}: set "
                'zero_optimization.stage, or use Trainer(strategy="ddp")'
            )
        if self.stage == 1 and config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
            raise MisconfigurationException(
                f"{who} cannot read DeepSpeed's optimizer for bfloat16 with gradients accumulated in float32 at ZeRO "
                "stage 1: use stage 2, or leave data_types.grad_accum_dtype out"
            )
        if strategy.handles_gradient_accumulation and trainer.accumulate_grad_batches > 1:
            rank_zero_warn(
                "Lightning's DeepSpeedStrategy divides accumulated gradients by their number twice and takes "
                "no step from the last, incomplete accumulation of an epoch: "
                "evolute.strategies.ZeROStrategy takes the same arguments and mends both"
            )

    @property
    def _zero(self) -> Any:
        """DeepSpeed's wrapper of the optimizer."""
        return self._trainer.strategy.optimizers[0]

    def groups(self, optimizer: Optimizer) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Return the groups with the module's parameters; the optimizer itself holds flat pieces of them."""
        zero: Any = optimizer
        if self.stage < 3:
            return list(zip(zero.param_groups, zero.bit16_groups, strict=True))
        held: list[list[Tensor]] = [[] for _ in zero.param_groups]
        for sub_group, params in enumerate(zero.fp16_groups):
            held[zero.sub_group_to_group_id[sub_group]] += params
        return list(zip(zero.param_groups, held, strict=True))

    def stepping(self) -> bool:
        """Ask the engine: Lightning calls the step for every micro-batch and leaves accumulation to it."""
        return bool(self._trainer.strategy.model.is_gradient_accumulation_boundary())  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]

    def watch(self, optimizer: Optimizer, enter: Callable[[], None], leave: Callable[[bool], None]) -> Restorable:
        """Wrap the step of DeepSpeed's optimizer, which has no hooks."""
        return _WatchedStep(optimizer, enter, leave)

    def gradients(self, params: Mapping[str, Tensor], optimizer: Optimizer) -> Parts:
        """Return this rank's pieces of the reduced gradient, in float32."""
        scale = float(self._zero.loss_scale)
        found = {name: self._gradient(p).float() for name, p in params.items()}
        return found if scale == 1.0 else {name: g / scale for name, g in found.items()}

    def _gradient(self, p: Any) -> Tensor:
        piece = self._piece(p)
        if self.stage == 3:
            return self._zero.get_local_fp32_grad_for_param(p)[: piece.length]
        if not piece.length:
            return torch.zeros(0, device=p.device)
        return _narrowed(p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group), piece)

    def accumulated(self, params: Mapping[str, Tensor]) -> Parts:
        """Return copies of this rank's pieces of what has accumulated; stage 1 reduces them here for the first time."""
        scale = float(self._zero.loss_scale)
        piece_of = {1: self._reduced_now, 2: self._running, 3: self._gradient}[self.stage]
        return {name: piece_of(p).float().clone() / scale for name, p in params.items()}

    def _reduced_now(self, p: Any) -> Tensor:
        whole = self._zero.get_param_gradient_attribute(p)
        whole = torch.zeros_like(p, dtype=torch.float32) if whole is None else whole.float()
        whole = whole / dist.get_world_size()
        dist.all_reduce(whole)
        return _narrowed(whole, self._piece(p))

    def _running(self, p: Any) -> Tensor:
        """Return a piece of stage 2's running gradient, which lies in a flat buffer or in a tensor a parameter."""
        zero, piece = self._zero, self._piece(p)
        if not piece.length:
            return torch.zeros(0, device=p.device)
        group = p._hp_mapping.param_group_index
        flat = getattr(zero.averaged_gradients.get(group), "flat_partition", None)
        if flat is not None:
            return piece.of(flat)
        tensors = zip(zero.params_in_partition[group], zero.all_grad_tensors.get(group) or (), strict=False)
        whole = next((gradient for member, gradient in tensors if member is p), None)
        return torch.zeros(piece.length, device=p.device) if whole is None else _narrowed(whole, piece)

    def weights(self, params: Mapping[str, Tensor]) -> Parts:
        """Return this rank's pieces of the float32 masters."""
        pieces = {name: self._piece(p) for name, p in params.items()}
        return {name: piece.of(piece.flat.detach()) for name, piece in pieces.items()}

    def publish(self, optimizer: Optimizer) -> None:
        """Cast the masters to the module's precision and send them to all ranks, as DeepSpeed's own step ends."""
        zero: Any = optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()

    def scale(self, optimizer: Optimizer, params: Mapping[str, Tensor], ratios: Mapping[str, float]) -> Restorable:
        """Shorten the update of the masters: the optimizer steps flat pieces of many parameters at one rate."""
        pieces = {n: self._piece(p) for n, p in params.items() if ratios.get(n, 1.0) != 1.0}
        return _ShortenedUpdate(optimizer, pieces, ratios)

    def norms(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return norms of the whole tensors: squares of the pieces, summed over ranks in one small all-reduce."""
        return self.sums(norms_of(list(parts.values())).square()).sqrt()

    def sums(self, value: Tensor) -> Tensor:
        """Return the sum over ranks."""
        total = value.clone()
        if total.numel():
            dist.all_reduce(total)
        return total

    def whole(self, params: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors, in one all-reduce of their joint size."""
        if not parts:
            return {}
        shapes = {name: shape_of(params[name]) for name in parts}
        first = next(iter(parts.values()))
        joint = torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=first.dtype, device=first.device)
        pieces = dict(zip(shapes, joint.split([shape.numel() for shape in shapes.values()]), strict=True))
        for name, part in parts.items():
            start = self._piece(params[name]).start
            pieces[name][start : start + part.numel()] = part
        dist.all_reduce(joint)
        return {name: flat.view(shapes[name]) for name, flat in pieces.items()}

    def shared(
        self, params: Mapping[str, Tensor], parts: Mapping[str, Tensor], owner: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return this rank's tensors, whole: pieces of one parameter follow each other in the order of ranks."""
        return {n: torch.cat(ps).view(shape_of(params[n])) for n, ps in sent_to_owners(parts, owner).items()}

    def part(self, params: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> Parts:
        """Return this rank's pieces of whole tensors."""
        found = {n: _narrowed(t, self._piece(params[n])) for n, t in whole.items() if n in params}
        return {n: t.to(params[n].device).clone() for n, t in found.items()}

    @contextmanager
    def unsharded(self, module: nn.Module) -> Generator[dict[str, Tensor]]:
        """Give the weights, out of reach of DeepSpeed's hooks: float32 masters where the module is rounded.

        Otherwise its own ones, not copied in stages 1 and 2, gathered in stage 3.
        """
        weights = self._whole_weights(module)
        with without_hooks_of("deepspeed", module), _plain_linear():
            yield weights

    def _whole_weights(self, module: nn.Module) -> dict[str, Tensor]:
        named: dict[str, Any] = dict(module.named_parameters())
        owned = {id(p) for _, members in self.groups(self._zero) for p in members}
        # A half-precision module is a rounded picture of what trains, too coarse to see one step in.
        rounded = {n: p for n, p in named.items() if id(p) in owned and p.dtype != torch.float32}
        return {**self._live_weights(named, set(rounded)), **self.whole(rounded, self.weights(rounded))}

    def _live_weights(self, named: Mapping[str, Any], without: set[str]) -> dict[str, Tensor]:
        wanted = {name: p for name, p in named.items() if name not in without}
        if self.stage < 3:
            return {name: p.detach() for name, p in wanted.items()}
        import deepspeed

        found: dict[str, Tensor] = {}
        for name, p in wanted.items():
            with deepspeed.zero.GatheredParameters([p]):
                found[name] = p.detach().clone()
        return found

    def optimizer_state(self, optimizer: Optimizer, param: Tensor) -> Mapping[str, Any]:
        """Return the optimizer's state of one parameter, gathered from all ranks."""
        piece = self._piece(param)
        state = base_optimizer(optimizer).state.get(piece.flat, {})
        flat = {key: v for key, v in state.items() if isinstance(v, Tensor) and v.shape == piece.flat.shape}
        gathered = {key: self.whole({key: param}, {key: piece.of(v)})[key] for key, v in flat.items()}
        return {**state, **gathered}

    def _piece(self, p: Any) -> Piece:
        zero = self._zero
        if self.stage == 3:
            group, offset, size = zero.grad_position[zero.get_param_id(p)]
            start = size * dist.get_rank(p.ds_process_group)
            length = max(0, min(size, p.ds_numel - start))  # the last rank's piece may be padded
            return Piece(zero.fp32_partitioned_groups_flat[group], offset, start, length)
        mapping = p._hp_mapping
        if mapping is None:
            group = next(i for i, members in enumerate(zero.bit16_groups) if any(m is p for m in members))
            return Piece(zero.single_partition_of_fp32_groups[group], 0, 0, 0)
        master = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        inner, outer = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Piece(master, inner.start, outer.start, outer.numel)


def _narrowed(whole: Tensor, piece: Piece) -> Tensor:
    """Return the piece of a flattened whole tensor, or the tensor if it is that piece already."""
    flat = whole.reshape(-1)
    return flat if flat.numel() == piece.length else flat.narrow(0, piece.start, piece.length)


@contextmanager
def _plain_linear() -> Generator[None]:
    """Put back torch's own ``linear``, for which stage 3 has one that saves memory and has no second derivative."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    now = F.linear
    F.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", now)
    try:
        yield
    finally:
        F.linear = now


class _WatchedStep:
    """Calls around ``step`` of one DeepSpeed optimizer."""

    def __init__(self, optimizer: Any, enter: Callable[[], None], leave: Callable[[bool], None]) -> None:
        self._optimizer = optimizer
        step = optimizer.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            enter()
            result = step(*args, **kwargs)
            leave(not optimizer.overflow)
            return result

        optimizer.step = watched

    def restore(self) -> None:
        """Give the optimizer its own method back."""
        self._optimizer.__dict__.pop("step", None)


class _ShortenedUpdate:
    """An update whose pieces are shortened as soon as the optimizer has made it, before it reaches the module.

    For every optimizer whose update is proportional to its rate (SGD, Adam, AdamW with its decoupled decay) this is a
    rate of its own. The masters are float32; ``lerp`` is exact where nothing is to be shortened.
    """

    def __init__(self, optimizer: Optimizer, pieces: Mapping[str, Piece], ratios: Mapping[str, float]) -> None:
        self._pieces = [(piece, piece.of(piece.flat.detach()).clone(), ratios[n]) for n, piece in pieces.items()]
        bases = (base_optimizer(optimizer), getattr(optimizer, "backup_optimizer", None))
        self._handles = [base.register_step_post_hook(self._shorten) for base in bases if base is not None]

    def _shorten(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # DeepSpeed steps one flat master at a time, so this runs once for each.
        stepped = {id(flat) for group in optimizer.param_groups for flat in group["params"]}
        with torch.no_grad():
            for piece, before, ratio in self._pieces:
                if id(piece.flat) in stepped:
                    now = piece.of(piece.flat)
                    now.copy_(torch.lerp(before, now, ratio))

    def restore(self) -> None:
        """Stop shortening."""
        for handle in self._handles:
            handle.remove()
