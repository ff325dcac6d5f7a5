"""k-winners-take-all: exactly k, their gradients, boosting by duty cycles, and the state of these."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from sparseout.baselines import KWinners


@pytest.mark.parametrize("shape", [(7, 20), (20,), (3, 4, 20), (5, 4, 5, 4), (2, 4, 5, 2, 2)])
@pytest.mark.parametrize("k", [1, 6, 0.25, 0.001, 20])
def test_exactly_k_win_and_they_are_the_largest(k, shape):
    x = torch.randn(shape)
    y = KWinners(k)(x)
    competing = x.flatten(1) if x.dim() > 3 else x.reshape(-1, 20)
    out = y.flatten(1) if x.dim() > 3 else y.reshape(-1, 20)
    count = k if isinstance(k, int) else max(1, round(k * competing.shape[1]))
    assert torch.equal((out != 0).sum(1), torch.full((len(out),), count))
    threshold = competing.sort(descending=True).values[:, count - 1 : count]
    assert torch.equal(out, torch.where(competing >= threshold, competing, 0.0))


def test_ties_do_not_make_more_winners():
    assert (KWinners(3)(torch.ones(5, 8)) != 0).sum(1).tolist() == [3] * 5


@pytest.mark.parametrize("boost", [0.0, 5.0])
def test_the_gradient_goes_to_the_winners_alone(boost):
    x = torch.rand(5, 8, requires_grad=True)
    layer = KWinners(2, boost=boost)
    layer(torch.rand(50, 8))
    y = layer(x)
    weight = torch.rand(5, 8)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight * (y != 0))
    assert torch.equal(y, x.detach() * (y != 0))  # boosted values choose, they are not put out


def test_another_k_in_evaluation_and_duty_cycles_at_rest():
    layer, x = KWinners(2, k_eval=0.5), torch.rand(5, 8)
    assert (layer(x) != 0).sum(1).tolist() == [2] * 5
    before = layer.duty_cycle.clone()
    assert (layer.eval()(x) != 0).sum(1).tolist() == [4] * 5
    assert torch.equal(layer.duty_cycle, before)


def test_the_duty_cycle_is_a_moving_average():
    layer = KWinners(1, momentum=0.25)
    first, second = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    layer(first)
    assert layer.duty_cycle.tolist() == [0.125, 0.125, 0.0]
    layer(second)
    assert layer.duty_cycle.tolist() == [0.09375, 0.09375, 0.25]


def test_the_boost_is_that_of_the_equation():
    layer = KWinners(1, boost=2.0, units=2).eval()
    layer.duty_cycle.copy_(torch.tensor([0.8, 0.2]))
    even = math.exp(2.0 * (0.8 - 0.2))  # b_2 / b_1
    for ratio, winner in ((even * 0.999, 1), (even * 1.001, 0)):
        assert layer(torch.tensor([[ratio, 1.0]])).argmax().item() == winner


@pytest.mark.parametrize("boost", [0.0, 10.0])
def test_boosting_evens_out_who_wins(boost):
    torch.manual_seed(0)
    layer = KWinners(5, boost=boost)
    scale = torch.linspace(0.5, 1.5, 50)
    for _ in range(400):
        layer(torch.rand(20, 50) * scale)
    spread = layer.duty_cycle.max() - layer.duty_cycle.min()
    assert spread > 0.2 if boost == 0 else spread < 0.15
    assert layer.duty_cycle.sum().item() == pytest.approx(5 * (1 - 0.99**400), rel=1e-4)


def test_a_map_competes_as_a_whole_and_counts_by_channel():
    x = torch.zeros(1, 3, 2, 2)
    x[0, 1] = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    x[0, 2, 0, 0] = 5.0
    layer = KWinners(3, momentum=1.0)
    y = layer(x)
    assert y[0, 1].tolist() == [[4.0, 3.0], [0.0, 0.0]]
    assert y[0, 2, 0, 0] == 5
    assert layer.duty_cycle.tolist() == [0.0, 0.5, 0.25]
    layer = KWinners(2, boost=3.0, units=3).eval()
    layer.duty_cycle.copy_(torch.tensor([0.0, 0.9, 0.9]))
    assert layer(x + 1)[0, 0].count_nonzero() == 2  # the channel that has not won yet, though its values are least


def test_memory_format_and_dtype_are_kept():
    x = torch.rand(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    y = KWinners(6)(x)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.contiguous(), KWinners(6)(x.contiguous()))


@pytest.mark.parametrize("units", [None, 8])
def test_the_state_goes_on(units):
    layer = KWinners(2, boost=3.0, units=units)
    for _ in range(5):
        layer(torch.rand(4, 8))
    other = KWinners(2, boost=3.0, units=units)
    other.load_state_dict(layer.state_dict())
    x = torch.rand(4, 8)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer.duty_cycle, other.duty_cycle)
    assert not torch.equal(layer.duty_cycle, torch.zeros(8))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    other.load_state_dict(KWinners(2).state_dict())  # of a layer that has seen nothing
    other(torch.rand(4, 3))
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda layer: layer.to(torch.bfloat16)])
@pytest.mark.parametrize("units", [2, None])
def test_duty_cycles_move_in_a_half_dtype(cast, units):
    layer = cast(KWinners(1, boost=0, units=units))
    x = torch.eye(2, dtype=torch.bfloat16)
    for step in range(2000):
        layer(x[step % 2, None])
    assert layer.duty_cycle.tolist() == pytest.approx([0.5, 0.5], abs=0.003)
    layer.bfloat16()
    assert layer.duty_cycle.dtype == torch.float32
    half = {name: value.bfloat16() for name, value in layer.state_dict().items()}
    for assign in (True, False):
        other = KWinners(1, boost=0, units=units)
        other.load_state_dict(half, assign=assign)
        assert other.duty_cycle.dtype == torch.float32
        assert other.duty_cycle.tolist() == pytest.approx([0.5, 0.5], abs=0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_duty_cycles_are_fp32_whatever_the_default(dtype):
    torch.set_default_dtype(dtype)
    try:
        layer = KWinners(1)
        layer(torch.ones(1, 2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.duty_cycle.dtype == torch.float32


def test_a_layer_born_in_inference_mode_trains():
    with torch.inference_mode():
        layer = KWinners(1)
        layer(torch.ones(1, 2))
    layer(torch.ones(1, 2, requires_grad=True)).sum().backward()


def test_a_layer_in_shared_memory_trains():
    layer = KWinners(1, momentum=0.5).share_memory()
    layer(torch.tensor([[1.0, 3.0, 2.0]]))  # makes the duty cycles
    assert layer.duty_cycle.tolist() == [0.0, 0.5, 0.0]
    loaded = KWinners(1).share_memory()
    loaded.load_state_dict(layer.state_dict())
    assert loaded.duty_cycle.tolist() == [0.0, 0.5, 0.0]


def test_a_boost_beyond_the_dtype_still_prefers_the_largest():
    x = torch.tensor([[1.0, 3.0, 2.0]])
    assert KWinners(1, boost=1000.0)(x).tolist() == [[0.0, 3.0, 0.0]]
    layer = KWinners(1, boost=1000.0, units=3).eval()
    layer.duty_cycle.copy_(torch.tensor([0.5, 0.5, 0.0]))
    assert layer(x).tolist() == [[0.0, 0.0, 2.0]]


def test_whole_numbers_stay_whole():
    y = KWinners(1)(torch.tensor([[1, 3, 2]]))
    assert y.dtype == torch.int64
    assert y.tolist() == [[0, 3, 0]]


@pytest.mark.parametrize("shape", [(2, 5, 5, 8), (2, 3, 5, 5, 8), (3, 8)])
def test_units_in_the_last_dim_of_maps(shape):
    x = torch.rand(shape)
    for layer in (KWinners(2, unit_dim=-1), KWinners(2, units=8)):
        flat = KWinners(2)
        assert torch.equal(layer(x), flat(x.reshape(-1, 8)).view(shape))
        assert torch.equal(layer.duty_cycle, flat.duty_cycle)


@pytest.mark.parametrize("unit_dim", [1, lambda name, module, x: 1 if x.dim() == 3 else None, {KWinners: 1}])
def test_units_of_sequences(unit_dim):
    x = torch.rand(2, 4, 5)
    layer, as_map = KWinners(3, unit_dim=unit_dim), KWinners(3)
    assert torch.equal(layer(x), as_map(x[..., None])[..., 0])
    assert torch.equal(layer.duty_cycle, as_map.duty_cycle)
    assert copy.deepcopy(layer)(x).shape == x.shape


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_rows_are_rows(layout):
    torch.manual_seed(0)
    parts = [torch.rand(2, 4), torch.rand(3, 4)]
    layer, plain = KWinners(1, boost=3.0, momentum=0.5), KWinners(1, boost=3.0, momentum=0.5)
    for _ in range(2):
        x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
        y = layer(x)
        out = torch.cat(y.unbind())
        assert torch.equal(out, plain(torch.cat(parts)))
        assert torch.equal(layer.duty_cycle, plain.duty_cycle)
        (x + y).unbind()  # of the same rows
        out.sum().backward()
        assert torch.equal(torch.cat(x.grad.unbind()), (out != 0).float())


@pytest.mark.parametrize("places", [[Replicate()], [Shard(0)], [Shard(1)], [Partial()]])
def test_sharded_rows_are_rows(places, process_group):
    x = torch.rand(6, 4)
    layer, plain = KWinners(1), KWinners(1)
    sharded = DTensor.from_local(x, init_device_mesh("cpu", (1,)), places)
    y = layer(sharded)
    assert torch.equal(y.full_tensor(), plain(x))
    assert y.placements == ((Replicate(),) if places == [Partial()] else tuple(places))
    assert torch.equal(layer.duty_cycle, plain.duty_cycle)


def test_compiled_it_is_the_same():
    layer = KWinners(0.25, boost=1.0, units=8)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.rand(4, 8)
        assert torch.equal(layer(x), compiled(x))
    assert torch.equal(layer.duty_cycle, compiled.duty_cycle)


def test_it_trains_a_sparse_code():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), KWinners(3, boost=1.0), nn.Linear(16, 8))
    x = torch.rand(200, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert ((model[:3](x) != 0).sum(1) <= 3).all()


WISH = "a whole number >= 1 (of units) or a number > 0 and < 1 (the fraction of them)"


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: KWinners(0), ValueError, f"expected `k` to be {WISH}, but got 0"),
        (lambda: KWinners(1.5), ValueError, f"expected `k` to be {WISH}, but got 1.5"),
        (lambda: KWinners(True), TypeError, f"expected `k` to be {WISH}, but got True"),
        (lambda: KWinners(k_eval=-0.5), ValueError, f"expected `k_eval` to be {WISH}, but got -0.5"),
        (lambda: KWinners(boost=-1), ValueError, "expected `boost` to be a finite number >= 0, but got -1"),
        (lambda: KWinners(momentum=0), ValueError, "expected `momentum` to be a number > 0 and <= 1, but got 0"),
        (lambda: KWinners(units=0), ValueError, "expected `units` to be an int >= 1, but got 0"),
        (lambda: KWinners(units=2.0), TypeError, "expected `units` to be an int >= 1, but got a float"),
        (
            lambda: KWinners(9)(torch.rand(2, 8)),
            ValueError,
            "expected `k` to be at most 8, the units that compete, but got 9",
        ),
        (
            lambda: KWinners(2, units=7)(torch.rand(2, 8)),
            ValueError,
            "expected `x` to be an input of 7 units, as before, but got one of 8",
        ),
        (
            lambda: KWinners(2)(torch.rand(())),
            ValueError,
            "expected `x` to be of at least one dim and one unit, but got shape ()",
        ),
    ],
)
def test_errors(call, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call()
