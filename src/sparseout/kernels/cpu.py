"""The operation on a CPU: calls the compiled cpu.c through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseout._utils import torch_internals
from sparseout.kernels import mask as masks
from sparseout.kernels.params import NoiseArguments, Numbers

SOURCES = sorted(Path(__file__).parent.glob("*.c"))
LIBRARY = Path(__file__).with_name("_native.so")  # also on macOS: ctypes does not care

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
VALUE, SLOPE, GRADIENT = range(3)  # what to compute


class _Plan(ctypes.Structure):
    """The struct of the same name in cpu.c."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("what", "dtype", "exact", "bits", "threshold", "runs")),
        *((name, ctypes.c_double) for name in ("q", "kept", "limit")),
        ("repeat", ctypes.c_int64),
        *((name, ctypes.c_int64 * 64) for name in ("sizes", "steps")),
    ]


def fingerprint() -> str:
    """A hash of the sources: what is compiled from another version is not used."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]


@functools.cache
def obstacle() -> str:
    """The reason why the kernel cannot be used, and what to do; empty if it can be."""
    if not LIBRARY.exists():
        todo = "install a C compiler (or name one in CC) and install sparseout again"
        return f"the native kernel was not compiled when sparseout was installed; {todo}"
    try:
        library = _library()
    except (OSError, AttributeError) as error:
        return f"the native kernel cannot be loaded ({error}); install sparseout again"
    if ctypes.string_at(library.sparseout_source()).decode() != fingerprint():
        return "the native kernel was compiled from another version of sparseout; install sparseout again"
    return ""


@functools.cache
def threads() -> str:
    """A sentence about the threads in which the kernel runs."""
    if torch_internals.parallel_for() is None:
        return f"compiled at installation, in one thread: torch {torch.__version__} cannot lend it more, as 2.10 does"
    return "compiled at installation, in torch's threads"


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(str(LIBRARY))
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    library.sparseout_source.restype = pointer
    library.sparseout_run.argtypes = [pointer] * 4 + [integer] * 2 + [real] * 2
    library.sparseout_matched.argtypes = [pointer] * 2 + [integer] + [pointer] * 2
    library.sparseout_set_parallel_for.argtypes = [pointer]
    library.sparseout_linear.argtypes = [ctypes.c_int32] + [pointer] * 4 + [integer] * 5
    for function in (library.sparseout_run, library.sparseout_matched, library.sparseout_set_parallel_for):
        function.restype = None
    library.sparseout_set_parallel_for(torch_internals.parallel_for())
    return library


def supports(x: Tensor, shared_dims: Sequence[int]) -> bool:
    """Whether the kernel takes such an `x` and such a mask."""
    return x.dtype in _DTYPES


def launch(grad: Tensor | None, x: Tensor, noise: NoiseArguments) -> Tensor:
    """Sparseout of a contiguous `x` if there is no `grad`, else `grad` times the slope at x: the ops of `ops`."""
    arguments = int(noise.seed), noise.p, noise.params.numbers(), noise.shared_dims
    return run(VALUE, None, x, *arguments) if grad is None else run(GRADIENT, grad, x, *arguments, noise.exact)


def run(
    what: int,
    grad: Tensor | None,
    x: Tensor,
    seed: int,
    p: float,
    params: Numbers,
    shared_dims: Sequence[int],
    exact: bool = False,
) -> Tensor:
    """What is asked for at a contiguous `x`: y (`VALUE`), the slope dy/dx, of fp32 or fp64, or `grad` times it."""
    q, scale_unit, amplitude = params
    plan, call = _plan(what, x.dtype, p, q, x.shape if shared_dims else (), tuple(shared_dims), exact)
    if grad is not None:
        if grad.dtype != x.dtype or grad.shape != x.shape:
            grad = grad.to(x.dtype).expand_as(x)
        grad = grad.contiguous()  # held until the call is over
    out = torch.empty_like(x)
    address = None if grad is None else grad.data_ptr()
    call(plan, out.data_ptr(), address, x.data_ptr(), x.numel(), seed, scale_unit, amplitude)
    return out


def matched(x: Tensor, q: float) -> tuple[float, float]:
    """The `scale_unit` and `amplitude` of `reference.matched` for a contiguous `x`."""
    scale_unit, amplitude = ctypes.c_double(), ctypes.c_double()
    plan, _ = _plan(VALUE, x.dtype, 0.5, q, (), (), False)
    _library().sparseout_matched(plan, x.data_ptr(), x.numel(), ctypes.byref(scale_unit), ctypes.byref(amplitude))
    return scale_unit.value, amplitude.value


def linear(x: Tensor, columns: Tensor, bias: Tensor | None, most: int) -> Tensor | None:
    """The output of a linear layer from the columns, rows of the contiguous `columns`, whose x is not 0.

    None if more than `most` numbers of the contiguous `x` are not 0. All are of one dtype, and none is empty.
    """
    ins, outs = columns.shape
    rows, threads = x.numel() // ins, torch.get_num_threads()
    width = outs if threads == 1 or rows >= threads else max(64, -(-outs * rows // threads))
    y = torch.empty((*x.shape[:-1], outs), dtype=x.dtype, device="cpu")
    address = None if bias is None else bias.data_ptr()
    call = _library().sparseout_linear
    done = call(_DTYPES[x.dtype], y.data_ptr(), x.data_ptr(), columns.data_ptr(), address, rows, ins, outs, width, most)
    return y if done else None


@functools.lru_cache(maxsize=1024)
def _plan(
    what: int, dtype: torch.dtype, p: float, q: float, shape: Sequence[int], shared_dims: Sequence[int], exact: bool
) -> tuple[Any, Any]:
    """The arguments that do not change from call to call, cached: on small tensors the host's time is all there is."""
    bits, threshold = masks.bits_and_threshold(p)
    effective = masks.effective_p(p)
    plan = _Plan(
        what=what,
        dtype=_DTYPES[dtype],
        exact=exact,
        bits=bits,
        threshold=masks.signed(threshold, bits),
        q=q,
        kept=effective / (1 - effective),
        limit=torch.finfo(dtype).max,
    )
    runs = masks.runs(shape, shared_dims)
    plan.repeat = runs.pop()[0] if runs and runs[-1][1] else 1
    runs = runs or [(1 if shape else 2**62, False)]
    plan.runs = len(runs)
    step = 1
    for index, (size, shared) in enumerate(reversed(runs)):
        plan.sizes[index], plan.steps[index] = size, 0 if shared else step
        step *= 1 if shared else size
    return ctypes.pointer(plan), _library().sparseout_run
