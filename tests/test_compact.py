"""Compaction: what is left computes the same, what went is counted by hand, and what may not go stays."""

import copy

import architectures
import pytest
import torch
import torch.nn.functional as F
from test_chains import REFUSED, Net
from torch import nn

import sparseout
from sparseout.inference import compact

ROWS = 64


def numel(model):
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def silence(layer, units, bias=-50.0, weights=False):
    """Make units of a layer what no input moves, or never enough to fire if their weights are kept."""
    transposed = type(layer).__name__ == "Conv1D" or isinstance(layer, nn.ConvTranspose2d)
    rows = layer.weight.transpose(0, 1) if transposed else layer.weight
    if not weights:
        rows[units] = 0.0
    if layer.bias is not None:
        layer.bias[units] = bias


@torch.no_grad()
def outputs(model, batch):
    flags = {module: module.training for module in model.modules()}
    model.eval()
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    for module, flag in flags.items():
        module.training = flag
    return out.logits if hasattr(out, "logits") else out


def compacted(model, *batches):
    """Compact the model on batches, and compare what it computes on each of them."""
    before = [outputs(model, batch) for batch in batches]
    plan = compact(model, list(batches))
    plan.apply_()
    for batch, expected in zip(batches, before, strict=True):
        torch.testing.assert_close(outputs(model, batch), expected, rtol=0, atol=1e-12)
    assert plan.difference < 1e-12
    assert plan.parameters_after == numel(model)
    return plan


def mlp(activation=nn.ReLU, bias=True):
    return nn.Sequential(
        nn.Linear(5, 16), activation(), nn.Dropout(), nn.Linear(16, 8, bias=bias), nn.ReLU(), nn.Linear(8, 2)
    ).double()


def vgg():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(6 * 4, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 3)),
    ).double()


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


class Block(nn.Module):
    """A residual block: the inner half can be cut, the sum cannot."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def test_inner_halves_of_residual_blocks():
    model = nn.Sequential(Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bn1.bias[[1, 2]] = -50.0
        model[1].bn1.weight[0], model[1].bn1.bias[0] = 0.0, -1.0
    plan = compacted(model, torch.randn(8, 4, 6, 6, dtype=torch.float64))
    assert [chain.removed for chain in plan.chains] == [(1, 2), (0,)]
    assert plan.parameters - plan.parameters_after == 3 * (2 * 4 * 9 + 2)
    assert "read by add" in plan.unreached["0.conv2"]


def test_wide_resnet():
    from sparseout_experiments.models import WideResNet

    model = WideResNet(10, 1, lambda _: sparseout.Sparseout(0.3, 1.5), torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        model.blocks[1].norm2.bias[:7] = -50.0
    plan = compacted(model, torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert set(range(7)) <= set(plan.chains[1].removed)
    assert plan.parameters - plan.parameters_after == sum(
        len(chain.removed) * (inputs * 9 + 2 + chain.units * 9)
        for chain, inputs in zip(plan.chains, (16, 16, 32), strict=True)
    )


# Architecture -> names of the layers that make hidden units, and what a unit weighs: row, bias, column.
FFNS = {
    "bert": ("intermediate.dense", 16 + 1 + 16),
    "gpt2": ("mlp.c_fc", 16 + 1 + 16),
    "vit": ("mlp.fc1", 16 + 1 + 16),
    "t5": ("DenseReluDense.wi", 16 + 16),
    "llama": ("mlp.gate_proj", 16 + 16 + 16),
}


@pytest.mark.parametrize("name", FFNS)
def test_feed_forward_networks_of_transformers(name):
    model, batch = architectures.transformer(name)
    model = model.double().eval()
    batch = {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
    ending, weight = FFNS[name]
    layers = [module for key, module in model.named_modules() if key.endswith(ending)]
    for layer in layers:
        silence(layer, [0, 5, 6], -60.0)
    plan = compacted(model, batch)
    dead = sum(len(chain.removed) for chain in plan.chains)
    assert len(plan.chains) == len(layers)
    assert dead >= 3 * len(layers)
    assert plan.parameters - plan.parameters_after == dead * weight
    if name != "t5":  # whose random ReLU units may be silent on so few tokens
        assert dead == 3 * len(layers)


def test_gated_unit_goes_with_either_factor():
    model, batch = architectures.transformer("llama")
    model = model.double()
    up = model.model.layers[0].mlp.up_proj
    silence(up, [3])
    plan = compacted(model, batch)
    assert plan.chains[0].producers == tuple(f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up"))
    assert [chain.removed for chain in plan.chains] == [(3,), ()]
    assert plan.chains[0].provably_dead == 1
    assert "model.layers.0.mlp.(gate_proj * up_proj -> down_proj)" in str(plan)
    assert (up.out_features, model.model.layers[0].mlp.down_proj.in_features) == (31, 31)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid])
def test_a_dead_gate(activation):
    """What is 0 at 0 makes the product 0 for any input, by the weights alone; a sigmoid does not."""
    gated = Net(
        lambda m, x: m.second(m.act(m.gate(x)) * m.first(x)),
        nn.Linear(3, 4),
        gate=nn.Linear(3, 4, bias=False),
        act=activation(),
    ).double()
    silence(gated.gate, [1])
    (chain,) = compacted(gated, torch.randn(ROWS, 3).double()).chains
    assert (chain.removed, chain.provably_dead) == (((), 0) if activation is nn.Sigmoid else ((1,), 1))


@pytest.mark.parametrize("name", ["convnext", "vgg", "swin"])
def test_image_models(name):
    model, x = architectures.image_model(name)
    model = model.double()
    layer = {"convnext": "stages.0.blocks.0.mlp.fc1", "vgg": "features.0", "swin": "layers.0.blocks.0.mlp.fc1"}[name]
    silence(model.get_submodule(layer), [2, 4], -60.0)
    plan = compacted(model, x.double())
    assert {2, 4} <= set(plan.chains[0].removed)
    row = model.get_submodule(layer).weight[0].numel() + 1
    column = model.get_submodule(plan.chains[0].consumer).weight[:, 0].numel()
    others = sum(len(chain.removed) for chain in plan.chains[1:])
    assert others or plan.parameters - plan.parameters_after == len(plan.chains[0].removed) * (row + column)


def test_torchs_transformer_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    silence(model.layers[1].linear1, [0, 3])
    plan = compacted(model, torch.randn(20, 5, 8, dtype=torch.float64))
    assert {0, 3} <= set(plan.chains[1].removed)


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("twice", "columns of a map")])
def test_what_is_refused_is_unchanged_and_named(name):
    model = copy.deepcopy(REFUSED[name][0]).eval()
    silence(model.first, [0])
    first = model.first
    x = torch.randn(8, 4, 9, 9) if isinstance(first, nn.Conv2d) else torch.randn(8, first.in_features)
    x = x[:, : first.in_channels] if isinstance(first, nn.Conv2d) else x
    model(x)
    state = copy.deepcopy(model.state_dict())
    plan = compact(model, [x])
    plan.apply_()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert "first" in plan.unreached


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


def test_a_failed_pass_leaves_everything():
    model = mlp().train()
    model.insert(2, sparseout.baselines.KWinners(3))  # takes its size at the first call
    duty = model[2].duty_cycle.shape
    with pytest.raises(RuntimeError):
        compact(model, [torch.randn(3, 5).double(), torch.randn(3, 4).double()])
    assert all(module.training for module in model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model[2].duty_cycle.shape == duty


def test_wrapped_for_processes(process_group):
    model = nn.parallel.DistributedDataParallel(mlp())
    silence(model.module[0], [1])
    x = torch.randn(ROWS, 5).double()
    plan = compact(model, [x])
    assert plan.chains[0].removed == (1,)
    with pytest.raises(RuntimeError, match="wrap it afterwards"):
        plan.apply_()
    assert model.module[0].out_features == 16
    compact(model.module, [x]).apply_()
    assert model.module[0].out_features == 15


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


def test_a_stale_plan_is_an_error():
    model = mlp()
    silence(model[0], [1])
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    changes = [
        lambda m: m[3].weight.data.mul_(2),
        lambda m: m.__setitem__(0, nn.Linear(5, 16).double()),
        lambda m: compact(m, [x]).apply_(),
    ]
    for change in changes:
        other = copy.deepcopy(model)
        plan = compact(other, [x])
        change(other)
        state = copy.deepcopy(other.state_dict())
        with pytest.raises(RuntimeError, match="has not changed since"):
            plan.apply_()
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    plan = compact(model, [x])
    twin, its_plan = copy.deepcopy((model, plan))
    its_plan.apply_()
    assert (model[0].out_features, twin[0].out_features) == (16, 15)
    plan.apply_()
    with pytest.raises(RuntimeError, match="this one has"):
        plan.apply_()


def test_nothing_is_touched_by_planning():
    model = vgg().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model(torch.rand(4, 3, 8, 8).double()).sum().backward()
    silence(model[9], [1])
    before = copy.deepcopy(model.state_dict())
    objects = {name: (id(p), p.data_ptr(), p._version, p.grad) for name, p in model.named_parameters()}
    x = torch.rand(8, 3, 8, 8).double()
    rng = torch.get_rng_state()
    compact(model, iter([x]))
    compact(model, torch.utils.data.DataLoader(x, 4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model] == [position != 1 for position in range(len(model))]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    after = {name: (id(p), p.data_ptr(), p._version, p.grad) for name, p in model.named_parameters()}
    assert all(a[:3] == b[:3] and a[3] is b[3] for a, b in zip(objects.values(), after.values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_model_trains_on_and_an_optimizers_state_can_be_cut():
    model = mlp()
    silence(model[0], [1, 4])
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = model(x).sum()
    loss.backward()  # the loss lives on, and the graph with it
    optimizer.step()
    silence(model[0], [1, 4])
    plan = compact(model, [x])
    plan.apply_()
    assert model[0].weight.grad is None
    for name, parameter in model.named_parameters():
        for dim, kept in plan.parameter_masks.get(name, []):
            for key in ("exp_avg", "exp_avg_sq"):
                state = optimizer.state[parameter]
                state[key] = state[key].index_select(dim, kept.nonzero().flatten())
    model(x).sum().backward()
    optimizer.step()
    assert model[0].weight.grad.shape == (14, 5)
    assert loss.grad_fn is not None


def test_batches_of_every_kind_and_a_copy():
    model = mlp()
    silence(model[0], [1])
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    for batches in ([x], [(x, torch.zeros(ROWS))], [{"input": x}], [x[:0], x]):
        assert compact(model, batches).chains[0].removed == (1,)
    compact(model, [x]).apply_()
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="to have rows"):
        compact(mlp(), [x[:0]])
    with pytest.raises(TypeError, match="put a single batch into a list"):
        compact(mlp(), x)


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


def test_the_plan_says_what_it_does():
    model = mlp(nn.GELU, bias=False)
    silence(model[0], [3], 0.7)
    text = str(compact(model, [torch.randn(ROWS, 5, dtype=torch.float64)]))
    assert "1 of 24 hidden units go" in text
    assert "0 -> 3" in text
    assert "1 of 16 units: 1 constant" in text
    assert "is what the model returns" in text
    assert "New parameters: 3.bias." in text
    assert "optimizer is not carried over" in text


def test_a_layer_that_is_not_called_is_left():
    model = Net(lambda m, x: x * 1.0)
    model.unused = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    plan = compact(model, [torch.ones(2, 3)])
    assert not plan.chains
    assert plan.unreached["unused.0"]


def test_padding_is_no_row():
    model, batch = architectures.transformer("bert")
    model = model.double().eval()
    del batch["labels"]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    layer = model.bert.encoder.layer[0].intermediate
    layer.intermediate_act_fn = nn.ReLU()
    full = compact(model, [batch])
    batch["attention_mask"][:, 3:] = 0
    plan = compact(model, [batch])
    assert (full.chains[0].rows, plan.chains[0].rows) == (12, 6)
    assert len(plan.chains[0].removed) > len(full.chains[0].removed)
    before = model(**batch).logits[:, :3]
    plan.apply_()
    torch.testing.assert_close(model(**batch).logits[:, :3], before, rtol=0, atol=1e-12)
    other = compact(mlp(), [torch.randn(8, 5).double()])
    with sparseout.row_mask(torch.tensor([1] * 6 + [0] * 2)):
        assert compact(mlp(), [torch.randn(8, 5).double()]).chains[0].rows == other.chains[0].rows - 2 == 6
