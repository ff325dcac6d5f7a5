"""The numbers of docs/choosing.md are those of the files in results/ that it names."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
# A table and, above it, the file of its numbers and what is the same in all of its rows.
TABLES = re.findall(r"<!-- (results/\S+\.json)(.*?) -->\n((?:\|.*\n)+)", TEXT)
SETTINGS = {"q", "p", "scale", "gradient"}
VALUES = {
    "Hoyer": lambda row: f"{row(lambda r: r['mean']['hoyer']):.3f}",
    "over live units": lambda row: f"{row(lambda r: r['mean']['hoyer_live']):.3f}",
    "dead units": lambda row: f"{row(lambda r: r['mean']['dead']):.0%}",
    "images with no active unit": lambda row: f"{row(lambda r: r['mean']['undefined']):.0%}",
    "test MSE": lambda row: f"{row(lambda r: r['test']['mse']):.4f}",
    "test error": lambda row: f"{row(lambda r: r['test']['error']):.3f}",
    "norm as trained": lambda row: f"{row(lambda r: r['test']['error_as_trained']):.3f}",
    "perplexity": lambda row: f"{row(lambda r: r['test']['perplexity']):.1f}",
}


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def the_runs(rows, setting):
    """Those of a setting, over the seeds that are analysed; q = 2 has no scale and no gradient, "none" no q."""
    method = "none" if setting["q"] == "none" else "sparseout"
    found = [row for row in rows if row["method"] == method and row["role"] in ("grid", "tuned", "common")]
    if method == "none":
        return found
    found = [row for row in found if row["q"] == float(setting["q"]) and row["value"] == float(setting["p"])]
    if float(setting["q"]) == 2:
        return found
    return [row for row in found if (row["scale"], row["gradient"]) == (setting["scale"], setting["gradient"])]


@pytest.mark.parametrize(("file", "same", "table"), TABLES, ids=range(len(TABLES)))
def test_tables_are_made_of_the_results(file, same, table):
    rows = json.loads((ROOT / file).read_text(encoding="utf-8"))["rows"]
    head, _, *lines = table.strip().split("\n")
    assert lines
    for line in lines:
        row = dict(zip(cells(head), cells(line), strict=True))
        setting = dict(pair.split("=") for pair in same.split()) | {key: row[key] for key in SETTINGS & row.keys()}
        runs = the_runs(rows, setting)
        assert len({run["seed"] for run in runs}) == len(runs) == 5, setting
        for key in row.keys() - SETTINGS:
            assert row[key] == VALUES[key](lambda take, runs=runs: sum(map(take, runs)) / len(runs)), (setting, key)


def test_every_table_names_its_file():
    assert len(TABLES) == len(re.findall(r"^\|[ -]*-", TEXT, re.MULTILINE)) >= 5


def test_numbers_in_prose_stand_in_a_table():
    in_tables = {cell for _, _, table in TABLES for line in table.split("\n") for cell in cells(line)}
    in_tables |= {pair.split("=")[1] for _, same, _ in TABLES for pair in same.split()}
    prose = re.sub(r"<!--.*?-->|^\|.*$|`[^`]*`", "", TEXT, flags=re.MULTILINE)
    said = re.findall(r"\d+\.\d+|\d+%", prose)
    assert len(said) > 15
    assert set(said) <= in_tables
