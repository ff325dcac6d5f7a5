"""Which dropout is applied to attention probabilities: by graph, by name, by source."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseout import Sparseout, convert_dropout_

PROBABILITIES = "on attention probabilities: "


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.softmax = nn.Linear(4, 12), nn.Linear(4, 4), nn.Softmax(-1)
        self.a, self.b = nn.Dropout(0.1), nn.Dropout(0.1)  # names that say nothing

    def scores(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q @ k.transpose(-2, -1) / math.sqrt(4), v


class ByFunction(Base):
    def forward(self, x):
        scores, v = self.scores(x)
        weights = F.softmax(scores, dim=-1).type_as(v)
        return self.b(self.out(self.a(weights) @ v))


class ByMethod(Base):
    def forward(self, x):
        scores, v = self.scores(x)
        return self.b(self.out(torch.matmul(self.a(scores.softmax(-1).view(2, 5, 5) * 0.5), v)))


class ByModule(Base):
    def forward(self, x):
        scores, v = self.scores(x)
        return self.b(self.out(self.a(torch.where(scores > 0, self.softmax(scores), 0.0)) @ v))


class ByOptions(Base):
    """Arguments with a default have it in the graph, so that branches on them can be followed."""

    def forward(self, x, double=False, scale=1.0):
        scores, v = self.scores(x)
        if double or scale > 2:
            scores = 2 * scores
        return self.b(self.out(self.a(scores.softmax(-1)) @ v))


class ByHelper(Base):
    """The layer is handed to a function, as in the Annotated Transformer."""

    def forward(self, x):
        scores, v = self.scores(x)
        return self.b(self.out(attend(scores, v, self.a)))


def attend(scores, v, dropout):
    return dropout(scores.softmax(-1)) @ v


class UntraceableFunction(Base):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        scores, v = self.scores(x)
        weights = F.softmax(scores, dim=-1)
        weights = weights.to(v.dtype)
        weights = self.a(weights)
        y = self.out(weights @ v)
        return self.b(y)


class OneBranch(Base):
    def forward(self, x):
        scores, v = self.scores(x)
        if x.sum() > 0:  # noqa: SIM108  (what is tried)
            weights = F.softmax(scores, dim=-1)
        else:
            weights = scores.relu()
        kept = self.a(weights)
        y = self.out(kept @ v) if x.sum() > 0 else v
        return self.b(y)


class OneCase(Base):
    def forward(self, x):
        scores, v = self.scores(x)
        kept = self.a(scores.relu() if x.sum() > 0 else scores.softmax(-1))
        return self.b(self.out(kept @ v))


class UntraceableModule(Base):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.rest(x)

    def rest(self, x):
        scores, v = self.scores(x)
        y = self.a(nn.Softmax(dim=-1)(scores)[0]) @ v
        return self.b(y @ self.out.weight)


class ReadsP(Base):
    """The layer is never called: a fused function is told its p."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.a.p if self.training else 0.0)
        return self.b(self.out(y))


TRACED = "softmax feeds it"
READ = "according to the source of {}.forward"


@pytest.mark.parametrize(
    ("owner", "reason"),
    [
        (ByFunction, TRACED),
        (ByMethod, TRACED),
        (ByModule, TRACED),
        (ByOptions, TRACED),
        (ByHelper, TRACED),
        (UntraceableFunction, READ),
        (OneBranch, READ),
        (OneCase, READ),
        (UntraceableModule, READ),
        (ReadsP, READ),
    ],
)
def test_what_softmax_feeds_is_left_and_what_a_product_feeds_is_not(owner, reason):
    model = owner()
    model(torch.rand(2, 5, 4))
    report = convert_dropout_(model, q=1.5)
    assert report.skipped == {"a": PROBABILITIES + reason.format(owner.__name__)}
    assert list(report.changed) == ["b"]


def holder(class_name, layer_name, forward=None):
    """A module whose class and only layer have these names, and whose forward tells nothing."""

    def tells_nothing(self, x):
        if x.sum() > 1e9:
            return x
        return unknown(self, x)

    owner = type(class_name, (nn.Module,), {"forward": forward or tells_nothing})()
    owner.add_module(layer_name, nn.Dropout(0.1))
    return owner


def unknown(module, x):
    return next(iter(module.children()))(x)


@pytest.mark.parametrize(
    "name", ["attn_drop", "attention_dropout", "attn_pdrop", "drop_attn", "att_drop", "dropout_attn"]
)
def test_names_of_attention(name):
    assert convert_dropout_(holder("Block", name), q=1.5).skipped == {name: PROBABILITIES + "according to its name"}


@pytest.mark.parametrize(
    "name",
    [
        "resid_dropout",
        "proj_drop",
        "dropout",
        "attn_out_dropout",
        "post_attention_dropout",
        "attn_proj_drop",
        "batt",
        "drop1",
    ],
)
def test_names_of_others(name):
    assert list(convert_dropout_(holder("Block", name), q=1.5).changed) == [name]


@pytest.mark.parametrize(
    ("class_name", "layer", "left"),
    [
        ("SelfAttention", "dropout", True),
        ("WindowAttn", "drop", True),
        ("SelfAttention", "resid_drop", False),
        ("SelfAttention", "out_dropout", False),
        ("SelfAttention", "proj_drop", False),
        ("AttentionOutput", "dropout", False),
        ("MLP", "dropout", False),
    ],
)
def test_class_of_the_owner_decides_last(class_name, layer, left):
    report = convert_dropout_(holder(class_name, layer), q=1.5)
    assert report.skipped == ({layer: f"{PROBABILITIES}its owner is a {class_name}"} if left else {})


def test_a_graph_that_says_otherwise_outweighs_names():
    model = holder("Attention", "attn_dropout", lambda self, x: self.attn_dropout(F.linear(x, x)))
    assert list(convert_dropout_(model, q=1.5).changed) == ["attn_dropout"]


def test_sequences_and_lists():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.drops = nn.ModuleList([nn.Dropout(0.1), nn.Dropout(0.1)])

        def forward(self, x):
            return self.drops[1](self.drops[0](x.softmax(-1)) @ x)

    model = nn.Sequential(
        nn.Sequential(nn.Softmax(-1), nn.Dropout(0.1)), nn.Sequential(nn.Linear(2, 2), nn.Dropout()), Heads()
    )
    report = convert_dropout_(model, q=1.5)
    assert report.skipped == dict.fromkeys(["0.1", "2.drops.0"], PROBABILITIES + TRACED)
    assert list(report.changed) == ["1.1", "2.drops.1"]


def test_a_layer_used_in_both_ways_is_left():
    class Shared(Base):
        def forward(self, x):
            scores, v = self.scores(x)
            return self.a(self.out(self.a(scores.softmax(-1)) @ v))

    assert list(convert_dropout_(Shared(), q=1.5).skipped) == ["a"]


def test_filter_fn_has_the_last_word():
    model = ByFunction()
    report = convert_dropout_(model, q=1.5, filter_fn=lambda name, module: name == "a")
    assert type(model.a) is Sparseout
    assert report.skipped == {"b": "filter_fn says so"}
    forced = ReadsP()
    report = convert_dropout_(forced, q=1.5, filter_fn=lambda name, module: True)
    assert report.unreached == {"": "scaled_dot_product_attention is called with p=0.1 in ReadsP.forward"}
    assert convert_dropout_(ReadsP(), q=1.5).unreached == {}
