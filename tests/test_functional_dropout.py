"""Dropout that conversion cannot reach: functions and torch's own modules, found and reported."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseout import convert_dropout_


class Functional(nn.Module):
    """A forward that drops by a function, keeps what it computes, makes a child, draws, and counts."""

    def __init__(self, p, untraceable):
        super().__init__()
        self.p, self.untraceable = p, untraceable
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.made = nn.Identity()
        self.kept = x * torch.rand([]) * random.random()
        self.steps.add_(1)
        if self.untraceable and x.sum() > 1e9:
            return x
        return self.drop(x)

    def drop(self, x):
        return F.dropout(x, self.p, self.training)


@pytest.mark.parametrize("untraceable", [False, True])
def test_functional_dropout_is_found_and_the_model_not_touched(untraceable):
    model = nn.Sequential(Functional(0.3, untraceable), Functional(0.0, untraceable)).eval()
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(1), random.random()
    torch.manual_seed(1)
    random.seed(1)
    report = convert_dropout_(model, q=1.5)
    assert report.unreached == {"0": "dropout is called with p=0.3 in Functional.forward"}
    assert (torch.rand(1), random.random()) == expected
    assert not hasattr(model[0], "kept")
    assert not hasattr(model[0], "made")
    assert model[0].steps == 0
    assert not model[0].training


def test_a_layer_built_in_forward_is_found():
    class Builds(nn.Module):
        def forward(self, x):
            return nn.Dropout(0.3)(x)

    assert convert_dropout_(Builds(), q=1.5).unreached == {"": "Dropout is called with p=0.3 in Builds.forward"}


drop = dropout = F.dropout


class Named(nn.Module):
    """Its forward cannot be traced, so that its source is read."""

    def __init__(self):
        super().__init__()
        self.drops = nn.ModuleDict({"default": nn.Dropout(0.3)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"dropout": nn.Dropout(0.3)})])
        self.function = F.dropout

    def dropout(self, x):
        return x

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.call(x)

    def call(self, x):
        raise NotImplementedError


class OfAnAdapter(Named):
    def call(self, x):  # as the layers of peft do
        for key in self.drops:
            dropout = self.drops[key]
            x = dropout(x)
        return x


class OfABlock(Named):
    def call(self, x):
        for block in self.blocks:
            x = block.dropout(x)
        return x


class OfAMethod(Named):
    def call(self, x):
        return self.dropout(x)


class OfAnArgument(Named):
    def call(self, x, dropout=None):
        return x if dropout is None else dropout(x)


class OfAGlobal(Named):
    def call(self, x):
        return drop(x, 0.3)


class OfALocal(Named):
    def call(self, x):
        noise = nn.functional.dropout if self.training else F.alpha_dropout
        return noise(x, p=0.3)


class OfAnImport(Named):
    def call(self, x):
        from torch.nn import functional
        from torch.nn.functional import dropout as noise

        return noise(functional.relu(x), 0.3)


class OfAnAttribute(Named):
    def call(self, x):
        return self.function(x, 0.3)


@pytest.mark.parametrize("kind", [OfAnAdapter, OfABlock, OfAMethod, OfAnArgument])
def test_a_name_is_not_taken_for_torchs_function(kind):
    assert convert_dropout_(kind(), 1.5).unreached == {}


@pytest.mark.parametrize("kind", [OfAGlobal, OfALocal, OfAnImport, OfAnAttribute])
def test_torchs_function_is_known_by_any_name(kind):
    unreached = {"": f"dropout is called with p=0.3 in {kind.__name__}.forward"}
    assert convert_dropout_(kind(), 1.5).unreached == unreached


def test_dropout_inside_torchs_modules_is_reported():
    single = nn.LSTM(3, 3)
    single.dropout = 0.2  # torch applies none after the last layer, and warns if it is built so
    model = nn.ModuleDict(
        {
            "single": single,
            "lstm": nn.LSTM(3, 3, num_layers=2, dropout=0.2),
            "gru": nn.GRU(3, 3, num_layers=2, dropout=0.2),
            "rnn": nn.RNN(3, 3, num_layers=2, dropout=0.2),
            "mha": nn.MultiheadAttention(4, 2, dropout=0.1),
            "none": nn.LSTM(3, 3, num_layers=2),
            "scripted": torch.jit.script(nn.Dropout(0.1)),
        }
    )
    assert convert_dropout_(model, q=1.5).unreached == {
        "lstm": "dropout (p=0.2) between its layers is inside torch's LSTM",
        "gru": "dropout (p=0.2) between its layers is inside torch's GRU",
        "rnn": "dropout (p=0.2) between its layers is inside torch's RNN",
        "mha": "dropout (p=0.1) on attention probabilities is inside torch's function",
        "scripted": "compiled by TorchScript, where no class can be changed",
    }
