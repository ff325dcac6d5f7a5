"""Gaussian dropout has the moments of Dropout and the tails of a Gaussian."""

import pytest
import torch
from moments import agrees
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from sparseout.baselines import GaussianDropout, gaussian_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_moments(p):
    x = -1.5
    noise = gaussian_dropout(torch.full((200_000,), x), p) - x
    variance = x**2 * p / (1 - p)
    agrees(noise + 1, 1.0, 0.02)
    agrees(noise.square(), variance, 0.02)
    agrees(noise**4, 3 * variance**2, 0.05)


def test_the_penalty_of_a_linear_model_is_dropouts():
    X, y, w = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (6,), (4,)))
    p = 0.3
    losses = (y - gaussian_dropout(X.expand(20_000, 6, 4), p) @ w).square().sum(1)
    wanted = (y - X @ w).square().sum() + p / (1 - p) * (X.square().sum(0) * w.square()).sum()
    agrees(losses, wanted.item(), 0.02)


def test_shared_dims_share_one_draw():
    x = torch.ones(5, 3, 4)
    out = GaussianDropout(0.5, shared_dims=(0, -1))(x)
    assert torch.equal(out, out[:1, :, :1].expand_as(out))
    assert len(out.unique()) == 3


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_tensors(layout):
    x = torch.nested.nested_tensor([torch.ones(500, 4), torch.ones(1000, 4)], layout=layout)
    out = torch.cat((x + GaussianDropout(0.5)(x)).unbind()) - 1  # of the same rows
    assert out.shape == (1500, 4)
    agrees(out, 1.0, 0.06)
    shared = torch.cat(GaussianDropout(0.5, shared_dims=(1,))(x).unbind())
    assert len(shared.unique()) == 8  # a draw for each example and unit
    with pytest.raises(ValueError, match="`shared_dims` to be dims within the examples of a nested tensor"):
        GaussianDropout(0.5, shared_dims=(0,))(x)


@pytest.mark.parametrize("shared_dims", [(), (0,), (1,)])
@pytest.mark.filterwarnings("ignore:DTensor random operators")  # torch says so of its dropout too
def test_sharded_tensors(shared_dims, process_group):
    x = DTensor.from_local(torch.ones(6, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    out = GaussianDropout(0.5, shared_dims=shared_dims)(x)
    assert out.placements == (Shard(0),)
    assert len(out.full_tensor().unique()) == {(): 24, (0,): 4, (1,): 6}[shared_dims]


def test_in_evaluation_it_is_its_input():
    x = torch.randn(4, 5)
    state = torch.get_rng_state()
    assert GaussianDropout(0.5).eval()(x) is x
    assert GaussianDropout(0.0)(x) is x
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_gradient(dtype):
    x = torch.randn(50, dtype=dtype, requires_grad=True)
    y = gaussian_dropout(x, 0.5)
    assert y.dtype == dtype
    y.sum().backward()
    assert torch.allclose(x.grad.double() * x.double(), y.double(), rtol=3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_floating_point(dtype):
    with pytest.raises(TypeError, match="expected `x` to be a floating-point tensor"):
        gaussian_dropout(torch.ones(3).to(dtype))


def test_channels_last_is_kept():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert gaussian_dropout(x).is_contiguous(memory_format=torch.channels_last)
