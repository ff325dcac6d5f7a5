"""Noise is switched on in evaluation and off in training, and nothing else is."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import sparseout
from conftest import needs_compiler
from sparseout import Sparseout, SparsityController, SparsityMonitor, baselines, noise_

X = torch.rand(4, 6, 8) + 0.5


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class DropPath(nn.Module):
    """Of its kind there are many; torch.fx sees no dropout in it."""

    def forward(self, x):
        return x * torch.rand(len(x), 1, 1).round() if self.training else x


class Derived(nn.Dropout):
    pass


class First(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


class Attention(First):
    def forward(self, x):
        return self.module(x, x, x)[0]


def converted():
    model = nn.Sequential(nn.Dropout(0.5))
    sparseout.convert_dropout_(model, 1.0)
    return model


def inserted():
    model = nn.Sequential(nn.ReLU())
    sparseout.insert_after_(model, nn.ReLU, p=0.5, q=1.0)
    return model


def encoder(padded=False):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True) if padded else layer


class Padded(First):
    def forward(self, x):
        padding = torch.arange(6).expand(4, 6) >= torch.tensor([6, 5, 4, 3])[:, None]
        return self.module(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0)


NOISY = {
    "sparseout": lambda: Sparseout(0.5, 1.0),
    "matched": lambda: Sparseout(0.5, torch.tensor(1.0), scale="matched"),
    "converted": converted,
    "inserted": inserted,
    "dropout": lambda: nn.Dropout(0.5),
    "dropout1d": lambda: nn.Dropout1d(0.5),
    "alpha": lambda: nn.AlphaDropout(0.5),
    "feature alpha": lambda: nn.FeatureAlphaDropout(0.5),
    "derived": lambda: Derived(0.5),
    "gaussian": lambda: baselines.GaussianDropout(0.5),
    "bridgeout": lambda: baselines.bridgeout_(nn.Linear(8, 8)),
    "shakeout": lambda: baselines.shakeout_(nn.Linear(8, 8)),
    "lstm": lambda: First(nn.LSTM(8, 8, 2, dropout=0.5)),
    "gru": lambda: First(nn.GRU(8, 8, 2, dropout=0.5)),
    "attention": lambda: Attention(nn.MultiheadAttention(8, 2, dropout=0.5)),
    "encoder layer": encoder,
    "encoder": lambda: Padded(encoder(padded=True)),
    "functional": Functional,
    "drop path": DropPath,
    "rrelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.RReLU()),
}
noisy = pytest.mark.parametrize("make", NOISY.values(), ids=NOISY)


def is_noisy(model):
    return not all(torch.equal(model(X), model(X)) for _ in range(3))


@noisy
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@torch.no_grad()
def test_noise_is_on_and_off_whatever_the_mode(make):
    model = nn.Sequential(make())
    keys, clean = list(model.state_dict()), model.eval()(X)
    attributes = [set(vars(module)) for module in model.modules()]
    noise_(model, True)
    assert is_noisy(model)
    assert is_noisy(model.train())
    assert is_noisy(model.eval())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_noisy(copied)
        noise_(copied, False)
        torch.testing.assert_close(copied.train()(X), clean)
    assert is_noisy(model)
    noise_(model, False)
    torch.testing.assert_close(model.train()(X), clean)
    assert list(model.state_dict()) == keys
    assert all(module.training for module in model.modules())
    noise_(model, None)
    assert is_noisy(model)
    torch.testing.assert_close(model.eval()(X), clean)
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_everything_but_the_noise_stays_in_evaluation():
    model = nn.Sequential(nn.BatchNorm1d(6), baselines.KWinners(3), nn.Dropout(0.5)).eval()
    noise_(model, True)
    assert is_noisy(model)
    assert model[0].num_batches_tracked == 0
    assert not model[1].duty_cycle.any()


def test_training_without_noise_has_gradients():
    model = nn.Sequential(First(nn.LSTM(8, 8, 2, dropout=0.5)), Sparseout(0.5, 1.0))
    noise_(model, False)
    model(X).sum().backward()
    assert model[0].module.weight_ih_l0.grad.abs().sum() > 0
    assert model[0].module.dropout == 0.5


def test_the_spread_is_that_of_the_equation():
    model = sparseout.Sparseout(0.5, 1.0).eval()
    noise_(model, True)
    y = torch.stack([model(torch.tensor([0.25, 4.0])) for _ in range(20000)])
    torch.testing.assert_close(y.std(0), torch.tensor([0.5, 2.0]), rtol=0.03, atol=0)  # sqrt(|x|)


def test_conversion_and_reverting_under_a_switch():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8)).eval()
    noise_(model, True)
    sparseout.convert_dropout_(model, 1.0)
    y = model[0](torch.full((1000,), 4.0))
    assert set(y.tolist()) == {2.0, 6.0}
    baselines.bridgeout_(model[1])
    noise_(model, True)
    sparseout.revert_(model)
    baselines.revert_(model)
    assert set(model[0](torch.full((1000,), 4.0)).tolist()) == {0.0, 8.0}
    noise_(model, None)
    assert not is_noisy(model)


def test_forwards_of_others_around_and_inside():
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    add_hook_to_module(model[0], ModelHook())
    noise_(model, True)
    assert is_noisy(model)
    add_hook_to_module(model[0], ModelHook())
    noise_(model, None)
    assert not is_noisy(model)
    noise_(model, True)
    assert is_noisy(model)
    remove_hook_from_module(model[0])
    noise_(model, None)
    assert not is_noisy(model)


def test_after_an_error_the_flag_is_as_before():
    model = nn.Dropout2d(0.5).eval()
    noise_(model, True)
    with pytest.raises(AttributeError):
        model("x")
    assert not model.training


def test_threads_that_share_a_model_do_not_see_each_others_flag():
    def forward(x):
        if threading.current_thread() is thread:
            first.set()
            second.wait(0.05)  # until the other call is inside too, which it may not be
        else:
            second.set()
            thread.join()
        seen.append(model.training)
        return x

    seen, first, second = [], threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: model(X))
    model = nn.Dropout(0.5).eval()
    model.forward = forward
    noise_(model, True)
    thread.start()
    first.wait()
    model(X)
    assert seen == [True, True]
    assert not model.training


def test_monitor_and_controller_go_by_the_flags():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Sparseout(0.5, 1.5))
    controller = SparsityController(model, 0.5, every=1)
    noise_(model, True)
    with SparsityMonitor(model) as monitor:
        model.eval()(X)
        assert {record["mode"] for record in monitor.report()} == {"eval"}
    controller.step()
    assert controller.measured["2"] is None
    noise_(model, False)
    model.train()(X)
    controller.step()
    assert controller.measured["2"] is not None


@needs_compiler
@pytest.mark.parametrize("make", [NOISY["dropout"], NOISY["sparseout"], NOISY["converted"], NOISY["gaussian"]])
@pytest.mark.slow
def test_compiled(make):
    model = nn.Sequential(nn.Linear(8, 8), make()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    clean = compiled(X)
    for enabled, mode in ((True, "eval"), (False, "train"), (True, "train"), (None, "eval")):
        noise_(compiled, enabled)
        getattr(model, mode)()
        assert torch.equal(compiled(X), compiled(X)) is (not enabled)
    assert torch.equal(compiled(X), clean)


def test_the_names_of_inputs_can_be_read():
    model = Functional()
    noise_(model, True)
    assert list(inspect.signature(model.forward).parameters) == ["x"]


def test_what_cannot_be_switched_is_said():
    with pytest.warns(UserWarning, match="^no noise was switched: the Linear has none that was found$"):
        noise_(nn.Linear(2, 2), True)
    with pytest.warns(UserWarning, match="^noise compiled by TorchScript stays as it is: 1$"):
        noise_(nn.Sequential(nn.Dropout(0.5), torch.jit.script(nn.Dropout(0.5))), True)
    with pytest.raises(TypeError, match="`enabled` to be True, False or None, but got an int"):
        noise_(nn.Dropout(0.5), 1)
