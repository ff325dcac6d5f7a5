"""Numbers of the README and of a how-to page, and the files that are named; that code runs: test_pages.py."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from tracked import run, scalars

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_target_that_is_shown_is_met():
    met = re.findall(r"hoyer (\S+), target 0.65|in evaluation: hoyer (\d\S+)", TEXT)  # during training, and after it
    assert [float(training or evaluation) for training, evaluation in met] == pytest.approx([0.65, 0.65], abs=0.005)


def test_home_begins_as_the_readme_does():
    """The first screen: what it is for, and where it pays."""
    begin, end = TEXT.index("**Sparseout trains"), TEXT.index("![Hoyer")
    home = " ".join((ROOT / "docs/index.md").read_text(encoding="utf-8").split())
    assert " ".join(TEXT[begin:end].replace("(docs/", "(").split()) in home


def ratios_at(level, measure, method):
    """Sparseout's error over that of another method at equal sparsity, one a seed, interpolated between settings."""
    rows = json.loads((ROOT / "results/alternatives-small-mnist.json").read_text())["rows"]
    errors = {}
    for row in rows:
        if row["method"] in ("sparseout", method):
            errors.setdefault((row["seed"], row["method"]), []).append((row[measure], row["mse"]))
    at = {key: np.interp(level, *zip(*sorted(points), strict=True)) for key, points in errors.items()}
    return [at[seed, "sparseout"] / at[seed, method] for seed, name in at if name == method]


@pytest.mark.parametrize(
    ("claim", "measure", "method"),
    [
        (r"error (\d+) ± (\d)% lower with Sparseout than with Dropout", "hoyer", "dropout"),
        (r"\((\d+) ± (\d)% if only live units count\)", "hoyer_live", "dropout"),
        (r"(\d+) ± (\d)% above k-winners", "hoyer", "kwinners"),
    ],
)
def test_where_it_pays_is_what_was_measured(claim, measure, method):
    ratios = ratios_at(0.8, measure, method)
    half = scipy.stats.t.ppf(0.975, len(ratios) - 1) * scipy.stats.sem(ratios)
    assert len(ratios) == 5
    assert re.search(claim, TEXT).groups() == (f"{100 * abs(1 - np.mean(ratios)):.0f}", f"{100 * half:.0f}")


@pytest.mark.parametrize("measure", ["hoyer", "hoyer_live"])
def test_the_penalty_is_level_with_it_there(measure):
    assert scipy.stats.ttest_1samp(ratios_at(0.8, measure, "penalty"), 1).pvalue > 0.05


def test_the_dead_units_that_are_named_were_measured():
    rows = json.loads((ROOT / "results/alternatives-small-mnist.json").read_text())["rows"]
    claim = (
        r"(\d+)% of the MNIST autoencoder's units at Hoyer (0\.\d+), judged by 10,000 images, "
        r"and (\d+)% with Dropout at (0\.\d+)"
    )
    dead, hoyer, of_dropout, dropout = re.search(claim, " ".join(TEXT.split())).groups()
    for method, setting, *said in (("sparseout", 0.5, dead, hoyer), ("dropout", 0.5, of_dropout, dropout)):
        found = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
        mean = {name: np.mean([row[name] for row in found]) for name in ("dead", "hoyer")}
        assert said == [f"{100 * mean['dead']:.0f}", f"{mean['hoyer']:.2f}"]


def test_files_that_are_named_exist():
    names = re.findall(r"`((?:docs|results|configs)/[^`]*|[A-Z]+\.md)`", TEXT)
    assert len(names) >= 3
    for name in names:
        assert list(ROOT.glob(name)), name


LIGHTNING = ("`isinstance(treespec, LeafSpec)`", "The '")  # its own with torch 2.13; few workers for so little data


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_the_page_on_frameworks_runs_and_logs_what_it_says(place, tmp_path):
    text = (ROOT / "docs/how-to/frameworks.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[place]
    code = f"import architectures\narchitectures.let_torchvision_import()\n{code}"
    quiet = [word for start in LIGHTNING for word in ("-W", f"ignore:{start}")]
    done = run([sys.executable, "-W", "error", *quiet, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^q \[?\d", done.stdout, re.MULTILINE)
    tags = set(scalars(tmp_path))
    names = re.findall(r"^\| `(\S+)` \| `(\S+)` \|", text, re.MULTILINE)
    assert len(names) == 5
    if place == 0:
        assert {lightning for lightning, _ in names} <= tags
    else:
        layer = "transformer.h.1.mlp.act.sparseout"
        lines = [line.replace("MODULE", layer).replace("LAYER", layer) for _, line in names]
        assert {f"train/{line}" for line in lines if not line.startswith("eval_")} <= tags


def test_its_figures_are_those_of_the_benchmark():
    from sparseout_experiments.bench.table import number

    rows = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores.json").read_text())["rows"]
    ratios = {
        (f"{row['elements']}, {row['threads']}", row["peer"]): number(row["ratio"]["both"]["median"])
        for row in rows
        if row.get("layout") == "vector" and row["dtype"] == "fp32"
    }
    million = 2**20
    columns = ["64, 1", "16384, 1", f"{million}, 1", f"{10 * million}, 1", f"{million}, 2", f"{10 * million}, 2"]
    lines = re.findall(r"^\| (\S.*\S) \|(( +\d\.\d+ \|){6})$", TEXT, re.MULTILINE)
    assert {"F.dropout", "Sparseout q=1.5"} <= {implementation for implementation, _, _ in lines}
    for implementation, cells, _ in lines:
        expected = [ratios[column, implementation] for column in columns]
        assert [cell.strip() for cell in cells.strip("|").split("|")] == expected


def test_what_watching_costs_is_what_was_measured():
    found = json.loads((ROOT / "benchmarks/results/monitor/amd-epyc.json").read_text())["median_ratio"]
    said = re.search(r"every tenth step added (\S+) to", (ROOT / "docs/how-to/watch.md").read_text(encoding="utf-8"))
    assert said[1] == f"{found['attached, every 10'] - 1:.0%}"
