"""What the function computes: noise, gradients, scale, special cases, seeds, layouts."""

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from slopes import DTYPES, post_relu, value_and_gradient

from sparseout import sparseout

QS = [0.0, 0.5, 1.0, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0]


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


# The noise


@pytest.mark.parametrize("q", [0.0, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_noise_takes_two_values(p, q):
    x = torch.tensor([0.3, -1.7, 2.0], dtype=torch.float64).repeat_interleave(500)
    xi = (sparseout(x, p, q, seed=5) - x) / (x.sign() * x.abs() ** (q / 2))
    realised = round(p * 2**16) / 2**16
    kept = xi > 0
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(xi[kept], torch.full_like(xi[kept], realised / (1 - realised)), rtol=1e-13, atol=0)
    torch.testing.assert_close(xi[~kept], torch.full_like(xi[~kept], -1.0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_rate_of_the_mask(p, dtype):
    n = 1_000_000
    dropped = (sparseout(torch.ones(n, dtype=dtype), p, 1.0) < 0.5).sum().item()
    assert abs(dropped - n * p) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("beta", range(3))
@pytest.mark.parametrize("q", range(5))
def test_mean_and_variance(q, beta):
    """Every two of the values meet."""
    p, dtype = (0.2, 0.7)[(q + beta) % 2], (torch.float64, torch.float32)[(q + min(beta, 1)) % 2]
    q, scale, n = (0.0, 1.0, 1.5, 2.5, 4.0)[q], (None, 0.3, "matched")[beta], 200_000
    points = torch.tensor([-2.0, -0.4, 0.1, 1.0, 3.0], dtype=dtype)
    x = points.expand(n, -1).contiguous()
    y = sparseout(x, p, q, scale=scale).double()
    b = oracle.beta(x.double().numpy(), q, scale)
    variance = p / (1 - p) * b**2 * points.double().abs() ** q
    error = ((y.mean(0) - points.double()).abs() / (variance / n).sqrt()).max()
    assert error < 5
    fourth = ((1 - p) * (p / (1 - p)) ** 4 + p) * (b**2 * points.double().abs() ** q) ** 2
    around = (y - points.double()).square().mean(0)
    assert ((around - variance).abs() / ((fourth - variance**2) / n).sqrt()).max() < 5


# Values and gradients against the formulas


LAYOUTS = {
    "0d": lambda x: x[0, 0, 0, 0, 0],
    "1d": lambda x: x[0, 0, 0, 0],
    "2d": lambda x: x[0, 0, 0],
    "3d": lambda x: x[0, 0],
    "4d": lambda x: x[0],
    "5d": lambda x: x,
    "channels_last": lambda x: x[0].contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda x: x[0, 0].transpose(0, 2),
    "sliced": lambda x: x[0, 0, :, ::2, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tensor_q", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3, "matched"])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_value_and_gradient_are_the_formulas(gradient, scale, tensor_q, layout):
    for dtype, q, p in itertools.product(TOLERANCE, [0.5, 1.5, 2.0, 3.0], [0.25]):
        x = LAYOUTS[layout](torch.randn(2, 3, 4, 5, 6, dtype=dtype))
        x = torch.where(x.abs() < 0.05, 0.0, x)  # zeros included
        q_arg = torch.tensor(q) if tensor_q else q
        y, slope = value_and_gradient(x, p, q_arg, gradient=gradient, scale=scale, seed=11)
        mask = oracle.mask_of(x, p, seed=11)
        kwargs = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        np.testing.assert_allclose(y.numpy(), oracle.value(x, mask, p, q, scale), **kwargs)
        np.testing.assert_allclose(slope.numpy(), oracle.slope(x, mask, p, q, scale, gradient), **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
@pytest.mark.parametrize("q", [0.5, 1.5, 3.0])
def test_half_types_are_computed_in_fp32_and_rounded_once(q, gradient, dtype):
    x = torch.randn(1000).to(dtype)
    upstream = torch.randn(1000).to(dtype)
    y, slope = value_and_gradient(x, 0.25, q, gradient=gradient, seed=2, upstream=upstream)
    wide_y, wide = value_and_gradient(x.float(), 0.25, q, gradient=gradient, seed=2, upstream=upstream.float())
    assert y.dtype == slope.dtype == dtype
    assert torch.equal(y, wide_y.to(dtype))
    assert torch.equal(slope, wide.to(dtype))


@pytest.mark.parametrize("q", [0.5, 1.3, 1.5, 3.0])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_exact_passes_gradcheck_twice(q, scale):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def f(x):
        return sparseout(x, 0.3, q, gradient="exact", scale=scale, seed=1)

    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)


def test_detached_multiplies_as_the_published_code_does():
    x, upstream = torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    p, q = 0.25, 1.4
    y, gradient = value_and_gradient(x, p, q, seed=8, upstream=upstream)
    mask = torch.from_numpy(oracle.mask_of(x, p, seed=8)).double()
    multiplier = x.abs().add(1e-12).pow((q - 2) / 2) * (mask / (1 - p) - 1) + 1
    torch.testing.assert_close(y, x * multiplier, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(gradient, upstream * multiplier, rtol=1e-7, atol=1e-10)


def test_detached_is_constant_in_double_backward():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = sparseout(x, 0.5, 1.0, seed=4)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    _, slope = value_and_gradient(x, 0.5, 1.0, seed=4)
    torch.testing.assert_close(second, 2 * slope**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_no_gradient_flows_through_the_matched_scale(gradient):
    x = torch.rand(40, dtype=torch.float64) + 0.1
    _, with_one = value_and_gradient(x, 0.5, 1.0, gradient=gradient, scale="matched", seed=0)
    mask = oracle.mask_of(x, 0.5, seed=0)
    np.testing.assert_allclose(with_one, oracle.slope(x, mask, 0.5, 1.0, "matched", gradient), rtol=1e-12)


# The matched scale


@pytest.mark.parametrize("tensor_q", [False, True])
@pytest.mark.parametrize("q", QS)
def test_matched_noise_has_the_power_of_dropout(q, tensor_q):
    x = (torch.rand(200_000) - 0.3).relu()  # bounded: else few draws decide the power at large q
    q = torch.tensor(q) if tensor_q else q
    for p, tolerance in ((0.5, 1e-5), (0.2, 0.05)):  # at p = 1/2 xi^2 is 1 and nothing is left to chance
        power = (sparseout(x, p, q, scale="matched") - x).square().mean()
        dropout = p / (1 - p) * x.square().mean()
        torch.testing.assert_close(power, dropout, rtol=tolerance, atol=0)


@pytest.mark.parametrize("factor", [1e-25, 1e-3, 7.0, 1e25])
@pytest.mark.parametrize("q", [0.0, 1.0, 3.0, 6.0])
def test_matched_has_no_unit(q, factor):
    x = post_relu(1000)
    for gradient in ("detached", "exact"):
        y, slope = value_and_gradient(x, 0.4, q, scale="matched", gradient=gradient, seed=1)
        scaled_y, scaled_slope = value_and_gradient(x * factor, 0.4, q, scale="matched", gradient=gradient, seed=1)
        torch.testing.assert_close(scaled_y / factor, y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scaled_slope, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["matched", 0.01, 30.0])
def test_scale_does_not_touch_q_2(scale):
    x = torch.randn(1000)
    two = torch.tensor(2.0)
    torch.testing.assert_close(sparseout(x, 0.3, two, scale=scale, seed=3), sparseout(x, 0.3, two, seed=3))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,)])
@pytest.mark.parametrize("q", [0.0, 1.0, 2.0, 3.0])
def test_matched_of_nothing_is_nothing(shape, q):
    y, slope = value_and_gradient(torch.zeros(shape), 0.5, torch.tensor(q), scale="matched", seed=0)
    assert y.shape == slope.shape == shape
    assert torch.equal(y, torch.zeros(shape))
    assert slope.isfinite().all()
    if q != 2:
        assert torch.equal(slope, torch.ones(shape))


# Dropout, nothing, everything


def _layouts_of(x):
    return [x, x.transpose(0, -1), x[..., ::2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("scale", [None, 3.0, "matched"])
def test_q_2_is_dropout_bit_for_bit(scale, p, dtype):
    for x in _layouts_of(torch.randn(6, 7, 8, dtype=dtype)):
        results = []
        for f in (lambda x: F.dropout(x, p), lambda x: sparseout(x, p, 2, scale=scale)):
            leaf = x.detach().requires_grad_()
            torch.manual_seed(3)
            y = f(leaf)
            results.append((y, torch.autograd.grad(y.sum(), leaf)[0], torch.get_rng_state()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("p", [0.25, 0.5, 1])
@pytest.mark.parametrize(
    ("shape", "dims", "dropout"),
    [
        ((3, 4, 5), (2,), F.dropout1d),
        ((4, 5), (1,), F.dropout1d),
        ((3, 4, 5, 6), (2, 3), F.dropout2d),
        ((3, 4, 5, 6), (1, 2, 3), F.dropout3d),
        ((3, 4, 5, 6, 2), (-1, 2, 3), F.dropout3d),
    ],
)
def test_q_2_on_channels_is_torchs_channel_dropout(shape, dims, dropout, p):
    x = torch.randn(shape)
    torch.manual_seed(3)
    expected, state = dropout(x, p), torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(sparseout(x, p, 2.0, shared_dims=dims), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_tensor_q_2_is_dropout_in_distribution():
    x = post_relu(100_000)
    y, slope = value_and_gradient(x, 0.25, torch.tensor(2.0))
    kept = slope > 0.5
    torch.testing.assert_close(y, x * kept / 0.75)
    torch.testing.assert_close(slope, kept / 0.75)
    assert abs(kept.float().mean() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / len(x))


@pytest.mark.parametrize("q", [1.0, 2.0, torch.tensor(1.5)])
@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0, True), (0.0, False), (1, False)])
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_to_do_returns_the_input_and_draws_nothing(p, training, inplace, q):
    x = torch.randn(10)
    state = torch.get_rng_state()
    assert sparseout(x, p, q, training, inplace, scale="matched", shared_dims=(0,)) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("q", [0.0, 1.0, 2.0, 3.0, torch.tensor(1.5)])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_p_1_gives_zeros_and_zero_gradient(q, gradient):
    y, slope = value_and_gradient(torch.randn(4, 5), 1, q, gradient=gradient, shared_dims=(1,), seed=1)
    assert torch.equal(y, torch.zeros(4, 5))
    assert torch.equal(slope, torch.zeros(4, 5))


# Awkward numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_awkward_inputs_stay_finite(gradient, q, dtype):
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps  # a denormal
    values = torch.tensor([0.0, -0.0, smallest, -smallest, info.tiny, 1e-4, 0.5, -1.0], dtype=dtype)
    for p, q_arg, scale in itertools.product((0.5, 0.9), (q, torch.tensor(q)), (None, 2.0, "matched")):
        for x in (values.repeat(200), torch.zeros(7, dtype=dtype), torch.randn(200).relu().to(dtype)):
            y, slope = value_and_gradient(x, p, q_arg, gradient=gradient, scale=scale, seed=9)
            assert y.isfinite().all()
            assert slope.isfinite().all()


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@pytest.mark.parametrize("tensor_q", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slope_of_the_noise_at_zero(dtype, tensor_q, gradient):
    x = torch.tensor([0.0, -0.0] * 50, dtype=dtype)
    for q in QS:
        q_arg = torch.tensor(q) if tensor_q else q
        y, slope = value_and_gradient(x, 0.5, q_arg, gradient=gradient, seed=9)
        assert torch.equal(y, torch.zeros_like(x))
        if q == 2:
            assert set(slope.tolist()) == {0.0, 2.0}
        else:
            assert torch.equal(slope, torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slope_saturates_at_the_largest_number(dtype):
    info = torch.finfo(dtype)
    x = torch.full((40,), info.tiny * info.eps, dtype=dtype)
    y, slope = value_and_gradient(x, 0.5, 0.0, seed=1)
    assert set(slope.tolist()) == {info.max, -info.max}
    assert set(y.tolist()) == {1.0, -1.0}  # |x|^0 is 1, however small x
    tangent = torch.func.jvp(lambda x: sparseout(x, 0.5, 0.0, seed=1), (x,), (torch.ones_like(x),))[1]
    assert torch.equal(tangent, slope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_forward_mode_has_the_slope_of_backward_on_awkward_inputs(gradient, dtype):
    info = torch.finfo(dtype)
    values = torch.tensor([0.0, info.tiny * info.eps, -info.tiny, info.tiny * 3, 1e-3, -1.0], dtype=dtype)
    x = values.repeat(100)
    for p, q in itertools.product((0.5, 0.9), (0.02, 0.1, *QS)):

        def f(x, p=p, q=q):
            return sparseout(x, p, q, gradient=gradient, seed=1)

        y, slope = value_and_gradient(x, p, q, gradient=gradient, seed=1)
        value, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
        assert slope.isfinite().all()
        torch.testing.assert_close(value, y)
        # A denormal's power is good to a few units of 1e-6 in fp32.
        tolerance = {"rtol": 1e-5, "atol": 0} if dtype == torch.float32 else {}
        torch.testing.assert_close(tangent, slope, **tolerance)
