"""The benchmark's implementations compute what they are named for, and its arithmetic is that of hand-made numbers."""

import inspect
import os
import time

import oracle
import pytest
import torch
import torch.nn.functional as F
from sparseout_experiments.bench import cases, implementations, measure, memory, timing
from sparseout_experiments.bench.timing import Budget, WallClock

import sparseout
from conftest import needs_compiler

N = 4096


def inputs(n=N):
    return torch.randn(n, dtype=torch.float64).requires_grad_()


def slope_of(function, x, seed=5):
    torch.manual_seed(seed)
    y = function(x)
    return y.detach().numpy(), torch.autograd.grad(y.sum(), x)[0].numpy()


@pytest.mark.parametrize("q", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_published_formula_is_the_equation_with_the_detached_slope(p, q):
    x = inputs()
    y, slope = slope_of(lambda x: implementations.published_formula(x, p, q), x)
    torch.manual_seed(5)
    mask = torch.empty_like(x).bernoulli_(1 - p).detach().numpy()
    assert abs(y - oracle.value(x.detach(), mask, p, q)).max() < 1e-6  # |x| + 1e-12
    expected = oracle.slope(x.detach(), mask, p, q)
    assert abs(slope / expected - 1).max() < 1e-6


@pytest.mark.parametrize("q", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_plain_formula_is_the_equation_with_the_exact_slope(p, q):
    x = inputs()
    y, slope = slope_of(lambda x: implementations.plain_formula(x, p, q), x)
    torch.manual_seed(5)
    mask = torch.bernoulli(torch.full_like(x, 1 - p)).detach().numpy()
    assert abs(y - oracle.value(x.detach(), mask, p, q)).max() < 1e-12
    assert abs(slope - oracle.slope(x.detach(), mask, p, q, gradient="exact")).max() < 1e-9


@needs_compiler
def test_the_compiled_formula_is_the_formula_for_a_mask_of_its_own():
    x = torch.randn(N)
    y = implementations.element("cpu")["plain formula, compiled"](x)
    dropped, kept = (oracle.value(x, torch.full((N,), m), 0.5, 1.5) for m in (0.0, 1.0))
    is_dropped, is_kept = (abs(y.numpy() - wanted) < 1e-5 for wanted in (dropped, kept))
    assert (is_dropped | is_kept).all()
    assert abs(is_kept.mean() - 0.5) < 5 * 0.5 / N**0.5


PEERS = [
    ("F.dropout", lambda x: F.dropout(x, 0.5)),
    *((f"Sparseout q={q:g}", lambda x, q=q: sparseout.sparseout(x, 0.5, q)) for q in (1.0, 1.3, 1.5, 2.5, 3.0)),
    ("Sparseout q=1.5 matched", lambda x: sparseout.sparseout(x, 0.5, 1.5, scale="matched")),
    ("Sparseout q=1.5 exact", lambda x: sparseout.sparseout(x, 0.5, 1.5, gradient="exact")),
    ("Sparseout q=1.5 as tensor", lambda x: sparseout.sparseout(x, 0.5, torch.tensor(1.5))),
]


@pytest.mark.parametrize(("name", "meant"), PEERS)
def test_a_peer_is_what_its_name_says(name, meant):
    x = inputs()
    for found, wanted in zip(slope_of(implementations.element("cpu")[name], x), slope_of(meant, x), strict=True):
        assert (found == wanted).all()


def test_layouts_reach_the_peers_and_masks_are_of_channels():
    for name, layout in list(implementations.LAYOUTS.items())[1:]:
        if layout.shape[0] != -1:
            continue
        x, grad, target = measure._tensors(cases.Operation(N, "fp32", 1, name), "cpu")
        assert all(tensor.is_contiguous(memory_format=layout.memory_format) for tensor in (x, grad, target))
        for function in layout.implementations("cpu").values():
            ratio = (function(x) / x).flatten(2).detach()
            assert ((ratio == 0).all(2) == (ratio == 0).any(2)).all() or "element" in name
    with torch.no_grad():
        y = implementations.channel("cpu")["Sparseout2d q=1.5"](torch.ones(50, 64, 8, 8))
    assert (y == y[:, :, :1, :1]).all()
    assert 0.4 < (y > 1).float().mean() < 0.6


def test_a_busy_machine_is_busy_as_long_as_it_says():
    def work():
        times = os.times()
        return times.children_user + times.children_system

    before = work()
    with timing.spinning(2):
        time.sleep(0.2)
    assert work() - before > 0.05  # of what has ended
    with pytest.raises(ZeroDivisionError), timing.spinning(1):
        1 / 0  # noqa: B018
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_known_sleeps_are_timed():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.01)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.03)
            return grad

    x = torch.ones(3, requires_grad=True)
    found = timing.phases(Slow.apply, x, torch.ones(3), 3, WallClock("cpu"))
    for phase, seconds in {"forward": 0.01, "backward": 0.03, "both": 0.04}.items():
        assert seconds <= found[phase] < 2.5 * seconds, phase


def test_every_round_runs_every_peer_once_in_changing_order():
    ran, names = [], "abcd"
    runners = {name: lambda name=name: ran.append(name) or {"step": 1.0} for name in names}
    found = timing.alternate(runners, Budget(0, 12, 12), pytest.fail)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys(names, 12)
    rounds = ["".join(ran[start : start + 4]) for start in range(len(ran) - 48, len(ran), 4)]
    assert all(sorted(one) == list(names) for one in rounds)
    assert len(set(rounds)) > 4
    assert len(ran) == 4 * (3 + 12)  # warm-up


@pytest.mark.parametrize("fails_at", [1, 2, 6])
def test_a_peer_that_fails_is_left_out_whenever_it_fails(fails_at):
    calls, failures = [], {}

    def bad():
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("no compiler")
        return {"step": 2.0}

    runners = {"good": lambda: {"step": 1.0}, "bad": bad}
    found = timing.alternate(runners, Budget(0, 5, 5), lambda name, error: failures.update({name: str(error)}))
    assert list(found) == ["good"]
    assert len(found["good"]) == 5
    assert failures == {"bad": "no compiler"}
    assert len(calls) == fails_at


def test_an_interrupt_is_not_a_failure():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.alternate({"a": interrupted}, Budget(0, 2, 2), pytest.fail)


def test_budgets_spreads_and_ratios():
    assert [Budget(10, 3, 50).rounds(cost) for cost in (1.0, 100.0, 0.001, 0.0)] == [10, 3, 50, 50]
    assert timing.spread([float(i) for i in range(11)]) == (5, 1, 9)
    assert timing.spread([3.0, 1.0]) == pytest.approx((2, 1.2, 2.8))
    times, base = [{"step": 6.0}, {"step": 10.0}], [{"step": 2.0}, {"step": 5.0}]
    assert measure.ratios(times, base) == [{"step": 3.0}, {"step": 2.0}]


def test_copy_bandwidth_counts_each_operand_once():
    # A copy moves 2 streams in 4 s. Forward needs 2 streams, backward 3 and both 5.
    seconds = {"forward": {"median": 8.0}, "backward": {"median": 6.0}, "both": {"median": 20.0}}
    assert measure.of_copy_bandwidth(seconds, 4.0) == {"forward": 0.5, "backward": 1.0, "both": 0.5}


def test_what_is_kept_for_backward_is_counted_once_and_the_input_apart():
    x = torch.randn(100, requires_grad=True)
    weight = torch.randn(100)
    assert memory.kept(lambda x: x * weight, x) == (400, 0)
    assert memory.kept(lambda x: x * x, x) == (0, 400)
    assert memory.kept(lambda x: (x.view(10, 10) * weight.view(10, 10)).exp() * x.view(10, 10), x) == (800, 400)
    assert memory.kept(lambda x: x + 1, x) == (0, 0)


def test_the_peak_is_the_most_held_at_a_time(capfd):
    def run():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(200)
        return second, third

    assert memory.peak(run, "cpu") in range(6000, 6000 + 300)  # the allocator may round up
    assert capfd.readouterr().err == ""


def test_plans():
    for (device, quick), plan in cases.PLANS.items():
        found = cases.cases(device, quick)
        assert len({case.key for case in found}) == len(found)
        assert {case.section for case in found} == {"operation", "model", "alternatives"}
        for section in ("model", "alternatives"):
            assert {case.section for case in cases.cases(device, quick, section)} == {section}
        assert tuple(case.width for case in found if case.section == "alternatives") == plan.widths
        assert {case.model for case in found if case.section == "model"} <= set(cases.MODELS)
        sizes = {case.elements for case in found if case.section == "operation" and case.layout == "vector"}
        assert sizes == {64, *plan.sizes}
    assert [cases.size(n) for n in (64, 2**20, 256 * 2**20)] == ["64", "1M", "256M"]


def test_a_training_step_changes_the_weights_and_leaves_no_gradient(monkeypatch):
    built = []
    monkeypatch.setitem(cases.MODELS, "tiny", cases.Text(2, 8, 8, 2, 3, 20))
    monkeypatch.setitem(cases.MODELS, "small", cases.Images(10, 1, 2))
    for name in ("tiny", "small"):

        class Noise(torch.nn.Identity):
            def __init__(self):
                super().__init__()
                self.seen = []
                built.append(self)

            def forward(self, x):
                self.seen.append(x.requires_grad)
                return x

        step = measure.training_step(cases.Model(name, "eager", 1), implementations.Method(Noise), "cpu")
        losses = []
        whole = F.cross_entropy
        monkeypatch.setattr(F, "cross_entropy", lambda *a, whole=whole, into=losses: into.append(whole(*a)) or into[-1])
        for _ in range(3):
            step()
        monkeypatch.setattr(F, "cross_entropy", whole)
        assert losses[2] < losses[0]
    assert len(built) == 3 + 3
    assert all(noise.seen == [True] * 3 for noise in built)


def test_the_reason_of_a_compiler_is_what_it_wraps():
    error = RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: none found")
    assert measure._reason(error) == "backend='inductor' raised:"
    error.inner_exception = RuntimeError("\n no C++ compiler was found \nmore")
    assert measure._reason(error) == "no C++ compiler was found"
    assert measure._reason(ValueError()) == "ValueError"


def test_every_method_is_what_its_row_says():
    steps = measure.steps_of(cases.Layer(8, 1), "cpu")
    assert list(steps) == [*implementations.METHODS, *implementations.ALTERNATIVES]
    found = {}
    for name, step in steps.items():
        model, penalty = (inspect.getclosurevars(step).nonlocals[cell] for cell in ("model", "penalty"))
        found[name] = (type(model[1]).__name__, type(model[2]).__name__, penalty is not None)
        step()
        assert all(parameter.grad is None for parameter in model.parameters())
        if name.startswith("Bridgeout"):
            assert model[2].per_example == name.endswith("example")
    assert found == {
        "nn.Dropout": ("Dropout", "Linear", False),
        "no dropout": ("Identity", "Linear", False),
        "Sparseout q=1.5": ("Sparseout", "Linear", False),
        "Gaussian dropout": ("GaussianDropout", "Linear", False),
        "L1 penalty": ("Identity", "Linear", True),
        "k-winners, a tenth": ("KWinners", "Linear", False),
        "Shakeout": ("Identity", "ShakeoutLinear", False),
        "Bridgeout, per batch": ("Identity", "BridgeoutLinear", False),
        "Bridgeout, per example": ("Identity", "BridgeoutLinear", False),
    }


def test_alternatives_in_models_where_they_have_a_place(monkeypatch):
    monkeypatch.setitem(cases.MODELS, "tiny", cases.Text(2, 8, 8, 2, 3, 20))
    monkeypatch.setitem(cases.MODELS, "small", cases.Images(10, 1, 2))
    plain, every = list(implementations.METHODS), [*implementations.METHODS, *implementations.ALTERNATIVES]
    for name, mode, wanted in (
        ("small", "eager", every),
        ("small", "compiled", plain),
        ("tiny", "eager", [*plain, "Gaussian dropout", "L1 penalty"]),
        ("tiny", "compiled", plain),
    ):
        assert list(measure.steps_of(cases.Model(name, mode, 1), "cpu")) == wanted


def test_noise_per_example_takes_memory_for_every_example():
    steps = measure.steps_of(cases.Layer(64, 1, batch=32), "cpu")
    peaks = {name: memory.peak(step, "cpu") for name, step in steps.items()}
    weights = 4 * 64 * 64
    assert peaks.pop("Bridgeout, per example") > 2 * 32 * weights
    assert max(peaks.values()) < 20 * weights
