"""A report is its records, a table that fits, and sentences where something is off."""

import sys

import pytest
import torch
from torch import nn

from sparseout import Sparseout, SparsityMonitor, SparsityReport, recalibrate_norm_
from sparseout.measures import MEASURES
from sparseout.monitor._table import shortened


def seen(model, *batches, **arguments):
    with SparsityMonitor(model, **arguments) as monitor:
        for batch in batches:
            model(batch)
    return monitor.report()


def network():
    return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Dropout(0.5))


def test_it_is_a_sequence_of_records():
    report = seen(network(), torch.randn(20, 8))
    assert len(report) == 4
    assert isinstance(report, SparsityReport)
    assert [record["axis"] for record in report] == ["population", "lifetime"] * 2
    assert report[-1] == list(report)[3] == report[2:][1]


def test_nothing_is_off():
    assert seen(network(), torch.randn(200, 8)).diagnosis == []


def test_dead_units():
    model = network()
    model[0].bias.data[:20] = -100.0
    assert seen(model, torch.randn(50, 8)).diagnosis == []  # half is not more than half
    model[0].bias.data[20] = -100.0
    (sentence,) = seen(model, torch.randn(50, 8)).diagnosis
    assert sentence.startswith(
        "Dead units: more than half of the units are 0 in every row measured: `1` (train, 21 of 40 in 50 rows), `2` ("
    )


@pytest.mark.parametrize(("zeros", "said"), [(1, False), (2, True)])
def test_collapse(zeros, said):
    x = torch.ones(100, 8)
    x[:zeros] = 0
    sentences = seen(nn.Sequential(nn.ReLU()), x).diagnosis
    assert [s == "Rows are all zero, and left out of the means: `0` (train, 2.0% of 100)." for s in sentences] == [
        True
    ] * said


@pytest.mark.parametrize(("scale", "said"), [(None, True), ("matched", False)])
@pytest.mark.parametrize("rows", [10, 2000])
def test_noise_power(scale, said, rows):
    model = nn.Sequential(Sparseout(0.1, 1.0, scale=scale))
    sentences = seen(model, 5 * torch.rand(rows, 8) + 5).diagnosis
    assert [
        s.startswith("The power of the noise differs from that of Dropout at the same p: `0` (train, 0.")
        for s in sentences
    ] == [True] * said


def test_little_noise_seen_is_no_finding():
    model = nn.Sequential(nn.Dropout(0.1))
    found = [seen(model, torch.randn(8, 4)) for _ in range(100)]
    assert sum(abs(report[0]["noise"] - 1) > 0.1 for report in found) > 50
    assert sum(bool(report.diagnosis) for report in found) < 30


def test_batch_norm_and_its_cure():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
    x = torch.rand(1000, 16) + 1
    for _ in range(60):
        model(x)
    model.eval()
    assert [s.partition(":")[0] for s in seen(model, x).diagnosis] == ["Batch norm"]
    assert "recalibrate_norm_" in seen(model, x).diagnosis[0]
    recalibrate_norm_(model, [x])
    assert seen(model, x).diagnosis == []


def test_what_is_never_called():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Tanh(), nn.Tanh()

        def forward(self, x):
            return self.used(x)

    assert seen(Half(), torch.randn(3, 4)).diagnosis == ["Never called: `unused`."]


def test_the_table_fits_and_states_its_window():
    model = network()
    model.add_module("a_module_with_a_long_name" * 4, nn.ReLU())
    model[0].bias.data[:] = -100.0
    report = seen(model, *[torch.randn(50, 8)] * 3, every=2)
    lines = str(report).split("\n")
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("Sparsity over 2 of 3 steps in train. ")
    head = "module at mode hoyer gini density live rows undef units dead on noise"
    assert " ".join(lines[2].split()) == head
    assert lines[3].split()[1:9] == ["out", "train", "nan", "nan", "0.000", "nan", "100", "100"]
    assert lines[3].split()[9:] == ["40", "40", "0", "-"]
    assert lines[6] == ""  # one line a module
    assert any(line.startswith("! Dead units") for line in lines)
    lines = report.table(axes=True).split("\n")
    assert max(map(len, lines)) <= 120
    assert " ".join(lines[0].split()) == head.replace("mode", "mode axis")
    assert [line.split()[3] for line in lines[1:]] == ["pop", "life"] * 3
    assert lines[2].split()[4:6] == ["nan", "-"]


def stack(layers, act="intermediate.intermediate_act_fn"):
    """Names as transformers has them."""
    model = nn.Module()
    model.encoder = nn.Module()
    model.encoder.layer = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        layer.intermediate, layer.drop = nn.Module(), nn.Dropout(0.1)
        layer.intermediate.add_module("intermediate_act_fn", nn.ReLU())
        model.encoder.layer.append(layer)
    model.forward = lambda x: [part(x) for part in model.modules() if isinstance(part, (nn.ReLU, nn.Dropout))]
    return model


def test_a_stack_of_layers_is_a_group_in_which_every_layer_has_its_line():
    report = seen(stack(12).eval(), torch.randn(20, 8))
    lines = report.table().split("\n")
    assert len(lines) == 1 + 2 * (1 + 12)
    assert lines[1] == "encoder.layer.*.intermediate.intermediate_act_fn"
    assert [line.split()[0] for line in lines[2:14]] == [str(layer) for layer in range(12)]
    assert lines[14] == "encoder.layer.*.drop"
    assert [line.split()[1] for line in lines[15:]] == ["in"] * 12
    assert "*" not in seen(stack(2), torch.randn(20, 8)).table()  # few are no stack
    apart = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.ReLU())  # a number alone is no name of a stack
    assert "*" not in seen(apart, torch.randn(20, 8)).table()


@pytest.mark.parametrize("room", [12, 20, 40])
@pytest.mark.parametrize("ends", ["{}.act", "{}." + "act" * 9, "act" * 9 + ".{}." + "act" * 9])
def test_cut_names_that_differ_stay_different(ends, room):
    names = [ends.format(f"layer.{number}") for number in range(12)]
    cut = shortened(names, room)
    assert len(set(cut)) == 12
    assert max(map(len, cut)) <= room


def test_names_that_no_one_cut_tells_apart_are_left_whole():
    names = [f"{'a' * 20}{first}{'b' * 30}{last}{'c' * 20}" for first in "12" for last in "34"]
    assert shortened(names, 12) == names


def test_noise_has_its_error_beside_it():
    report = seen(nn.Sequential(nn.Dropout(0.5)), torch.randn(8, 4))
    assert report.table().endswith(f"{report[0]['noise']:.3f} ±{report[0]['noise_error']:.3f}")


def test_calls_that_share_a_record_are_told():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, first, second):
            return self.act(first), self.act(second)

    model = Twice()
    first, second = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.ones(1, 4)
    with SparsityMonitor(model) as monitor:
        for _ in range(3):
            model(first, second)
    assert monitor.report()[0]["calls"] == 2
    (sentence,) = monitor.report().diagnosis
    assert sentence.startswith("Several calls in one step share a record: `act` (train, 2 calls a step).")
    with SparsityMonitor(model) as monitor:
        model(first, torch.ones(1, 5))  # another width, another record
    assert monitor.report().diagnosis == []


def test_modules_that_were_never_called_are_named_where_nothing_was_seen():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.acts = nn.ModuleList(nn.ReLU() for _ in range(5))
            self.used = True

        def forward(self, x):
            return self.acts[0](x) if self.used else x

    model = Idle()
    model.used = False
    names = "`acts.0`, `acts.1`, `acts.2` and 2 more"
    report = seen(model.eval(), torch.randn(3, 4))
    assert str(report) == f"Sparsity: 1 of 1 steps in eval\n\n! Never called: {names}."
    with SparsityMonitor(model, every=2) as monitor:
        model(torch.randn(3, 4))
        model.used = True
        model(torch.randn(3, 4))  # called for real, if in a step that is passed over
    assert monitor.report().silent == [f"acts.{number}" for number in range(1, 5)]
    told = "Called only in steps not watched, or without a floating-point tensor of at least one dim: `acts.0`."
    assert told in monitor.report().diagnosis


def test_all_measures_have_a_column():
    lines = str(seen(network(), torch.randn(50, 8), measures=tuple(MEASURES))).split("\n")
    assert {name[:8] for name in MEASURES} <= set(lines[2].split())
    assert max(map(len, lines)) <= 125  # six, twice as many as there are by default


def test_before_any_step():
    monitor = SparsityMonitor(network())
    report = monitor.report()
    assert (str(report), report.diagnosis, len(report)) == ("Sparsity: no step measured", [], 0)


def test_frame():
    pandas = pytest.importorskip("pandas")
    report = seen(network(), torch.randn(20, 8))
    frame = report.frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == list(report[0])
    assert frame["hoyer"].tolist() == [record["hoyer"] for record in report]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = seen(network(), torch.randn(20, 8))
    path = tmp_path / "report.png"
    figure = report.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    values, units, *_ = figure.axes
    assert [t.get_text() for t in values.get_yticklabels()] == ["1 train", "2 train"]
    hoyer = next(line for line in values.lines if line.get_label() == "hoyer")
    assert list(hoyer.get_xdata()) == [r["hoyer"] for r in report if r["axis"] == "population"]
    assert len(units.patches) == 4
    assert SparsityMonitor(network()).report().plot() is not None


@pytest.mark.parametrize(("package", "call"), [("pandas", "frame"), ("matplotlib", "plot")])
def test_without_the_package_the_error_says_so(package, call, monkeypatch):
    monkeypatch.delitem(sys.modules, "sparseout.monitor._plot", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"SparsityReport.{call} needs {package}: pip install {package}"):
        getattr(SparsityReport([], {}), call)()
