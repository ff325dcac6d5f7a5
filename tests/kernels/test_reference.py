"""The definition against the equation written once more, with the mask given."""

import numpy as np
import oracle
import pytest
import torch

from sparseout.kernels import reference

X = torch.tensor([-3.0, -0.2, -0.0, 0.0, 1e-3, 0.7, 1.0, 5.0], dtype=torch.float64).repeat(2)
MASK = torch.tensor([True] * 8 + [False] * 8)
SCALES = {None: (1.0, 1.0), 0.4: (0.4, 1.0)}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("q", [0.0, 0.7, 2.0, 2.6, 5.0])
@pytest.mark.parametrize("scale", [None, 0.4, "matched"])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_value_and_both_slopes(gradient, scale, q, p):
    exact = gradient == "exact"
    unit, gain = reference.matched(X, q) if scale == "matched" else SCALES[scale]
    xi = reference.noise(MASK, p, torch.float64)
    np.testing.assert_allclose(xi, oracle.xi(MASK.numpy(), p), rtol=1e-14)
    value = oracle.value(X.numpy(), MASK.numpy(), p, q, scale)
    slope = oracle.slope(X.numpy(), MASK.numpy(), p, q, scale, gradient)
    x = X.clone().requires_grad_()
    y = reference.sparseout(x, xi, q, unit, gain, exact)
    np.testing.assert_allclose(y.detach(), value, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(reference.value(X, xi, q, unit, gain), value, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(reference.slope(X, xi, q, unit, gain, exact), slope, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(torch.autograd.grad(y.sum(), x)[0], slope, rtol=1e-12, atol=1e-15)


def test_matched_sets_the_power_and_counts_zeros_as_zeros():
    x = torch.tensor([0.0, 0.0, 3.0, -4.0], dtype=torch.float64)
    for q in (0.0, 1.0, 2.0, 3.5):
        unit, gain = reference.matched(x, q)
        beta = gain * unit ** (1 - q / 2)
        terms = beta * x.sign().abs() * x.abs() ** (q / 2)
        assert terms.square().mean().item() == pytest.approx(25 / 4, rel=1e-14)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("q", [1.0, 3.0])
def test_what_is_not_finite_stays_so(value, q):
    y = reference.value(torch.tensor([value, 1.0]), torch.ones(2), q, 1.0, 1.0)
    assert not y[0].isfinite()
    assert y[1] == 2
