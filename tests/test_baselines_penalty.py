"""Penalties on activations: their closed forms, and the object that collects them."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, kl_divergence
from torch.utils.checkpoint import checkpoint

from sparseout.baselines import ActivityPenalty, kl_penalty, lq_penalty


@pytest.mark.parametrize("q", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_away_from_zero_it_is_the_lq_norm(q):
    x = torch.tensor([[2.0, -0.5, 0.0], [0.0, 1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    eps = 1e-9
    assert lq_penalty(x, q, eps).item() == pytest.approx((x.abs() ** q).sum().item() / 2, abs=4 * eps**q)
    lq_penalty(x, q).backward()
    wanted = q * x * (x**2 + 1e-6) ** (q / 2 - 1) / 2
    torch.testing.assert_close(x.grad, wanted.detach())


@pytest.mark.parametrize("q", [0.1, 0.5, 1.0, 2.0])
def test_smooth_at_zero(q):
    x = torch.zeros(2, 3, requires_grad=True)
    loss = lq_penalty(x, q)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros(2, 3))
    y = torch.linspace(-2e-3, 2e-3, 41, dtype=torch.float64)[:, None].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: lq_penalty(y, q, 1e-3) * 1e3, y, eps=1e-7, rtol=1e-2)


@pytest.mark.parametrize("penalty", [lq_penalty, kl_penalty])
def test_neither_the_batch_nor_the_map_changes_it_and_units_add_up(penalty):
    x = torch.rand(6, 4)
    wanted = penalty(x)
    torch.testing.assert_close(penalty(x.repeat(3, 1)), wanted)
    torch.testing.assert_close(penalty(x.repeat(1, 3)), 3 * wanted)
    torch.testing.assert_close(penalty(x.view(2, 3, 4)), wanted)
    torch.testing.assert_close(penalty(x[:, :, None, None].expand(6, 4, 5, 7)), wanted)
    torch.testing.assert_close(penalty(x.T, unit_dim=0), wanted)
    assert penalty(x[:0]).item() == 0


def test_the_kl_penalty_is_the_divergence_of_coins():
    x = torch.rand(50, 4, dtype=torch.float64, requires_grad=True)
    wanted = kl_divergence(Bernoulli(torch.tensor(0.2, dtype=torch.float64)), Bernoulli(x.mean(0))).sum()
    torch.testing.assert_close(kl_penalty(x, 0.2), wanted)
    kl_penalty(x, 0.2).backward()
    mean = x.detach().mean(0)
    slope = (-0.2 / mean + 0.8 / (1 - mean)) / 50
    torch.testing.assert_close(x.grad, slope.expand_as(x))


def test_the_kl_penalty_of_saturated_units_is_finite():
    for value in (0.0, 1.0):
        x = torch.full((5, 2), value, requires_grad=True)
        kl_penalty(x).backward()
        assert kl_penalty(x).isfinite()
        assert x.grad.isfinite().all()


def test_half_types_are_computed_in_fp32():
    x = torch.full((4096, 16), 0.01, dtype=torch.float16)
    assert lq_penalty(x).dtype == torch.float32
    assert lq_penalty(x).item() == pytest.approx(16 * 0.00905, rel=0.01)  # sqrt(1e-4 + 1e-6) - 1e-3


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


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(5, 2))


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


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_counts_once(reentrant):
    model, x = network(), torch.randn(8, 4, requires_grad=True)
    with ActivityPenalty(model, ["1"]) as penalty:
        model(x)
        wanted = penalty.loss()
        out = checkpoint(model, x, use_reentrant=reentrant)
        found = penalty.loss()
        (out.sum() + found).backward()
        assert penalty.loss().item() == 0
    # the older kind of checkpoint runs forward without gradients, where nothing is collected
    torch.testing.assert_close(found, torch.zeros(()) if reentrant else wanted)


def test_compiled_it_is_the_same():
    model, x = network(), torch.randn(8, 4)
    model[4].p = 0.0
    with ActivityPenalty(model) as penalty:

        def step(x):
            return model(x).square().sum() + penalty.loss()

        wanted = step(x)
        compiled = torch.compile(step, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(x), model(x).square().sum())


def test_a_copy_of_the_model_leaves_the_penalty_alone():
    model, x = network(), torch.randn(8, 4)
    with ActivityPenalty(model) as penalty:
        copy.deepcopy(model)(x)
        assert penalty.loss().item() == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "sentence"),
    [
        ({"strength": -1}, ValueError, "expected `strength` to be a finite number >= 0, but got -1"),
        ({"strength": "1"}, TypeError, "expected `strength` to be a finite number >= 0, but got '1'"),
        (
            {"q": 1.0, "target": 0.1},
            ValueError,
            "expected `q` to be left out, as `target` asks for the KL penalty, but got 1.0",
        ),
        ({"unit_dim": 1.5}, TypeError, "expected `unit_dim` to be an int or None, but got a float"),
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
