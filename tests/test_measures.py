"""Each measure against a naive float64 computation, its axioms, and the stream against the functions."""

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from naive import FUNCTIONS, ONES, fast, naive, naive_rows, same, sparse_data

from sparseout.measures import Streaming, density, gini, hoyer, kurtosis, sparsity, treves_rolls

RATIOS = (hoyer, gini, treves_rolls, kurtosis)  # the smooth ones, undefined for all-zero rows


element = st.one_of(st.just(0.0), st.floats(0.01, 100.0), st.floats(-100.0, -0.01))


row = st.lists(element, min_size=2, max_size=9).filter(any).map(lambda v: torch.tensor(v, dtype=torch.float64))


# Quarters: every transfer and sum below is exact, so that the strict axioms can be asked for strictly.
quarters = st.lists(st.integers(0, 20), min_size=2, max_size=7).filter(any)


wealth = quarters.map(lambda v: torch.tensor(v, dtype=torch.float64) / 4)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("name", FUNCTIONS)
@fast
@given(row=row)
def test_value_is_the_naive_one(name, row):
    same(FUNCTIONS[name](row).item(), naive(name, row), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_any_dim_of_a_strided_tensor(name, dim):
    x = sparse_data(5, 8, 7).transpose(0, 2)[:, ::2]
    got = FUNCTIONS[name](x, dim)
    moved = x.movedim(dim, -1)
    assert got.shape == moved.shape[:-1]
    same(got.flatten(), naive_rows(name, moved.contiguous()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (9, 1), (9, 4), (16, 5), (100, 99), (64, 64)])
def test_k_equal_elements_among_n(n, k):
    x = torch.zeros(n, dtype=torch.float64)
    x[torch.randperm(n, generator=torch.Generator().manual_seed(n))[:k]] = -3.7
    expected = {
        "hoyer": (math.sqrt(n) - math.sqrt(k)) / (math.sqrt(n) - 1),
        "gini": 1 - k / n,
        "treves_rolls": k / n,
        "sparsity": 1 - k / n,
        "density": k / n,
        "kurtosis": n / k,
    }
    got = {name: f(x).item() for name, f in FUNCTIONS.items()}
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_a_ramp_has_closed_forms():
    n = 12
    x = torch.arange(1, n + 1, dtype=torch.float64)
    assert gini(x).item() == pytest.approx((n - 1) / (3 * n), rel=1e-13)
    assert treves_rolls(x).item() == pytest.approx(3 * (n + 1) / (2 * (2 * n + 1)), rel=1e-13)
    expected = 6 * (3 * n**2 + 3 * n - 1) / (5 * (n + 1) * (2 * n + 1))
    assert kurtosis(x).item() == pytest.approx(expected, rel=1e-13)


def test_gaussian_limits():
    n = 100_001  # quantiles in place of draws: no sampling noise
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    assert kurtosis(x).item() == pytest.approx(3, rel=1e-3)
    assert treves_rolls(x).item() == pytest.approx(2 / math.pi, rel=1e-4)
    assert gini(x).item() == pytest.approx(math.sqrt(2) - 1, rel=1e-4)
    limit = (math.sqrt(n) - math.sqrt(n * 2 / math.pi)) / (math.sqrt(n) - 1)
    assert hoyer(x).item() == pytest.approx(limit, rel=1e-4)
    assert sparsity(x, eps=1.0).item() == pytest.approx(math.erf(1 / math.sqrt(2)), rel=1e-4)


def test_selectivity_of_vinje_and_gallant_from_treves_rolls():
    x = torch.tensor([[0.0, 5.0, 0.0], [1.0, 1.0, 1.0], [1.0, 2.0, 0.0]], dtype=torch.float64)
    n = x.shape[-1]
    # their equation, with the rates r of one row: (1 - (sum r / n)^2 / sum(r^2 / n)) / (1 - 1/n)
    expected = (1 - (x.sum(-1) / n) ** 2 / (x**2 / n).sum(-1)) / (1 - 1 / n)
    same((1 - treves_rolls(x)) / (1 - 1 / n), expected)
    same(expected[:2], torch.tensor([1.0, 0.0], dtype=torch.float64))


@fast
@given(row=row, scale=st.floats(1e-3, 1e3), data=st.data())
def test_bounds_permutations_signs_scale(row, scale, data):
    n = len(row)
    bounds = {"hoyer": (0, 1), "gini": (0, 1 - 1 / n), "treves_rolls": (1 / n, 1), "kurtosis": (1, n)}
    order = data.draw(st.permutations(range(n)))
    signs = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=n, max_size=n)))
    for name, f in FUNCTIONS.items():
        low, high = bounds.get(name, (0, 1))
        value = f(row)
        assert low - 1e-12 <= value.item() <= high + 1e-12
        for other in (row[list(order)], row * signs, row * scale):
            same(f(other), value, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------ axioms


def sparser(name, x, **options):
    """The measure, turned so that it rises with sparsity."""
    value = FUNCTIONS[name](x, **options).item()
    return -value if name in ("treves_rolls", "density") else value


MARGIN = 1e-12  # rounding; on the grid of quarters the strict changes are larger


@pytest.mark.parametrize("name", ["hoyer", "gini", "treves_rolls"])
@fast
@given(x=wealth, share=st.floats(0.05, 0.95), data=st.data())
def test_d1_robin_hood_is_kept(name, x, share, data):
    i, j = data.draw(st.permutations(range(len(x))))[:2]
    assume(x[i] > x[j])
    y = x.clone()
    transfer = share * (x[i] - x[j]) / 2
    y[i] -= transfer
    y[j] += transfer
    assert sparser(name, y) < sparser(name, x) - MARGIN


@pytest.mark.parametrize("name", ["hoyer", "gini", "treves_rolls", "kurtosis"])
@fast
@given(x=wealth, tide=st.floats(0.1, 20))
def test_d3_rising_tide_is_kept(name, x, tide):
    assume(x.min() < x.max())
    assert sparser(name, x + tide) < sparser(name, x) - MARGIN


@pytest.mark.parametrize("name", ["gini", "treves_rolls", "sparsity", "density", "kurtosis"])
@fast
@given(x=wealth, copies=st.integers(2, 4))
def test_d4_cloning_is_kept(name, x, copies):
    assert sparser(name, x.repeat(copies)) == pytest.approx(sparser(name, x), abs=MARGIN)


@pytest.mark.parametrize("name", ["hoyer", "gini", "treves_rolls", "kurtosis"])
@fast
@given(x=wealth, more=st.floats(1, 100), data=st.data())
def test_p1_bill_gates_is_kept(name, x, more, data):
    i = data.draw(st.integers(0, len(x) - 1))
    assume(x.sum() > x[i])  # else growing is scaling
    rich, richer = x.clone(), x.clone()
    rich[i] += 100
    richer[i] += 100 + more
    assert sparser(name, richer) > sparser(name, rich) + MARGIN


@pytest.mark.parametrize("name", FUNCTIONS)
@fast
@given(x=wealth)
def test_p2_babies_is_kept(name, x):
    assume(name != "hoyer" or (x > 0).sum() > 1)  # a one-hot row is at the maximum already
    assert sparser(name, torch.cat([x, x.new_zeros(1)])) > sparser(name, x) + MARGIN


@pytest.mark.parametrize(
    ("name", "before", "after", "values", "options"),
    [
        # (D4) cloning changes it
        ("hoyer", [2, 1], [2, 1, 2, 1], (0.18, 0.10), {}),
        # (P2) a one-hot row has no room
        ("hoyer", [1, 0], [1, 0, 0], (1.0, 1.0), {}),
        # (D1) a transfer between the small ones raises it
        ("kurtosis", [10, 2, 0], [10, 1, 1], (2.78, 2.88), {}),
        # (D1, D3, P1) the size of what is not zero is not seen
        ("sparsity", [3, 1], [2.5, 1.5], (0.0, 0.0), {}),
        ("sparsity", [3, 1], [4, 2], (0.0, 0.0), {}),
        ("sparsity", [3, 1], [9, 1], (0.0, 0.0), {}),
        # (D1 the wrong way, D2) an absolute threshold
        ("sparsity", [1.1, 0.5], [0.9, 0.7], (0.5, 1.0), {"eps": 1.0}),
        ("sparsity", [1.1, 0.5], [2.2, 1.0], (0.5, 0.5), {"eps": 1.0}),
        ("sparsity", [1.1, 0.5], [11, 5], (0.5, 0.0), {"eps": 1.0}),
        # (P2 the wrong way) a relative threshold
        ("sparsity", [1, 1], [1, 1, 0], (1.0, 0.33), {"eps": 1.0, "relative": True}),
    ],
)
def test_broken_axioms_have_the_documented_counterexamples(name, before, after, values, options):
    got = [FUNCTIONS[name](torch.tensor(v, dtype=torch.float64), **options).item() for v in (before, after)]
    assert [round(v, 2) for v in got] == list(values)


def test_other_numbers_in_the_docstrings():
    x = torch.tensor([2.0, 1.0])
    selectivity = [(1 - treves_rolls(v).item()) / (1 - 1 / len(v)) for v in (x, x.repeat(2))]
    assert [round(v, 2) for v in selectivity] == [0.2, 0.13]
    # kappa_4 without the factor n: clones halve it, a zero leaves it alone
    kappa = {len(v): kurtosis(v).item() / len(v) for v in (x, x.repeat(2), torch.tensor([2.0, 1.0, 0.0]))}
    assert kappa[4] == pytest.approx(kappa[2] / 2, rel=1e-6)
    assert kappa[3] == pytest.approx(kappa[2], rel=1e-6)


# ------------------------------------------------------------------------------------------ robustness


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("exponent", [-140, -126, -100, 100, 122])
def test_no_overflow_or_underflow_in_float32(name, exponent):
    x = torch.tensor([[0.0, 1.0, -2.0, 5.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 7.0, 0.0]])
    # A power of two, exact also in denormals: the result is the same to the last bit.
    assert torch.equal(FUNCTIONS[name](torch.ldexp(x, torch.tensor(exponent))), FUNCTIONS[name](x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_range_within_a_row(name):
    x = torch.tensor([1e-30, 1e30, 0.0, -1e-30])
    same(FUNCTIONS[name](x).double().item(), naive(name, x.double()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes(name):
    f = FUNCTIONS[name]
    x = sparse_data(6, 40)
    assert f(x).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert f(half).dtype == torch.float32
        assert torch.equal(f(half), f(half.float()))
        assert torch.equal(f(half * 10000), f((half * 10000).float()))
    same(f(x.float()).double(), naive_rows(name, x.float()), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_undefined_rows(name):
    f, nan = FUNCTIONS[name], math.nan
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, nan, 0.0], [1.0, math.inf, 0.0], [-math.inf, 0.0, 0.0], [3.0, 0.0, 0.0]])
    of_zero = {"sparsity": 1.0, "density": 0.0}.get(name, nan)
    same(f(x), torch.tensor([of_zero, nan, nan, nan, naive(name, x[4])], dtype=torch.float32))
    same(f(torch.zeros(2, 0)), torch.full((2,), nan))  # rows of nothing
    assert f(torch.zeros(0, 3)).shape == (0,)
    assert f(torch.zeros(0, 3, 2), 1).shape == (0, 2)
    same(f(torch.full((2, 1), 5.0)), torch.full((2,), naive(name, [5.0]), dtype=torch.float32))


def test_thresholds():
    x = torch.tensor([0.0, 0.1, -0.1, 0.2, 5.0])
    assert sparsity(x).item() == pytest.approx(0.2)
    assert sparsity(x, eps=0.1).item() == pytest.approx(0.6)  # <= in the dtype of x
    assert density(x, eps=0.15).item() == pytest.approx(0.4)
    assert density(x, eps=5).item() == 0
    assert density(x, eps=1e300).item() == 0  # beyond float32
    rms = math.sqrt((0.01 * 2 + 0.04 + 25) / 5)
    for eps in (0.0, 0.19 / rms, 0.21 / rms, 1.0, 4.9 / rms, 5.1 / rms):
        expected = naive("sparsity", x.double(), eps=eps, relative=True)
        assert sparsity(x, eps=eps, relative=True).item() == pytest.approx(expected)
        for scale in (1e-30, 1e30):
            assert sparsity(x * scale, eps=eps, relative=True).item() == pytest.approx(expected)
    assert sparsity(torch.ones(3, 4), eps=1.0, relative=True).tolist() == [1, 1, 1]  # a constant row is its rms
    assert sparsity(torch.zeros(4), eps=1.0, relative=True).item() == 1


@pytest.mark.parametrize("f", RATIOS)
def test_gradients(f):
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.2, 4.0, -1.5, 0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradcheck(partial(f, dim=0), x)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("f", RATIOS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_gradients_of_rows_with_zeros(f, scale):
    x = (torch.tensor([[0.0, 2.0, -1.0, 0.0], [0.0] * 4, [0.0, 0.0, 3.0, 0.0]]) * scale).requires_grad_()
    value = f(x)
    value.nanmean().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[1] == 0).all()  # undefined: no slope, and it poisons nothing
    if f is hoyer:  # by hand: -(sign x_i / |x|_2 - |x|_1 x_i / |x|_2^3) / (sqrt(n) - 1), of which the mean takes half
        two = math.sqrt(5)
        slope = torch.tensor([0.0, 1 / two - 3 * 2 / two**3, -1 / two + 3 / two**3, 0.0]) / -(2 - 1) / 2
        same(x.grad[0] * scale, slope, rtol=1e-5, atol=1e-6)


def test_counts_have_no_gradient():
    x = torch.ones(3, requires_grad=True)
    assert not sparsity(x, eps=0.5, relative=True).requires_grad
    assert not density(x).requires_grad


@pytest.mark.slow
def test_meta_vmap_and_compile():
    x = sparse_data(3, 4, 5, dtype=torch.float32)
    x[0, 0] = 0
    x[1, 1, 1] = math.nan
    for f in FUNCTIONS.values():
        meta = f(x.half().to("meta"), 1)
        assert (meta.shape, meta.dtype, meta.device.type) == ((3, 5), torch.float32, "meta")
        same(torch.vmap(f)(x), f(x))

    def together(x):  # one graph, as each takes a second
        return [f(x) for f in FUNCTIONS.values()]

    compiled = torch.compile(together, fullgraph=True, dynamic=True, backend="aot_eager")
    for found, wanted in zip(compiled(x), together(x), strict=True):
        same(found, wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(3).long(),), TypeError, "expected `x` to be a floating-point tensor, but got torch.int64"),
        ((torch.ones(3) * 1j,), TypeError, "expected `x` to be a floating-point tensor, but got torch.complex64"),
        (([1.0, 2.0],), TypeError, "expected `x` to be a floating-point tensor, but got a list"),
        ((ONES, 1.0), TypeError, "expected `dim` to be an int, but got a float"),
        ((ONES, True), TypeError, "expected `dim` to be an int, but got True"),
        ((ONES, 2), ValueError, "expected `dim` to be in [-2, 1], but got 2"),
        ((ONES, -3), ValueError, "expected `dim` to be in [-2, 1], but got -3"),
        ((torch.tensor(1.0),), ValueError, "expected `x` to be a tensor of at least one dimension, but got a 0-d one"),
    ],
)
def test_bad_tensors(name, arguments, error, text):
    with pytest.raises(error) as caught:
        FUNCTIONS[name](*arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("eps", "error", "text"),
    [
        (True, TypeError, "expected `eps` to be a finite number >= 0, but got True"),
        ("0", TypeError, "expected `eps` to be a finite number >= 0, but got '0'"),
        (-0.1, ValueError, "expected `eps` to be a finite number >= 0, but got -0.1"),
        (math.inf, ValueError, "expected `eps` to be a finite number >= 0, but got inf"),
        (math.nan, ValueError, "expected `eps` to be a finite number >= 0, but got nan"),
    ],
)
@pytest.mark.parametrize("call", [partial(sparsity, ONES), partial(density, ONES), Streaming])
def test_bad_eps(call, eps, error, text):
    with pytest.raises(error) as caught:
        call(eps=eps)
    assert str(caught.value) == text
