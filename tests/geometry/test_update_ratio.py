"""Relative update size: known ratios, the edges, both dtypes."""

import math

import pytest
import torch

from evolute.geometry import update_ratio


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_shrinking_weights_by_a_quarter_is_a_ratio_of_a_quarter(dtype, rel):
    torch.manual_seed(0)
    weights = torch.randn(7, 5, dtype=torch.float64)
    ratio = update_ratio(weights.to(dtype), (0.75 * weights).to(dtype))
    assert ratio.item() == pytest.approx(0.25, rel=rel)
    assert ratio.dtype == torch.promote_types(dtype, torch.float32)


def test_zero_weights():
    zero, one = torch.zeros(3), torch.ones(3)
    assert update_ratio(zero, one).item() == math.inf
    assert update_ratio(zero, zero).item() == 0
    assert update_ratio(one, one).item() == 0
    assert update_ratio(one, torch.tensor([1.0, torch.nan, 1.0])).isnan()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(3,\) before the step, \(4,\) after"):
        update_ratio(torch.ones(3), torch.ones(4))
