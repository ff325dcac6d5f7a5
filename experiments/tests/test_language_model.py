"""Weight drop, embedding dropout and what the language task reads from the model."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from sparseout_experiments.models import LanguageModel, language
from sparseout_experiments.models.language import WeightDropLSTM
from torch import nn

from sparseout import Sparseout

WORDS = 17


def small(noise=lambda _: nn.Identity(), layers=3, seed=0, **drops):
    return LanguageModel(WORDS, 6, 8, layers, noise, torch.Generator().manual_seed(seed), **drops)


def layer(p, inputs=5, outputs=7):
    return WeightDropLSTM(inputs, outputs, p).double()


def cell_by_cell(x, hidden, cell, weights):
    """The equations of an LSTM layer, a step at a time."""
    w_ih, w_hh, b_ih, b_hh = weights
    out = []
    for step in x:
        i, f, g, o = (step @ w_ih.t() + b_ih + hidden @ w_hh.t() + b_hh).chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        out.append(hidden)
    return torch.stack(out), hidden, cell


def dropped_weight(module, seed):
    """What F.dropout makes of the weight after this seed: the only draw of a call."""
    torch.manual_seed(seed)
    return F.dropout(module.weight_hh_l0, module.weight_drop)


@pytest.mark.parametrize("with_state", [False, True])
def test_the_dropped_weights_are_those_that_are_used(with_state):
    module, x = layer(0.5), torch.rand(9, 3, 5).double()
    state = tuple(torch.rand(2, 1, 3, 7).double()) if with_state else None
    torch.manual_seed(5)
    out, (hidden, cell) = module(x, state)
    first = [s[0] for s in state] if with_state else [torch.zeros(3, 7).double()] * 2
    kept = dropped_weight(module, 5)
    assert 0.3 < (kept == 0).double().mean() < 0.7
    found = cell_by_cell(x, *first, [module.weight_ih_l0, kept, module.bias_ih_l0, module.bias_hh_l0])
    for ours, other in zip((out, hidden[0], cell[0]), found, strict=True):
        torch.testing.assert_close(ours, other)
    undropped, _ = module.eval()(x, state)
    assert not torch.allclose(out, undropped, rtol=1e-2)


def test_gradients_reach_the_raw_weight_through_what_was_kept_alone():
    module, x = layer(0.5), torch.rand(9, 3, 5).double()
    torch.manual_seed(5)
    module(x)[0].square().sum().backward()
    found = [weight.grad.clone() for weight in module.parameters()]
    kept = dropped_weight(module, 5)
    weights = [module.weight_ih_l0, kept, module.bias_ih_l0, module.bias_hh_l0]
    zeros = torch.zeros(3, 7).double()
    out, _, _ = cell_by_cell(x, zeros, zeros, weights)
    for ours, other in zip(found, torch.autograd.grad(out.square().sum(), list(module.parameters())), strict=True):
        torch.testing.assert_close(ours, other)
    assert torch.equal(found[1] == 0, kept == 0)


def test_a_mask_holds_for_one_call():
    module, x = layer(0.5), torch.rand(4, 3, 5).double()
    assert not torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_where_nothing_drops_it_is_nn_lstm_and_draws_nothing(p):
    module, x = layer(p), torch.rand(4, 3, 5).double()
    module.train(p == 0)
    plain = nn.LSTM(5, 7).double()
    plain.load_state_dict(module.state_dict())
    before = torch.get_rng_state()
    assert torch.equal(module(x)[0], plain(x)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_p_1_leaves_no_recurrence():
    module, x = layer(1.0), torch.rand(4, 3, 5).double()
    zeros = torch.zeros(3, 7).double()
    raw = [module.weight_ih_l0, torch.zeros(28, 7).double(), module.bias_ih_l0, module.bias_hh_l0]
    torch.testing.assert_close(module(x)[0], cell_by_cell(x, zeros, zeros, raw)[0])


def test_the_weights_have_the_names_of_nn_lstm_and_the_same_start():
    plain, dropping = small(), small(weight_drop=0.5, embedding_drop=0.1)
    assert list(dropping.state_dict()) == list(plain.state_dict())
    assert "layers.0.weight_hh_l0" in dropping.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), dropping.parameters(), strict=True))


def test_copies_compute_with_their_own_weights():
    model, text = small(weight_drop=0.5), torch.randint(WORDS, (5, 2))
    model(text)[0].sum().backward()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    before = model(text)[0]
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(2)
    torch.manual_seed(1)
    assert torch.equal(model(text)[0], before)
    torch.manual_seed(1)
    assert not torch.allclose(twin(text)[0], before, rtol=1e-2)
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(1)
    again = model(text)[0]
    torch.manual_seed(1)
    assert torch.equal(again, twin(text)[0])


def test_under_ddp_every_weight_gets_its_gradient(tmp_path):
    import torch.distributed as dist

    model, text = small(weight_drop=0.5, embedding_drop=0.1), torch.randint(WORDS, (5, 2))
    torch.manual_seed(1)
    model(text)[0].square().sum().backward()
    alone = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(1)
        parallel(text)[0].square().sum().backward()
    finally:
        dist.destroy_process_group()
    for weight, other in zip(model.parameters(), alone, strict=True):
        torch.testing.assert_close(weight.grad, other)


def test_mixed_precision_goes_on_from_its_state():
    model, text = small(weight_drop=0.5, embedding_drop=0.1), torch.randint(WORDS, (6, 2))
    with torch.autocast("cpu", torch.bfloat16):
        _, state = model(text[:3])
        logits, _ = model(text[3:], [(h.detach(), c.detach()) for h, c in state])
    logits.float().sum().backward()
    assert model.layers[0].weight_hh_l0.grad.abs().sum() > 0


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_cpu_without_a_half_lstm_computes_in_fp32(p, monkeypatch):
    monkeypatch.setattr(language, "_cpu_has_half_lstm", lambda: False)
    layer = WeightDropLSTM(4, 3, p)
    x = torch.randn(5, 2, 4).bfloat16()
    state = (torch.randn(1, 2, 3), torch.randn(1, 2, 3))
    torch.manual_seed(0)
    plain, (hidden, cell) = layer(x.float(), state)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found, (mine, own) = layer(x, tuple(one.double() for one in state))
        assert torch.is_autocast_enabled("cpu")
    assert {one.dtype for one in (found, mine, own)} == {torch.float32}
    for one, same in ((found, plain), (mine, hidden), (own, cell)):
        torch.testing.assert_close(one, same, atol=0, rtol=0)


def test_embedding_dropout_drops_whole_words_of_the_vocabulary():
    model, p = small(embedding_drop=0.4), 0.4
    text = torch.arange(WORDS).repeat(3, 40)
    found = model._embed(text).detach()
    raw = model.embedding.weight[text].detach()
    dropped = (found == 0).all(-1)
    torch.testing.assert_close(found[~dropped], raw[~dropped] / (1 - p))
    assert torch.equal(dropped, dropped[0, :WORDS].repeat(3, 40))  # the same words wherever they stand
    assert 0 < dropped[0, :WORDS].sum() < WORDS
    shares = torch.stack([(model._embed(text[0]) == 0).all(-1).float().mean() for _ in range(500)])
    assert shares.mean() == pytest.approx(p, abs=4 * (p * (1 - p) / WORDS / 500) ** 0.5)
    assert torch.equal(model.eval()._embed(text), raw)


def test_the_decoder_reads_all_weights():
    model = small(embedding_drop=1.0)
    out = model.features(torch.randint(WORDS, (4, 2))).dropped
    torch.manual_seed(0)
    assert torch.equal(model.decoder(out), F.linear(out, model.embedding.weight, model.decoder.bias))
    assert model.decoder.weight is model.embedding.weight


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_noise_is_made_by_the_name_of_its_place(layers):
    asked = []

    def noise(place):
        asked.append(place)
        return nn.Identity()

    small(noise, layers)
    assert asked == ["input", *["between"] * (layers - 1), "output"]


def test_features_are_the_last_layer_before_and_after_its_noise():
    noises = {"input": 0.1, "between": 0.2, "output": 0.5}
    model = small(lambda place: Sparseout(noises[place], 1.5, shared_dims=(0,)), weight_drop=0.5)
    text = torch.randint(WORDS, (5, 2))
    heard = {}
    for name, module in model.activations().items():
        module.register_forward_hook(lambda _, __, out, name=name: heard.update({name: out[0]}))
    torch.manual_seed(2)
    logits, state = model(text)
    torch.manual_seed(2)
    dropped, raw, again = model.features(text)
    assert list(heard) == ["layer1", "layer2", "layer3"]
    assert torch.equal(heard["layer3"], raw)
    assert not torch.equal(dropped, raw)
    assert torch.equal(model.decoder(dropped), logits)
    assert all(
        torch.equal(a, b) for one, other in zip(state, again, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert [tuple(out.shape) for out in heard.values()] == [(5, 2, 8), (5, 2, 8), (5, 2, 6)]
    dropped, raw, _ = model.eval().features(text)
    assert torch.equal(dropped, raw)
