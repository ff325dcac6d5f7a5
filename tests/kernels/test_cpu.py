"""The native kernel against the definition: every dtype, exponent, kind of mask and size of block."""

import itertools
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from sparseout import backend, sparseout
from sparseout._utils import torch_internals
from sparseout.kernels import backends, cpu, reference
from sparseout.kernels import mask as masks
from sparseout.kernels.params import NoiseArguments, NoiseParams

needs_kernel = pytest.mark.skipif(bool(cpu.obstacle()), reason=cpu.obstacle() or "it is there")
SEED = torch.tensor(11)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Units in the last place of |x| + |term|, for q <= 2. In fp64 a power loses with the logarithm of what it is taken of.
ULPS = {torch.float32: 3, torch.float64: 400, torch.bfloat16: 0.51, torch.float16: 0.51}
QS = [0.0, 0.1, 0.5, 1.0, 1.3, 1.5, 2.0, 2.5, 2.9, 3.0, 3.5, 4.0, 6.0, 20.0]
# Around a block of 1,024 elements and a word of 4 draws; masks shared in the inner dims, in the outer ones, in turns.
SHAPES = [
    ((), ()),
    ((1,), ()),
    ((7, 0), (1,)),
    ((1023,), ()),
    ((3 * 1024 + 5,), ()),
    ((70, 33), (0,)),
    ((5, 700, 3), (2,)),
    ((9, 5, 100), (1,)),
    ((7, 33, 5), (1, 2)),
    ((2, 3000), (1,)),
    ((3, 4, 5), (0, 1, 2)),
    ((3, 2, 5, 3, 7, 2), (0, 2, 4)),
    ((3, 2, 5, 3, 7, 2), (1, 3, 5)),
    ((4, 1, 6, 1, 50), (1, 2)),
]


def noise(x, p, shared_dims=()):
    shape = [1 if dim in shared_dims else size for dim, size in enumerate(x.shape)]
    return reference.noise(masks.make(SEED, shape, p), masks.effective_p(p), torch.float64)


def launch(grad, x, p, params, shared_dims=(), exact=False):
    return cpu.launch(grad, x, NoiseArguments(SEED, p, list(params), None, shared_dims, exact))


def torch_path(x, p, q):
    """What plain torch gives where there is no kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "kernels", lambda device: None)
        return torch.ops.sparseout.forward(x, SEED, p, [q, 1.0, 1.0], None, [], False)


def assert_is_sum(result, a, b, q):
    """Whether it is a + b up to the rounding of each, wherever these are normal numbers."""
    info, size = torch.finfo(result.dtype), a.abs() + b.abs()
    counted = (size > 100 * info.tiny) & (size < info.max / 8)
    ulps = ((result.double() - (a + b)).abs() / (size * info.eps))[counted]
    assert ulps.numel() == 0 or ulps.max() <= ULPS[result.dtype] * max(1, q / 2)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "shared_dims"), SHAPES)
def test_value_and_slopes_are_the_definition(shape, shared_dims, dtype):
    scales = [(1.0, 1.0, 0.3), (0.7, 1.6, 0.001), (1e-12, 1.0, 0.9), (1e10, 2.0, 0.3)]
    size = math.prod(shape)
    for (index, q), (unit, amplitude, p) in itertools.product(enumerate(QS), scales):
        params = NoiseParams(q, unit, amplitude) if q != 2 else NoiseParams(q)  # at q = 2 beta is 1
        x = torch.randn(size + 3, dtype=torch.float64) * 10.0 ** torch.randint(-3, 4, (size + 3,))
        x = torch.where(torch.rand(size + 3) < 0.2, 0.0, x).to(dtype)
        grad = torch.randn(size + 3).to(dtype)
        x, grad = (tensor[index % 4 :][:size].view(shape) for tensor in (x, grad))  # at any address
        wide, xi, largest = x.double(), noise(x, p, shared_dims), torch.finfo(dtype).max
        term = reference.value(wide, xi, *params) - wide
        assert_is_sum(launch(None, x, p, params, shared_dims), wide, term, q)
        for exact in (False, True):
            slope = (reference.slope(wide, xi, *params, exact) - 1).clamp(-largest, largest)
            result = launch(grad, x, p, params, shared_dims, exact)
            assert result.dtype == dtype
            if q < 6:  # beyond, the power overflows in fp32 before it is multiplied, as in the definition
                assert_is_sum(result, grad.double(), grad.double() * slope, q)
        if dtype in (torch.float32, torch.float64) and q < 6:
            slope = (reference.slope(wide, xi, *params, False) - 1).clamp(-largest, largest)
            assert_is_sum(
                cpu.run(cpu.SLOPE, None, x, int(SEED), p, params, shared_dims), torch.ones_like(slope), slope, q
            )


@needs_kernel
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 7 - 2**40])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.77, 0.99, 1e-9, 0.004, 0.9999])
def test_the_mask_is_that_of_every_other_path_bit_for_bit(p, seed):
    for shape, shared_dims in SHAPES:
        x = torch.ones(shape)
        y = cpu.launch(None, x, NoiseArguments(torch.tensor(seed), p, [1.0, 1.0, 1.0], None, shared_dims, False))
        drawn = [1 if dim in shared_dims else size for dim, size in enumerate(shape)]
        assert torch.equal(y != 0, masks.make(torch.tensor(seed), drawn, p).expand(shape))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.3, 0.5])
def test_every_number_of_a_half_type_is_read_and_rounded_as_torch_does(p, dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    y = launch(None, x, p, NoiseParams(2.0))
    slope = cpu.run(cpu.SLOPE, None, torch.ones(2**16), int(SEED), p, (2.0, 1.0, 1.0), ())
    torch.testing.assert_close(y, (x.float() * slope).to(dtype), rtol=0, atol=0, equal_nan=True)
    y = launch(x, torch.ones_like(x), p, NoiseParams(2.0))
    torch.testing.assert_close(y, (x.float() * slope).to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [0.0, 0.05, 0.5, 1.0, 1.3, 2.0, 2.7, 4.0, 7.0, 1e6, 1e300])
def test_awkward_numbers_give_what_the_definition_gives(q, dtype):
    info = torch.finfo(dtype)
    small = info.tiny * info.eps
    numbers = [0.0, -0.0, small, -small, 5 * small, info.tiny, -info.tiny, 1.0, -1.0, info.max, -info.max, math.inf,
               -math.inf, math.nan]  # fmt: skip
    x = torch.tensor(numbers, dtype=dtype).repeat(40)  # both values of the noise for each
    xi = noise(x, 0.9)
    y = launch(None, x, 0.9, NoiseParams(q))
    expected = reference.value(x.double(), xi, q, 1.0, 1.0).to(dtype)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1.01 * info.eps, "atol": 2 * small, "equal_nan": True}
    tolerance["rtol"] = max(tolerance["rtol"], 1e-12)
    finite = x.isfinite()
    torch.testing.assert_close(y[finite], expected[finite], **tolerance)
    assert y[x.isnan()].isnan().all()
    # Infinity minus infinity is NaN, where y is the sum; where it is x times its slope there is a limit.
    plain = torch_path(x, 0.9, q)
    torch.testing.assert_close(y[x.isinf()], plain[x.isinf()], equal_nan=True)
    for exact in (False, True):
        slope = launch(torch.ones_like(x), x, 0.9, NoiseParams(q), exact=exact)
        wide = (reference.slope(x.double(), xi, q, 1.0, 1.0, exact) - 1).clamp(-info.max, info.max) + 1
        if dtype == torch.float64 or q <= 4:
            torch.testing.assert_close(slope[finite], wide.to(dtype)[finite], **tolerance)
        assert slope[finite].isfinite().all()
        assert slope[x.isnan()].isnan().all()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_move_a_bit(dtype):
    x, grad = (torch.randn(300_001).to(dtype) for _ in range(2))
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            tensors = [launch(None, x, 0.3, NoiseParams(1.3)), launch(grad, x, 0.3, NoiseParams(2.5))]
            results.append((torch.stack(tensors), cpu.matched(x, 1.3), cpu.matched(x, 3.0)))
    finally:
        torch.set_num_threads(before)
    for tensors, *scales in results[1:]:
        assert torch.equal(tensors, results[0][0])
        assert scales == list(results[0][1:])


def has_fma():
    """Whether the processor has the instructions of the level x86-64-v3, and the compiler made code for each level."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = re.findall(r"^flags\s*:(.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    clones = cpu.LIBRARY.exists() and b".arch_x86_64_v3" in cpu.LIBRARY.read_bytes()
    return clones and bool(flags) and {"avx2", "fma", "bmi2", "movbe"} <= set(flags[0].split())


@pytest.mark.skipif(not has_fma(), reason="a processor with FMA, of x86, and code for it")
@needs_kernel
def test_a_processor_with_fma_runs_the_code_that_has_it():
    x, p, amplitude = torch.randn(1000), 0.3, 1.1
    y = launch(None, x, p, NoiseParams(0.0, 1.0, amplitude))
    # The exact product of two fp32, and one rounding of the sum. With two roundings a sixth of them differ.
    xi = noise(x, p).float().double()
    assert torch.equal(y, (x.double() + x.double().sign() * torch.tensor(amplitude).double() * xi).float())


@pytest.mark.skipif(torch_internals.parallel_for() is None, reason="this torch does not lend its threads")
@needs_kernel
def test_the_threads_are_torchs():
    script = """
import os, torch
from sparseout.kernels import cpu
x = torch.randn(2_000_000)
torch.set_num_threads(1)
run = lambda: cpu.run(cpu.VALUE, None, x, 1, 0.3, (1.3, 1.0, 1.0), ())
run(); alone = len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
run(); print(len(os.listdir("/proc/self/task")) - alone)
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in /proc")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2


@needs_kernel
@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 1.3, 1.5, 2.0, 3.0, 6.0, 9.0])
def test_matched_is_the_definition(q):
    for dtype, factor in itertools.product(DTYPES, (1.0, 1e-25, 1e30)):
        for size in (0, 1, 5, 1024, 300_001):
            x = (torch.randn(size).relu() * factor).to(dtype)
            ours = NoiseParams(q, *cpu.matched(x, q)).balanced(torch.float64).numbers()
            theirs = NoiseParams(q, *reference.matched(x.double(), q)).balanced(torch.float64).numbers()
            infinite = not x.isfinite().all()
            assert ours == pytest.approx((q, 1.0, 1.0) if infinite else theirs, rel=2e-6)
    for numbers in ([0.0, 0.0], [1.0, math.inf], [1.0, math.nan, 2.0], [math.nan] * 2000, [-math.inf] + [1.0] * 5000):
        assert cpu.matched(torch.tensor(numbers), q) == (1.0, 1.0)


@needs_kernel
def test_a_gradient_of_another_dtype_or_shape_is_not_read_as_what_it_is_not():
    x = torch.randn(100, 3)
    right = launch(torch.full_like(x, 2.0), x, 0.3, NoiseParams(1.5))
    for grad in (torch.tensor(2.0), torch.full((3,), 2.0, dtype=torch.float64), torch.full((100, 1), 2.0).half()):
        assert torch.equal(launch(grad, x, 0.3, NoiseParams(1.5)), right)


@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_zeros_that_are_not_written_down_and_negatives_that_are_not_applied_are_read_right(gradient):
    x, zeros = torch.randn(5, requires_grad=True), torch._efficientzerotensor((5,))
    y = sparseout(x, 0.3, 1.5, gradient=gradient, seed=1)
    assert torch.equal(torch.autograd.grad(y, x, zeros, retain_graph=True)[0], torch.zeros(5))
    assert torch.equal(sparseout(zeros, 0.3, 1.5, seed=1), torch.zeros(5))
    negative = torch._neg_view(x.detach())
    right = sparseout(-x.detach(), 0.3, 1.5, gradient=gradient, seed=1)
    assert torch.equal(sparseout(negative, 0.3, 1.5, gradient=gradient, seed=1), right)
    (slope,) = torch.autograd.grad(y, x, torch.ones(5), retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, torch._neg_view(torch.ones(5)))[0], -slope)


@needs_kernel
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


@needs_kernel
def test_what_is_not_there_or_not_ours_is_not_used(monkeypatch, tmp_path):
    x = torch.randn(100)
    right = sparseout(x, 0.3, 1.5, seed=1)
    stale, broken = tmp_path / "stale.so", tmp_path / "broken.so"
    broken.write_text("no library")
    stale.write_bytes(cpu.LIBRARY.read_bytes())
    for library, sentence in (
        (tmp_path / "none.so", "was not compiled when sparseout was installed; install a C compiler (or"),
        (broken, "cannot be loaded"),
        (stale, "was compiled from another version of sparseout; install sparseout again"),
    ):
        monkeypatch.delenv("SPARSEOUT_BACKEND", raising=False)
        monkeypatch.setattr(cpu, "LIBRARY", library)
        monkeypatch.setattr(cpu, "fingerprint", lambda: "another")
        for function in (cpu.obstacle, cpu._library, cpu._plan):
            function.cache_clear()
        try:
            assert backend("cpu").name == "torch"
            assert sentence in backend("cpu").reason
            torch.testing.assert_close(sparseout(x, 0.3, 1.5, seed=1), right)
            monkeypatch.setenv("SPARSEOUT_BACKEND", "native")
            for call in (lambda: backend("cpu"), lambda: sparseout(x, 0.3, 1.5, seed=1)):
                with pytest.raises(RuntimeError, match="SPARSEOUT_BACKEND=native cannot be followed: the native ker"):
                    call()
        finally:
            monkeypatch.undo()
            for function in (cpu.obstacle, cpu._library, cpu._plan):
                function.cache_clear()


AVAILABLE = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.slow
@pytest.mark.skipif(
    AVAILABLE < 12, reason=f"2^31 elements of bf16 in and out need 12 GiB, and {AVAILABLE:.0f} are free"
)
@needs_kernel
def test_more_than_2_to_the_31_elements():
    n, p = 2**31 + 5, 0.5
    y = launch(None, torch.ones((), dtype=torch.bfloat16).expand(n).contiguous(), p, NoiseParams(2.0))
    first = n // 4 - 10
    draws = masks.words(SEED, 12, first).view(torch.int16)
    assert torch.equal(y[4 * first :] != 0, draws[: n - 4 * first] >= 0)
