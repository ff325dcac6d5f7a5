"""Chains of hidden units: what is found, and why everything else is left."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrizations

from sparseout import Sparseout
from sparseout._utils.chains import find_chains
from sparseout._utils.dataflow import flows
from sparseout.baselines import KWinners


class Net(nn.Module):
    """Two layers and a function of the hidden units between them."""

    def __init__(self, between, first=None, second=None, **modules):
        super().__init__()
        self.between = between
        self.first = nn.Linear(3, 4) if first is None else first
        self.second = nn.Linear(4, 2) if second is None else second
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.between(self, x)


def found(model):
    chains = find_chains(model)
    return [[chains.names[module] for module in chain.modules] for chain in chains.chains]


def convs(last=None, **options):
    return nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3, **options) if last is None else last


CHAINED = {
    "functional": Net(lambda m, x: m.second(F.dropout(torch.relu(m.first(x)), training=m.training))),
    "in place": Net(lambda m, x: m.second(m.first(x).relu_())),
    "own module": Net(lambda m, x: m.second(m.swish(m.first(x))), swish=Net(lambda m, x: x * m.act(x), act=nn.SiLU())),
    "swish": Net(lambda m, x: m.second((h := m.first(x)) * torch.sigmoid(h))),
    "wrapped": Net(lambda m, x: m.second(m.mid(m.first(x))), mid=nn.Sequential(nn.GELU(), Sparseout(0.5, 1.5))),
    "dtype read": Net(lambda m, x: m.second((h := m.first(x)).to(h.dtype))),
    "global pool": Net(lambda m, x: m.second(m.first(x).mean((2, 3))), nn.Conv2d(1, 4, 3)),
    "flatten": Net(lambda m, x: m.second(torch.flatten(m.first(x), 1)), nn.Conv2d(1, 4, 3), nn.Linear(36, 2)),
    "view": Net(lambda m, x: m.second((h := m.first(x)).view(h.size(0), -1)), nn.Conv2d(1, 4, 3), nn.Linear(36, 2)),
    "shape": Net(lambda m, x: m.second((h := m.first(x)).view(h.shape[0], -1)), nn.Conv2d(1, 4, 3), nn.Linear(36, 2)),
    "transposed": Net(lambda m, x: m.second(m.first(x)), nn.ConvTranspose2d(1, 4, 3), nn.ConvTranspose2d(4, 2, 3)),
    "constant made": Net(lambda m, x: m.second(m.first(x)) * torch.tensor(2.0)),
    "pooled": Net(lambda m, x: m.second(F.max_pool2d(m.first(x), 2)), *convs()),
}
REFUSED = {
    "residual": (Net(lambda m, x: m.second(m.first(x) + m.other(x)), other=nn.Linear(3, 4)), "by add"),
    "input added": (Net(lambda m, x: m.second(m.first(x) + x), nn.Linear(4, 4)), "read by add"),
    "scaled by a parameter": (Net(lambda m, x: m.second(m.first(x) * m.first.bias)), "read by mul"),
    "concatenated": (Net(lambda m, x: m.second(torch.cat([m.first(x), x], 1)), second=nn.Linear(7, 2)), "read by cat"),
    "tensor made": (Net(lambda m, x: m.second(m.first(x) + torch.arange(4.0))), "read by add"),
    "consumers": (Net(lambda m, x: m.second(h := m.first(x)) + m.other(h), other=nn.Linear(4, 2)), "several layers"),
    "width read": (Net(lambda m, x: m.second((h := m.first(x)) * h.shape[-1] ** -0.5)), "read by getitem"),
    "size read": (Net(lambda m, x: m.second((h := m.first(x)) / h.size(1))), "read by size"),
    "softmax": (Net(lambda m, x: m.second(m.first(x).softmax(-1))), "read by softmax"),
    "layer norm": (Net(lambda m, x: m.second(m.norm(m.first(x))), norm=nn.LayerNorm(4)), "a LayerNorm"),
    "winners": (Net(lambda m, x: m.second(m.win(m.first(x))), win=KWinners(2)), "a KWinners"),
    "glu": (Net(lambda m, x: m.second(F.glu(m.first(x))), second=nn.Linear(2, 2)), "read by glu"),
    "returned": (Net(lambda m, x: (m.second(h := m.first(x)), h)), "what the model returns"),
    "twice": (Net(lambda m, x: m.second(m.first(m.first(x))), nn.Linear(4, 4)), "called more than once"),
    "consumer twice": (Net(lambda m, x: m.second(m.first(x)) + m.second(x), nn.Linear(4, 4)), "called more than once"),
    "weight read": (Net(lambda m, x: F.linear(m.second(m.first(x)), m.second.weight.t())), "also read by t"),
    "grouped": (Net(lambda m, x: m.second(m.first(x)), *convs(groups=2)), "of 2 groups"),
    "depthwise": (Net(lambda m, x: m.second(m.first(x)), *convs(nn.Conv2d(4, 4, 3, groups=4))), "of 4 groups"),
    "columns of a map": (Net(lambda m, x: m.second(m.first(x)), nn.Conv2d(1, 4, 3)), "along another dim"),
    "by a flag": (Net(lambda m, x: m.second(torch.cat([m.first(x)]) if m.training else m.first(x))), "read by cat"),
    "by a branch": (Net(lambda m, x: m.second(m.first(x)) if x.sum() > 0 else x), "cannot be traced"),
    "prelu": (Net(lambda m, x: m.second(m.act(m.first(x))), act=nn.PReLU(4)), "a PReLU"),
    "product of unequal": (Net(lambda m, x: m.second(m.first(x) * m.gate(x)), gate=nn.Linear(3, 1)), "another size"),
}


@pytest.mark.parametrize("name", CHAINED)
def test_chains_are_found(name):
    assert found(CHAINED[name]) == [["first", "second"]]


@pytest.mark.parametrize("name", REFUSED)
def test_what_others_read_is_left_with_a_reason(name):
    model, reason = REFUSED[name]
    assert found(model) == []
    assert reason in find_chains(model).left["first"]


def test_gated_and_normed():
    gated = Net(lambda m, x: m.second(F.silu(m.gate(x)) * m.first(x)), gate=nn.Linear(3, 4))
    assert found(gated) == [["gate", "first", "second"]]
    normed = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)
    )
    assert found(normed) == [["0", "1", "5"]]
    assert find_chains(normed).chains[0].block == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.first.register_forward_hook(print), "has hooks"),
        (lambda m: m.second.register_forward_pre_hook(print), "has hooks"),
        (lambda m: m.mid.register_forward_hook(print), "has hooks"),
        (lambda m: m.mid.act.register_full_backward_hook(print), "has hooks"),
        (lambda m: m.first.weight.register_hook(print), "has hooks"),
        (lambda m: vars(m.second).update(forward=lambda x: x), "another forward"),
        (lambda m: setattr(m.other, "weight", m.first.weight), "is shared: first.weight, other.weight"),
        (lambda m: parametrizations.weight_norm(m.first), "is a ParametrizedLinear"),
        (lambda m: m.first.to("meta"), "meta device"),
        (lambda m: (delattr(m.first, "weight"), setattr(m.first, "weight", torch.ones(4, 3))), "no parameter of it"),
    ],
)
def test_what_is_attached_is_respected(change, reason):
    model = Net(
        lambda m, x: m.second(m.mid(m.first(x))),
        mid=Net(lambda m, x: m.act(x), first=nn.Identity(), second=nn.Identity(), act=nn.ReLU()),
        other=nn.Linear(3, 4),
    )
    assert found(model) == [["first", "second"]]
    change(model)
    assert found(model) == []
    assert reason in find_chains(model).left["first"]


def test_a_sequential_that_a_forward_goes_through_is_no_forward_of_its_own():
    layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert found(Net(lambda m, x: [x := layer(x) for layer in m.layers][-1], layers=layers))[0] == [
        "layers.0",
        "layers.2",
    ]
    assert found(Net(lambda m, x: [x := layer(x) for layer in m.layers], layers=layers)) == []
    assert found(fx.symbolic_trace(layers)) == [["0", "2"]]


def test_torchs_own_transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert found(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)) == [
        [f"layers.{n}.linear1", f"layers.{n}.linear2"] for n in range(2)
    ]


def test_flow_of_submodules_is_put_together():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 1)))
    (flow,) = flows(model, training=False)
    calls = [step.module for step in flow.steps if not step.inlined]
    assert calls == [model[0], model[1][0], model[1][1]]
    assert flow.steps[1].inputs[0].source is flow.steps[0]
