"""The conformance matrix: every cell works, or refuses as ``tests/settings.py`` says; no third outcome.

``pytest`` runs few cells, in which every two values of two factors meet. With ``EVOLUTE_MATRIX=all``, which ``make
matrix`` sets, it runs all of them, and writes ``docs/compatibility.md`` if they all pass.
"""

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from evolute.callbacks.access import named_parameters
from tests.callbacks.matrix import (
    FACTORS,
    LEFT_OVER,
    LIMITS,
    Cell,
    all_cells,
    deviations,
    module,
    pairwise_cells,
    refusal_of,
    run_cell,
)
from tests.callbacks.matrix_page import page
from tests.processes import run_pair
from tests.settings import MATRIX

WHICH = "all" if os.environ.get("EVOLUTE_MATRIX") == "all" else "pairwise"
CELLS = all_cells() if WHICH == "all" else pairwise_cells()
PASSED: set[Cell] = set()
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"

pytestmark = pytest.mark.timeout(2400 if WHICH == "all" else 600)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Cell, Any]]:
    """What each of two processes saw in its cells."""
    found = run_pair(str(Path(__file__).with_name("matrix.py")), tmp_path_factory.mktemp("matrix"), 2000, WHICH)
    return [{Cell(*key): result for key, result in rank.items()} for rank in found]


@functools.cache
def single(cell: Cell) -> dict[str, Any]:
    """Run a cell in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return run_cell(cell, Path(folder))


@functools.cache
def start() -> dict[str, torch.Tensor]:
    """Return the weights before the first step of every cell."""
    L.seed_everything(0, verbose=False)
    return {n: p.detach().clone() for n, p in named_parameters(module(scene=True)).items()}


def assert_within(
    found: dict[str, Any], reference: dict[str, Any], weights: float, metrics: float, without: tuple[str, ...] = ()
) -> None:
    for what, deviation in deviations(found, reference, start()):
        if what.split(" at ")[0] in without:
            continue
        limit = weights if what in start() else metrics
        assert deviation <= limit, f"{what} deviates by {deviation:.1e}, {limit:g} is allowed"


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_works_or_refuses_as_stated(cell, ranks):
    check(cell, ranks)
    PASSED.add(cell)


def check(cell: Cell, ranks: list[dict[Cell, Any]]) -> None:
    def results(cell: Cell) -> list[dict[str, Any]]:
        return [single(cell)] if cell.strategy == "single" else [rank[cell] for rank in ranks]

    first, *others = found = results(cell)
    refusal = refusal_of(cell)
    if refusal is not None:
        assert all(refusal.message in rank.get("refused", "it did not") for rank in found)
        return
    assert all("refused" not in rank for rank in found), first["refused"]
    for rank in others:
        assert not rank["rows"]  # rank 0 records for all
        assert all(torch.equal(w, first["weights"][name]) for name, w in rank["weights"].items())
    assert first["rows"]
    jumps = LEFT_OVER + (MATRIX[cell.name].jumps if cell.precision == "bf16" else ())
    assert_within(first, single(cell._replace(strategy="single", life="fresh")), *LIMITS[cell.precision], jumps)
    if cell.life == "resumed":
        assert_within(first, results(cell._replace(life="fresh"))[0], 0.0, 0.0)


def test_the_pairwise_cells_contain_every_pair_of_values():
    chosen = pairwise_cells()
    for a in range(len(FACTORS)):
        for b in range(a):
            assert len({(c[a], c[b]) for c in chosen}) == len({(c[a], c[b]) for c in all_cells()})
    assert len(chosen) < len(all_cells()) / 4


def test_the_page_lists_the_callbacks_and_settings_there_are():
    if set(all_cells()) == PASSED:
        PAGE.write_text(page())
    assert PAGE.read_text() == page(), "run make matrix"
