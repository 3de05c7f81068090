"""Rewards: plain callables, sync or async, of which none can end a run."""

import asyncio
import importlib
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

RewardFunction = Callable[..., Any]
"""``f(prompts, completions, completion_ids, **columns)`` -> one number, or None, for each completion."""


class Scores(NamedTuple):
    """What the rewards of a batch came to.

    Attributes:
        total: weighted sum over the functions that gave a number [n]; NaN where none did.
        each: by function [functions, n]; NaN for None.
        failed: names of the functions that failed in this call.
    """

    total: Tensor
    each: Tensor
    failed: list[str]


class Rewards:
    """Several reward functions as one.

    A function that raises, takes longer than ``timeout``, or returns another number of scores than there are
    completions, scores None for the whole batch: it is named in a warning the first time and counted always.

    Args:
        functions: callables, or import paths of callables.
        weights: one for each; all 1 by default.
        timeout: seconds a function may take for a batch; None for ever. A sync function that is late goes on in a
            thread of its own, and its scores are dropped.

    Raises:
        ValueError: if there is no function, one cannot be imported, or the weights do not match.
    """

    def __init__(
        self,
        functions: Sequence[str | RewardFunction],
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
    ) -> None:
        if not functions:
            raise ValueError("rewards=[]: give at least one function")
        self.functions = [imported(f, "rewards") if isinstance(f, str) else f for f in functions]
        self.names = _distinct([getattr(f, "__name__", type(f).__name__) for f in self.functions])
        self.weights = [1.0] * len(functions) if weights is None else [float(w) for w in weights]
        if len(self.weights) != len(functions):
            raise ValueError(f"reward_weights={weights}: {len(functions)} reward functions need as many weights")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"reward_timeout={timeout}: must be above 0")
        self.timeout = timeout
        self.failures = dict.fromkeys(self.names, 0)

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], columns: dict[str, list[Any]]
    ) -> Scores:
        """Score completions; every argument and column has one entry for each of them."""
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        rows: list[Tensor] = []
        failed: list[str] = []
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                rows.append(_numbers(_call(function, given | columns, self.timeout), len(completions)))
            except Exception as error:  # anybody's code: whatever it raises is its failure, not the run's
                if not self.failures[name]:
                    rank_zero_warn(f"reward {name} failed and scores None: {type(error).__name__}: {error}")
                self.failures[name] += 1
                failed.append(name)
                rows.append(torch.full((len(completions),), math.nan, dtype=torch.float64))
        each = torch.stack(rows)
        weights = torch.tensor(self.weights, dtype=torch.float64).unsqueeze(1)
        total = torch.where(each.isfinite(), each * weights, 0.0).sum(0)
        return Scores(torch.where(each.isfinite().any(0), total, math.nan), each, failed)


def _call(function: RewardFunction, arguments: dict[str, Any], timeout: float | None) -> Any:
    """Call a function with the arguments it takes, for no longer than ``timeout`` seconds."""
    parameters = inspect.signature(function).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}

    async def awaited() -> Any:
        return await asyncio.wait_for(function(**arguments), timeout)

    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        # In a thread of its own: the caller (a notebook) may run an event loop already.
        return _in_thread(lambda: asyncio.run(awaited()), None)
    return function(**arguments) if timeout is None else _in_thread(lambda: function(**arguments), timeout)


def _in_thread(work: Callable[[], Any], timeout: float | None) -> Any:
    done: dict[str, Any] = {}

    def run() -> None:
        try:
            done["value"] = work()
        except BaseException as error:
            done["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    if "error" in done:
        raise done["error"]
    if "value" not in done:
        raise TimeoutError(f"took longer than {timeout} s")
    return done["value"]


def _numbers(values: Any, count: int) -> Tensor:
    values = list(values)
    if len(values) != count:
        raise ValueError(f"returned {len(values)} scores for {count} completions")
    row = torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float64)
    return torch.where(row.isfinite(), row, math.nan)


def imported(path: str, what: str) -> Any:
    """Return the callable at an import path; a class is instantiated.

    Raises:
        ValueError: naming the argument ``what``, if there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what}: {path!r} cannot be imported ({error})") from error
    if inspect.isclass(function):
        function = function()
    if not callable(function):
        raise ValueError(f"{what}: {path!r} is not callable")
    return function


def _distinct(names: list[str]) -> list[str]:
    return [n if names.index(n) == i else f"{n}_{i}" for i, n in enumerate(names)]


def exact_match(completions: list[str], answer: list[Any], **_: Any) -> list[float | None]:
    """Score 1 where the completion is the answer, spaces around it aside; None where no answer is known."""
    return [
        None if known is None else float(text.strip() == str(known).strip())
        for text, known in zip(completions, answer, strict=True)
    ]


def reasoning_gym(
    completions: list[str], answer: list[Any], metadata: list[dict[str, Any]], **_: Any
) -> list[float | None]:
    """Score with the verifier of the reasoning-gym task that made the problem, in [0, 1]."""
    from reasoning_gym import get_score_answer_fn

    verifier = cast(Any, get_score_answer_fn)  # whose own annotation leaves the arguments out
    return [
        float(verifier(meta["source_dataset"])(text.strip(), {"answer": known, "metadata": meta}))
        for text, known, meta in zip(completions, answer, metadata, strict=True)
    ]


def last_number(completions: list[str], answer: list[Any], **_: Any) -> list[float | None]:
    """Score 1 where the last integer in the completion is the answer, for models that explain themselves."""
    import re

    found = [re.findall(r"-?\d+", text.replace(",", "")) for text in completions]
    return [
        None if known is None else float(bool(numbers) and int(numbers[-1]) == int(known))
        for numbers, known in zip(found, answer, strict=True)
    ]
