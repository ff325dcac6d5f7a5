"""The monitor sees what direct computation sees, counts steps by its rule, and leaves nothing behind."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tracked import hooks
from watching import NAMES, dense, only, windows

from sparseout import Sparseout, SparsityMonitor, measures
from sparseout._utils.activations import ROWS, sampled, stride


@pytest.mark.parametrize("shape", [(32, 5), (6, 7, 5), (3, 5, 4, 6), (2, 5, 3, 4, 2)])
def test_values_are_those_of_direct_computation(shape):
    batches = [torch.randn(shape) for _ in range(3)]
    model = nn.Sequential(nn.ReLU())
    with SparsityMonitor(model) as monitor:
        outputs = [model(batch) for batch in batches]
    rows = torch.cat([out.movedim(1 if out.ndim > 3 else -1, -1).reshape(-1, 5) for out in outputs])
    population = only(monitor.report(), axis="population")
    zero = (rows == 0).all(1)
    for name in NAMES:
        value = getattr(measures, name)(rows)
        torch.testing.assert_close(population[name], value[~value.isnan()].double().mean().item())
    assert population["rows"] == len(rows)
    assert population["undefined_rows"] == zero.sum()
    lifetime = only(monitor.report(), axis="lifetime")
    torch.testing.assert_close(lifetime["hoyer"], measures.hoyer(rows.double(), 0).mean().item())
    assert lifetime["gini"] is None


def test_the_histogram_counts_every_value():
    x = torch.tensor([[0.0, 2e-3, -2e-3, 50.0, 1e-20, 1e30, math.nan, math.inf]])
    model = nn.Sequential(nn.Identity())
    with SparsityMonitor(model, ["0"]) as monitor:
        model(x)
    record = monitor.report()[0]
    assert (record["zeros"], record["not_finite"]) == (1, 2)
    expected = [0] * 24
    expected[0] = expected[-1] = 1  # 1e-20 and 1e30
    expected[10] = 2  # log10 0.002 = -2.7, in [-3, -2.5)
    expected[19] = 1  # log10 50 = 1.7
    assert record["histogram"] == tuple(expected)
    assert "NaN or infinite" in monitor.report().diagnosis[0]


def test_half_types_are_measured_in_fp32_under_autocast():
    model, x = nn.Sequential(nn.Linear(16, 300), nn.ReLU()), torch.randn(8, 16)
    with SparsityMonitor(model) as monitor, torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(monitor.report()[0]["gini"], measures.gini(out.float()).double().mean().item())


@pytest.mark.parametrize("shape", [(64, 3, 16, 16), (5000, 3), (64, 100, 3)])
def test_of_many_rows_every_sth(shape):
    x = torch.randn(shape)
    dim = 1 if len(shape) == 4 else -1
    whole = x.movedim(dim, -1).reshape(-1, 3)
    step = stride(len(whole))
    assert step > 1
    assert math.gcd(step, len(whole)) == 1
    assert torch.equal(sampled(x, dim), whole[::step])
    assert len(whole[::step]) <= ROWS


def test_sampled_positions_cover_a_map_evenly():
    places = torch.arange(32.0).expand(128, 1, 32, 32)  # the column of each position
    counts = sampled(places, 1).flatten().long().bincount()
    assert len(counts) == 32
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("rows", [0, 1, ROWS, ROWS + 1, 30030 * 8, 2**20])
def test_stride_leaves_at_most_so_many(rows):
    assert -(-rows // stride(rows)) <= ROWS


def test_modes_are_kept_apart():
    model = dense()
    with SparsityMonitor(model) as monitor:
        model(torch.randn(7, 6))
        model.eval()
        model(torch.randn(5, 6))
        model(torch.randn(5, 6))
    report = monitor.report()
    assert windows(report) == ((1, 1), (2, 2))
    assert only(report, module="1", mode="train", axis="population")["rows"] == 7
    assert only(report, module="1", mode="eval", axis="population")["rows"] == 10


@pytest.mark.parametrize("every", [1, 3])
def test_every_nth_step_of_each_mode_from_the_first(every):
    model = dense()
    with SparsityMonitor(model, every=every) as monitor:
        for step in range(7):
            model.train()(torch.randn(1 + step, 6))
            model.eval()(torch.randn(10, 6))
    report = monitor.report()
    seen = range(0, 7, every)
    assert windows(report) == ((len(seen), 7),) * 2
    assert only(report, module="1", mode="train", axis="population")["rows"] == sum(1 + step for step in seen)


def test_a_step_where_only_submodules_are_called():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.ReLU()), "decoder": nn.Sequential(nn.ReLU())})
    with SparsityMonitor(model, every=2) as monitor:
        for _ in range(5):
            code = model["encoder"](torch.randn(3, 4))
            model["decoder"](code)
            model["decoder"](code)  # shared: the same step
    report = monitor.report()
    assert windows(report) == ((3, 5), (0, 0))
    assert only(report, module="encoder.0", axis="population")["rows"] == 9
    assert only(report, module="decoder.0", axis="population")["rows"] == 18


def test_calls_of_the_model_and_of_its_parts_may_take_turns():
    model = dense()
    with SparsityMonitor(model) as monitor:
        model(torch.randn(3, 6))
        model[1](torch.randn(3, 8))
        model(torch.randn(3, 6))
    assert windows(monitor.report())[0] == (3, 3)


class Unrolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x, times):
        for _ in range(times):
            x = self.act(x)
        if times == 0:
            raise RuntimeError("on purpose")
        return x


def test_all_calls_within_a_step_count_and_an_error_ends_it():
    model = Unrolled()
    with SparsityMonitor(model, every=2) as monitor:
        model(torch.randn(2, 4), 3)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(torch.randn(2, 4), 0)
        model.act(torch.randn(5, 4))  # no call of the model is open any more: a step of its own
    report = monitor.report()
    assert windows(report)[0] == (2, 3)
    assert report[0]["rows"] == 3 * 2 + 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_does_not_count(reentrant):
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model = Saved()
    with SparsityMonitor(model) as monitor:
        for _ in range(2):
            model(torch.randn(3, 4, requires_grad=True)).sum().backward()
    report = monitor.report()
    assert windows(report)[0] == (2, 2)
    assert report[0]["rows"] == 6


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer", [lambda **k: Sparseout(0.3, 1.2, **k), lambda **k: nn.Dropout(0.3, **k)])
def test_noise_is_measured_against_dropout(layer, inplace):
    model = nn.Sequential(layer(inplace=inplace))
    xs = [torch.randn(20, 9) for _ in range(4)]
    with SparsityMonitor(model) as monitor:
        pairs = [(x.clone(), model(x).clone()) for x in xs]
        model.eval()(xs[0])
    noise = sum((y - x).square().sum() for x, y in pairs) / (0.3 / 0.7 * sum(x.square().sum() for x, _ in pairs))
    record = only(monitor.report(), mode="train", axis="population")
    assert record["noise"] == pytest.approx(noise.item(), rel=1e-6)
    assert only(monitor.report(), mode="eval", axis="population")["noise"] is None


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Dropout(0.0), nn.Dropout(1.0), nn.AlphaDropout(0.5)])
def test_no_noise_where_there_is_none_to_compare(module):
    model = nn.Sequential(module)
    with SparsityMonitor(model) as monitor:
        model(torch.randn(4, 4))
    assert monitor.report()[0]["noise"] is None


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Dropout(0.2), (40, 10)), (nn.Dropout1d(0.2), (40, 10, 16)), (nn.Dropout2d(0.2), (40, 10, 4, 4))],
)
def test_the_standard_error_of_the_noise_is_right(layer, shape):
    model, errors, ratios = nn.Sequential(layer), [], []
    x = torch.randn(shape)
    for _ in range(100):
        with SparsityMonitor(model) as monitor:
            model(x)
        ratios.append(monitor.report()[0]["noise"])
        errors.append(monitor.report()[0]["noise_error"])
    spread, claimed = torch.tensor(ratios).std().item(), sum(errors) / len(errors)
    # 100 draws know a standard deviation to 7%. Channel masks are taken at their worst, at most twice too large here.
    assert 0.75 * spread < claimed < (1.35 if layer.__class__ is nn.Dropout else 4) * spread


def test_detached_nothing_is_left_and_what_was_seen_stays():
    model = dense()
    monitor = SparsityMonitor(model)
    assert hooks(model) == 0
    assert monitor.attach() is monitor
    assert hooks(model) > 0
    count = hooks(model)
    monitor.attach()
    assert hooks(model) == count
    model(torch.randn(3, 6))
    monitor.detach()
    monitor.detach()
    assert hooks(model) == 0
    model(torch.randn(3, 6))
    assert windows(monitor.report())[0] == (1, 1)
    with monitor:
        model(torch.randn(3, 6))
    assert windows(monitor.report())[0] == (2, 2)
    monitor.reset()
    assert len(monitor.report()) == 0
    assert windows(monitor.report())[0] == (0, 0)


def test_nothing_of_the_run_changes():
    plain, watched = dense(seed=1), dense(seed=1)
    watched.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6)
    state = torch.get_rng_state()
    with SparsityMonitor(watched):
        out = watched(x)
        out.sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        copy.deepcopy(watched)(x)
    assert torch.equal(out, plain(x))
    plain(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not any(t.requires_grad for t in watched.buffers())


def test_batch_norm_that_sees_something_else_in_evaluation():
    model = nn.Sequential(nn.BatchNorm1d(16), nn.ReLU())
    x = torch.randn(2000, 16)
    model[0].running_mean.copy_(x.mean(0))
    model[0].running_var.copy_(x.var(0))
    model.eval()
    with SparsityMonitor(model) as monitor:
        model(x)
    assert monitor.report().diagnosis == []
    monitor.reset()
    with monitor:
        model(2 * x + 3)
    (norm,) = monitor.report().norms
    seen = 2 * x + 3
    shift = (seen.mean(0) - x.mean(0)) / (x.var(0) + 1e-5).sqrt()
    assert norm.shift == pytest.approx(shift.square().mean().sqrt().item(), rel=1e-4)
    assert norm.spread == pytest.approx(2, rel=1e-3)
    (sentence,) = monitor.report().diagnosis
    assert sentence.startswith("Batch norm: in evaluation 1 of 1 layers")
