"""What is no larger than eps counts as zero: values worked out by hand."""

import pytest
import torch
from torch import nn

from sparseout import SparsityMonitor, row_mask

# GELU of -7, -3, -1, 1, 2, 3 is -9e-12, -0.0041, -0.159, 0.841, 1.954, 2.996; the rows' rms are 1.067, 1.789, 1.498.
INPUTS = torch.tensor(
    [[-7.0, 1.0, -1.0, 2.0], [-7.0, 2.0, 3.0, -3.0], [-7.0, 3.0, -3.0, -3.0], [9.0, 9.0, 9.0, 9.0]], dtype=torch.float64
)
PADDING = torch.tensor([1, 1, 1, 0])


@pytest.mark.parametrize(
    ("eps", "relative", "active", "dead", "always_on"),
    [
        (0.0, False, 12, 0, 4),
        (0.01, False, 3 + 2 + 1, 1, 1),
        (0.01, True, 3 + 2 + 1, 1, 1),  # thresholds of .0107, .0179, .0150
        (0.2, True, 2 + 2 + 1, 1, 1),  # of .213, .358, .300: the .159 of the first row is no more active
        (2.0, False, 0 + 1 + 1, 2, 0),
    ],
)
def test_a_gelu_network(eps, relative, active, dead, always_on):
    model = nn.Sequential(nn.GELU())
    measures = ("density", "sparsity", "hoyer")
    with SparsityMonitor(model, measures=measures, eps=eps, relative=relative) as monitor, row_mask(PADDING):
        model(INPUTS)
    for record in monitor.report():
        assert record["density"] == pytest.approx(active / 12)
        assert record["sparsity"] == pytest.approx(1 - active / 12)
        assert (record["dead_units"], record["always_on_units"]) == (dead, always_on)
    magnitudes = nn.functional.gelu(INPUTS[:3]).abs()
    ratio = (magnitudes.sum(1) / magnitudes.square().sum(1).sqrt()).mean().item()
    assert monitor.report()[0]["hoyer"] == pytest.approx((2 - ratio) / (2 - 1))  # whatever eps


def test_a_value_of_eps_is_zero_and_the_report_says_what_is():
    model = nn.Sequential(nn.Identity())
    with SparsityMonitor(model, ["0"], eps=0.5) as monitor:
        model(torch.tensor([[0.5, -0.5, 0.75, 0.0]]))
    assert monitor.report()[0]["density"] == 0.25
    assert monitor.report().zero == (0.5, False)
    assert "What is at most 0.5 counts as zero." in str(monitor.report())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"eps": -1.0}, ValueError, "expected `eps` to be a finite number >= 0, but got -1.0"),
        ({"eps": "0"}, TypeError, "expected `eps` to be a finite number >= 0, but got '0'"),
        ({"eps": float("nan")}, ValueError, "expected `eps` to be a finite number >= 0, but got nan"),
        ({"eps": 0.1, "relative": 1}, TypeError, "expected `relative` to be a bool, but got an int"),
    ],
)
def test_what_is_no_eps(options, error, text):
    with pytest.raises(error) as caught:
        SparsityMonitor(nn.Sequential(nn.ReLU()), **options)
    assert str(caught.value) == text
