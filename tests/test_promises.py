"""What README and home promise of the function and the layers: everywhere, the same values and gradients."""

import functools
from pathlib import Path

import pytest
import torch
from torch.func import jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import sparseout
from sparseout import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d

ROOT = Path(__file__).parent.parent
FUNCTION = functools.partial(sparseout.sparseout, p=0.5, q=1.5, seed=3, gradient="exact")
SHAPES = {
    Sparseout: (3, 6),
    Sparseout1d: (2, 3, 4),
    Sparseout2d: (2, 3, 2, 3),
    Sparseout3d: (2, 3, 2, 2, 2),
}
CASES = [(FUNCTION, (3, 6)), *((layer(0.5, 1.5, seed=3, gradient="exact"), shape) for layer, shape in SHAPES.items())]
each = pytest.mark.parametrize(("call", "shape"), CASES, ids=["function", *(layer.__name__ for layer in SHAPES)])
in_each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def under_autocast(call):
    def inner(x):
        with torch.autocast("cpu", torch.bfloat16):
            return call(x)

    return inner


WAYS = {
    "compile": lambda call: torch.compile(call, fullgraph=True, backend="aot_eager"),
    "autocast": under_autocast,
    "checkpoint": lambda call: lambda x: checkpoint(call, x, use_reentrant=False),
    "vmap": lambda call: lambda x: vmap(call)(x[None])[0],
}


def value_and_gradient(call, x):
    x = x.clone().requires_grad_()
    y = call(x)
    y.double().mul(torch.arange(1.0, 1 + y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad


@each
@in_each_dtype
@pytest.mark.parametrize("way", WAYS)
def test_everywhere_the_same(call, shape, dtype, way):
    x = torch.randn(shape, dtype=dtype)
    for found, expected in zip(value_and_gradient(WAYS[way](call), x), value_and_gradient(call, x), strict=True):
        assert found.dtype == dtype
        assert expected.std() > 0
        torch.testing.assert_close(found, expected)


@each
def test_double_backward_and_forward_mode(call, shape):
    x = torch.rand(shape, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)
    direction = torch.randn_like(x)
    torch.testing.assert_close(jvp(call, (x,), (direction,))[1], vjp(call, x)[1](torch.ones_like(x))[0] * direction)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_these_are_what_is_promised(name):
    text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
    promise = (
        "under `torch.compile(fullgraph=True)`, autocast, activation checkpointing, `torch.func` and double backward"
    )
    assert promise in text
