"""Sparse linear layers that are fast whatever is measured, and inputs with zeros."""

import torch
from torch import nn

from sparseout.inference import _sparse_linear, _sparse_timing, sparse_linear_
from sparseout.inference._sparse_linear import SparseLinear
from sparseout.inference._sparse_product import Break, sparse_product

ALWAYS = (Break(1, 1.0), Break(64, 1.0))


def with_zeros(*shape, density=0.2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * torch.rand(shape, generator=generator).lt(density)).to(dtype)


def let_every_layer_gain(monkeypatch, break_even=ALWAYS):
    monkeypatch.setattr(_sparse_linear, "measure_break_even", lambda *given: break_even)
    monkeypatch.setattr(_sparse_timing, "times", lambda *functions: [1.0, 0.1, 1.0])


def count_sparse_calls(monkeypatch):
    """A list that grows with each call of a layer by whether it was sparse; every layer gains, whatever is measured."""
    let_every_layer_gain(monkeypatch)
    calls = []

    def counted(*given):
        y = sparse_product(*given)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(_sparse_linear, "sparse_product", counted)
    return calls


def converted(calls, layer=None, x=None):
    layer = nn.Linear(32, 24).eval() if layer is None else layer
    report = sparse_linear_(layer, [with_zeros(3, layer.in_features, dtype=layer.weight.dtype) if x is None else x])
    assert type(layer) is SparseLinear, report
    calls.clear()
    return layer
