"""`sparseout theory`: its checks hold and can fail, and the page that is committed is that of the results."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import status_of
from sparseout_experiments.commands import app
from sparseout_experiments.studies import theory
from sparseout_experiments.studies.engine import style
from sparseout_experiments.studies.theory import curves, figures, masks, statements, training
from sparseout_experiments.studies.theory.statements import Check
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "results", ROOT / "docs/theory.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def record() -> theory.Record:
    return theory.load(RESULTS)


@pytest.fixture(scope="module")
def fresh() -> list[Check]:
    return [check for group in statements.GROUPS.values() for check in group()]


# What is committed


def test_the_page_is_that_of_the_results(record):
    assert theory.filled(TEXT, record, theory.checks_of(record)) == TEXT


def test_a_changed_result_changes_the_page(record):
    checks = theory.checks_of(record)
    changed = [checks[0]._replace(measured=0.5), *checks[1:]]
    text = theory.filled(TEXT, record, changed)
    assert text != TEXT
    assert f"{len(checks) - 1} of {len(checks)} checks hold" in text
    assert "| 0.5 |" in text
    assert "**no**" in text


def test_every_committed_check_holds_and_none_is_missing(record, fresh):
    checks = theory.checks_of(record)
    assert all(check.holds for check in checks)
    named = {(check.statement, check.of) for check in checks}
    of_training = {(check.statement, check.of) for check in statements.of_training(record)}
    assert named == {(check.statement, check.of) for check in fresh} | of_training
    assert len(record["equivalence"]) == len(training.TRAINED) * len(training.GRADIENTS)
    assert len(record["rescaling"]) == len(training.KINDS)


def test_the_page_has_every_block_and_figure_once(record):
    begun = re.compile(r"<!-- begin: (.*?) -->")
    assert begun.findall(TEXT) == begun.findall(theory.filled(None, record, theory.checks_of(record)))
    for name in figures.FIGURES:
        assert TEXT.count(f"images/theory-{name}.png") == 1
        assert (PAGE.parent / f"images/theory-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_formulas_begin_and_end_on_a_line():
    """Elsewhere they are not read as formulas, or a minus at the start of a line is read as a list."""
    prose = re.sub(r"```.*?```|\$\$.*?\$\$", "", TEXT, flags=re.DOTALL)
    assert "$" in prose
    for line in prose.split("\n"):
        assert line.count("$") % 2 == 0, line


# The statements, anew


def test_every_statement_holds(fresh):
    assert [check for check in fresh if not check.holds] == []


def test_every_check_has_a_line_of_the_table(record):
    checks = theory.checks_of(record)
    table = theory.filled(None, record, checks).split("<!-- begin: statements -->")[1]
    assert table.count("\n| ") == 1 + len(checks)  # a heading
    for check in checks:
        assert check.of.replace("|", "\\|") in table


def test_a_check_can_fail():
    assert Check("", "", 1.0, 0, 1).holds
    assert not Check("", "", 1.1, 0, 1).holds
    assert not Check("", "", -0.1, 0, 1).holds
    assert not Check("", "", math.nan, 0, math.inf).holds


@pytest.mark.parametrize(
    ("group", "statement"),
    [
        ("the penalty", "gaussian"),
        ("orders", "order-3"),
        ("orders", "order-4"),
        ("special cases", "dropout"),
        ("special cases", "count"),
        ("gradients", "exact"),
        ("rescaling", "rescaling"),
        ("rescaling", "matched"),
    ],
)
def test_a_wrong_penalty_is_seen(group, statement, monkeypatch):
    right = statements.theory.lq_penalty
    monkeypatch.setattr(statements.theory, "lq_penalty", lambda *args, **kwargs: 1.0001 * right(*args, **kwargs) + 1e-6)
    found = [check for check in statements.GROUPS[group]() if check.statement == statement]
    assert found
    assert not all(check.holds for check in found)


# Training


@pytest.mark.parametrize("gradient", training.GRADIENTS)
def test_training_too_short_is_seen(record, gradient):
    short = training.equivalence(1.5, gradient, steps=20)
    (check,) = statements.of_training({"equivalence": [short], "rescaling": []})
    assert check.statement == {"exact": "equivalence", "detached": "equivalence-detached"}[gradient]
    assert not check.holds
    (long,) = (one for one in record["equivalence"] if (one["q"], one["gradient"]) == (1.5, gradient))
    assert short["hoyer"]["penalty"] == pytest.approx(long["hoyer"]["penalty"], rel=1e-4)
    assert short["near"] == pytest.approx(long["near"], rel=1e-2)


@pytest.mark.parametrize("factor", [1.0, 2 / 1.5])
def test_the_penalty_s_encoder_is_a_minimum(factor):
    x, weight = training.images(), training.decoder()
    encoder = training.by_penalty(x, weight, 1.5, factor).requires_grad_()
    features = x @ encoder.T
    decoder = weight.square().sum(0)  # R once more, written out
    cost = factor * (decoder * features.abs() ** 1.5).sum(-1) * training.P / (1 - training.P) / 2
    (slope,) = torch.autograd.grad((training.misfit(x, features, weight) + cost).mean(), encoder)
    assert slope.abs().max() < 1e-4


def test_the_balance_moves_under_exact_and_not_under_detached():
    moved = {}
    for gradient in ("exact", "detached"):
        rows = training.rescaling(training.Kind(1.0, gradient, 0.0), steps=100)["rows"]
        assert rows[0]["balance"] == pytest.approx(0, abs=1e-12)
        moved[gradient] = rows[-1]["balance"] / rows[-1]["predicted"]
    assert moved["exact"] == pytest.approx(1, abs=0.05)
    assert abs(moved["detached"]) < 0.05


@pytest.mark.parametrize("q", [1.0, 1.5, 3.0])
def test_the_path_is_made_of_minima(q):
    weight, x = training.decoder(12), training.images()[0]
    code = training.sparse_code(x, weight, q).requires_grad_()
    objective = training.misfit(x, code, weight) + training.penalty(code, weight, q)
    (slope,) = torch.autograd.grad(objective, code)
    kept = code != 0
    assert slope[kept].abs().max() < 1e-6
    if q == 1:  # at a zero the pull of the loss is weaker than the penalty's slope
        assert 0 < (~kept).sum() < 12
        assert slope[~kept].abs().max() < training.P / (1 - training.P) / 2
    else:
        assert (kept | (slope.abs() < 1e-6)).all()


def test_the_settings_are_what_the_prose_says():
    """Numbers that were typed: of what was set up, and not of what came of it."""
    assert f"{statements.SAMPLES:,} draws" in " ".join(TEXT.split())
    assert f"five features, p = {curves.P:g}" in TEXT
    assert len(masks.FEATURES) == 5
    assert f"A linear encoder of {training.UNITS} features" in " ".join(TEXT.split())
    layers = f"({training.INPUTS}-{training.HIDDEN}-{training.INPUTS}, ReLU)"
    assert f"{layers} learns to reproduce digits at p = {training.P:g}" in " ".join(TEXT.split())
    assert f"the solution at q + {training.NEAR:g}" in " ".join(TEXT.split())


def test_the_images_are_uncorrelated_components():
    x = training.images()
    assert x.shape == (128, 16)
    assert x.mean(0).abs().max() < 1e-12
    assert x.std() == pytest.approx(1)
    torch.testing.assert_close(x.T @ x, torch.diag((x**2).sum(0)), atol=1e-9, rtol=0)


# The command


@pytest.mark.slow
def test_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "sparse_code", partial(training.sparse_code, sweeps=20))
    monkeypatch.setattr(training, "by_penalty", partial(training.by_penalty, iterations=20))
    heard: list[str] = []
    found = theory.run(tmp_path, heard.append, steps=40, long=60)
    assert len(heard) == theory.PARTS
    assert not all(Check(**check).holds for check in found["checks"])  # not trained long enough
    loaded = theory.load(tmp_path)
    assert loaded.keys() == found.keys() | {"kind"} == theory.load(RESULTS).keys()
    assert loaded["environment"] == found["environment"]
    written = theory.render(loaded, tmp_path / "theory.md")
    assert {path.name for path in written} == {"theory.md", *(f"theory-{name}.png" for name in figures.FIGURES)}
    assert all(path.exists() for path in written)


def test_rendering_needs_no_run_and_no_page(tmp_path, record, monkeypatch):
    monkeypatch.setattr(style, "png", lambda *_: b"")
    file = tmp_path / "new" / "page.md"
    done = CliRunner().invoke(app, ["theory", "--results", str(RESULTS), "--page", str(file), "--render"])
    assert done.exit_code == 0, done.output
    assert f"All {len(record['checks'])} checks hold." in done.stdout
    text = file.read_text()
    assert re.findall(r"\n(\| statement .*?)\n\n", text, re.DOTALL) == re.findall(
        r"\n(\| statement .*?)\n\n", TEXT, re.DOTALL
    )
    assert len(list((tmp_path / "new" / "images").glob("*.png"))) == len(figures.FIGURES)
    before = text
    assert (
        CliRunner().invoke(app, ["theory", "--results", str(RESULTS), "--page", str(file), "--render"]).exit_code == 0
    )
    assert file.read_text() == before


def test_what_does_not_hold_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(style, "png", lambda *_: b"")
    found: dict[str, Any] = json.loads(theory.path_of(RESULTS).read_text())
    found["checks"][0]["measured"] = None  # no number
    theory.path_of(tmp_path).write_text(json.dumps(found))
    assert status_of("theory", "--results", str(tmp_path), "--page", str(tmp_path / "page.md"), "--render") == 1
    out, err = capsys.readouterr()
    assert f"1 of {len(found['checks'])} checks do not hold" in err
    assert f"{found['checks'][0]['of']}: nan is not in" in out
    assert "**no**" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("text", ["# A page\n", "<!-- begin: summary -->\nno end\n"])
def test_a_page_that_is_not_ours_is_known_before_the_work(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(theory, "run", lambda *_: pytest.fail("it ran"))
    file = tmp_path / "page.md"
    file.write_text(text)
    assert status_of("theory", "--results", str(tmp_path), "--page", str(file)) == 2
    assert "expected `--page` to be a page with blocks" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--render"], "theory.json does not hold results of sparseout theory"),
        (["--results", ""], "expected `--results` to be the name of a folder, but got ''"),
        (["--page", ""], "expected `--page` to be the name of a file, but got ''"),
        (["--other"], "--other"),
    ],
)
def test_errors(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(theory, "run", lambda *_: pytest.fail("it ran"))
    assert status_of("theory", *args) == 2
    assert words in capsys.readouterr().err


def test_other_files_are_not_results(tmp_path):
    for text in ("{}", "[]", "no json", '{"kind": "sparseout bench"}'):
        theory.path_of(tmp_path).write_text(text)
        with pytest.raises(ValueError, match="does not hold results of sparseout theory"):
            theory.load(tmp_path)


def test_an_interrupt_leaves_nothing(tmp_path, capsys, monkeypatch):
    def run(folder, heard):
        heard("the first part")
        raise KeyboardInterrupt

    monkeypatch.setattr(theory, "run", run)
    assert status_of("theory", "--results", str(tmp_path / "a"), "--page", str(tmp_path / "b" / "page.md")) == 130
    assert "interrupted, and nothing was written" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
