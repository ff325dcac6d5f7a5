"""Thresholds as large as a budget of loss allows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from thresholds import batches, net

from sparseout.inference import threshold_


def distance(plain):
    return lambda model, batch: F.mse_loss(model(batch), plain(batch))


def test_the_least_density_within_the_budget():
    model, given = net(), batches()
    plain = copy.deepcopy(model)
    most = 1e-3
    report = threshold_(model, given, max_loss_increase=most, loss=distance(plain))
    density = report.records[0]["density"]
    assert report.loss_before == 0
    assert 0 < report.loss <= most
    with torch.no_grad():
        assert report.loss == pytest.approx(sum(float(distance(plain)(model, x)) for x in given) / len(given))
    assert 0.01 < density < 0.95
    denser = threshold_(model, given, density=density - 0.02, loss=distance(plain))
    assert denser.loss > most
    none = threshold_(model, given, max_loss_increase=1e9, loss=distance(plain))
    assert none.records[0]["density"] < 0.01


def test_a_budget_that_nothing_meets_is_said():
    model, given = net(), batches()
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="no threshold keeps the loss"):
        report = threshold_(model, given, max_loss_increase=0.0, loss=distance(plain))
    assert report.records[0]["density"] == 1
    assert report.loss == 0
    assert torch.equal(model(given[0]), plain(given[0]))
