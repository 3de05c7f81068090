"""Names of run folders. Imports nothing heavy."""

import re
from pathlib import Path


def next_free(parent: Path, name: str) -> Path:
    """Return ``parent/name-N`` with the lowest N above every folder there."""
    taken = [re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name) for p in parent.glob(f"{name}-*")]
    return parent / f"{name}-{1 + max((int(m[1]) for m in taken if m), default=0)}"


def take(proposal: Path) -> Path:
    """Make the folder ``name-N``, or the next number that no other run has taken, and return it."""
    while True:
        try:
            proposal.mkdir(parents=True)
            return proposal
        except FileExistsError:
            proposal = next_free(proposal.parent, proposal.name.rpartition("-")[0])
