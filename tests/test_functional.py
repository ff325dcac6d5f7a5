"""What the function computes: noise, gradients, scale, special cases, seeds, layouts."""

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

from sparseout import backend, functional, sparseout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
QS = [0.0, 0.5, 1.0, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def post_relu(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).relu().to(dtype)


def value_and_gradient(x, *args, upstream=None, **kwargs):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = sparseout(x, *args, **kwargs)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y) if upstream is None else upstream)
    return y.detach(), gradient


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [None, 0.3, "matched"])
@pytest.mark.parametrize("q", [0.0, 1.0, 1.5, 2.5, 4.0])
@pytest.mark.parametrize("p", [0.2, 0.7])
def test_mean_and_variance(p, q, scale, dtype):
    n = 200_000
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


# Seeds


def noise_of(n=1000, **kwargs):
    return sparseout(torch.ones(n), 0.5, 1.0, **kwargs)


def test_seed_repeats_and_the_default_does_not():
    assert torch.equal(noise_of(seed=7), noise_of(seed=7))
    assert torch.equal(noise_of(seed=7), noise_of(seed=torch.tensor(7)))
    assert not torch.equal(noise_of(), noise_of())
    torch.manual_seed(1)
    first = noise_of(), noise_of()
    torch.manual_seed(1)
    second = noise_of(), noise_of()
    assert all(map(torch.equal, first, second))


def test_explicit_seed_leaves_the_generator_alone():
    state = torch.get_rng_state()
    noise_of(seed=7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("other", [8, 7 + 2**32, 7 + 2**62, -7, 7 - 2**63])
def test_different_seeds_differ(other):
    agreement = (noise_of(seed=7) == noise_of(seed=other)).float().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(1000)


def test_drawn_seeds_use_all_64_bits():
    seeds = [functional._seed_tensor(None, torch.device("cpu")).item() for _ in range(500)]
    assert len(set(seeds)) == 500
    for bit in range(64):
        ones = sum((seed >> bit) & 1 for seed in seeds)
        assert abs(ones - 250) < 5 * 0.5 * math.sqrt(500)


def test_seeds_wrap_at_64_bits():
    assert torch.equal(noise_of(seed=2**64 - 1), noise_of(seed=-1))
    assert torch.equal(noise_of(seed=2**63), noise_of(seed=-(2**63)))


@pytest.mark.parametrize("q", [0.5, 1.5, 3.0])
def test_the_mask_does_not_depend_on_q_dtype_or_gradient(q):
    x = torch.ones(500)
    mask = sparseout(x, 0.3, 1.0, seed=6) > 1
    for dtype, gradient in itertools.product(DTYPES, ("detached", "exact")):
        assert torch.equal(sparseout(x.to(dtype), 0.3, q, gradient=gradient, seed=6) > 1, mask)


# Shapes and layouts


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0, 2), (13, 17), (2, 3, 5, 7)])
@pytest.mark.parametrize("q", [1.0, 2.0, 3.0])
def test_shapes(shape, q):
    y, slope = value_and_gradient(torch.randn(shape), 0.5, q)
    assert y.shape == slope.shape == shape


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)],
)
@pytest.mark.parametrize("crop", [False, True])
def test_memory_format_is_kept_and_the_mask_follows_memory(shape, memory_format, crop):
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    if crop:
        x = x[..., 1:]
    y, slope = value_and_gradient(x, 0.5, 1.0, seed=3)
    assert y.is_contiguous(memory_format=memory_format)
    assert slope.is_contiguous(memory_format=memory_format)
    in_memory_order = x.movedim(1, -1).contiguous()
    expected, expected_slope = value_and_gradient(in_memory_order, 0.5, 1.0, seed=3)
    assert torch.equal(y, expected.movedim(-1, 1))
    assert torch.equal(slope, expected_slope.movedim(-1, 1))


def test_expanded_input_gets_a_draw_for_each_element():
    x = torch.ones(1, 50).expand(40, 50)
    y = sparseout(x, 0.5, 1.0, seed=0)
    assert torch.equal(y, sparseout(x.contiguous(), 0.5, 1.0, seed=0))
    assert y.std(dim=0).min() > 0.5


@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_gradient_of_other_strides_gives_the_same_result(gradient):
    x = torch.randn(4, 6, 5, 3)
    upstream = torch.randn(4, 6, 5, 3)
    _, expected = value_and_gradient(x, 0.5, 1.0, gradient=gradient, seed=3, upstream=upstream)
    other = upstream.contiguous(memory_format=torch.channels_last)
    _, slope = value_and_gradient(x, 0.5, 1.0, gradient=gradient, seed=3, upstream=other)
    assert torch.equal(slope, expected)
    constant = torch.ones(()).expand(4, 6, 5, 3)
    _, slope = value_and_gradient(x, 0.5, 1.0, gradient=gradient, seed=3, upstream=constant)
    assert torch.equal(slope, value_and_gradient(x, 0.5, 1.0, gradient=gradient, seed=3)[1])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dims", [(0,), (2, 3), (1, 2, 3), (-1,), [0, 1], (0, 1, 2, 3)])
def test_shared_dims_share_one_draw(dims, memory_format):
    x = torch.ones(20, 30, 4, 5).contiguous(memory_format=memory_format)
    for q in (1.0, 2.0):
        y, slope = value_and_gradient(x, 0.3, q, shared_dims=dims, seed=2)
        for result in (y, slope):
            assert result.is_contiguous(memory_format=memory_format)
            first = result
            for dim in dims:
                first = first.narrow(dim, 0, 1)
            assert torch.equal(result, first.expand_as(result))
        rates = (first < 0.5).float()
        assert abs(rates.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / rates.numel())


def test_locked_mask_draws_for_batch_and_feature():
    y = sparseout(torch.ones(9, 40, 50), 0.5, 1.5, shared_dims=(0,), seed=0)
    assert torch.equal(y[0], y[8])
    assert y[0].std(dim=0).min() > 0
    assert y[0].std(dim=1).min() > 0


# In place


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@pytest.mark.parametrize("q", [1.0, 2.0, torch.tensor(1.5)])
def test_inplace_overwrites_and_differentiates_right(q, gradient):
    x = torch.randn(4, 5)
    expected, expected_slope = value_and_gradient(x, 0.5, q, gradient=gradient, seed=2)
    leaf = x.clone().requires_grad_()
    middle = leaf * 1
    y = sparseout(middle, 0.5, q, inplace=True, gradient=gradient, seed=2)
    assert y is middle
    assert torch.equal(middle, expected)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(slope, expected_slope)
    assert sparseout(x, 0.5, q, inplace=True, seed=2) is x
    torch.testing.assert_close(x, expected)  # without a gradient it may be computed another way


@pytest.mark.parametrize("q", [1.0, 2.0])
def test_inplace_refuses_what_torch_refuses(q):
    with pytest.raises(RuntimeError, match="leaf Variable"):
        sparseout(torch.ones(3, requires_grad=True), 0.5, q, inplace=True)
    with pytest.raises(RuntimeError, match="single memory location"):
        sparseout(torch.ones(1).expand(3), 0.5, q, inplace=True)


# What is kept


@pytest.mark.parametrize("scale", [None, 2.0, "matched"])
@pytest.mark.parametrize("q", [1.0, torch.tensor(1.5)])
@pytest.mark.parametrize(
    ("gradient", "dtype", "own"),
    [
        ("detached", torch.float32, True),  # the slope of a small input, as large as the mask of `F.dropout`
        ("exact", torch.float32, False),
        ("detached", torch.bfloat16, False),
    ],
)
def test_backward_keeps_one_tensor_and_a_few_scalars(gradient, dtype, own, q, scale):
    x = torch.randn(1000).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sparseout(x, 0.5, q, scale=scale, gradient=gradient)
    (large,) = (t for t in kept if t.numel() > 3)
    assert large.numel() == x.numel()
    assert large.dtype == dtype
    kernel = backend("cpu").name == "native"  # without it a tensor among q and scale stays one
    own = own and (kernel or not (isinstance(q, torch.Tensor) or scale == "matched"))
    assert (large.data_ptr() != x.data_ptr()) == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
@pytest.mark.parametrize("scale", [None, 0.3, "matched"])
@pytest.mark.parametrize("q", [0.0, 0.3, 1.0, 1.3, 2.0, 3.0, 6.0, torch.tensor(1.5)])
def test_values_are_the_same_bits_with_gradients_and_without(q, scale, gradient, dtype):
    info = torch.finfo(dtype)
    special = torch.tensor([0.0, info.tiny * info.eps, info.tiny, info.max, math.inf, -math.inf, math.nan]).to(dtype)
    for size in (600, 20000):  # of the slope and of the input that is kept
        x = torch.randn(size).mul(3).to(dtype)
        if size == 600 and scale != "matched":
            x[:70] = special.repeat(10)
        y = sparseout(x, 0.3, q, scale=scale, gradient=gradient, seed=3)
        with_gradients = sparseout(x.clone().requires_grad_(), 0.3, q, scale=scale, gradient=gradient, seed=3).detach()
        torch.testing.assert_close(with_gradients, y, rtol=0, atol=0, equal_nan=True)
