"""What the README shows runs, and what it points at exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tracked import scalars

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHOWN = re.findall(r"prints\n\n```\n(.*?)```", TEXT, re.DOTALL)[0]


def test_there_is_code_to_run():
    assert BLOCKS


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    if "SparsityController" not in code:
        assert done.stdout.startswith("tensor(")
        return
    assert [words(line) for line in done.stdout.split("\n")] == [words(line) for line in SHOWN.split("\n")]
    for text in (done.stdout, SHOWN):  # the target is met while training and after it
        met = re.findall(r"hoyer (\S+), target 0.65|out +eval +pop +(\S+)", text)
        assert [float(one or other) for one, other in met] == pytest.approx([0.65, 0.65], abs=0.02)


def words(line: str) -> list[str]:
    """A line without its numbers, whose last digits are those of one processor."""
    return [word for word in line.split() if not re.match(r"[\d.]", word)]


@pytest.mark.parametrize("page", ["watch", "target"])  # that on conversion needs transformers: test_convert_models
def test_how_to_pages_run(page, tmp_path):
    text = (ROOT / f"docs/how-to/{page}.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"```\n(\w.*?)```", text, re.DOTALL)
    assert shown
    printed = [words(line) for line in done.stdout.split("\n")]
    for block in shown:
        assert all(words(line) in printed for line in block.strip().split("\n")), block


LIGHTNING = ("`isinstance(treespec, LeafSpec)`", "The '")  # its own with torch 2.13; few workers for so little data


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_the_page_on_frameworks_runs_and_logs_what_it_says(place, tmp_path):
    text = (ROOT / "docs/how-to/frameworks.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[place]
    code = f"import architectures\narchitectures.let_torchvision_import()\n{code}"
    quiet = [word for start in LIGHTNING for word in ("-W", f"ignore:{start}")]
    command = [sys.executable, "-W", "error", *quiet, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
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


def test_local_links_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT) + re.findall(r"`(docs/[^`]+|[A-Z]+\.md)`", TEXT)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_its_figures_are_those_of_the_benchmark():
    from sparseout.experiments.bench.table import number

    rows = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores.json").read_text())["rows"]
    ratios = {
        (f"{row['elements']}, {row['threads']}", row["peer"]): number(row["ratio"]["both"]["median"])
        for row in rows
        if row.get("layout") == "vector" and row["dtype"] == "fp32"
    }
    million = 2**20
    columns = ["64, 1", "16384, 1", f"{million}, 1", f"{10 * million}, 1", f"{million}, 2", f"{10 * million}, 2"]
    lines = re.findall(r"^\| (\S.*\S) \|(( +\d\.\d+ \|){6})$", TEXT, re.MULTILINE)
    assert len(lines) == 11
    for peer, cells, _ in lines:
        assert [cell.strip() for cell in cells.strip("|").split("|")] == [ratios[column, peer] for column in columns]
