"""Item vectors of recommenders: their geometry, the graph of what is used together, and projections that follow it."""

from evolute.geometry.items.cooccurrence import Histories, cooccurrence_graph, normalised_graph
from evolute.geometry.items.embedding import embedding_geometry, total_variation
from evolute.geometry.items.rec_pca import Form, RecPCA
from evolute.geometry.items.softmax import condition_number, effective_rank, softmax_covariance
from evolute.geometry.items.tables import TableMethod, initial_table, unit_rows

__all__ = [
    "Form",
    "Histories",
    "RecPCA",
    "TableMethod",
    "condition_number",
    "cooccurrence_graph",
    "effective_rank",
    "embedding_geometry",
    "initial_table",
    "normalised_graph",
    "softmax_covariance",
    "total_variation",
    "unit_rows",
]
