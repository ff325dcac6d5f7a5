"""The registered ops keep torch's rules for ops."""

import pytest
import torch
from torch.library import opcheck

SEED = torch.tensor(5)


@pytest.mark.parametrize("shared_dims", [[], [0], [1, 2]])
@pytest.mark.parametrize(
    "curve", [([1.3, 1.0, 1.0], None), ([], torch.tensor([1.3, 2.0, 0.5]))], ids=["floats", "tensor"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exact", [False, True])
def test_opcheck(exact, dtype, curve, shared_dims):
    x = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    opcheck(torch.ops.sparseout.forward.default, (x, SEED, 0.3, *curve, shared_dims, exact))
    x, grad = x.detach(), torch.randn_like(x).detach()
    opcheck(torch.ops.sparseout.backward.default, (grad, x, SEED, 0.3, *curve, shared_dims, exact))


def test_backward_keeps_the_layout_that_it_promises():
    x, grad = torch.randn(4, 5), torch.randn(5, 4).t()
    result = torch.ops.sparseout.backward(grad, x, SEED, 0.3, [1.3, 1.0, 1.0], None, [], False)
    assert result.is_contiguous()
    expected = torch.ops.sparseout.backward(grad.contiguous(), x, SEED, 0.3, [1.3, 1.0, 1.0], None, [], False)
    assert torch.equal(result, expected)
