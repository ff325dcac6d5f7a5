"""Thresholds: what is close to 0 becomes 0 in evaluation, at a density or within a budget of loss."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from architectures import transformer
from sparse_calls import let_every_layer_gain
from thresholds import batches, hidden, net
from torch import nn
from torch.testing import assert_close

from sparseout.inference import ThresholdReport, revert_, sparse_linear_, threshold_
from sparseout.inference._sparse_linear import SparseLinear
from sparseout.inference._sparse_product import Break


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ReLU, nn.Softplus, nn.Hardswish])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_density_is_met_and_the_values_are_cut(activation, density):
    model, given = net(activation), batches()
    plain = copy.deepcopy(model)
    report = threshold_(model, given, density=density)
    (record,) = report.records
    x = hidden(model, torch.cat(given)).detach()
    t = record["threshold"]
    assert record["module"] == "3"
    assert record["rows"] == len(x)
    before = float((x != 0).double().mean())
    assert record["density_before"] == pytest.approx(before)
    assert record["density"] == pytest.approx(min(density, before), abs=0.002)
    cut = torch.where(x.abs() <= t, 0.0, x)
    assert record["density"] == pytest.approx(float((cut != 0).double().mean()))
    assert_close(model(given[0]), model[3](x[: len(given[0])]))
    assert_close(model(given[0]), F.linear(cut[:64], model[3].weight, model[3].bias))
    if density == 1:
        assert torch.equal(model(given[0]), plain(given[0]))
    assert report.loss is None


def test_each_layer_has_a_quantile_of_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2)).eval()
    model[2].weight.data *= 0.1
    model[2].bias.data.zero_()
    report = threshold_(model, batches(), density=0.5)
    first, second = report.records
    assert first["threshold"] > 3 * second["threshold"]
    assert first["density"] == pytest.approx(0.5, abs=0.01)
    assert second["density"] == pytest.approx(0.5, abs=0.1)  # behind the first one's threshold


def test_training_and_state_are_as_they_were():
    model, given = net(), batches()
    plain = copy.deepcopy(model)
    model.train()
    threshold_(model, given, density=0.1)
    assert all(module.training for module in model.modules())
    assert list(model.state_dict()) == list(plain.state_dict())
    for one in (model, plain):
        torch.manual_seed(1)
        one.train()
    torch.manual_seed(1)
    y = model(given[0])
    torch.manual_seed(1)
    assert torch.equal(y, plain(given[0]))
    y.sum().backward()
    assert not torch.equal(model.eval()(given[0]), plain.eval()(given[0]))
    revert_(model)
    assert torch.equal(model(given[0]), plain(given[0]))
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())
    with pytest.warns(UserWarning, match="nothing was reverted"):
        revert_(model)


def test_a_traced_graph_has_the_thresholds():
    model = nn.Sequential(net(), nn.GELU(), net()).eval()  # of modules that are traced through
    model[2][0] = nn.Linear(model[0][-1].out_features, model[2][0].out_features)
    threshold_(model, batches(), density=0.2, modules=["2"])
    traced, x = torch.fx.symbolic_trace(model), batches()[0]
    assert torch.equal(traced(x), model(x))
    revert_(model)
    assert not torch.equal(traced(x), model(x))


def test_it_is_copied_pickled_differentiated_compiled_and_exported():
    model, given = net(), batches()
    threshold_(model, given, density=0.2)
    x = given[0]
    expected = model(x).detach()
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(one(x), expected)
        revert_(one)
        assert not torch.equal(one(x), expected)
    assert torch.equal(model(x), expected)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    assert_close(torch.export.export(model, (x,)).module()(x), expected)
    assert_close(torch.vmap(model)(x), expected)
    model.zero_grad()
    model(x).sum().backward()
    cut = (hidden(model, x).abs() <= model[3]._forward_pre_hooks[next(iter(model[3]._forward_pre_hooks))].value).float()
    assert 0 < cut.mean() < 1
    unit = int(cut.mean(0).argmax())
    kept = (hidden(model, x)[:, unit] * (1 - cut[:, unit])).sum()
    assert_close(model[3].weight.grad[0, unit], kept.detach())


def test_a_second_call_replaces_the_first_and_an_error_keeps_it():
    model, given = net(), batches()
    threshold_(model, given, density=0.1)
    second = threshold_(model, given, density=0.6)
    assert second.records[0]["density_before"] == 1
    assert second.records[0]["density"] == pytest.approx(0.6, abs=0.01)
    assert len(model[3]._forward_pre_hooks) == 1
    expected = model(given[0])

    def broken(model, batch):
        raise KeyError("loss")

    for modules in (None, [nn.Linear]):
        with pytest.raises(KeyError):
            threshold_(model, given, density=0.1, loss=broken, modules=modules)
        assert torch.equal(model(given[0]), expected)
        assert not model[0]._forward_pre_hooks


def test_what_is_not_a_number_stays():
    model = net()
    threshold_(model, batches(), density=0.1)
    x = torch.full((1, 8), torch.nan)
    assert model(x).isnan().all()
    report = threshold_(model, [torch.cat([batches()[0], x])], density=0.1)
    assert report.records[0]["density"] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = net().to(dtype)
    given = [x.to(dtype) for x in batches()]
    (record,) = threshold_(model, given, density=0.2).records
    assert record["density"] == pytest.approx(0.2, abs=0.02)
    assert model(given[0]).dtype is dtype


def loss(model, batch):
    return model(batch).square().mean()


def test_the_report_prints():
    report = threshold_(net(), batches(), density=0.25, loss=loss)
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "threshold", "density", "before", "density"]
    assert lines[1].split()[0] == "3"
    assert lines[2] == f"loss {report.loss_before:.4g} -> {report.loss:.4g}"
    assert "(the model itself)" in str(ThresholdReport([dict(report.records[0], module="")]))


class Gated(nn.Module):
    """As in Llama: only the last layer has an activation before it, by way of a product."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.dropout(F.silu(self.gate(y)) * self.up(y), 0.1, self.training))


class Written(Gated):
    """Activations without a module or a function: GELU by tanh, and a squared ReLU in place."""

    def forward(self, x):
        a = self.gate(self.norm(x))
        x = x + self.down(0.5 * a * (1 + torch.tanh(0.8 * (a + 0.045 * a**3))))
        return x + self.down(self.up(x).relu_().pow(2).reshape(-1, 32).view(len(x), 32))


class Residual(Gated):
    """The sum of an activation and something else is none."""

    def forward(self, x):
        return self.down(F.relu(self.gate(x)) + self.up(x))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down = nn.Conv1d(1, 4, 3), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(F.max_pool1d(F.relu(self.conv(x.unsqueeze(1))), 2).flatten(1))


@pytest.mark.parametrize("model", [Gated(), Written(), Pooled()], ids=lambda model: type(model).__name__)
def test_layers_after_activations_are_found(model):
    assert [r["module"] for r in threshold_(model.eval(), batches(), density=0.5).records] == ["down"]


def test_a_model_without_such_a_layer_is_an_error():
    for model in (Residual(), nn.Linear(8, 4), nn.ReLU()):
        with pytest.raises(ValueError, match="a Linear layer after an activation"):
            threshold_(model, batches(), density=0.5)
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "ending", "count"), [("gpt2", "c_proj", 2), ("llama", "down_proj", 2), ("t5", "wo", 4), ("vit", "fc2", 2)]
)
def test_transformers(name, ending, count):
    model, batch = transformer(name)
    model.eval()
    report = threshold_(model, [batch], density=0.3, loss=lambda model, batch: model(**batch).loss)
    assert [r["module"].split(".")[-1] for r in report.records] == [ending] * count
    assert all("attn" not in r["module"] for r in report.records)
    assert report.loss != report.loss_before
    assert all(r["density"] < 0.5 for r in report.records)


def test_padding_is_not_counted():
    model, batch = transformer("bert")
    model.eval()
    ids = batch["input_ids"]
    longer = F.pad(ids, (0, 6), value=3)
    mask = F.pad(torch.ones_like(ids), (0, 6))
    modules = [r["module"] for r in threshold_(model, [{"input_ids": ids}], density=0.3).records][:1]
    alone = threshold_(model, [{"input_ids": ids}], density=0.3, modules=modules).records
    masked = threshold_(model, [{"input_ids": longer, "attention_mask": mask}], density=0.3, modules=modules).records
    whole = threshold_(model, [{"input_ids": longer}], density=0.3, modules=modules).records
    assert masked[0]["rows"] == alone[0]["rows"] == ids.numel() < whole[0]["rows"]
    assert masked[0]["threshold"] == pytest.approx(alone[0]["threshold"], rel=0.01)


def test_an_encoders_padding_is_not_the_decoders():
    model, batch = transformer("t5")
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 2:] = 0
    report = threshold_(model, [batch | {"attention_mask": mask}], density=0.3)
    assert {record["rows"] for record in report.records} == {mask.numel()}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    model, parts = net(), [part[:rows].clone() for part, rows in zip(batches(2), (3, 5), strict=True)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    assert threshold_(model, [nested], density=0.3).records[0]["density"] == pytest.approx(0.3, abs=0.01)
    output = model(nested)
    assert_close([*output.unbind()], [model(part) for part in parts])
    torch.cat([*output.unbind()]).sum().backward()
    gradient, model[0].weight.grad = model[0].weight.grad, None
    model(torch.cat(parts)).sum().backward()
    assert_close(gradient, model[0].weight.grad)


def test_modules_are_those_named_at_their_first_input():
    model = net()
    report = threshold_(model, batches(), density=0.5, modules=["0", "3"])
    assert [r["module"] for r in report.records] == ["0", "3"]
    assert model[0](torch.tensor([[1e-6] * 8])).equal(model[0].bias[None])

    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, x):
            return self.inner(input=x)

    model = Keyword().eval()
    threshold_(model, batches(), density=0.5, modules=["inner"])
    x = torch.full((1, 8), 1e-6)
    assert model(x).equal(model.inner.bias[None])


class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, x):
        return self.embed(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "`density` to be given, or else `max_loss_increase`"),
        ({"density": 0.1, "max_loss_increase": 1.0, "loss": loss}, TypeError, "but got both"),
        ({"density": 0}, ValueError, "a number > 0 and <= 1"),
        ({"density": "0.1"}, TypeError, "a number > 0 and <= 1"),
        ({"max_loss_increase": 1.0}, TypeError, "expected `loss`"),
        ({"max_loss_increase": -1.0, "loss": loss}, ValueError, "finite number >= 0"),
        ({"density": 0.1, "loss": 3}, TypeError, "expected `loss`"),
        ({"density": 0.1, "modules": ["7"]}, ValueError, "'7'"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    model = net()
    with pytest.raises(error, match=message):
        threshold_(model, batches(), **arguments)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_module_that_is_given_no_numbers():
    model = Ids()
    with pytest.raises(ValueError, match="given a floating-point tensor first on these batches"):
        threshold_(model, [torch.arange(3)], density=0.1, modules=["embed"])
    assert not model.embed._forward_pre_hooks


def test_sparse_layers_read_what_is_left(monkeypatch):
    """The two together: the threshold's zeros are what a sparse layer skips, where it is faster, as here."""
    let_every_layer_gain(monkeypatch, (Break(1, 0.5), Break(64, 0.5)))
    model, given = net(hidden=4096), batches(1, 2)
    model[3] = nn.Linear(4096, 1024).eval()
    threshold_(model, given, density=0.05)
    with torch.no_grad():
        expected = model(given[0])
        report = sparse_linear_(model, given)
        assert isinstance(model[3], SparseLinear), str(report)
        assert report.records[0]["density"] == pytest.approx(0.05, abs=0.01)
        assert_close(model(given[0]), expected, rtol=1e-4, atol=1e-5)
        revert_(model)
        assert type(model[3]) is nn.Linear
        assert not torch.equal(model(given[0]), expected)
