"""The beta of `scale="matched"` by the Triton kernels, interpreted without a GPU, against the equation in fp64."""

import math

import oracle
import pytest
import torch
from interpreter import DEVICE, launchers
from torch.func import vmap

from sparseout import sparseout
from sparseout.kernels import backends, reference
from sparseout.kernels.params import NoiseParams

pytest.importorskip("triton", reason="triton is not installed: its kernels were not tested")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on which the interpreter computes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QS = [0.0, 0.02, 0.5, 1.0, 1.3, 1.5, 2.1, 2.5, 3.0, 3.5, 4.0, 4.5, 6.0, 40.0]


@pytest.fixture(scope="module")
def cuda():
    with launchers() as module:
        yield module


def both(q):
    """The two forms of q."""
    return q, torch.tensor(q, device=DEVICE)


def check(cuda, x, q, tolerance=3e-6):
    """beta against numpy, and its two factors as plain torch has them."""
    wide = x.double().cpu()
    unit, amplitude = reference.matched(wide, q)
    expected = NoiseParams(q, unit, amplitude).balanced(torch.float32).numbers()
    with_oracle = math.log2(oracle.beta((wide / unit).numpy(), q, "matched"))
    for form in both(q):
        params = cuda.matched(x.to(DEVICE), form)
        assert params.q is form
        assert params.scale_unit.dtype == params.amplitude.dtype == torch.float32
        _, unit_, amplitude_ = params.numbers()
        assert unit_ == expected[1]
        assert amplitude_ == pytest.approx(expected[2], rel=tolerance, abs=0)
        in_units = math.log2(amplitude_) + (1 - q / 2) * (math.log2(unit_) - math.log2(unit))
        assert in_units == pytest.approx(with_oracle, abs=1.5 * tolerance)


def numbers(n, dtype=torch.float32):
    """Normal ones, and zeros."""
    return (torch.randn(n, dtype=torch.float64) * (torch.rand(n) < 0.7)).to(dtype)


@pytest.mark.parametrize(
    ("q", "dtype"), [(q, dtype) for at, q in enumerate(QS) for dtype in (torch.float32, DTYPES[1 + at % 2])]
)
def test_beta_is_the_equation(cuda, q, dtype):
    check(cuda, numbers(5001, dtype), q)


@pytest.mark.parametrize("n", [1, 3, 2047, 2048, 2049, 4096, 20_001])
def test_of_every_size_and_in_few_parts(cuda, n, monkeypatch):
    monkeypatch.setattr(cuda, "_PARTS", 4)  # of 20,001 elements two have three tiles
    around = torch.full((n + 5000,), math.nan)
    check(cuda, around[:n].copy_(numbers(n) + 0.1), 1.3)


@pytest.mark.parametrize(("q", "descending"), [(q, at % 2 == 0) for at, q in enumerate(QS)])
def test_the_largest_may_come_first_or_last(cuda, q, descending, monkeypatch):
    monkeypatch.setattr(cuda, "_PARTS", 2)
    x = torch.logspace(-15, 15, 10_000).sort(descending=descending).values
    check(cuda, x, q, tolerance=1e-5)


# A logarithm is off by 2^-22 of itself: of 1e30 by 2.4e-5, which q/2 takes to beta; roots and products are not.
@pytest.mark.parametrize(
    ("q", "unit"), [(q, unit) for at, q in enumerate(QS) for unit in ((1e-36, 1e30), (1e-30, 1e37))[at % 2]]
)
def test_x_may_be_measured_in_anything(cuda, q, unit):
    check(cuda, torch.linspace(0.1, 3, 999) * unit, q, tolerance=3e-6 if 2 * q in range(9) else 3e-6 + 1e-5 * q)


@pytest.mark.parametrize("q", [0.0, 0.02, 0.1])
def test_small_numbers_beside_a_large_one_count(cuda, q):
    check(cuda, torch.tensor([1e30] + [1e-20] * 40), q)


@pytest.mark.parametrize("q", [0.0, 1.3, 3.0])
@pytest.mark.parametrize("value", [0.0, 1e-40, math.inf, -math.inf, math.nan])
def test_beta_is_1_where_the_largest_is_0_or_not_finite(cuda, value, q, monkeypatch):
    monkeypatch.setattr(cuda, "_PARTS", 2)
    for place in (0, 9999):
        x = numbers(10_000) if abs(value) != 1e-40 and value != 0 else torch.zeros(10_000)
        x[place] = value
        for form in both(q):
            assert cuda.matched(x.to(DEVICE), form).numbers()[1:] == (1, 1)


@pytest.mark.parametrize("q", [0.0, 1.3, 3.0])
def test_of_nothing_it_is_1(cuda, q):
    for form in both(q):
        assert cuda.matched(torch.ones(0, device=DEVICE), form).numbers()[1:] == (1, 1)


def test_at_q_2_it_is_1_and_not_up_to_rounding(cuda):
    assert cuda.matched(numbers(3000).to(DEVICE) * 1e20, torch.tensor(2.0, device=DEVICE)).numbers()[1:] == (1, 1)


def test_plain_tensors_take_it_and_all_else_plain_torch(cuda, monkeypatch):
    seen = []

    def matched(x, q):
        seen.append(x.shape)
        assert x.is_contiguous()
        return launch(x, q)

    launch = cuda.matched
    monkeypatch.setattr(cuda, "matched", matched)
    wide = numbers(3 * 50 * 40).view(3, 40, 50).transpose(1, 2).to(DEVICE)

    def results(x, q):
        leaf = x.detach().requires_grad_()
        y = sparseout(leaf, 0.5, q, scale="matched", gradient="exact", seed=3)
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]

    for x in (wide, wide.bfloat16(), wide[:, ::2]):
        for q in both(1.3):
            monkeypatch.setattr(backends, "kernels", lambda device: None)
            expected = results(x, q)
            monkeypatch.setattr(backends, "kernels", lambda device: cuda)
            for ours, theirs in zip(results(x, q), expected, strict=True):
                rounding = torch.finfo(x.dtype).eps
                torch.testing.assert_close(ours, theirs, rtol=max(2e-5, 2 * rounding), atol=1e-5)
    assert [tuple(shape) for shape in seen] == [(3, 40, 50)] * 4 + [(3, 40, 25)] * 2
    sparseout(wide.double(), 0.5, 1.3, scale="matched")
    vmap(lambda x: sparseout(x, 0.5, 1.3, scale="matched"), randomness="different")(wide)
    torch.compile(lambda x: sparseout(x, 0.5, 1.3, scale="matched"), backend="eager", fullgraph=True)(wide)
    assert len(seen) == 6
