"""The registered ops keep torch's rules for ops, and eager tensors, which go around them, get the same."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sparseout.kernels import ops

SEED = torch.tensor(5)
P = torch.tensor(0.3, dtype=torch.float64)


@pytest.mark.parametrize("shared", range(3))
@pytest.mark.parametrize("dtype", range(3))
def test_opcheck(dtype, shared):
    """Every two of the choices meet, of q as numbers or a tensor and of the gradient as well."""
    packed = [([1.3, 1.0, 1.0], None), ([], torch.tensor([1.3, 2.0, 0.5]))][(dtype + shared) % 3 % 2]
    exact = (dtype + 2 * shared) % 3 > 0
    dtype, shared_dims = [torch.float32, torch.bfloat16, torch.float64][dtype], [[], [0], [1, 2]][shared]
    x = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    for p in ((), (P,)):
        opcheck(torch.ops.sparseout.forward.default, (x, SEED, 0.3, *packed, shared_dims, exact, *p))
    x, grad = x.detach(), torch.randn_like(x).detach()
    for p in ((), (P,)):
        opcheck(torch.ops.sparseout.backward.default, (grad, x, SEED, 0.3, *packed, shared_dims, exact, *p))


@pytest.mark.parametrize("shared_dims", [[], [0]])
def test_opcheck_of_the_slope(shared_dims):
    opcheck(torch.ops.sparseout.slope.default, (torch.randn(3, 4), SEED, 0.3, [1.3, 1.0, 1.0], shared_dims))


def test_opcheck_of_the_noise():
    opcheck(torch.ops.sparseout.noise.default, (SEED, P, [3, 4], torch.float32))


def test_backward_keeps_the_layout_that_it_promises():
    x, grad = torch.randn(4, 5), torch.randn(5, 4).t()
    result = torch.ops.sparseout.backward(grad, x, SEED, 0.3, [1.3, 1.0, 1.0], None, [], False)
    assert result.is_contiguous()
    expected = torch.ops.sparseout.backward(grad.contiguous(), x, SEED, 0.3, [1.3, 1.0, 1.0], None, [], False)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("batched", [("x",), ("seed",), ("packed",), ("grad",), ("grad", "x", "seed", "packed")])
def test_vmap_rules_are_the_loop(batched, request):
    def draw(name, make):
        return torch.stack([make() for _ in range(4)], dim=1 if make().dim() else 0) if name in batched else make()

    x, grad = draw("x", lambda: torch.randn(600, 500)), draw("grad", lambda: torch.randn(600, 500))
    seed = draw("seed", lambda: torch.randint(2**40, ()))
    packed = draw("packed", lambda: torch.rand(3) + 0.5)
    arguments = {"grad": grad, "x": x, "seed": seed, "packed": packed}
    in_dims = tuple((0 if name == "seed" else 1) if name in batched else None for name in arguments)

    pairs = list(zip(arguments.values(), in_dims, strict=True))

    def forward(grad, x, seed, packed):
        return torch.ops.sparseout.forward(x, seed, 0.3, [], packed, [0], False)

    def backward(grad, x, seed, packed):
        return torch.ops.sparseout.backward(grad, x, seed, 0.3, [], packed, [0], True)

    for op in (forward, backward):
        torch._C._functorch._set_vmap_fallback_enabled(False)  # or it would do, and tell nobody
        request.addfinalizer(lambda: torch._C._functorch._set_vmap_fallback_enabled(True))
        rows = [
            op(*(value if dim is None else value.select(dim, place).contiguous() for value, dim in pairs))
            for place in range(4)
        ]
        result = torch.vmap(op, in_dims)(*arguments.values())
        assert torch.equal(result, torch.stack(rows))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shared_dims", [(), (1,)])
@pytest.mark.parametrize("q", [0.1, 1.0, 1.3, 2.0, 3.0, torch.tensor(1.7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_eager_tensors_get_what_the_ops_give_and_a_mode_sees_the_ops(dtype, q, shared_dims, exact):
    def results():
        x = torch.linspace(-2, 2, 300).view(20, 15).to(dtype).requires_grad_()
        y = ops.apply(x, SEED, 0.3, q, None, shared_dims, exact)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y) * 0.3)
        with torch.no_grad():
            return y.detach(), grad, ops.apply(x, SEED, 0.3, q, None, shared_dims, exact)

    with Recorder() as recorder:
        seen = results()
    steep = isinstance(q, torch.Tensor) or (q == 0.1 and dtype == torch.float32)
    keeps_slope = dtype != torch.bfloat16 and not exact and not steep
    names = ["slope", "forward"] if keeps_slope else ["forward", "backward", "forward"]
    assert [name for name in recorder.seen if "sparseout" in name] == [f"sparseout.{name}.default" for name in names]
    for ours, theirs in zip(results(), seen, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


def test_a_subclass_of_tensor_sees_the_ops():
    class Seeing(torch.Tensor):
        seen = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(5).as_subclass(Seeing)
    y = ops.apply(x, SEED, 0.3, 1.0, None, (), False)
    assert type(y) is Seeing
    assert any("sparseout.forward" in name for name in Seeing.seen)


def test_nothing_is_drawn_or_computed_for_a_batch_of_none():
    assert torch.ops.sparseout.forward(torch.ones(0, 3), SEED, 0.3, [1.0, 1.0, 1.0], None, [0], False).shape == (0, 3)
