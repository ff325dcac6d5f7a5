"""The CPU path against the definition: in one block and in many, for masks of every kind."""

import math

import pytest
import torch

from sparseout import sparseout
from sparseout.kernels import cpu, reference
from sparseout.kernels import mask as masks
from sparseout.kernels.params import NoiseParams

SEED = 11
# |x / unit|^(q/2 - 1) loses with the logarithm of what it is taken of; here that is within 1e-6 of its value.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 3e-6, "atol": 3e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-5},
}
SHAPES = [
    ((1000,), ()),
    ((), ()),
    ((7, 0), ()),
    ((3, 4, 5), (0, 2)),
    ((3, 4, 5), (0, 1, 2)),
    ((600_001,), ()),
    ((700, 400, 3), (2,)),
    ((700, 400, 3), (0,)),
    ((2, 300_000), (1,)),
    ((2, 300_000), (0,)),
]


@pytest.mark.parametrize("q", [0.5, 1.0, 1.3, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0])
@pytest.mark.parametrize(("shape", "shared_dims"), SHAPES)
def test_value_and_slopes_are_the_definition(shape, shared_dims, q):
    place = SHAPES.index((shape, shared_dims))
    for dtype, p, unit, gain in (
        (torch.float32, 0.3, 1.0, 1.0),
        (torch.float32, 0.001, 0.7, 1.6),
        (list(TOLERANCE)[place % 3], 0.3, 0.7, 1.0),
    ):
        x, grad = torch.randn(shape, dtype=torch.float64).relu().to(dtype), torch.randn(shape).to(dtype)
        small = [1 if dim in shared_dims else size for dim, size in enumerate(shape)]
        mask = masks.make(torch.tensor(SEED), small, p)
        xi = reference.noise(mask, masks.effective_p(p), reference.compute_dtype(dtype))
        params, how = NoiseParams(q, unit, gain if q != 2 else 1.0), TOLERANCE[dtype]  # at q = 2 beta is 1
        y = cpu.value(x, SEED, p, params, shared_dims)
        torch.testing.assert_close(y, reference.value(x, xi, *params), **how)
        for exact in (False, True):
            slope = reference.slope(x, xi, *params, exact)
            result = cpu.gradient(grad, x, SEED, p, params, shared_dims, exact)
            torch.testing.assert_close(result, (grad * slope).to(dtype), **how)
        if cpu.keeps_slope(dtype, p, params):
            slope = cpu.slope(x, SEED, p, params, shared_dims)
            torch.testing.assert_close(slope, reference.slope(x, xi, *params, False).expand_as(x), **how)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 7 - 2**40])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.77, 0.99, 1e-9, 0.004, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_that_of_the_mask_however_much_is_made_at_a_time(dtype, p, seed):
    n = 1500
    xi = reference.noise(masks.make(torch.tensor(seed), (n,), p), masks.effective_p(p), dtype)
    for start, count in ((0, 1), (0, 3), (0, 511), (0, 512), (0, 513), (0, n), (4, 100), (700, 800), (1496, 4)):
        made = masks.noise(masks.key(seed), p, dtype, start, count)
        assert made.dtype == dtype
        assert torch.equal(made, xi[start : start + count])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_only_where_a_slope_would_overflow_the_path_is_not_taken(dtype):
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for q in (0.0, 0.1, 0.2, 0.28, 0.3, 0.5, 1.0, 2.0, 3.0, 7.0):
        y = cpu.value(torch.tensor([smallest], dtype=dtype), SEED, 0.5, NoiseParams(q), ())
        right = math.isclose(abs(y.double().item()), smallest ** (q / 2), rel_tol=0.01) or q >= 2
        assert right or not cpu.supports(dtype, 0.5, NoiseParams(q))
    assert cpu.supports(dtype, 0.5, NoiseParams(0.3))
    assert not cpu.supports(dtype, 0.5, NoiseParams(0.0))


def test_it_works_whatever_the_default_device_and_in_inference_mode():
    masks._steps.cache_clear()
    masks._lanes.cache_clear()
    cpu._one.cache_clear()
    params = NoiseParams(1.3)
    x, large = torch.rand(64), torch.rand(1000)
    with torch.inference_mode(), torch.device("meta"):
        first = cpu.value(x, SEED, 0.5, params, ()), cpu.slope(large, SEED, 0.5, params, ())
    second = cpu.value(x, SEED, 0.5, params, ()), cpu.slope(large, SEED, 0.5, params, ())
    for a, b in zip(first, second, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)
    y = (leaf := large.clone().requires_grad_()) * second[1]
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], second[1])


@pytest.mark.parametrize("scale", [None, 0.3, "matched"])
@pytest.mark.parametrize("q", [2.0, torch.tensor(2.0)])
def test_at_q_2_a_dropped_unit_is_zero_in_any_unit(q, scale):
    x = torch.randn(10_000)
    y = sparseout(x, 0.5, q, scale=scale, seed=1)
    dropped = ~masks.make(torch.tensor(1), x.shape, 0.5)
    assert torch.equal(y == 0, dropped)
    assert torch.equal(y[~dropped], 2 * x[~dropped])


@pytest.mark.parametrize("q", [0.0, 0.5])
def test_a_gradient_saturates_also_if_it_is_the_input_itself(q):
    x = torch.tensor([6e-8, 1e-7, 1.0, 2.0], dtype=torch.float16, requires_grad=True)
    y = sparseout(x, 0.9, q, seed=5)
    (same,) = torch.autograd.grad(y, x, x, retain_graph=True)
    (equal,) = torch.autograd.grad(y, x, x.detach().clone())
    assert torch.equal(same, equal)


def test_a_steep_slope_saturates_and_a_large_value_does_not():
    x = torch.full((40,), 1e25, requires_grad=True)
    for q, scale in ((6.0, None), (torch.tensor(6.0), 2.0)):
        y = sparseout(x, 0.5, q, scale=scale, seed=1)
        assert set(y.abs().tolist()) == {math.inf}
        (slope,) = torch.autograd.grad(y, x, torch.full_like(x, 1e-30))
        torch.testing.assert_close(slope.abs(), torch.full_like(slope, 1e-30 * torch.finfo(torch.float32).max))
