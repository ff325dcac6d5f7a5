"""Penalties on activations: their closed forms, and the object that collects them."""

import copy
import gc
import pickle
import re

import pytest
import torch
from penalised import network
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from conftest import needs_compiler
from sparseout import insert_after_
from sparseout.baselines import ActivityPenalty, kl_penalty, lq_penalty


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: lq_penalty(x, 0), ValueError, "expected `q` to be a finite number > 0, but got 0"),
        (lambda x: lq_penalty(x, True), TypeError, "expected `q` to be a finite number > 0, but got True"),
        (lambda x: lq_penalty(x, 1.0, 0.0), ValueError, "expected `eps` to be a finite number > 0, but got 0.0"),
        (lambda x: kl_penalty(x, 1.0), ValueError, "expected `target` to be a number > 0 and < 1, but got 1.0"),
        (
            lambda x: kl_penalty(5 * x),
            ValueError,
            "expected `x` to be activations from 0 to 1, as of a sigmoid, for the KL penalty, but got some from 0 to 5",
        ),
    ],
)
def test_errors(call, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call(torch.eye(3))


def test_it_adds_up_the_layers_and_forgets():
    model, x = network(), torch.randn(8, 4)
    h = model[:2](x)
    g = model[2:4](h)
    with ActivityPenalty(model, strength=0.3, q=1.5) as penalty:
        model(x)
        torch.testing.assert_close(penalty.loss(), 0.3 * (lq_penalty(h, 1.5) + lq_penalty(g, 1.5)))
        assert penalty.loss().item() == 0
        model(x)
        model(x)
        loss = penalty.loss()
        torch.testing.assert_close(loss, 0.6 * (lq_penalty(h, 1.5) + lq_penalty(g, 1.5)))
        loss.backward()
    wanted = torch.autograd.grad(0.6 * (lq_penalty(h, 1.5) + lq_penalty(g, 1.5)), model[0].weight)[0]
    torch.testing.assert_close(model[0].weight.grad, wanted)
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    model(x)
    assert penalty.loss().item() == 0


class GELUActivation(nn.Module):
    """Of transformers, which has classes of its own: no nn.GELU."""

    def forward(self, x):
        return nn.functional.gelu(x)


def test_activations_of_other_libraries_are_penalised_with_noise_after_them_too():
    model = nn.Sequential(nn.Linear(4, 6), GELUActivation(), nn.Linear(6, 6), nn.Tanh())
    assert list(ActivityPenalty(model).sites) == ["1", "3"]
    insert_after_(model, GELUActivation, p=0.5, q=1.0)
    assert list(ActivityPenalty(model).sites) == ["1", "3"]


def test_each_layer_its_own_strength():
    model, x = network(), torch.randn(8, 4)
    with ActivityPenalty(model, strength={"1": 0.1, "3": 2.0}) as penalty:
        model(x)
        h = model[:2](x)
    g = model[2:4](h)
    with ActivityPenalty(model, strength={"1": 0.1, "3": 2.0}) as penalty:
        model(x)
        torch.testing.assert_close(penalty.loss(), 0.1 * lq_penalty(h) + 2 * lq_penalty(g))
    with ActivityPenalty(model, ["3"], strength=0.5, target=0.1) as penalty:
        model(x)
        torch.testing.assert_close(penalty.loss(), 0.5 * kl_penalty(g, 0.1))
    with ActivityPenalty(model, [nn.Dropout]) as penalty:  # at its input
        model(x)
        torch.testing.assert_close(penalty.loss(), 1e-3 * lq_penalty(g))


def test_only_training_with_gradients_counts():
    model, x = network(), torch.randn(8, 4)
    with ActivityPenalty(model) as penalty:
        model.eval()(x)
        assert penalty.loss().item() == 0
        model.train()
        with torch.no_grad():
            model(x)
        assert penalty.loss().item() == 0
        model(x)
        assert penalty.loss().item() > 0


@pytest.fixture(scope="module")
def _few_objects():
    """A heap in which only what the test makes is collected and looked at: the rest is a million objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def graphs():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) and thing.grad_fn is not None for thing in gc.get_objects())


@pytest.mark.usefixtures("_few_objects")
@pytest.mark.parametrize("copied", [copy.deepcopy, AveragedModel, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_penalised_and_keeps_nothing(copied):
    model, x = network(), torch.randn(8, 4)
    with ActivityPenalty(model, ["1", "4"]) as penalty:
        out = model(x)
        other = copied(model)  # between forward and loss()
        wanted = penalty.loss().detach()
        assert wanted > 0
        del out
        before = graphs()
        for _ in range(3):
            other(x).sum().backward()
            assert penalty.loss() == 0
        assert graphs() == before
        model(x)
        torch.testing.assert_close(penalty.loss().detach(), wanted)


def test_a_copy_of_the_penalty_with_its_model_is_attached_to_nothing():
    model, x = network(), torch.randn(8, 4)
    with ActivityPenalty(model) as penalty:
        model(x)
        other_model, other = copy.deepcopy((model, penalty))
        with pytest.raises(RuntimeError, match="expected `penalty` to be attached"):
            other.loss()
        with other:
            other_model(x)
            torch.testing.assert_close(other.loss(), penalty.loss())


def test_a_penalty_that_was_never_attached_is_an_error():
    model = network()
    penalty = ActivityPenalty(model)
    model(torch.randn(8, 4))
    with pytest.raises(RuntimeError, match="with-block, but got one that never was"):
        penalty.loss()
    with penalty:
        model(torch.randn(8, 4))
    with pytest.raises(RuntimeError, match="or no longer is"):  # its terms went with the hooks
        penalty.loss()


@pytest.mark.parametrize(
    ("before", "watched", "overwrites"),
    [
        (nn.Linear(4, 6), nn.Dropout(0.5, inplace=True), nn.Identity()),
        (nn.Identity(), nn.Linear(4, 6), nn.ReLU(inplace=True)),
        (nn.Identity(), nn.Linear(4, 6), nn.Dropout(0.5, inplace=True)),
        (nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.5, inplace=True)),
        (nn.Linear(4, 6), nn.SiLU(), nn.ReLU(inplace=True)),
    ],
)
@pytest.mark.parametrize("options", [{"q": 1.0}, {"q": 0.5}, {"q": 2.0}])
def test_activations_may_be_overwritten(before, watched, overwrites, options):
    model, x = nn.Sequential(before, watched, overwrites), torch.randn(8, 4)
    with ActivityPenalty(model, ["1"], **options) as penalty:
        out = model(x)
        loss = penalty.loss()
        (out.sum() + loss).backward()
    h = before(x) if isinstance(watched, nn.Dropout) else watched(before(x))
    torch.testing.assert_close(loss, 1e-3 * lq_penalty(h, options["q"]))


def test_units_lie_where_the_module_before_puts_them():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), torch.randn(2, 5, 5, 4)
    h = model(x)
    for given, dim in ((None, -1), (1, 1), ({"1": 2}, 2), ({nn.ReLU: 2}, 2), (lambda name, module, x: 1, 1)):
        with ActivityPenalty(model, strength=1.0, unit_dim=given) as penalty:
            model(x)
            torch.testing.assert_close(penalty.loss(), lq_penalty(h, unit_dim=dim))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("options", [{}, {"target": 0.1}])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_rows_are_rows(layout, options):
    parts = [torch.rand(2, 4), torch.rand(3, 4)]
    model = nn.Sequential(nn.ReLU())
    with ActivityPenalty(model, **options) as penalty:
        x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
        model(x)
        loss = penalty.loss()
        model(torch.cat(parts))
        torch.testing.assert_close(loss, penalty.loss())
        loss.backward()
    assert torch.cat(x.grad.unbind()).abs().sum() > 0


def test_sharded_rows_are_rows(process_group):
    x, model = torch.randn(6, 4), nn.Sequential(nn.ReLU())
    with ActivityPenalty(model) as penalty:
        model(DTensor.from_local(x.requires_grad_(), init_device_mesh("cpu", (1,)), [Shard(0)]))
        loss = penalty.loss()
        model(x)
        torch.testing.assert_close(loss, penalty.loss())


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=needs_compiler)])
def test_with_warmup_the_strength_rises_on_a_line(backend):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(5, 4)
    penalty = ActivityPenalty(model, strength=2.0, warmup=4).attach()

    def step():
        model(x)
        return penalty.loss()

    if backend:
        step = torch.compile(step, backend=backend, fullgraph=True)
    whole = 2 * lq_penalty(model(x).detach())
    penalty.loss()  # t = 0, of the line above
    model.eval()
    assert step() == 0  # nothing collected: no step
    model.train()
    found = [step().item() for _ in range(5)]
    assert found == pytest.approx([whole.item() * part for part in (0.25, 0.5, 0.75, 1.0, 1.0)])
    assert penalty.state_dict() == {"steps": 6}
    other = ActivityPenalty(model, strength=2.0, warmup=4)
    other.load_state_dict({"steps": 2})
    penalty.detach()
    for resumed in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        with resumed:
            (resumed._sites[0].module)(torch.ones(5, 3))
            assert resumed.loss().item() == pytest.approx(3 * 2 * 0.5, rel=1e-2)
            assert resumed.state_dict() == {"steps": 3}


@pytest.mark.usefixtures("_few_objects")
def test_nothing_is_kept_over_many_steps():
    model, x = network(), torch.randn(8, 4)
    with ActivityPenalty(model) as penalty:
        counts = []
        for step in range(300):
            (checkpoint(model, x, use_reentrant=False).sum() + penalty.loss()).backward()
            if step in (5, 299):
                gc.collect()
                counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[1] <= counts[0]


@pytest.mark.parametrize(
    ("kwargs", "error", "sentence"),
    [
        ({"strength": -1}, ValueError, "expected `strength` to be a finite number >= 0, but got -1"),
        ({"warmup": -1}, ValueError, "expected `warmup` to be an int >= 0, but got -1"),
        ({"strength": "1"}, TypeError, "expected `strength` to be a finite number >= 0, but got '1'"),
        (
            {"q": 1.0, "target": 0.1},
            ValueError,
            "expected `q` to be left out, as `target` asks for the KL penalty, but got 1.0",
        ),
        (
            {"unit_dim": 1.5},
            TypeError,
            "expected `unit_dim` to be an int, a mapping from names or types of modules to ints, "
            "a function (name, module, tensor), or None, but got a float",
        ),
        (
            {"modules": ["7"]},
            ValueError,
            "expected `modules` to be names of modules, such as '0', '1', '2', but got '7'",
        ),
        (
            {"modules": ["1"], "strength": {"3": 1.0}},
            ValueError,
            "expected `strength` to be one number for each of the watched modules, '1', but got names 3",
        ),
    ],
)
def test_what_cannot_be_built(kwargs, error, sentence):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        ActivityPenalty(network(), **kwargs)


def test_relu_has_no_kl_penalty():
    model = network()
    with ActivityPenalty(model, ["1"], target=0.1), pytest.raises(ValueError, match="as of a sigmoid"):
        model(10 * torch.randn(8, 4))
