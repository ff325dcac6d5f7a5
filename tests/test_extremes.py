"""Numbers near the ends of a dtype: nothing overflows or vanishes on the way that the result does not."""

import itertools
import math

import pytest
import torch
from torch.func import jvp, vmap

from sparseout import sparseout
from sparseout.kernels import reference
from sparseout.kernels.params import NoiseParams

SCALES = [1e-37, 1e-20, 0.01, 1.0, 1e20, 1e37]
QS = [0.0, 0.1, 0.5, 1.0, 1.5, 1.9, 2.1, 2.5, 3.0, 3.9, 4.0, 6.0]
XS = torch.tensor([1e-37, 1e-30, 1e-15, 1e-3, 1.0, 1e3, 1e15, 1e30, 1e37, 3e38]).repeat_interleave(8)


def expected(x, q, beta_log2, xi_of_p):
    """y in fp64, where none of this overflows, for a mask that is read off the sign of the noise."""
    wide = x.double()
    return wide + torch.exp2(beta_log2 + q / 2 * wide.log2()) * xi_of_p


def check(y, x, q, beta_log2):
    """Each element is what the equation gives where the mask keeps or where it drops, or beyond the dtype."""
    candidates = torch.stack([expected(x, q, beta_log2, xi) for xi in (1.0, -1.0)])
    largest = torch.finfo(x.dtype).max
    close = (y.double() - candidates).abs() <= 1e-5 * torch.maximum(x.double(), candidates.abs())
    beyond = (candidates.abs() >= largest * (1 - 1e-4)) & (y.abs() >= largest * (1 - 1e-4))
    right = (close | beyond).any(0)
    assert right.all(), (q, x[~right].tolist(), y[~right].tolist(), candidates[:, ~right].tolist())


def paths(q, scale, gradient="detached"):
    """The operation by every way, as functions of x."""

    def f(x, q=q, seed=3):
        return sparseout(x, 0.5, q, gradient=gradient, scale=scale, seed=seed)

    yield "eager", f
    yield "tensor q", lambda x: f(x, torch.tensor(q))
    yield "needing a gradient", lambda x: f(x.clone().requires_grad_()).detach()
    yield "vmap", lambda x: vmap(f)(x[None])[0]
    yield "jvp", lambda x: jvp(lambda x: f(x, torch.tensor(q)), (x,), (torch.ones_like(x),))[0]

    def op(x):
        params = NoiseParams(torch.tensor(q), float(scale), 1.0).balanced(torch.float32).pack(x.device, torch.float32)
        return torch.ops.sparseout.forward(x, torch.tensor(3), 0.5, *params, [], False)

    yield "op", op


@pytest.mark.parametrize("gradient", ["detached", "exact"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_takes_no_value_out_of_the_dtype(scale, gradient):
    for q in QS:
        for name, f in paths(q, scale, gradient):
            try:
                check(f(XS), XS, q, (1 - q / 2) * math.log2(scale))
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("q", [0.1, 1.5])
def test_a_large_number_in_a_small_unit_is_left_as_it_is(q):
    x = torch.full((3,), 1e37)
    assert torch.equal(vmap(lambda x: sparseout(x, 0.5, q, scale=0.01, seed=1))(x[None])[0], x)
    torch.testing.assert_close(sparseout(x, 0.5, q, scale=0.01, seed=1), x)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("scale", SCALES)
def test_gradients_are_finite_and_right_wherever_they_fit(scale, backend, monkeypatch):
    monkeypatch.setenv("SPARSEOUT_BACKEND", backend)
    for q, gradient in itertools.product(QS, ("detached", "exact")):
        x = XS.clone().requires_grad_()
        y = sparseout(x, 0.5, q, gradient=gradient, scale=scale, seed=3)
        (slope,) = torch.autograd.grad(y.sum(), x)
        wide, factor = XS.double(), q / 2 if gradient == "exact" else 1.0
        steepness = factor * torch.exp2((1 - q / 2) * math.log2(scale) + (q / 2 - 1) * wide.log2())
        steepness = steepness.clamp(max=torch.finfo(torch.float32).max)
        close = torch.stack(
            [(slope.double() - 1 - sign * steepness).abs() <= 1e-5 * (1 + steepness) for sign in (1, -1)]
        )
        assert close.any(0).all(), (q, gradient)


@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 1.9, 2.1, 3.0, 3.9, 6.0])
@pytest.mark.parametrize("unit", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_matched_spans_the_dtype(unit, q):
    x = torch.tensor([1e-7, 1e-3, 0.1, 0.5, 1.0]).repeat(8) * unit
    wide = x.double()
    relative = wide / unit
    beta = (relative.square().mean() / relative.pow(q).mean()).sqrt().log2().item() + (1 - q / 2) * math.log2(unit)
    for f in (
        lambda x: sparseout(x, 0.5, q, scale="matched", seed=3),
        lambda x: sparseout(x, 0.5, torch.tensor(q), scale="matched", seed=3),
        lambda x: vmap(lambda x: sparseout(x, 0.5, q, scale="matched", seed=3))(x[None])[0],
    ):
        check(f(x), x, q, beta)


def test_small_numbers_beside_a_large_one_keep_their_noise():
    x = torch.tensor([1e30] + [1e-20] * 40)
    for q in (0.1, torch.tensor(0.1)):
        unit = 1e30
        moment = (1 + 40 * 1e-50**0.1) / 41
        term = (1 / 41 / moment) ** 0.5 * unit * 1e-50**0.05
        for y in (
            sparseout(x, 0.5, q, scale="matched", seed=3),
            vmap(lambda x, q=q: sparseout(x, 0.5, q, scale="matched", seed=3))(x[None])[0],
        ):
            torch.testing.assert_close(y[1:].abs(), torch.full((40,), term), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balanced_parameters_are_the_same_noise(dtype):
    for q, unit, amplitude in itertools.product(QS, SCALES, (0.25, 1.0)):
        exact = math.log2(amplitude) + (1 - q / 2) * math.log2(unit)
        for given in (NoiseParams(q, unit, amplitude), NoiseParams(torch.tensor(q, dtype=dtype), unit, amplitude)):
            _, unit_, amplitude_ = given.balanced(dtype).numbers()
            if q == 2:
                continue
            tolerance = 2e-5 if dtype == torch.float32 else 1e-12
            assert math.log2(amplitude_) + (1 - q / 2) * math.log2(unit_) == pytest.approx(exact, abs=tolerance)
            assert (unit_ == 1) == (q < 4 or unit == 1)


# Own tensors in the default dtype


@pytest.mark.parametrize(
    "q", [1.0, 1.5, *(torch.tensor(q, dtype=t) for q in (1.5, 5.0) for t in (torch.float32, torch.float64))]
)
@pytest.mark.parametrize("scale", [None, 0.1, "matched"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default, scale, q):
    def results(dtype):
        x = torch.linspace(-2, 2, 60, dtype=torch.float32).view(4, 15).to(dtype).requires_grad_()
        y = sparseout(x, 0.3, q, scale=scale, gradient="exact", seed=3)
        (grad,) = torch.autograd.grad(y.sum(), x)
        return y.detach(), grad, vmap(lambda x: sparseout(x, 0.3, q, scale=scale, seed=3))(x.detach()[None])[0]

    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    before = [results(dtype) for dtype in dtypes]
    try:
        torch.set_default_dtype(default)
        after = [results(dtype) for dtype in dtypes]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(itertools.chain(*before), itertools.chain(*after), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_users_q_in_any_floating_dtype_moves_the_noise():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        q = torch.tensor(1.0, dtype=dtype)
        x = torch.full((30,), 4.0)
        for value in (1.0, 1.5, 3.0):
            q.fill_(value)
            torch.testing.assert_close(sparseout(x, 0.5, q, seed=1), sparseout(x, 0.5, value, seed=1))


def test_reference_terms_beyond_q_2_do_not_overflow_on_the_way():
    x = torch.tensor([1e20])
    assert reference.value(x, torch.ones(1), 3.9, 1.0, 1e-36).isfinite().all()
    assert reference.value(x, torch.ones(1), torch.tensor(3.9), 1.0, 1e-36).isfinite().all()
