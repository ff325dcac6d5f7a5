"""What pages say in their own words about measurements is what the files of results say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

ROOT = Path(__file__).parent.parent


def text(name):
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def rows(data):
    return json.loads((ROOT / f"results/alternatives-small-{data}.json").read_text())["rows"]


def errors_at(level, measure, method, data="mnist"):
    """The errors of Sparseout and of another method at equal sparsity, by seed, interpolated between settings."""
    points = {}
    for row in rows(data):
        points.setdefault((row["method"], row["seed"]), []).append((row[measure], row["mse"]))
    return tuple(
        np.array(
            [np.interp(level, *zip(*sorted(points[name, seed]), strict=True), np.nan, np.nan) for seed in range(5)]
        )
        for name in ("sparseout", method)
    )


def interval(values):
    return np.mean(values), scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)


@pytest.mark.parametrize(
    ("claim", "measure", "method"),
    [
        (r"error (\d+) ± (\d)% lower with Sparseout than with Dropout", "hoyer", "dropout"),
        (r"\((\d+) ± (\d)% if only live units count\)", "hoyer_live", "dropout"),
        (r"(\d+) ± (\d)% above k-winners", "hoyer", "kwinners"),
    ],
)
def test_where_it_pays(claim, measure, method):
    ours, other = errors_at(0.8, measure, method)
    mean, half = interval(ours / other)
    assert re.search(claim, text("README.md")).groups() == (f"{100 * abs(1 - mean):.0f}", f"{100 * half:.0f}")


@pytest.mark.parametrize("measure", ["hoyer", "hoyer_live"])
def test_the_penalty_is_level_with_it_there(measure):
    assert scipy.stats.ttest_rel(*errors_at(0.8, measure, "penalty")).pvalue > 0.05


@pytest.mark.parametrize(
    ("claim", "data", "method", "level", "lower"),
    [
        (r"at 0\.6 by ([\d.]+) ± ([\d.]+) and", "digits", "penalty", 0.6, True),
        (r"at 0\.6 by .* and ([\d.]+) ± ([\d.]+)\)", "digits", "kwinners", 0.6, True),
        (r"higher by ([\d.]+) ± ([\d.]+) \(penalty\)", "mnist", "penalty", 0.7, False),
        (r"and ([\d.]+) ± ([\d.]+) \(k-winners\)", "mnist", "kwinners", 0.7, False),
        (r"penalty is lower by ([\d.]+) ± ([\d.]+), at", "mnist", "penalty", 0.6, True),
        (r"at 0\.8 k-winners by ([\d.]+) ± ([\d.]+\d)", "mnist", "kwinners", 0.8, True),
        (r"lower by ([\d.]+) ± ([\d.]+) at Hoyer 0\.42", "digits", "bridgeout", 0.42, True),
    ],
)
def test_differences_at_equal_sparsity(claim, data, method, level, lower):
    ours, other = errors_at(level, "hoyer", method, data)
    mean, half = interval(1000 * (ours - other))
    assert (mean > 0) == lower
    said = re.search(claim, text("docs/comparison.md")).groups()
    places = len(said[0].split(".")[1])
    assert said == (f"{abs(mean):.{places}f}", f"{half:.{places}f}")


@pytest.mark.parametrize("measure", ["hoyer", "hoyer_live"])
@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_the_lowest_error_of_the_noises_from_one_half_up(data, measure):
    compared = 0
    for level in (0.5, 0.6, 0.7, 0.8):
        for method in ("dropout", "gaussian", "bridgeout", "shakeout"):
            ours, other = errors_at(level, measure, method, data)
            if not np.isnan(ours - other).any():
                assert scipy.stats.ttest_rel(ours, other, alternative="less").pvalue < 0.025, (level, method)
                compared += 1
    assert compared >= 8
    below = errors_at(0.45, "hoyer", "bridgeout", "digits")
    assert scipy.stats.ttest_rel(*below).pvalue > 0.05  # "level at 0.45"


@pytest.mark.parametrize("measure", ["hoyer", "hoyer_live"])
@pytest.mark.parametrize("method", ["penalty", "kwinners"])
def test_on_digits_both_cost_less(method, measure):
    for level in (0.5, 0.6, 0.7):
        ours, other = errors_at(level, measure, method, "digits")
        assert scipy.stats.ttest_rel(ours, other, alternative="greater").pvalue < 0.025


def test_the_dead_units_that_are_named():
    claim = (
        r"(\d+)% of the MNIST autoencoder's units at Hoyer (0\.\d+), over 10,000 images, "
        r"and (\d+)% with Dropout at (0\.\d+)"
    )
    dead, hoyer, of_dropout, dropout = re.search(claim, text("README.md")).groups()
    for method, setting, *said in (("sparseout", 0.5, dead, hoyer), ("dropout", 0.5, of_dropout, dropout)):
        found = [row for row in rows("mnist") if (row["method"], row["setting"]) == (method, setting)]
        mean = {name: np.mean([row[name] for row in found]) for name in ("dead", "hoyer")}
        assert said == [f"{100 * mean['dead']:.0f}", f"{mean['hoyer']:.2f}"]


@pytest.mark.parametrize(
    ("page", "claim", "contrast", "places"),
    [
        ("docs/experiments.md", r"is (-0\.\d+ ± [\d.]+) and", r"\*\*primary\*\*: Hoyer, all units", 3),
        (
            "docs/experiments.md",
            r"and (-0\.\d+ ± [\d.]+), and similar",
            r"language \| Hoyer, all = live units, matched",
            3,
        ),
        ("docs/experiments.md", r"it is (\+0\.0025 ± [\d.]+), which", r"image \| Hoyer, all = live units, matched", 4),
        ("docs/limits.md", r"is (\+0\.0025 ± [\d.]+) per unit", r"image \| Hoyer, all = live units, matched", 4),
        ("docs/experiments.md", r"is (\+0\.000 ± [\d.]+) per unit", r"\*\*primary\*\*: error", 3),
        ("docs/experiments.md", r"is (-\d\.\d ± [\d.]+), which", r"\*\*primary\*\*: perplexity", 1),
    ],
)
def test_slopes_are_those_of_the_study(page, claim, contrast, places):
    smallest = text("docs/results.md").partition("## Budget `small`")[2]
    mean, half = re.search(rf"{contrast}[^|]*\| (\S+) ± (\S+) \|", smallest).groups()
    assert re.search(claim, text(page))[1] == f"{float(mean):+.{places}f} ± {float(half):.{places}f}"


RESULTS = (ROOT / "docs/results.md").read_text(encoding="utf-8")
LARGER = RESULTS.partition("## Budget `medium`")[2].partition("## Budget `small`")[0]


@pytest.mark.parametrize(
    ("page", "before", "claim", "network", "words"),
    [
        ("docs/experiments.md", "its slope is ", "C1", "Wide-ResNet", "5 of 5 seeds: all = live units supported, "),
        ("docs/experiments.md", "that of the LSTM ", "C1", "LSTM", "5 of 5 seeds: all = live units supported, "),
        ("docs/experiments.md", "in the transformer, ", "C1", "transformer", "5 of 5 seeds: all units undecided, "),
        (
            "docs/limits.md",
            "transformer of `medium` it is ",
            "C1",
            "transformer",
            "5 of 5 seeds: all units undecided, ",
        ),
        ("docs/experiments.md", "decided: the slope of the error is ", "C2", "Wide-ResNet", "slope of error "),
        ("docs/experiments.md", "that of the perplexity ", "C3", "LSTM", "5 of 5 seeds: undecided, "),
        ("docs/experiments.md", "in the LSTM and ", "C3", "transformer", "5 of 5 seeds: undecided, "),
    ],
)
def test_slopes_are_those_of_the_larger_budget(page, before, claim, network, words):
    number = r"([-+]\d\.\d+) ± (\d\.\d+)"
    row = re.search(rf"^\| {claim} \w.*", LARGER, re.MULTILINE)[0]  # of the table of verdicts
    found = re.search(f"{network}, {words}{number}", row).groups()
    said = re.search(before + number, text(page)).groups()
    places = [len(value.partition(".")[2]) for value in said]
    assert said == tuple(f"{float(value):.{n}f}" for value, n in zip(found, places, strict=True))


def test_verdicts_are_those_of_the_larger_budget():
    for claim in ("C2", "C3"):
        assert re.search(rf"\| {claim} [^|]*\| \*\*undecided\*\* ", LARGER)
    assert re.search(r"LSTM \| common \| perplexity \|[^\n]*C3 contradicted, secondary", LARGER)


def test_how_closely_a_short_training_meets_its_targets():
    rows = json.loads((ROOT / "results/targets-short.json").read_text())["rows"]
    off = [abs(row["last_tenth"] - row["target"]) for row in rows if row["target"] is not None]
    assert max(off) <= 0.01
    assert f"[met all {len(off)} targets]" in text("docs/how-to/target.md")
    assert f"to {max(off):.4f} over the last 20" in text("docs/how-to/target.md")


def test_where_more_noise_makes_the_lstm_denser():
    rows = json.loads((ROOT / "results/targets-language.json").read_text())["rows"]
    hoyer = {row["value"]: row["hoyer"] for row in rows if row["knob"] == "p" and row["target"] is None}
    assert f"(Hoyer {hoyer[0.9]:.2f} at 0.9, {hoyer[0.8]:.2f} at 0.8)" in text("docs/limits.md")


@pytest.mark.parametrize(("page", "count"), [("README.md", 3), ("docs/index.md", 5)])
def test_what_sparsity_is_worth_on_the_first_pages(page, count):
    """Means over seeds; how many there are is said beside the table."""
    rows = json.loads((ROOT / "results/payoff-mnist.json").read_text())["rows"]
    seeds = {1: "one seed", 3: "three seeds"}[len({row["seed"] for row in rows})]
    assert re.search(rf"payoff\.md\), {seeds}", text(page))
    methods = {"no noise": "none", "Dropout": "dropout", "L1 penalty": "penalty", "Sparseout": "sparseout"}
    line = rf"^\| ({'|'.join(methods)})(?:, target ([\d.]+))? \| ([\d.]+) \| ([\d.]+%) \| (\d+%) \| (\d+) \| (\d+) \|$"
    lines = re.findall(line, (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == count
    for method, target, *shown in lines:
        wanted = (methods[method], float(target) if target else None)
        found = [row for row in rows if (row["method"], row["target"]) == wanted]
        columns = [
            (".3f", [row["density"] for row in found]),
            (".2%", [row["error"] for row in found]),
            (".0%", [row["parameters_compact"] / row["parameters"] for row in found]),
            (".0f", [row["us"]["dense"]["1"] for row in found]),
            (".0f", [row["us"]["sparse"]["1"] for row in found]),
        ]
        assert shown == [format(sum(values) / len(values), form) for form, values in columns]
