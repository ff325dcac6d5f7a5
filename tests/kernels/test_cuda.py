"""The Triton kernel against the equation and against plain torch, mask for mask. Without a GPU it is interpreted."""

import math

import numpy as np
import oracle
import pytest
import torch
from interpreter import DEVICE, launchers

from sparseout.kernels import mask as masks
from sparseout.kernels import ops, reference
from sparseout.kernels.params import NoiseArguments, NoiseParams

tl = pytest.importorskip("triton.language", reason="triton is not installed: its kernel was not tested")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on which the interpreter computes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QS = [0.0, 0.5, 1.0, 1.3, 1.5, 2.0, 2.5, 2.7, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0]
PS = [0.001, 0.25, 0.5, 0.999]
SEED = torch.tensor(0x0123456789ABCDEF, device=DEVICE)
ONES = ([1.0, 1.0, 1.0], None)  # at x = 1 the output is above 1 where the mask keeps, below where it drops


@pytest.fixture(scope="module")
def cuda():
    with launchers() as module:
        yield module


def forward(cuda, x, p, packed, shared_dims=(), seed=SEED):
    return cuda.launch(None, x, NoiseArguments(seed, p, *packed, shared_dims, False))


def backward(cuda, grad, x, p, packed, shared_dims=(), exact=False):
    return cuda.launch(grad, x, NoiseArguments(SEED, p, *packed, shared_dims, exact))


def mask_of(shape, p, shared_dims=(), seed=SEED):
    shape = [1 if dim in shared_dims else size for dim, size in enumerate(shape)]
    return masks.make(seed, shape, p)


def spread(n, dtype):
    """Numbers of either sign from 1e-6 to 1e3, for fp16 from 1e-4 to 4, and zeros."""
    low, high = (1e-4, 4) if dtype == torch.float16 else (1e-6, 1e3)
    x = torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)
    x *= torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    x[::17] = 0.0
    return x[torch.randperm(n)].to(dtype).to(DEVICE)


def forms(q, scale_unit=1.0, amplitude=1.0):
    """The three forms in which an op gets the parameters of the noise."""
    both = torch.tensor([scale_unit, amplitude], device=DEVICE)
    yield [q, scale_unit, amplitude], None
    yield [q], both
    yield [], torch.cat([torch.tensor([q], device=DEVICE), both])


def rounding(dtype):
    """Half a scale_unit in the last place; Triton's interpreter does not round to bf16, it truncates."""
    truncated = DEVICE == "cpu" and dtype == torch.bfloat16
    return torch.finfo(dtype).eps / (1 if truncated else 2)


def error_of_power(x, e, roots, scale_unit):
    """What the kernel promises of |x / scale_unit|^e, relative, and some roundings more."""
    if roots:
        return np.full(x.shape, 5 * 2.0**-22)
    u = np.abs(np.where(x == 0, scale_unit, x)) / scale_unit
    return 2.0**-22 * (4 + 0.7 * abs(e) * np.maximum(1, np.abs(np.log2(u))))


def check(cuda, x, p, packed, q, scale_unit=1.0, amplitude=1.0, shared_dims=()):
    """y and both gradients against numpy in fp64, within what the arithmetic allows."""
    wide = x.double().cpu().numpy()
    keep = np.broadcast_to(mask_of(x.shape, p, shared_dims).cpu().numpy(), x.shape)
    p_effective = masks.effective_p(p)
    roots = bool(packed[0]) and 2 * q in range(9)
    half_ulp = rounding(x.dtype)

    expected = wide + amplitude * (oracle.value(wide, keep, p_effective, q, scale_unit) - wide)
    y = forward(cuda, x, p, packed, shared_dims)
    scale = np.abs(wide) + np.abs(expected - wide)
    allowed = scale * error_of_power(wide, q / 2, roots, scale_unit) + half_ulp * np.abs(expected)
    assert y.dtype == x.dtype
    assert (np.abs(y.double().cpu().numpy() - expected) <= allowed).all()

    grad = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    limit = torch.finfo(x.dtype).max
    for gradient in ("detached", "exact"):
        noise = amplitude * (oracle.slope(wide, keep, p_effective, q, scale_unit, gradient) - 1)
        noise = np.clip(noise, -limit, limit)
        with np.errstate(over="ignore"):
            expected = grad.double().cpu().numpy() * (1 + noise)
        result = backward(cuda, grad, x, p, packed, shared_dims, gradient == "exact")
        scale = np.abs(grad.double().cpu().numpy()) * (1 + np.abs(noise))
        allowed = scale * error_of_power(wide, q / 2 - 1, roots, scale_unit) + half_ulp * np.abs(expected)
        fits = np.abs(expected) < limit
        assert (np.abs(result.double().cpu().numpy() - expected)[fits] <= allowed[fits]).all()
        assert (result.double().abs().cpu().numpy()[~fits] >= limit * (1 - 2 * half_ulp)).all()


@pytest.mark.parametrize("q", QS)
def test_value_and_slopes_are_the_equation(cuda, q):
    for packed in forms(q):
        check(cuda, spread(1000, torch.float32), PS[QS.index(q) % 4], packed, q)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("q", QS)
def test_half_types_are_rounded_once(cuda, q, dtype):
    check(cuda, spread(1000, dtype), 0.25, next(forms(q)), q)


@pytest.mark.parametrize("q", [0.0, 1.0, 1.3, 2.0, 3.0])
def test_units_and_gains_of_any_size(cuda, q):
    for scale_unit, amplitude in (
        (0.5, 0.25 if q != 2 else 1.0),
        (1.0, 1.5),
        (2.0**100, 1.5),
        (2.0**-100, 1.0),
    ):  # at q = 2 beta is 1
        for packed in list(forms(q, scale_unit, amplitude))[: 3 if scale_unit == 0.5 else 1]:
            check(cuda, spread(200, torch.float32) * scale_unit, 0.25, packed, q, scale_unit, amplitude)


@pytest.mark.parametrize("p", [0.001, 0.25])
@pytest.mark.parametrize("n", [1, 3, 1000, 2047, 2048, 2049, 4099])
def test_sizes_and_nothing_beside_the_tensor_is_written(cuda, n, p, monkeypatch):
    written = None

    def inside(x):
        nonlocal written
        written = torch.full((n + 100,), 7.0, dtype=x.dtype, device=DEVICE)
        return written[:n]

    for dtype in DTYPES[:2]:
        x, keep = torch.ones(n, dtype=dtype, device=DEVICE), mask_of((n,), p)
        monkeypatch.setattr(torch, "empty_like", inside)
        for q in (1.0, 1.3):
            for grad in (None, x):
                cuda.launch(grad, x, NoiseArguments(SEED, p, [q, 1.0, 1.0], None, (), False))
                assert torch.equal(written[:n] > 0.5, keep)
                assert (written[n:] == 7).all()
        monkeypatch.undo()


SHARED = [
    ((7, 12, 5), (0,)),
    ((7, 12, 5), (1,)),
    ((7, 12, 5), (2,)),
    ((7, 3, 8), (1,)),  # channels_last: channels innermost
    ((7, 3, 8), (0,)),  # the locked mask
    ((5, 6, 4, 4), (2, 3)),  # whole channels
    ((5, 6, 7, 7), (2, 3)),
    ((5, 6, 7, 7), (0, 2, 3)),
    ((3, 4, 5, 8), (0, 2)),
    ((3, 4, 5, 6), (0, 2)),
    ((3, 4, 5, 6), (1, 3)),
    ((3, 4, 5, 6), (0, 1, 2, 3)),
    ((2, 3, 4, 5, 3), (0, 2, 4)),
    ((2, 3, 4, 5, 8), (0, 2, 4)),
    ((1, 6, 1, 5), (0, 2)),
    ((1, 1), (0, 1)),
]


@pytest.mark.parametrize("p", [0.3, 0.004])
@pytest.mark.parametrize(("shape", "dims"), SHARED)
def test_shared_dims_take_the_bits_of_the_smaller_mask(cuda, shape, dims, p, monkeypatch):
    x, keep = torch.ones(shape, device=DEVICE), mask_of(shape, p, dims).expand(shape)
    assert cuda.supports(x, dims)
    results = [
        forward(cuda, x, p, ONES, dims),
        forward(cuda, x.bfloat16(), p, ONES, dims),
        backward(cuda, x, x, p, ONES, dims),
    ]
    arguments = cuda._arguments
    monkeypatch.setattr(cuda, "_arguments", lambda *given: arguments(*given) | {"WIDE": True})
    results.append(forward(cuda, x, p, ONES, dims))  # by the arithmetic of tensors over 2^31 elements
    for result in results:
        assert torch.equal(result > 0.5, keep)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 7 - 2**40])
@pytest.mark.parametrize("p", [0.004, 0.5])
def test_every_bit_of_the_seed_counts(cuda, seed, p):
    seed = torch.tensor(seed, device=DEVICE)
    y = forward(cuda, torch.ones(999, device=DEVICE), p, ONES, seed=seed)
    assert torch.equal(y > 0.5, mask_of((999,), p, seed=seed))


def keep_of(out_ptr, seed_ptr, start, cut, keep: tl.constexpr, bits: tl.constexpr, step: tl.constexpr):
    kept = keep(seed_ptr, start, tl.arange(0, 64), cut, 0, 0, 0, 0, bits, step, True, False, False, False, True)
    tl.store(out_ptr + tl.arange(0, 64), kept.to(tl.int8))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU a whole tensor of that size is tested")
@pytest.mark.parametrize("p", [0.004, 0.5])
@pytest.mark.parametrize("start", [0, 8, 2**31, 2**32, 2**33 + 64])
def test_positions_have_64_bits(cuda, start, p):
    bits, threshold = masks.bits_and_threshold(p)
    out = torch.zeros(64, dtype=torch.int8)
    cut = masks.signed(threshold, bits) << (32 - bits)
    kernel = type(cuda.kernels.sparseout)(keep_of)
    kernel[(1,)](out, SEED, start, cut, cuda.kernels._keep, bits, 64 // bits)
    draws = masks.words(SEED.cpu(), bits, start * bits // 64).view(torch.int16 if bits == 16 else torch.int32)
    assert torch.equal(out.bool(), draws >= masks.signed(threshold, bits))


def test_what_is_large_is_indexed_with_64_bits(cuda):
    for n, wide in ((2**32 - 1, False), (2**32, True)):
        assert cuda._arguments(torch.bfloat16, (n,), 0.5, (1.0, 1.0, 1.0), (), False, False)["WIDE"] == wide


def test_what_the_kernel_does_not_do_is_left_to_torch(cuda):
    assert not cuda.supports(torch.ones(3, dtype=torch.float64), ())
    assert not cuda.supports(torch.ones(2, 2, 2, 2, 2, 2), (0, 2, 4))
    assert not cuda.supports(torch.ones(2, 2, 2, 2, 2, 2), (1, 3, 5))
    assert cuda.supports(torch.ones(2, 2, 2, 1, 2, 2), (1, 3))


# Awkward numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [0.0, 0.02, 0.5, 1.0, 1.3, 1.5, 2.0, 2.7, 3.0, 6.0])
def test_awkward_numbers_go_where_plain_torch_sends_them(cuda, q, dtype):
    info = torch.finfo(dtype)
    # A denormal: of fp16 it is a number like others in fp32, of the other types it counts as 0. Triton's interpreter
    # takes those of bf16 for yet other numbers.
    smallest = info.tiny * (1 if DEVICE == "cpu" and dtype == torch.bfloat16 else info.eps)
    numbers = [0.0, -0.0, smallest, -smallest, 3 * smallest, -info.tiny, info.tiny, 1.0, -2.0, math.inf, -math.inf]
    x = torch.tensor([*numbers, math.nan], dtype=dtype, device=DEVICE).repeat(20)
    flushed = torch.where(x.float().abs() < 2.0**-126, 0.0, x)
    grad = torch.full_like(x, 0.5)
    tolerance = {"rtol": 3e-5, "atol": 1e-37} if dtype == torch.float32 else {"rtol": 1.01 * info.eps, "atol": smallest}
    p = 0.9
    xi = ops._noise(x, SEED, p, [])
    for packed in list(forms(q))[::2]:
        expected = reference.value(flushed, xi, *NoiseParams.unpack(*packed))
        y = forward(cuda, x, p, packed)
        same = x.isfinite()
        torch.testing.assert_close(y[same], expected[same], **tolerance)
        assert not y[~same].isfinite().any()
        assert y[x.isnan()].isnan().all()
        for exact in (False, True):
            slope = reference.slope(flushed, xi, *NoiseParams.unpack(*packed), exact)
            result = backward(cuda, grad, x, p, packed, exact=exact)
            torch.testing.assert_close(result[same], (grad * slope).to(dtype)[same], **tolerance)
            assert q in (0, 2) or result[x.isnan()].isnan().all()


@pytest.mark.parametrize("scale_unit", [None, 1.7])
def test_q_2_is_dropout_to_the_last_bit(cuda, scale_unit):
    x = spread(1000, torch.float32)
    packed = next(forms(2.0)) if scale_unit is None else list(forms(2.0, scale_unit))[2]
    expected = torch.where(mask_of((1000,), 0.5), 2 * x, 0.0)
    assert torch.equal(forward(cuda, x, 0.5, packed), expected)
    assert torch.equal(backward(cuda, x, x, 0.5, packed, exact=True), expected)


def test_gradients_of_any_strides(cuda):
    x = spread(24, torch.float32).view(4, 6)
    grad = torch.randn(6, 4, device=DEVICE).t()
    for other in (grad, torch.ones((), device=DEVICE).expand(4, 6)):
        result = backward(cuda, other, x, 0.5, ONES)
        assert torch.equal(result, backward(cuda, other.contiguous(), x, 0.5, ONES))
        assert result.is_contiguous()


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_of_nothing_comes_nothing(cuda, shape):
    x = torch.ones(shape, device=DEVICE)
    assert forward(cuda, x, 0.5, ONES).shape == shape
    assert backward(cuda, x, x, 0.5, ONES, (0,), True).shape == shape


@pytest.mark.parametrize("scale_unit", [2.0**-127, 2.0**-140])
def test_units_too_small_to_have_an_inverse_give_no_nan(cuda, scale_unit):
    x = torch.tensor([0.0, scale_unit, -scale_unit, 1e-30], device=DEVICE)
    packed = [1.3], torch.tensor([scale_unit, 1.0], device=DEVICE)
    assert forward(cuda, x, 0.5, packed).isfinite().all()
    assert backward(cuda, torch.ones_like(x), x, 0.5, packed).isfinite().all()


def test_an_infinite_gradient_stays_infinite(cuda):
    x, grad = torch.zeros(40, device=DEVICE), torch.full((40,), math.inf, device=DEVICE)
    assert torch.equal(backward(cuda, grad, x, 0.5, ([1.0, 1.0, 1.0], None)), grad)


def test_a_slope_saturates_in_the_unit_that_it_has(cuda):
    x = torch.full((40,), 6e-8, dtype=torch.float16, device=DEVICE)
    result = backward(cuda, torch.full_like(x, 0.5), x, 0.5, ([1.0, 1.0, 100.0], None))
    assert set(result.tolist()) == {32752.0, -32752.0}  # half of 1 ± 65504
