"""What a curvature monitor measures, and how thoroughly: three sizes."""

from dataclasses import dataclass
from typing import Literal

Quantity = Literal[
    "sharpness",
    "edge",
    "lambda_min",
    "directional",
    "trace",
    "grad_rayleigh",
    "blocks",
    "model_agreement",
    "smoothness",
    "critical",
]
QUANTITIES: tuple[Quantity, ...] = Quantity.__args__  # type: ignore[attr-defined]
FORWARD_ONLY: frozenset[Quantity] = frozenset(["critical"])
"""Those that need no derivative: for models without a second one, or too large for a kept graph."""

PresetName = Literal["cheap", "standard", "full"]


@dataclass(frozen=True)
class Preset:
    """Defaults of the arguments of the same names.

    Attributes:
        quantities: what is measured.
        eigenpairs: largest eigenvalues.
        max_products: bound on the products of one search.
        trace_samples: random vectors for the trace.
        edge_products: bound on the products for the edge, from an earlier direction and without one.
        blocks: the blocks measured if ``"blocks"`` is among the quantities.
    """

    quantities: tuple[Quantity, ...]
    eigenpairs: int = 1
    max_products: int = 12
    trace_samples: int = 1
    edge_products: tuple[int, int] = (2, 6)
    blocks: str = "layer"


PRESETS: dict[PresetName, Preset] = {
    "cheap": Preset(("critical",)),
    "standard": Preset(("sharpness", "edge", "directional", "trace")),
    "full": Preset(QUANTITIES, eigenpairs=5, max_products=60, trace_samples=8, edge_products=(20, 20)),
}
