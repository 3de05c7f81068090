"""Recommenders that know a user by a vector of its own."""

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from typing_extensions import override

from evolute.geometry import Histories


class MatrixFactorization(nn.Module):
    """A vector a user, a vector an item (Koren et al. 2009).

    Args:
        n_users: number of users.
        dim: width.
    """

    objective = "user"
    extra = 0

    def __init__(self, n_users: int, dim: int = 64) -> None:
        super().__init__()
        self.users = nn.Embedding(n_users, dim)
        nn.init.normal_(self.users.weight, std=0.02)

    @override
    def forward(self, users: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the users' vectors [b, dim] and the item table [n, dim] they meet."""
        return self.users(users), table


class LightGCN(nn.Module):
    """User and item vectors, averaged along the graph of interactions (He et al. 2020, arXiv 2002.02126).

    Args:
        histories: training histories, one a user.
        n_items: number of items.
        dim: width.
        layers: steps.
    """

    objective = "user"
    extra = 0
    left: Tensor
    right: Tensor

    def __init__(self, histories: Histories, n_items: int, dim: int = 64, layers: int = 3) -> None:
        super().__init__()
        n_users = len(histories.offsets) - 1
        self.layers = layers
        self.users = nn.Embedding(n_users, dim)
        nn.init.normal_(self.users.weight, std=0.02)
        ones = np.ones(len(histories.items))
        # Copies: summing duplicates writes to its arrays.
        seen: Any = sparse.csr_array((ones, histories.items.copy(), histories.offsets.copy()), shape=(n_users, n_items))
        seen.sum_duplicates()
        seen.data[:] = 1
        inverse = [1 / np.sqrt(np.maximum(np.asarray(seen.sum(axis)).ravel(), 1)) for axis in (1, 0)]
        normalised = sparse.csr_array(sparse.diags_array(inverse[0]) @ seen @ sparse.diags_array(inverse[1]))
        self.register_buffer("left", _tensor(normalised), persistent=False)
        self.register_buffer("right", _tensor(sparse.csr_array(normalised.T)), persistent=False)

    @override
    def forward(self, users: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the users' vectors [b, dim] and the items' [n, dim], both after propagation."""
        u, i = self.users.weight, table
        total_u, total_i = u, i
        for _ in range(self.layers):
            u, i = torch.sparse.mm(self.left, i), torch.sparse.mm(self.right, u)
            total_u, total_i = total_u + u, total_i + i
        return (total_u / (self.layers + 1))[users], total_i / (self.layers + 1)


def _tensor(matrix: Any) -> Tensor:
    # COO: its product has a gradient on every backend.
    coo = matrix.tocoo()
    index = torch.from_numpy(np.stack(coo.coords).astype(np.int64))
    return torch.sparse_coo_tensor(
        index, torch.from_numpy(coo.data).float(), coo.shape, check_invariants=False
    ).coalesce()
