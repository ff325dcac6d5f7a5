"""A report is its records, a table that fits, and sentences where something is off."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from sparseout import Sparseout, SparsityMonitor, SparsityReport, recalibrate_norm_
from sparseout.measures._functions import MEASURES


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


def test_mass_death():
    model = network()
    model[0].bias.data[:20] = -100.0
    assert seen(model, torch.randn(50, 8)).diagnosis == []  # half is not more than half
    model[0].bias.data[20] = -100.0
    (sentence,) = seen(model, torch.randn(50, 8)).diagnosis
    assert sentence.startswith("Mass death: more than half of the units never fired: `1` (train, 21 of 40), `2` (train")


@pytest.mark.parametrize(("zeros", "said"), [(1, False), (2, True)])
def test_collapse(zeros, said):
    x = torch.ones(100, 8)
    x[:zeros] = 0
    sentences = seen(nn.Sequential(nn.ReLU()), x).diagnosis
    assert [s.startswith("Collapse: rows are all zero") for s in sentences] == [True] * said


@pytest.mark.parametrize(("scale", "said"), [(None, True), ("matched", False)])
@pytest.mark.parametrize("rows", [10, 2000])
def test_noise_power(scale, said, rows):
    model = nn.Sequential(Sparseout(0.1, 1.0, scale=scale))
    sentences = seen(model, 5 * torch.rand(rows, 8) + 5).diagnosis
    assert [s.startswith("The noise has not the power") for s in sentences] == [True] * said


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

    assert seen(Half(), torch.randn(3, 4)).diagnosis == ["Never called in a watched step: `unused`."]


def test_the_table_fits_and_states_its_window():
    model = network()
    model.add_module("a_module_with_a_long_name" * 4, nn.ReLU())
    model[0].bias.data[:] = -100.0
    text = str(seen(model, *[torch.randn(50, 8)] * 3, every=2))
    lines = text.split("\n")
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("Sparsity over 2 of 3 steps in train. ")
    head = "module at mode axis hoyer gini density live rows undef units dead on noise"
    assert " ".join(lines[2].split()) == head
    assert lines[4].split()[1:10] == ["out", "train", "life", "nan", "-", "0.000", "nan", "100", "100"]
    assert lines[4].split()[10:] == ["40", "40", "0", "-"]
    assert any(line.startswith("! Mass death") for line in lines)


def test_all_measures_have_a_column():
    lines = str(seen(network(), torch.randn(50, 8), measures=tuple(MEASURES))).split("\n")
    assert {name[:8] for name in MEASURES} <= set(lines[2].split())
    assert max(map(len, lines)) <= 125  # six, twice as many as there are by default


def test_before_any_step():
    monitor = SparsityMonitor(network())
    report = monitor.report()
    assert (str(report), report.diagnosis, len(report)) == ("Sparsity: no step seen", [], 0)


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


def test_optional_packages_are_not_imported():
    code = """
import sys, torch, sparseout
model = torch.nn.Sequential(torch.nn.ReLU())
with sparseout.SparsityMonitor(model) as monitor:
    model(torch.randn(3, 4))
str(monitor.report())
assert not {"pandas", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
