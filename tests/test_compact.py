"""Compaction: what went is counted by hand, constants are folded, and what is left computes the same."""

import pytest
import torch
from compacting import ROWS, compacted, mlp, numel, outputs, silence, vgg
from torch import nn

import sparseout
from sparseout.inference import compact


def test_mlp_counted_by_hand():
    model = mlp()
    silence(model[0], [1, 4, 9])  # a row of 5 weights and a bias, a column of 8
    silence(model[3], [0], bias=-1e3, weights=True)  # a row of 16 - 3 weights and a bias, a column of 2
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    hidden = model[1](model[0](x))
    dead = int((hidden == 0).all(0).sum())
    assert dead == 3
    before = numel(model)
    plan = compacted(model, x)
    assert before - numel(model) == plan.parameters - plan.parameters_after == 3 * (5 + 1 + 8) + (13 + 1 + 2)
    assert [chain.removed for chain in plan.chains] == [(1, 4, 9), (0,)]
    assert (plan.chains[0].provably_dead, plan.chains[1].rows) == (3, ROWS)
    assert (model[0].out_features, model[3].in_features, model[3].out_features, model[5].in_features) == (13, 13, 7, 7)
    assert plan.masks["0"].tolist() == [unit not in (1, 4, 9) for unit in range(16)]


def test_never_active_is_not_provably_dead():
    model = mlp()
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    with torch.no_grad():  # silent on these rows only: two inputs that never are large together
        x[:, 0], x[:, 1] = x[:, 0].abs(), -x[:, 0].abs()
        model[0].weight[2], model[0].bias[2] = torch.tensor([1.0, 1.0, 0, 0, 0]), -1e-9
    plan = compact(model, [x])
    assert 2 in plan.chains[0].removed
    assert plan.chains[0].never_active >= 1
    assert "never active on 64 rows" in str(plan)


CONSTANTS = {
    "gelu": (nn.GELU, 0.7),
    "sigmoid": (nn.Sigmoid, 0.3),
    "tanh": (nn.Tanh, -0.2),
    "softplus": (nn.Softplus, 1.0),
    "relu": (nn.ReLU, 2.0),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_folded(name, bias):
    activation, value = CONSTANTS[name]
    model = mlp(activation, bias)
    silence(model[0], [3, 7], value)
    plan = compacted(model, torch.randn(ROWS, 5, dtype=torch.float64))
    assert plan.chains[0].removed == (3, 7)
    assert plan.chains[0].constant == 2
    assert plan.new_biases == (() if bias else ("3.bias",))


@pytest.mark.parametrize(("activation", "bias"), [(nn.ELU, -1e3), (nn.Sigmoid, 1e3), (nn.Hardtanh, 9e9)])
def test_saturated_units_are_constant(activation, bias):
    model = mlp(activation)
    silence(model[0], [3], bias, weights=True)
    assert compacted(model, torch.randn(ROWS, 5, dtype=torch.float64)).chains[0].removed == (3,)


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU, nn.Identity])
def test_one_row_makes_nothing_constant(activation):
    """Of one row every unit has one value: only those that are 0 go."""
    model, x = mlp(activation), torch.randn(1, 5, dtype=torch.float64)
    plan = compact(model, [x, x])
    zero = (model.eval()[:3](x) == 0).flatten()
    assert plan.chains[0].removed == tuple(zero.nonzero().flatten().tolist())
    assert plan.chains[0].constant == 0


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(4), nn.AvgPool2d(4), Mean()], ids=lambda pool: type(pool).__name__
)
@pytest.mark.parametrize("maps", [1, 3])
def test_one_map_makes_nothing_constant(pool, maps):
    """Its positions differ, but pooled it is one row, and so are copies of it; a unit that saturates over maps goes."""
    flatten = nn.Identity() if isinstance(pool, Mean) else nn.Flatten()
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Sigmoid(), pool, flatten, nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[2] = 0.0, 1e4
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    assert compact(model, [x.expand(maps, -1, -1, -1)]).chains[0].removed == (1,)
    assert compacted(model, torch.randn(4, 2, 6, 6, dtype=torch.float64)).chains[0].removed == (1, 2)


@pytest.mark.parametrize("options", [{"padding": 1}, {"divisor_override": 3}])
def test_averages_that_are_no_means(options):
    """Zeros of the padding make two values of a constant, and with another divisor nothing is assumed."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.AvgPool2d(3, 1, **options), nn.Conv2d(6, 2, 1)).double()
    with torch.no_grad():
        model[0].weight[1] = 0.0
    assert compacted(model, torch.randn(4, 2, 9, 9, dtype=torch.float64)).chains[0].removed == ()


def test_zeros_of_the_padding_are_in_the_range():
    """Silent where all nine taps read the input; at a corner only four do, and they may be as small as elsewhere."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 1)).double()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0], model[0].bias[1] = -1.0, 5.0, 9.0
    x = torch.full((1, 1, 4, 4), 2.0, dtype=torch.float64)
    x[0, 0, 1, 1] = 1.5
    (chain,) = compact(model, [x]).chains
    assert (chain.removed, chain.never_active, chain.provably_dead) == ((0,), 1, 0)


def test_dead_columns_make_dead_rows():
    """A unit that reads only units that go is constant too."""
    model = mlp(nn.GELU)
    silence(model[0], [0, 1])
    with torch.no_grad():
        model[3].weight[2, 2:], model[3].weight[3:, 3:], model[3].bias[2:] = 0, 1.0, 0.5
    first, second = compacted(model, torch.rand(ROWS, 5).double()).chains
    assert first.removed == (0, 1)
    assert 2 in second.removed


def test_batch_norm_between_and_flatten():
    model = vgg()
    with torch.no_grad():  # random statistics, so that a dead row is no zero behind the norm
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.bias, 0.1, 0.3)
        model[1].bias[[2, 5]] = -50.0  # dead behind the norm
        model[5].weight[[0, 3]] = 0.0  # constant: each is folded into the linear layer, over its 4 columns
        silence(model[9], [1, 2, 3])
    x = torch.rand(16, 3, 8, 8, dtype=torch.float64)
    before = numel(model)
    plan = compacted(model, x)
    first = 2 * (27 + 2) + 2 * 6 * 9
    second = 2 * ((8 - 2) * 9 + 1 + 2) + 2 * 4 * 10
    third = len(plan.chains[2].removed) * ((6 - 2) * 4 + 1 + 3)
    assert [chain.removed for chain in plan.chains[:2]] == [(2, 5), (0, 3)]
    assert {1, 2, 3} <= set(plan.chains[2].removed)
    assert before - numel(model) == first + second + third
    assert model[1].num_features == len(model[1].running_mean) == model[4].in_channels == 6


@pytest.mark.parametrize(
    ("options", "goes"),
    [
        ({"padding": 1}, False),
        ({"padding": "same"}, False),
        ({"padding": 1, "padding_mode": "replicate"}, True),
        ({"padding": 1, "padding_mode": "circular"}, True),
        ({"stride": 2}, True),
        ({"dilation": 2, "bias": False}, True),
    ],
)
def test_a_constant_is_none_at_a_border_of_zeros(options, goes):
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 3, 3, **options)).double()
    silence(model[0], [1, 4], 0.5)
    plan = compacted(model, torch.randn(4, 2, 9, 9, dtype=torch.float64))
    assert plan.chains[0].removed == ((1, 4) if goes else ())
    assert plan.chains[0].bordered == (0 if goes else 2)


@pytest.mark.parametrize("kind", ["transposed", "1d", "3d"])
def test_other_convolutions(kind):
    layers, x = {
        "transposed": ((nn.ConvTranspose2d(2, 6, 3, stride=2), nn.ConvTranspose2d(6, 3, 2)), torch.randn(4, 2, 5, 5)),
        "1d": ((nn.Conv1d(2, 6, 3), nn.Conv1d(6, 3, 3, padding=1)), torch.randn(4, 2, 9)),
        "3d": ((nn.Conv3d(2, 6, 2), nn.Conv3d(6, 3, 2, padding=1)), torch.randn(4, 2, 4, 4, 4)),
    }[kind]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).double()
    silence(layers[0], [0, 5])
    assert compacted(model, x.double()).chains[0].removed == (0, 5)


class Secret(nn.Module):
    """Reads the width of its feed-forward network from outside of it, where no graph tells."""

    def __init__(self):
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        self.other = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        y = self.ffn(x) + self.other(x)
        return y * self.ffn[0].out_features if float(y.sum()) < 1e9 else y


def test_the_trial_finds_what_no_graph_tells():
    model = Secret().double()
    silence(model.ffn[0], [1])
    silence(model.other[0], [2])
    plan = compacted(model, torch.randn(ROWS, 3, dtype=torch.float64))
    assert [(chain.producers, chain.removed) for chain in plan.chains] == [(("other.0",), (2,))]
    assert "without its silent units the outputs differ" in plan.unreached["ffn.0"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, about quantization
def test_quantized_layers_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plan = compact(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), [torch.randn(8, 3)])
    assert plan.unreached == {"0": "is a quantized Linear", "2": "is a quantized Linear"}


def test_one_unit_stays():
    model = mlp()
    silence(model[0], list(range(16)))
    compacted(model, torch.randn(ROWS, 5, dtype=torch.float64))
    assert model[0].out_features == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    model = mlp(nn.GELU).to(dtype)
    silence(model[0], [3, 7], 0.7)
    plan = compact(model, [torch.randn(ROWS, 5, dtype=dtype)])
    assert plan.chains[0].removed == (3, 7)
    assert plan.difference <= 4 * torch.finfo(dtype).eps * max(plan.largest_output, 1)
    plan.apply_()
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_after_thresholds():
    """A GELU unit that never passes its threshold is as good as dead."""
    model = mlp(nn.GELU)
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    sparseout.inference.threshold_(model, [x], density=0.1)
    silent = (model.eval()[:3](x).abs() <= vars(next(iter(model[3]._forward_pre_hooks.values())))["value"]).all(0)
    assert 0 < silent.sum() < 16
    plan = compacted(model, x)
    assert plan.chains[0].removed == tuple(silent.nonzero().flatten().tolist())
    assert plan.chains[0].never_active == silent.sum()


def test_nan_and_infinity_stay():
    model = mlp(nn.Identity)
    silence(model[0], [2, 3])
    with torch.no_grad():
        model[0].bias[[2, 3]] = torch.tensor([torch.nan, torch.inf]).double()
    x = torch.randn(ROWS, 5).double()
    plan = compact(model, [x])
    assert plan.chains[0].removed == ()
    x[3] = torch.nan
    assert compact(model, [x]).unreached["0"] == "is NaN on some of the rows given"


def test_converted_and_compiled_models():
    model = mlp()
    sparseout.convert_dropout_(model, q=1.5)
    silence(model[0], [1])
    wrapped = torch.compile(model, backend="eager")
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    before = wrapped.eval()(x)
    compact(wrapped, [x]).apply_()
    assert model[0].out_features == 15
    torch.testing.assert_close(wrapped(x), before, rtol=0, atol=1e-12)


def test_in_inference_mode_and_under_autocast():
    model = mlp().float().eval()
    silence(model[0], [1])
    x = torch.randn(ROWS, 5)
    with torch.autocast("cpu"):  # it keeps the weights in bf16, by parameter
        before = model(x)
        plan = compact(model, [x])
        with torch.inference_mode():
            plan.apply_()
        assert 1 in plan.chains[0].removed
        assert model[0](x).shape == (ROWS, model[0].out_features)
        torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)
    model(x).sum().backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    model = mlp()
    silence(model[0], [1])
    parts = [torch.randn(n, 5, dtype=torch.float64) for n in (20, 30)]
    before = [outputs(model, part) for part in parts]
    plan = compact(model, [torch.nested.nested_tensor(parts, layout=layout)])
    assert plan.chains[0].rows == 50
    assert 1 in plan.chains[0].removed
    plan.apply_()
    torch.testing.assert_close([outputs(model, part) for part in parts], before, rtol=0, atol=1e-12)
