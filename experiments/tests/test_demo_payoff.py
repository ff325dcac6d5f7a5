"""The last act of the demonstration: parameters, multiplications and times of the sparsest network."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sparseout_experiments.demo import Options, Run, Setting, payoff, report, training
from sparseout_experiments.models import Autoencoder
from torch import nn

OPTIONS = Options(q=(1.0,), seeds=1, scales=("matched",), epochs=1)
NUMBERS = {"hoyer_live": 0.5, "gini": 0.5, "density": 0.5, "dead": 0.25, "rows": 450, "undefined_rows": 0}


def run(hoyer: float, seed: int, silent: int = 0) -> Run:
    """A network in which the first units never fire."""
    model = Autoencoder(64, 256, nn.Identity(), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.encoder.bias[:silent] = -100.0
    setting = Setting("sparseout", "matched", 1.0)
    return Run(setting, seed, hoyer, **NUMBERS, error=0.05, seconds=1.0, histogram=[0] * 60, model=model)


def test_the_sparsest_network_loses_what_never_fires() -> None:
    runs = [run(0.5, 0), run(0.9, 1, silent=200), run(math.nan, 2, silent=250)]
    state = {name: value.clone() for name, value in runs[1].model.state_dict().items()}
    worth = payoff.measure(runs)
    assert worth is not None
    assert worth.seed == 1
    trained, compacted, sparse = worth.networks
    kept = compacted.macs / (2 * 64)
    assert trained.macs == 2 * 64 * 256
    assert trained.parameters == 2 * 64 * 256 + 256 + 64
    assert kept <= 56
    assert compacted.parameters == sparse.parameters == 2 * 64 * kept + kept + 64
    assert compacted.macs_effective < compacted.macs
    assert worth.difference < 1e-4
    assert all(network.us[rows] > 0 for network in worth.networks for rows in payoff.ROWS)
    assert all(torch.equal(value, state[name]) for name, value in runs[1].model.state_dict().items())


def test_it_is_in_terminal_page_and_results(tmp_path: Path) -> None:
    runs = [replace(run(0.9, 0, silent=200), pictures=None)]
    worth = payoff.measure(runs)
    assert worth is not None
    report.write(tmp_path, OPTIONS, runs, 1.0, worth)
    record = json.loads((tmp_path / "results.json").read_text())["payoff"]
    assert [network["name"] for network in record["networks"]] == ["as trained", "compacted", "and sparse"]
    html = (tmp_path / "report.html").read_text()
    assert "The sparsest network (matched scale, q = 1, seed 0), cashed in" in html
    assert f"<td>{worth.networks[1].parameters:,}</td>" in html
    console = Console(width=80, record=True, file=io.StringIO())
    report.show(console, OPTIONS, runs, [], worth)
    text = console.export_text()
    assert f"{worth.networks[1].parameters:,}" in text
    assert "fewer parameters" in text


@pytest.mark.parametrize("runs", [[], [replace(run(0.5, 0), model=None)], [run(math.nan, 0)]])
def test_without_a_network_with_numbers_there_is_no_last_act(runs: list[Run]) -> None:
    assert payoff.measure(runs) is None


def test_a_run_keeps_its_network_without_noise(tmp_path: Path) -> None:
    found = training.train(Setting("none"), 0, OPTIONS, tmp_path, lambda *progress: None)
    assert isinstance(found.model, Autoencoder)
    assert "model" not in found.record()
