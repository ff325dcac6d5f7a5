"""The demonstration: its runs, what it says of them, and what it leaves behind."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small import status_of
from sparseout_experiments import demo
from sparseout_experiments.commands import app
from sparseout_experiments.config import record, resolve
from sparseout_experiments.demo import Options, plan, report
from sparseout_experiments.models import Autoencoder
from sparseout_experiments.studies.engine import jobs
from sparseout_experiments.studies.engine.frame import Results
from sparseout_experiments.tasks import autoencoder
from torch import Tensor
from typer.testing import CliRunner

TINY = ["demo", "--epochs", "1", "--seeds", "2", "--q", "1,3", "--q", "2"]


def found(options: Options, folder: Path) -> Results:
    return demo.run(plan(options, folder), "", lambda done, name: None)


def test_every_setting_is_run_on_every_seed(tmp_path: Path) -> None:
    planned = plan(Options(), tmp_path)
    assert len(planned) == len({job.folder for job in planned.values()}) == (5 * 2 + 2) * 3


@pytest.mark.slow
def test_weights_and_batches_are_the_same_at_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded(Autoencoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            start.append([parameter.detach().clone() for parameter in self.parameters()])

        def code(self, x: Tensor) -> Tensor:
            if self.training:
                batches.append(x)
            return super().code(x)

    monkeypatch.setattr(autoencoder, "Autoencoder", Recorded)
    seen = {}
    for name, job in plan(Options(q=(1.0, 3.0), seeds=2, epochs=2), tmp_path).items():
        start: list[list[Tensor]] = []
        batches: list[Tensor] = []
        jobs.train(*job)
        seen[name, job.options["seed"]] = torch.cat([p.flatten() for p in start[0]]), torch.cat(batches)
    first, *others = (value for (_, seed), value in seen.items() if seed == 0)
    count = len(first[1]) // 2
    assert first[1].shape == (2 * count, 64)
    assert count == 18 * 64
    assert not torch.equal(first[1][:count], first[1][count:])  # another order in the second epoch
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
    elsewhere = seen["method=none seed=1", 1]
    assert not torch.equal(first[0], elsewhere[0])
    assert not torch.equal(first[1], elsewhere[1])


@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_q_2_is_dropout_bit_for_bit(tmp_path: Path, gradient: demo.Gradient) -> None:
    options = Options(q=(2.0,), seeds=1, scales=("paper", "matched", 0.1), gradient=gradient, epochs=2)
    frame = found(options, tmp_path).frame
    numbers = frame[frame["method"] != "none"][["hoyer", "gini", "dead", "metric"]]
    assert len(numbers.drop_duplicates()) == 1
    assert len(numbers) == 4


@pytest.mark.parametrize("scale", ["paper", "matched", 0.25])
def test_the_options_reach_the_run(scale: demo.Scale, tmp_path: Path) -> None:
    options = Options(q=(1.5,), scales=(scale,), p=0.3, gradient="exact", epochs=7, seeds=4)
    for job in plan(options, tmp_path).values():
        got, method = record(resolve(job.task, job.options)), job.options["method"]
        wanted = {"epochs": 7, "data": "digits", "units": 256}
        wanted |= {} if method == "none" else {"p": 0.3}
        wanted |= {"q": 1.5, "scale": scale, "gradient": "exact"} if method == "sparseout" else {}
        assert {name: got[name] for name in wanted} == wanted


@pytest.mark.slow
def test_sparsity_falls_with_q(tmp_path: Path) -> None:
    """The claim of the picture, at reduced size."""
    results = found(Options(q=(1.0, 3.0), epochs=5), tmp_path)
    for scale in Options.scales:
        said = report.verdict(results, scale)
        assert "the Hoyer sparsity of the code falls" in said
        assert "over live units it falls" in said
    assert (results.frame["undefined"] == 0).all()


def made_up(curves: list[dict[float, float | None]], live: list[dict[float, float | None]] | None = None) -> Results:
    """Results with the Hoyer sparsity of each seed by q."""
    rows = [
        {"method": "sparseout", "scale": "paper", "q": q, "seed": seed, "hoyer": hoyer, "hoyer_live": of_live[q]}
        for seed, (curve, of_live) in enumerate(zip(curves, live or curves, strict=True))
        for q, hoyer in curve.items()
    ]
    return Results("autoencoder", ("mse", "e-3"), pd.DataFrame(rows), {}, {}, {}, {}, [], "")


FALLING: list[dict[float, float | None]] = [{1.0: 0.9 + off, 2.0: 0.6, 3.0: 0.4} for off in (-0.01, 0.0, 0.01)]
RISING: list[dict[float, float | None]] = [{1.0: 0.4 + off, 2.0: 0.6, 3.0: 0.9} for off in (-0.01, 0.0, 0.01)]
CROSSED: list[dict[float, float | None]] = [{1.0: 0.5, 3.0: 0.7}, {1.0: 0.7, 3.0: 0.5}, {1.0: 0.6, 3.0: 0.6}]


@pytest.mark.parametrize(
    ("results", "says"),
    [
        (
            made_up(FALLING),
            "as q goes from 1 to 3, the Hoyer sparsity of the code falls, from 0.90 to 0.40, by -0.250 ± ",
        ),
        (made_up(RISING), "the code rises, from 0.40 to 0.90"),
        (made_up(FALLING, RISING), "over live units it rises, from 0.40 to 0.90."),
        (made_up(CROSSED), "has no clear direction"),
        (made_up(FALLING[:1]), "the code changes, from 0.89 to 0.40, by -0.245 per unit"),
        (made_up([curve | {1.0: None} for curve in FALLING]), "As q goes from 2 to 3"),  # at 1 all codes are zero
        (made_up([*FALLING[:2], FALLING[2] | {3.0: None}]), "from 0.90 to 0.40"),  # of two seeds
        (made_up([{2.0: 0.6}]), ""),
    ],
)
def test_says_what_the_numbers_say(results: Results, says: str) -> None:
    said = report.verdict(results, "paper")
    assert says.lower() in said.lower() if says else said == ""


@pytest.mark.slow
def test_the_terminal_shows_what_the_files_hold(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    result = CliRunner().invoke(app, [*TINY, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(folder)) == ["demo.png", "report.html", "report.json", "sweep.csv", "table.tex"]
    assert len(json.loads((folder / "report.json").read_text())["runs"]) == (3 * 2 + 2) * 2
    means = pd.read_csv(folder / "sweep.csv").groupby(["scale", "q"], sort=False)["hoyer"].mean()
    lines = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("q = ")]
    assert [line[3] for line in lines] == [f"{mean:.3f}" for mean in means]
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    assert (folder / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupt_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def train(*job: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "train", train)
    assert status_of(*TINY, "--out", str(tmp_path / "new")) == 130
    assert capfd.readouterr().err.strip() == "sparseout: interrupted, and nothing was written"
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparseout_experiments.studies.engine.report.write", full)
    assert status_of("demo", "--epochs", "1", "--seeds", "1", "--q", "2", "--out", str(tmp_path)) == 2
    assert capfd.readouterr().err.strip().endswith("(No space left on device)")
    assert os.listdir(tmp_path) == []  # no picture without a report, beside which the next demo would not write


def test_extremes_are_reported_and_not_fatal(tmp_path: Path) -> None:
    args = ["--q", "0,300", "--seeds", "1", "--epochs", "2", "--scale", "paper", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["demo", *args])
    assert result.exit_code == 0, result.output
    (line,) = (line.split() for line in result.stdout.splitlines() if line.strip().startswith("q = 300"))
    assert set(line[3:]) == {"-"}  # it diverged
    assert "1 failed" in (tmp_path / "report.html").read_text()
