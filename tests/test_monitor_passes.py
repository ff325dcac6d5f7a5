"""The passes and rows that a monitor counts: compiled, distributed, nested, transformed, without values."""

import os
import sys
from collections import OrderedDict

import pytest
import torch
from ranks import on_two_ranks
from torch import nn
from watching import dense, only, windows

from conftest import needs_compiler
from sparseout import Sparseout, SparsityMonitor, measures


def test_inference_mode_and_training_mix():
    model = dense()
    with SparsityMonitor(model) as monitor:
        with torch.inference_mode():
            model(torch.randn(3, 6))
        model(torch.randn(3, 6)).sum().backward()
    assert only(monitor.report(), module="1", axis="population")["rows"] == 6


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("before", "method"), [(False, True), (True, False)])
def test_compiled(before, method):
    model = nn.Sequential(OrderedDict(linear=nn.Linear(6, 8), act=nn.ReLU(), noise=Sparseout(0.5), head=nn.ReLU()))
    if method:
        model.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    xs = [torch.randn(4, 6) for _ in range(4)]
    if before:
        compiled(xs[0])
    with SparsityMonitor(compiled, every=2) as monitor:
        for x in xs:
            compiled(x).sum().backward()
    compiled(xs[0])
    report = monitor.report()
    assert windows(report) == ((2, 4), (0, 0))
    outputs = torch.cat([torch.relu(model.linear(x)) for x in xs[::2]])
    record = only(report, module="act", axis="population")
    assert record["rows"] == 8
    assert record["density"] == pytest.approx(measures.density(outputs).mean().item())
    assert only(report, module="noise", axis="population")["noise"] > 0


@needs_compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_many_watched_modules_are_no_recompilations():
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5))))
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), SparsityMonitor(compiled) as monitor:
        for rows in (2, 3, 5):
            compiled(torch.randn(rows, 8))
    assert {record["rows"] for record in monitor.report()} == {10}


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch import nn
from sparseout import SparsityMonitor
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.5))
wrapped = nn.parallel.DistributedDataParallel(model)
data = torch.randn(2, 10, 6)
with SparsityMonitor(model) as monitor:
    wrapped(data[rank]).sum().backward()
    if rank == 0:  # only one process evaluates
        model.eval()
        model(data[0])
together, alone = monitor.report(), monitor.report(sync=False)
with SparsityMonitor(model.train(), ["1"]) as single:
    for part in data:
        model(part)
one = single.report(sync=False)
for a, b in zip([r for r in together if r["module"] == "1" and r["mode"] == "train"], one):
    for key in set(a) - {"steps", "of_steps"}:
        same = a[key] == b[key] or abs(a[key] - b[key]) < 1e-12
        assert same, (key, a[key], b[key])
assert together.steps == {"train": (1, 1), "eval": (1, 1)}
assert {r["rows"] for r in together if r["mode"] == "train"} == {20}
assert {r["rows"] for r in together if r["mode"] == "eval"} == {10}
assert [norm.samples for norm in together.norms] == [10]
assert {r["rows"] for r in alone} == {10}
assert any(r["mode"] == "eval" for r in alone) == (rank == 0)
dist.destroy_process_group()
print("done")
"""


@pytest.mark.slow
def test_processes_report_together(tmp_path):
    for done in on_two_ranks(DISTRIBUTED, tmp_path):
        assert done.stdout == "done\n", done.stderr


def test_one_mode_can_be_forgotten():
    model = dense()
    monitor = SparsityMonitor(model, every=2).attach()
    for mode in (True, False):
        for _ in range(3):
            model.train(mode)(torch.randn(4, 6))
    both = monitor.report()
    monitor.reset("eval")
    assert monitor.report().steps == {"train": (2, 3), "eval": (0, 0)}
    assert list(monitor.report()) == [record for record in both if record["mode"] == "train"]
    model.eval()(torch.randn(4, 6))
    assert monitor.report().steps["eval"] == (1, 1)  # the first is watched
    monitor.reset("train")
    assert {record["mode"] for record in monitor.report()} == {"eval"}
    with pytest.raises(ValueError, match=r"^expected `mode` to be one of train, eval, but got 'test'$"):
        monitor.reset("test")


def vae():
    return nn.ModuleDict({part: nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for part in ("encoder", "decoder")})


def test_a_row_belongs_to_the_mode_of_the_module_that_sees_it():
    model = vae()
    with SparsityMonitor(model) as monitor:
        for _ in range(3):
            model["decoder"](model["encoder"](torch.randn(20, 4)))
        model.eval()
        model["decoder"](torch.randn(1000, 4))
        model.train()
        model["decoder"].eval()  # frozen while the rest trains
        model["decoder"](model["encoder"](torch.randn(20, 4)))
    report = monitor.report()
    rows = {(r["module"], r["mode"]): r["rows"] for r in report if r["axis"] == "population"}
    assert rows == {("encoder.1", "train"): 80, ("decoder.1", "train"): 60, ("decoder.1", "eval"): 1020}
    assert windows(report) == ((4, 4), (2, 2))


def test_a_map_that_a_linear_made_has_its_units_last():
    linear = nn.Linear(8, 8)
    linear.weight.data.copy_(torch.diag(torch.tensor([1.0, 1.0] + [0.0] * 6)))
    linear.bias.data.zero_()
    x = torch.rand(2, 5, 5, 8) + 0.1
    with SparsityMonitor(nn.Sequential(linear, nn.ReLU(), nn.Dropout(0.5)).eval()) as monitor:
        monitor._model(x)
    for name in ("1", "2"):
        record = only(monitor.report(), module=name, axis="population")
        assert (record["units"], record["dead_units"], record["rows"]) == (8, 6, 50)
        assert record["hoyer"] == pytest.approx(measures.hoyer(x * torch.tensor([1.0] * 2 + [0] * 6)).mean().item())
    with SparsityMonitor(monitor._model, unit_dim={"1": 1, nn.Dropout: 2}) as given:
        given._model(x[:, :4])
    assert [record["units"] for record in given.report() if record["axis"] == "population"] == [4, 5]


PADDED = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_of_the_nested_tensors_that_a_transformer_makes_inside_the_real_rows_count():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.activation = nn.ReLU()
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        with SparsityMonitor(model, [nn.ReLU, nn.Dropout, nn.Linear, nn.LayerNorm]) as monitor:
            out = model(x, src_key_padding_mask=PADDED)
        torch.testing.assert_close(out, model(x, src_key_padding_mask=PADDED))
    record = only(monitor.report(), module="layers.0.norm2", axis="population")
    assert (record["rows"], record["units"]) == (8, 8)
    hidden = only(monitor.report(), module="layers.1.linear1", axis="population")
    assert (hidden["rows"], hidden["units"]) == (8, 16)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout, training):
    parts = [torch.randn(3, 6), torch.randn(1, 6), torch.randn(4, 6)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5)).train(training)
    with SparsityMonitor(model) as monitor:
        model(nested)
    rows = model[0](torch.cat(parts)).relu()
    record = only(monitor.report(), module="1", axis="population")
    assert (record["rows"], record["units"]) == (8, 5)
    assert record["hoyer"] == pytest.approx(measures.hoyer(rows).nanmean().item(), rel=1e-5)
    assert (only(monitor.report(), module="2", axis="population")["noise"] is None) == (not training)
    jagged_dim = torch.nested.nested_tensor([torch.randn(3), torch.randn(2)], layout=layout)
    with SparsityMonitor(nn.Sequential(nn.ReLU())) as monitor:  # rows of different length: each its own width
        monitor._model(jagged_dim)
    assert {(r["units"], r["rows"]) for r in monitor.report()} == {(2, 1), (3, 1)}


def passes():
    from torch._subclasses import FakeTensorMode
    from torch.fx import symbolic_trace
    from torch.fx.experimental.proxy_tensor import make_fx

    def fake(model, x):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(x))

    return {
        "meta": lambda model, x: copy_to_meta(model)(x.to("meta")),
        "fake": fake,
        "make_fx": lambda model, x: make_fx(model, tracing_mode="real")(x),
        "make_fx, symbols": lambda model, x: make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x),
        "export": lambda model, x: torch.export.export(
            model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        ),
        "export, strict": lambda model, x: torch.export.export(model, (x,), strict=True),
        "jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
        "fx": lambda model, x: symbolic_trace(model),
    }


def copy_to_meta(model):
    """The model itself, for a call on meta tensors only."""
    return lambda x: torch.func.functional_call(model, {k: v.to("meta") for k, v in model.state_dict().items()}, x)


class Own(nn.Module):
    """No leaf to torch.fx, which goes through its hooks."""

    def forward(self, x):
        return x.relu()


@needs_compiler
@pytest.mark.parametrize("name", passes())
@pytest.mark.parametrize("training", [True, False])
def test_passes_without_values_do_not_count_and_break_nothing(name, training):
    model = nn.Sequential(nn.Linear(6, 8), Own(), nn.Dropout(0.5), nn.BatchNorm1d(8)).train(training)
    model[3].eval()  # in training it warns a tracer itself
    x = torch.randn(4, 6)
    with SparsityMonitor(model, [Own, nn.Dropout]) as monitor:
        passes()[name](model, x)
        assert monitor.report().steps == {"train": (0, 0), "eval": (0, 0)}
        assert len(monitor.report()) == 0
        model(x)
    assert {record["rows"] for record in monitor.report()} == {4}
    assert sum(windows(monitor.report()), ()) in ((1, 1, 0, 0), (0, 0, 1, 1))


ROWS_OF_VMAP = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    "transform",
    [
        lambda model, x: torch.vmap(model)(x),
        lambda model, x: torch.vmap(model, in_dims=1)(x.t()),
        lambda model, x: torch.vmap(torch.vmap(model))(x[None]),
        lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
        lambda model, x: torch.vmap(torch.func.grad(lambda x: model(x).sum()))(x),
        lambda model, x: torch.func.jvp(model, (x,), (x,)),
        lambda model, x: torch.func.jacrev(model)(x),
        lambda model, x: torch.func.jacfwd(model)(x),
        lambda model, x: torch.autograd.functional.jvp(model, x, x),
    ],
)
def test_inside_transforms_values_count(transform):
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Dropout(0.5))
    model[2].eval()
    with SparsityMonitor(model) as monitor:
        transform(model, ROWS_OF_VMAP)
        monitor.report()
        model(ROWS_OF_VMAP)
    for name in ("1", "2"):
        records = [r for r in monitor.report() if r["module"] == name and r["axis"] == "population"]
        assert sum(r["rows"] for r in records) == 4
        assert {r["units"] for r in records} == {4}
        assert {r["hoyer"] for r in records} == {0.5}


def test_noise_inside_vmap():
    model = nn.Sequential(nn.Dropout(0.2))
    with SparsityMonitor(model) as monitor:
        torch.vmap(model, randomness="different")(torch.randn(400, 5))
    assert monitor.report()[0]["noise"] == pytest.approx(1, abs=0.2)
    assert monitor.report()[0]["noise"] != 1


def test_forward_mode_leaves_no_tangents():
    from torch.autograd import forward_ad

    model = nn.Sequential(nn.ReLU())
    with SparsityMonitor(model) as monitor:
        for _ in range(2):
            with forward_ad.dual_level():
                model(forward_ad.make_dual(ROWS_OF_VMAP, ROWS_OF_VMAP))
    assert monitor.report()[0]["hoyer"] == 0.5


@pytest.mark.parametrize("first", [True, False])
def test_what_a_hook_keeps_is_born_outside_inference_mode(first):
    model = dense()
    with SparsityMonitor(model) as monitor:
        for inference in (first, not first, first):
            with torch.inference_mode(inference):
                model(torch.randn(3, 6))
    tensors = [t for at in monitor._accumulators.values() for t in at.state().values()]
    assert not any(t.is_inference() or t.requires_grad for t in tensors)
    assert only(monitor.report(), module="1", axis="population")["rows"] == 9


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    model = nn.Sequential(nn.Linear(4, 512), nn.ReLU())
    with SparsityMonitor(model, measures=("hoyer",)) as monitor:
        for step in range(220):
            model(torch.randn(64 + step % 7, 4)).sum().backward()
            if step == 20:
                before = resident()
    assert resident() - before < 8  # MB; one tensor of a call, kept, would be 27 in all
    assert monitor.report()[0]["steps"] == 220
