"""Hidden units are removed from residual, gated, image and transformer networks, and elsewhere with a reason not."""

import copy

import architectures
import pytest
import torch
import torch.nn.functional as F
from compacting import ROWS, compacted, silence
from test_chains import REFUSED, Net
from torch import nn

import sparseout
from sparseout.inference import compact


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
