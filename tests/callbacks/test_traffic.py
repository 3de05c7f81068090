"""What each callback sends and holds is what ``docs/scaling.md`` says: its formulas, evaluated, against counters.

The file is also the script of two processes, which run every row of its tables under every strategy named there.
"""

import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from evolute import callbacks as evolute_callbacks
from evolute.callbacks.access.ranks import MeanOverRanks
from evolute.callbacks.access.shares import shared_out
from tests.conftest import fit
from tests.modules import Net, classification_data
from tests.processes import run_pair
from tests.traffic import Counters, held_by, predictions

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
STRATEGIES = ("DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3")  # the last one leaves its own linear layer behind
KINDS = ("all_reduce", "all_gather", "all_to_all")
RANKS, STEPS, MICRO_BATCH = 2, 4, 4
PROBED = 1  # samples a probe batch takes of a micro-batch
ROUNDS = 2  # of clipping, with a target far out of reach


class Row(NamedTuple):
    """One line of a table: a callback as it is constructed, a strategy, and formulas in bytes."""

    callback: str
    strategy: str
    formulas: dict[str, str]


def table(heading: str) -> list[Row]:
    """Read the first table under a heading of the page: a constructor, then names of strategies, then formulas."""
    section = PAGE.read_text().split(f"## {heading}\n", 1)[1]
    first = "|" + section.split("\n|", 1)[1].split("\n\n", 1)[0]
    lines = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in first.splitlines()]
    titles = [title.replace("-", "_") for title in lines[0][2:]]
    rows = [(cells[0], cells[1].split(", "), dict(zip(titles, cells[2:], strict=True))) for cells in lines[2:]]
    return [Row(name, strategy, formulas) for name, strategies, formulas in rows for strategy in strategies]


TRAFFIC, MEMORY = table("Traffic"), table("Memory")
PAIRS = tuple(dict.fromkeys((row.callback, row.strategy) for row in TRAFFIC))


def built(constructor: str) -> Callback:
    """Build a callback from its line in the table, so that it measures every step."""
    often = {"every_n_steps": 1, "budget": None}
    names = {
        "CurvatureMonitor": partial(evolute_callbacks.CurvatureMonitor, **often),
        "LayerMonitor": partial(evolute_callbacks.LayerMonitor, **often),
        "NoiseAdaptiveLR": evolute_callbacks.NoiseAdaptiveLR,
        "SpectrumProbe": partial(evolute_callbacks.SpectrumProbe, **often, lanczos_steps=8),
        "StepRadius": partial(evolute_callbacks.StepRadius, **often, target=1e-3),
    }
    return eval(constructor, names)


class Sized(Net):
    """Sizes that divide by the number of ranks: nothing is padded, so that counts are exact."""

    def __init__(self) -> None:
        network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        super().__init__(network, make=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


def strategy_of(name: str) -> Any:
    from evolute.strategies import CPUDeepSpeedStrategy

    if name == "DDP":
        return "ddp"
    if name == "FSDP2":
        return ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    zero: dict[str, Any] = {"stage": int(name[-1])}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return CPUDeepSpeedStrategy(config={"zero_allow_untested_optimizer": True, "zero_optimization": zero})


class Marks(Callback):
    """Counters and bytes held after every optimizer step."""

    def __init__(self, counters: Counters, products: list[int], watched: Callback | None) -> None:
        self.counters, self.products, self.watched = counters, products, watched
        self.at: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > len(self.at):
            mark = {"bytes": Counter(self.counters.bytes), "calls": Counter(self.counters.calls)}
            held = held_by(self.watched, module, trainer) if self.watched is not None else 0
            self.at.append({**mark, "held": held, "products": len(self.products)})

    def last_step(self) -> dict[str, Any]:
        before, after = self.at[-2:]
        found = {key: {k: after[key][k] - before[key][k] for k in after[key]} for key in ("bytes", "calls")}
        return {**found, "held": after["held"], "products": after["products"] - before["products"]}


def run(constructor: str | None, strategy: str, accumulate: int, counters: Counters, products: list[int]) -> Any:
    """Return what the last of a few steps sent, how many Hessian products it made, and what is held after it."""
    watched = built(constructor) if constructor is not None else None
    marks = Marks(counters, products, watched)
    data = classification_data()
    mine = DistributedSampler(data, RANKS, int(os.environ["LOCAL_RANK"]), shuffle=False)
    fit(
        [watched, marks] if watched is not None else [marks], Sized,
        DataLoader(data, batch_size=MICRO_BATCH, sampler=mine), strategy=strategy_of(strategy), devices=RANKS,
        accumulate_grad_batches=accumulate, max_steps=STEPS, use_distributed_sampler=False,
    )  # fmt: skip
    ratios = watched.state_dict()["ratios"] if isinstance(watched, evolute_callbacks.NoiseAdaptiveLR) else {}
    return {**marks.last_step(), "ratios": ratios}


def accumulation(constructor: str | None) -> int:
    return 2 if constructor is not None and "split" in constructor else 1


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes counted, by callback and strategy."""
    return run_pair(__file__, tmp_path_factory.mktemp("traffic"), 400)


def values_of(products: int) -> dict[str, int]:
    shapes = [p.numel() for p in Sized().parameters()]
    batch = PROBED * (8 * 4 + 8)  # features in float32, a class
    return {
        "P": sum(shapes), "L": len(shapes), "N": RANKS, "m": products, "r": ROUNDS, "b": batch,
    }  # fmt: skip


@pytest.mark.parametrize("row", TRAFFIC, ids=lambda row: f"{row.callback}-{row.strategy}")
def test_a_measurement_sends_what_the_table_says(ranks, row):
    for rank in ranks:
        found, base = rank[row.callback, row.strategy], rank[accumulation(row.callback), row.strategy]
        terms = MICRO_BATCH if 'mode="clip"' in row.callback else PROBED
        values = {**values_of(found["products"]), "s": terms}
        sent = {kind: found["bytes"].get(kind, 0) - base["bytes"].get(kind, 0) for kind in KINDS}
        assert sent == {kind: eval(row.formulas[kind], values) for kind in KINDS}
        calls = sum(found["calls"].values()) - sum(base["calls"].values())
        assert calls == eval(row.formulas["calls"], values)


@pytest.mark.parametrize("row", MEMORY, ids=lambda row: f"{row.callback}-{row.strategy}")
def test_between_steps_a_rank_holds_what_the_table_says(ranks, row):
    for rank in ranks:
        assert rank[row.callback, row.strategy]["held"] == eval(row.formulas["held"], values_of(0))


@pytest.mark.parametrize("constructor", ["NoiseAdaptiveLR()", 'NoiseAdaptiveLR(estimator="split")'])
def test_ratios_are_the_same_bits_on_all_ranks_and_the_same_under_every_strategy(ranks, constructor):
    plain = ranks[0][constructor, "DDP"]["ratios"]
    assert min(plain.values()) < 0.99
    for strategy in STRATEGIES:
        first, second = (rank[constructor, strategy]["ratios"] for rank in ranks)
        assert first == second
        assert first == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_layer_is_measured_by_one_rank_alone(ranks, strategy):
    both = [rank["measured", strategy] for rank in ranks]
    assert all(both)
    assert sorted(both[0] + both[1]) == sorted(set(both[0]) | set(both[1]))
    assert len(both[0]) + len(both[1]) == values_of(0)["L"]


def test_both_tables_speak_of_the_same_runs():
    assert {(row.callback, row.strategy) for row in MEMORY} == set(PAIRS)


def test_work_is_shared_out_evenly_and_all_of_it():
    costs = {f"layer{i}": float(1 + (i * 7) % 11) for i in range(40)}
    owner = shared_out(costs, 4)
    loads = [sum(costs[n] for n, rank in owner.items() if rank == r) for r in range(4)]
    assert owner.keys() == costs.keys()
    assert max(loads) - sum(loads) / 4 <= max(costs.values())
    assert max(loads) < 1.1 * sum(loads) / 4


def test_the_predictions_of_the_page_follow_from_its_formulas():
    page = PAGE.read_text()
    for line in predictions(TRAFFIC, MEMORY):
        assert line in page, line


def main(folder: str) -> None:
    counters, products = Counters(), list[int]()
    counters.install()  # before DeepSpeed takes hold of the functions
    torch.set_num_threads(1)
    multiply = MeanOverRanks.__matmul__

    def counted(H: MeanOverRanks, v: Tensor) -> Tensor:
        products.append(1)
        return multiply(H, v)

    MeanOverRanks.__matmul__ = counted  # type: ignore[method-assign]
    from evolute.callbacks import noise_adaptive_lr

    dual_norms, measured = noise_adaptive_lr.batched_dual_norms, list[Any]()

    def noted(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        measured.extend(tuple(t.shape) for t in tensors)
        return dual_norms(tensors, *args, **kwargs)

    noise_adaptive_lr.batched_dual_norms = noted
    results: dict[Any, Any] = {}
    for strategy in STRATEGIES:
        for accumulate in (1, 2):
            results[accumulate, strategy] = run(None, strategy, accumulate, counters, products)
        for name in (name for name, where in PAIRS if where == strategy):
            measured.clear()
            results[name, strategy] = run(name, strategy, accumulation(name), counters, products)
            if name.startswith("NoiseAdaptiveLR"):
                results["measured", strategy] = measured[-(len(measured) // (STEPS - 1)) :]  # none at step 0
    torch.save(results, Path(folder) / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
