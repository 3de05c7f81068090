"""The exact baselines on MovieLens-100K: splits, ties, filters and metrics in one number each."""

import pytest

from benchmarks.ml100k_anchors import KNOWN, anchors
from evolute.data import movielens_folder


@pytest.mark.parametrize("ties", ["file", "item"])
def test_baselines_have_their_known_values_to_four_digits(ties):
    try:
        movielens_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    found = anchors(ties)
    for (rule, filtered), methods in KNOWN.items():
        if rule == ties:
            for name, known in methods.items():
                assert found[filtered][name] == pytest.approx(known, abs=6e-5), name
