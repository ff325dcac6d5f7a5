"""Numbers of the README and of a how-to page, and the files that are named; that code runs: test_pages.py."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from benchmark_rows import newest
from tracked import run, scalars

from sparseout import SparsityMonitor

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_target_that_is_shown_is_met():
    met = re.findall(
        r"hoyer (\S+) in training, target 0.65|in evaluation: hoyer (\d\S+)", TEXT
    )  # during training, and after it
    assert [float(training or evaluation) for training, evaluation in met] == pytest.approx([0.65, 0.65], abs=0.005)


def test_home_begins_as_the_readme_does():
    """The first screen: what it is for, and where it pays."""
    begin, end = TEXT.index("**Sparseout trains"), TEXT.index("![Hoyer")
    home = " ".join((ROOT / "docs/index.md").read_text(encoding="utf-8").split())
    assert " ".join(TEXT[begin:end].replace("(docs/", "(").split()) in home


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
    from sparseout_experiments.bench.page import number

    record = newest()
    rows, old = record["rows"], record["environment"]["backend"]["name"] != "native"
    assert ("measured before the native kernel" in " ".join(TEXT.split())) == old
    ratios = {
        (f"{row['elements']}, {row['threads']}" + ", busy" * row.get("busy", False), row["implementation"]): number(
            row["ratio"]["both"]["median"]
        )
        for row in rows
        if row.get("layout") == "vector" and row["dtype"] == "fp32"
    }
    (header,) = re.findall(r"^\| \| 64 elements (.*) \|$", TEXT, re.MULTILINE)
    columns = ["64, 1"]
    for heading in header.strip(" |").split(" | "):
        elements, threads, busy = re.fullmatch(r"(\d+M|[\d,]+?)(?:, (\d) threads)?(, busy)?", heading).groups()
        count = int(elements[:-1]) * 2**20 if elements.endswith("M") else int(elements.replace(",", ""))
        columns.append(f"{count}, {threads or 1}{busy or ''}")
    assert len(columns) >= 6
    lines = re.findall(rf"^\| (\S.*\S) \|(( +(?:\d+\.\d+|) \|){{{len(columns)}}})$", TEXT, re.MULTILINE)
    assert {"F.dropout", "Sparseout q=1.5"} <= {implementation for implementation, _, _ in lines}
    for implementation, cells, _ in lines:
        expected = [ratios.get((column, implementation), "") for column in columns]
        assert [cell.strip() for cell in cells.strip("|").split("|")] == expected


def test_the_tables_of_costs_are_those_that_the_tool_writes():
    tool = runpy.run_path(str(ROOT / "tools/benchmark_tables.py"))
    for name, start, end, write in tool["TABLES"]:
        table, *rest = (ROOT / name).read_text(encoding="utf-8").split(start)[1].split(end)
        assert rest
        assert table == write(tool["newest"]())


def test_what_watching_costs_is_what_was_measured():
    found = json.loads((ROOT / "benchmarks/results/monitor/amd-epyc.json").read_text())["median_ratio"]
    said = re.search(r"every tenth step added (\S+) to", (ROOT / "docs/how-to/watch.md").read_text(encoding="utf-8"))
    assert said[1] == f"{found['attached, every 10'] - 1:.0%}"


def test_every_column_of_the_report_is_explained():
    text = (ROOT / "docs/how-to/watch.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| (\w+) \|", text[text.index("## The columns") :], re.MULTILINE)
    model = torch.nn.Sequential(torch.nn.ReLU())
    with SparsityMonitor(model) as monitor:
        model(torch.randn(8, 4))
    (header,) = re.findall(r"^module +.*$", str(monitor.report().table(axes=True)), re.MULTILINE)
    assert explained == ["column", *header.split()]
