"""Linear layers that stay as they are, each with its reason, and those of transformers."""

import pytest
import torch
from architectures import transformer
from sparse_calls import count_sparse_calls, with_zeros
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from sparseout.inference import _sparse_timing, sparse_linear_
from sparseout.inference._sparse_linear import SparseLinear


@pytest.fixture
def always(monkeypatch):
    return count_sparse_calls(monkeypatch)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 32), nn.Linear(32, 24)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x).relu())


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(32, 24)

    def forward(self, x):
        return self.query(x)


class LoRA(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def changed(change):
    layer = nn.Linear(32, 24)
    change(layer)
    return layer


def never_called():
    model = nn.Sequential(nn.ReLU())
    model[0].unused = nn.Linear(32, 24)
    return model


def own_forward(layer):
    old = layer.forward
    layer.forward = lambda x: old(x)


LEFT = [
    (Tied(), "tied"),
    (SelfAttention(), "a projection of attention"),
    (LoRA(32, 24), "LoRA is derived from Linear"),
    (changed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), "computed anew"),
    (changed(parametrizations.weight_norm), "ParametrizedLinear is derived"),
    (changed(own_forward), "forward was replaced"),
    (changed(lambda layer: layer.share_memory()), "larger storage, or shared"),
    (changed(lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(48, 32)[:24]))), "larger storage"),
    (never_called(), "it is not called"),
]


@pytest.mark.parametrize(("model", "reason"), LEFT, ids=[reason for _, reason in LEFT])
def test_what_is_left_says_why(always, model, reason):
    model.eval()
    x = torch.arange(4) if isinstance(model, Tied) else with_zeros(2, 32)
    before = model(x)
    report = sparse_linear_(model, [x])
    assert len(report.skipped) == 1
    assert reason in next(iter(report.skipped.values()))
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert torch.equal(model(x), before)


def test_a_projection_of_attention_that_is_named_is_taken(always):
    model = SelfAttention()
    assert set(sparse_linear_(model, [with_zeros(2, 32)], modules=["query"]).changed) == {"query"}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_layers_that_torch_reads_without_calling(always):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    report = sparse_linear_(layer, [torch.randn(2, 5, 16)])
    assert {"linear1", "linear2", "self_attn.out_proj"} == set(report.skipped)
    assert "fused" in report.skipped["linear2"]
    assert "never calls it" in report.skipped["self_attn.out_proj"]


@pytest.mark.parametrize(("name", "taken"), [("bert", "output.dense"), ("t5", "wo"), ("vit", "fc2")])
def test_transformers(always, name, taken):
    """Only what follows the activation of an FFN has zeros; models are called as they take their batches."""
    model, batch = transformer(name)
    model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        for module in model.modules():
            if isinstance(module, nn.GELU) or type(module).__name__ == "GELUActivation":
                module.forward = torch.relu
        before = model(**batch).logits
        report = sparse_linear_(model, [batch])
        assert report.changed
        assert all(name.endswith(taken) for name in report.changed), str(report)
        always.clear()
        after = model(**batch).logits
    assert sum(always) == len(report.changed)
    assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_an_input_without_zeros_and_a_small_matrix_are_left():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    report = sparse_linear_(model, [torch.randn(4, 16)])
    assert report.skipped["0"] == "its input has hardly a zero on these batches"
    assert not report.changed or report.records[0]["sparse_us"] < report.records[0]["dense_us"]
    assert {record["module"] for record in report.records} == {"2"}
    assert "skipped  0" in str(report)


@pytest.mark.parametrize(
    ("times", "left"),
    [
        ([1.0, 0.1, 1.2], None),
        ([1.0, 0.1, 1.3], "on an input without zeros it would be slower than now, with its weight in columns"),
        ([1.0, 0.9, 1.0], "dense is as fast on these batches"),
    ],
)
def test_what_is_measured_decides(times, left, always, monkeypatch):
    """The times of a call: as the layer is, as it would be, and as it would be without zeros."""
    monkeypatch.setattr(_sparse_timing, "times", lambda *functions: times)
    report = sparse_linear_(nn.Linear(32, 24).eval(), [with_zeros(3, 32)])
    assert list(report.skipped.values()) == ([left] if left else [])
    assert bool(report.changed) is (left is None)
