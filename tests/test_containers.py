"""Nested tensors, whose rows differ in length, and DTensors, which are spread over processes."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from torch import nn

from sparseout import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d, sparseout

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

ROWS = [(2, 8), (0, 8), (5, 8)]


def nested(kind):
    rows = [torch.randn(shape) for shape in ROWS]
    if kind == "strided":
        return torch.nested.nested_tensor(rows)
    if kind == "holes":
        starts, lengths = torch.tensor([1, 0, 0]), torch.tensor([2, 0, 5])
        padded = torch.full((3, 5, 8), 1e20)  # between the rows
        for start, length, row, target in zip(starts, lengths, rows, padded, strict=True):
            target[start : start + length] = row
        return torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    return jagged.transpose(1, 2) if kind == "transposed" else jagged


def noise(y, x, q, beta=1.0):
    return (y - x) / (beta * x.sign() * x.abs() ** (q / 2))


@pytest.mark.parametrize("settings", [{}, {"scale": "matched"}, {"scale": 0.5, "gradient": "exact"}])
@pytest.mark.parametrize("q", [1.0, torch.tensor(1.5)])
@pytest.mark.parametrize("kind", ["strided", "jagged", "transposed", "holes"])
def test_rows_get_noise_of_their_own_in_one_scale(kind, q, settings):
    x = nested(kind).detach().requires_grad_()
    layer = Sparseout(0.5, q, **settings)
    y = layer(x)
    assert (y.is_nested, y.layout, y.dtype) == (True, x.layout, x.dtype)
    rows = [row.detach() for row in x.unbind()]
    values = torch.cat([row.flatten() for row in rows])
    power = float(q)
    beta = {None: 1.0, 0.5: 0.5 ** (1 - power / 2)}.get(layer.scale if layer.scale != "matched" else 0)
    beta = beta or (values.square().mean() / values.abs().pow(power).mean()).sqrt()
    xi = [noise(y_.detach(), x_, power, beta) for y_, x_ in zip(y.unbind(), rows, strict=True)]
    together = torch.cat([row.flatten() for row in xi])
    torch.testing.assert_close(together.abs(), torch.ones_like(together), rtol=1e-3, atol=1e-3)
    assert not torch.equal(xi[0].flatten().sign(), xi[2].flatten()[:16].sign())
    sum(row.sum() for row in y.unbind()).backward()
    factor = power / 2 if layer.gradient == "exact" else 1
    for row, xi_, grad in zip(rows, xi, x.grad.unbind(), strict=True):
        torch.testing.assert_close(grad, 1 + factor * beta * row.abs() ** (power / 2 - 1) * xi_, rtol=1e-3, atol=1e-3)
    if x.layout is torch.jagged:
        assert (x + y).shape == x.shape  # ragged in the same way, as torch compares it
    assert layer.eval()(x) is x


@pytest.mark.parametrize("kind", ["strided", "jagged"])
def test_q_2_is_torchs_dropout_in_bits(kind):
    x = nested(kind)
    torch.manual_seed(1)
    expected = nn.Dropout(0.5)(x)
    torch.manual_seed(1)
    y = Sparseout(0.5, 2.0)(x)
    assert all(map(torch.equal, y.unbind(), expected.unbind()))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("q", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["strided", "jagged", "transposed"])
@pytest.mark.parametrize(("layer", "dims"), [(Sparseout1d, (1,)), (Sparseout2d, (1,)), (Sparseout3d, (0, 1))])
def test_channels_within_rows(layer, dims, kind, q, inplace):
    x = nested(kind)
    x = x.__class__.detach(x * 0 + 1)  # ones, ragged as x is
    y = layer(0.5, q, inplace)(x)
    assert (y is x) == inplace
    firsts = []
    for row in y.unbind():
        if row.numel():
            assert (row == row.amax(dims, keepdim=True)).all()
            firsts += row.amax(dims).flatten().tolist()
    assert set(firsts) <= {0.0, 2.0}
    assert layer is Sparseout3d or len(set(firsts)) == 2


def test_what_rows_cannot_share_is_said():
    x = nested("jagged")
    with pytest.raises(ValueError, match="`shared_dims` to be dims within the rows of a nested tensor, but got"):
        sparseout(x, 0.5, 1.0, shared_dims=(0,))
    with pytest.raises(ValueError, match="other than the ragged one of a tensor with lengths"):
        sparseout(nested("holes"), 0.5, 1.0, shared_dims=(1,))


def test_a_jagged_tensor_in_compiled_code():
    layer = Sparseout(0.5, 1.0, scale="matched", seed=torch.tensor(3))
    x = nested("jagged")
    compiled = torch.compile(lambda x: layer(x) + x, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).values(), (layer(x) + x).values())


# DTensors

SHARDED = """
import sys, warnings, torch, torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from sparseout import Sparseout, Sparseout2d

def check(world):
    mesh = init_device_mesh("cpu", (world,))
    full = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))  # 5 rows: parts of unequal size
    for placement in (Shard(0), Shard(1), Replicate(), Partial()):
        for q, scale, gradient in (1.5, None, "detached"), (torch.tensor(1.3), "matched", "exact"), (3.0, 0.5, "exact"):
            layer = Sparseout(0.5, q, scale=scale, gradient=gradient)
            partial = isinstance(placement, Partial)
            x = DTensor.from_local(full / world, mesh, [placement]) if partial else None
            x = (x if partial else distribute_tensor(full, mesh, [placement])).detach().requires_grad_()
            y = layer(x)
            assert type(y) is DTensor and y.shape == full.shape, y
            power = float(q)
            beta = 1.0 if scale is None else 0.5 ** (1 - power / 2)
            if scale == "matched":
                beta = (full.square().mean() / full.abs().pow(power).mean()).sqrt()
            if isinstance(placement, Replicate):
                copies = DTensor.from_local(y.to_local().detach(), mesh, [Shard(0)]).full_tensor().split(5)
                assert all(torch.equal(copy, copies[0]) for copy in copies), "processes disagree on what they share"
            xi = (y.full_tensor().detach() - full) / (beta * full.sign() * full.abs() ** (power / 2))
            torch.testing.assert_close(xi.abs(), torch.ones_like(xi), rtol=1e-3, atol=1e-3)
            if placement == Shard(1) and world == 2:
                assert not torch.equal(xi[:, :4] > 0, xi[:, 4:] > 0), "both parts have the same mask"
            y.sum().backward()
            if not partial:
                factor = power / 2 if gradient == "exact" else 1
                slope = 1 + factor * beta * full.abs() ** (power / 2 - 1) * xi
                torch.testing.assert_close(x.grad.full_tensor(), slope, rtol=1e-3, atol=1e-3)
            assert layer.eval()(x) is x
    maps = distribute_tensor(torch.ones(4, 6, 4, 3), mesh, [Shard(2)])
    y = Sparseout2d(0.5, 1.0, True)(maps)
    assert y is maps
    y = y.full_tensor()
    assert torch.equal(y, y[:, :, :1, :1].expand_as(y)), "a channel has one draw in every process"
    if world == 1:  # importing the compiler takes seconds
        compiled = torch.compile(Sparseout(0.5, 1.5, scale="matched"), fullgraph=True, backend="aot_eager")
        assert type(compiled(distribute_tensor(full, mesh, [Shard(0)]))) is DTensor
"""


def test_a_dtensor_in_one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        names = {}
        exec(SHARDED, names)
        names["check"](1)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_dtensors_in_two_processes(tmp_path):
    code = SHARDED + (
        "\nrank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)\n"
        "check(2)\ndist.barrier()\ndist.destroy_process_group()\n"
        "import os; os._exit(0)\n"  # gloo's threads may abort a process that tidies up at its end
    )
    for done in on_two_ranks(code, tmp_path):
        assert done.returncode == 0, done.stderr
