"""Insertion perturbs outputs and leaves classes and state_dict keys alone."""

from collections import namedtuple

import pytest
import torch
from copies import copies, seeded
from torch import nn
from torch.utils.hooks import RemovableHandle

import sparseout
from conftest import needs_compiler
from sparseout import Sparseout, SparsityMonitor, convert_dropout_, insert_after_, revert_, revive_, set_q_
from sparseout.baselines import ActivityPenalty, KWinners, lq_penalty
from sparseout.inference import compact
from sparseout.measures import hoyer


def net():
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))


def test_output_is_the_modules_then_the_functions():
    model, x = net(), torch.rand(8, 6)
    classes = [type(module) for module in model]
    keys = list(model.state_dict())
    report = insert_after_(model, nn.ReLU, p=0.5, q=1.0, scale=0.5, gradient="exact")
    hidden = torch.relu(model[0](x))
    torch.manual_seed(5)
    expected = model[2](sparseout.sparseout(hidden, 0.5, 1.0, scale=0.5, gradient="exact"))
    assert torch.equal(seeded(model, x), expected)
    assert [type(module) for module in model] == classes
    assert list(model.state_dict()) == keys
    model.load_state_dict(net().state_dict(), strict=True)
    assert report.changed == {"1": ("ReLU", "ReLU, then Sparseout(p=0.5, q=1.0, gradient='exact', scale=0.5)")}


def test_evaluation_and_reverting_restore_the_outputs():
    model, x = net(), torch.rand(8, 6)
    expected = seeded(model, x)
    before = [set(vars(module)) for module in model.modules()]
    insert_after_(model, (nn.ReLU, nn.Linear), p=0.5, q=1.0)
    assert not torch.equal(seeded(model, x), expected)
    assert torch.equal(model.eval()(x), expected)
    revert_(model.train())
    assert torch.equal(seeded(model, x), expected)
    assert [set(vars(module)) for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("first", ["noise", "observers"])
def test_observers_see_the_output_without_the_noise(first):
    model, x, seen = nn.Sequential(nn.Linear(6, 20), nn.ReLU()), torch.rand(8, 6), []
    code = model(x)
    penalty, monitor = ActivityPenalty(model, strength=1.0), SparsityMonitor(model, ["1"])
    observe = [penalty.attach, monitor.attach]
    insert = [
        lambda: insert_after_(model, nn.ReLU, p=0.5, q=1.0),
        lambda: model[1].register_forward_hook(lambda module, args, output: seen.append(output)),
    ]
    for step in insert + observe if first == "noise" else observe + insert:
        step()
    y = model(x)
    assert not torch.equal(y, code)
    assert seen[0] is y
    assert penalty.loss().item() == pytest.approx(lq_penalty(code, 1.0).item())
    assert monitor.report()[0]["hoyer"] == pytest.approx(hoyer(code).mean().item())


def test_dead_units_under_inserted_noise_are_revived_and_removed():
    model, x = net(), torch.rand(40, 6)
    model[0].bias.data.fill_(5.0)[:3] = -50.0
    insert_after_(model, nn.ReLU, p=0.5, q=1.0)
    y = model.eval()(x)
    plan = compact(model, [x])
    with SparsityMonitor(model) as monitor:
        model(x)
    done = revive_(model, monitor.report())
    assert (done.revived, done.left) == ({"0": (0, 1, 2)}, {})
    torch.testing.assert_close(model(x), y)
    assert str(plan).startswith("Compaction: 3 of 20 hidden units go")


def test_training_mode_set_q_and_other_hooks():
    model, calls = net().eval(), []
    insert_after_(model, nn.ReLU, p=0.5, q=1.0)
    assert not model[1].sparseout.training
    set_q_(model, {"1.sparseout": 1.5})
    assert model[1].sparseout.q == 1.5
    model[1].register_forward_hook(lambda *_: calls.append(1))
    revert_(model)
    model(torch.rand(2, 6))
    assert calls == [1]


@pytest.mark.parametrize("packed", [False, True])
def test_first_of_a_tuple_is_perturbed(packed):
    lstm, x = nn.LSTM(3, 4), torch.rand(5, 2, 3)
    x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])) if packed else x
    clean, (h, c) = lstm(x)
    insert_after_(lstm, nn.LSTM, p=0.5, q=1.0)
    noisy, (h2, c2) = lstm(x)
    assert type(noisy) is type(clean)
    a, b = (clean.data, noisy.data) if packed else (clean, noisy)
    assert not torch.equal(a, b)
    assert torch.equal(h, h2)
    assert torch.equal(c, c2)
    lstm.eval()
    assert torch.equal(lstm(x)[0].data if packed else lstm(x)[0], a)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


Pair = namedtuple("Pair", "first second")


def test_named_tuples_stay_named_tuples():
    model = Returns(lambda x: Pair(x, x))
    insert_after_(model, Returns, p=0.5, q=1.0)
    out = model(torch.ones(50))
    assert type(out) is Pair
    assert set(out.first.tolist()) == {0.0, 2.0}
    assert torch.equal(out.second, torch.ones(50))


@pytest.mark.parametrize("make", [lambda x: {"x": x}, lambda x: [x], lambda x: (), lambda x: (None, x)])
@pytest.mark.parametrize("training", [True, False])
def test_other_outputs_are_an_error_in_one_sentence(make, training):
    model = Returns(make).train(training)
    insert_after_(model, Returns, p=0.5, q=1.0)
    with pytest.raises(TypeError, match=r"expected `output of Returns` to be a tensor or a tuple that begins with one"):
        model(torch.ones(3))


def test_what_is_skipped_is_reported():
    taken = nn.ReLU()
    taken.sparseout = 3
    model = nn.ModuleDict({"list": net(), "mha": nn.MultiheadAttention(4, 2), "taken": taken, "own": Sparseout()})
    report = insert_after_(model, nn.Module, p=0.5, q=1.0, filter_fn=lambda name, module: name != "list.0")
    assert report.skipped == {
        "": "a ModuleDict would take a new child for one of its steps",
        "list": "a Sequential would take a new child for one of its steps",
        "list.0": "filter_fn says so",
        "mha.out_proj": "nn.MultiheadAttention reads its weights and never calls it",
        "taken": "it has an attribute `sparseout`, where the layer would go",
        "own": "it is a Sparseout layer itself",
    }
    assert list(report.changed) == ["list.1", "list.2", "mha"]
    again = insert_after_(model, nn.ReLU, p=0.5, q=1.0)
    assert again.skipped["list.1"] == "it has a Sparseout layer after it already"
    assert not again.changed


def test_nothing_found_says_so():
    with pytest.warns(UserWarning, match="^nothing was inserted: the Sequential has no such module$"):
        report = insert_after_(net(), nn.GELU, p=0.5, q=1.0)
    assert str(report) == "changed  nothing  no layer to change"


@pytest.mark.parametrize(
    ("types", "arguments", "error", "sentence"),
    [
        (nn.ReLU, {"p": 0.5, "q": -1.0}, ValueError, "expected `q` to be a finite number >= 0, but got -1.0"),
        (nn.GELU, {"p": 0.5, "q": -1.0}, ValueError, "expected `q` to be a finite number >= 0, but got -1.0"),
        (nn.ReLU, {"p": True, "q": 1.0}, TypeError, "expected `p`"),
        ("ReLU", {"p": 0.5, "q": 1.0}, TypeError, "expected `types` to be a class of modules or a tuple of them"),
        ((nn.ReLU, int), {"p": 0.5, "q": 1.0}, TypeError, "expected `types`"),
        (nn.ReLU, {"p": 0.5, "q": 1.0, "filter_fn": lambda name, module: 1}, TypeError, "expected `filter_fn`"),
    ],
)
def test_refusals_change_nothing(types, arguments, error, sentence):
    model = net()
    with pytest.raises(error) as caught:
        insert_after_(model, types, **arguments)
    assert sentence in str(caught.value)
    assert not any(isinstance(module, Sparseout) for module in model.modules())


def test_copies_and_pickles_can_be_reverted():
    model, x = net(), torch.rand(4, 6)
    original = seeded(model, x)
    insert_after_(model, nn.ReLU, p=0.5, q=1.0)
    noisy = seeded(model, x)
    for other in copies(model):
        assert torch.equal(seeded(other, x), noisy)
        revert_(other)
        assert torch.equal(seeded(other, x), original)
    assert torch.equal(seeded(model, x), noisy)


def test_a_hook_added_after_loading_in_another_process_replaces_none(tmp_path, monkeypatch):
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    model = nn.ReLU()
    insert_after_(model, nn.ReLU, p=0.5, q=1.0)
    torch.save(model, tmp_path / "model.pt")
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # a new process counts from 0, as this one did
    model = torch.load(tmp_path / "model.pt", weights_only=False)
    for _ in range(50):
        model.register_forward_hook(lambda *_: None)
    assert set(model(torch.ones(50)).tolist()) == {0.0, 2.0}
    assert len(model._forward_hooks) == 51


@needs_compiler
def test_compiled_code_sees_what_is_inserted_and_removed():
    model, x = net(), torch.rand(16, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    clean = compiled(x)
    insert_after_(model, nn.ReLU, p=1.0, q=1.0)
    assert torch.allclose(compiled(x), model[2].bias.expand(16, 3))
    revert_(model)
    assert torch.equal(compiled(x), clean)


def test_a_traced_graph_has_what_was_inserted():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x), x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(x)[0]

    model, x = Model(), torch.ones(2, 100)
    insert_after_(model, Block, p=0.5, q=1.0)
    traced = torch.fx.symbolic_trace(model)
    assert sorted(traced(x).unique().tolist()) == [0.0, 2.0]
    assert torch.equal(traced.eval()(x), x)


def test_a_traced_graph_has_what_was_inserted_after_a_layer_of_ours_once():
    model, x = nn.Sequential(KWinners(0.5, units=100, boost=0)), torch.ones(2, 100)
    insert_after_(model, KWinners, p=0.5, q=2.0)
    traced = torch.fx.symbolic_trace(model)
    assert sorted(traced(x).unique().tolist()) == [0.0, 2.0]


def test_inserted_and_converted_together():
    model = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    insert_after_(model, nn.ReLU, p=0.1, q=1.0)
    report = convert_dropout_(model, q=1.5)
    assert list(report.changed) == ["1"]
    revert_(model)
    assert [type(module) for module in model.modules()] == [nn.Sequential, nn.ReLU, nn.Dropout]
