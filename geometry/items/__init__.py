"""Item vectors of recommenders: their geometry, the graph of what is used together, and projections that follow it."""

from evolute.geometry.items.cooccurrence import Histories, cooccurrence_graph, normalised_graph
from evolute.geometry.items.embedding import embedding_geometry, total_variation
from evolute.geometry.items.files import VECTOR_FILES, read_vectors, vectors_of, write_vectors
from evolute.geometry.items.rec_pca import Form, RecPCA
from evolute.geometry.items.softmax import condition_number, effective_rank, softmax_covariance
from evolute.geometry.items.tables import TABLE_METHODS, Adapter, TableMethod, initial_table, text_adapter, unit_rows

__all__ = [
    "TABLE_METHODS",
    "VECTOR_FILES",
    "Adapter",
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
    "read_vectors",
    "softmax_covariance",
    "text_adapter",
    "total_variation",
    "unit_rows",
    "vectors_of",
    "write_vectors",
]
