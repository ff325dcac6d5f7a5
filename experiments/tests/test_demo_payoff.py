"""The last act of the demonstration: parameters, multiplications and times of the sparsest network."""

import io
import json
from pathlib import Path

import pytest
import torch
from demo_results import results, row
from rich.console import Console
from sparseout_experiments.demo import Options, payoff, report, training
from sparseout_experiments.demo.training import Look
from sparseout_experiments.models import Autoencoder
from torch import nn

OPTIONS = Options(q=(1.0,), seeds=1, scales=("matched",), epochs=1)


def look(seed: int, silent: int = 0) -> Look:
    """A network in which the first units never fire."""
    model = Autoencoder(64, 256, nn.Identity(), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.encoder.bias[:silent] = -100.0
    return training.look(model, training.digits().test)


def test_the_sparsest_network_loses_what_never_fires() -> None:
    rows = [row("sparseout", seed, hoyer, "matched", 1.0) for seed, hoyer in enumerate((0.5, 0.9, None))]
    looks = {row["run"]: look(seed, silent) for seed, (row, silent) in enumerate(zip(rows, (0, 200, 250), strict=True))}
    model = looks[rows[1]["run"]].model
    state = {name: value.clone() for name, value in model.state_dict().items()}
    worth = payoff.measure(results(rows), looks)
    assert worth is not None
    assert worth.run == {"method": "sparseout", "scale": "matched", "q": 1.0, "seed": 1}
    trained, compacted, sparse = worth.networks
    kept = compacted.macs / (2 * 64)
    assert trained.macs == 2 * 64 * 256
    assert trained.parameters == 2 * 64 * 256 + 256 + 64
    assert kept <= 56
    assert compacted.parameters == sparse.parameters == 2 * 64 * kept + kept + 64
    assert compacted.macs_effective < compacted.macs
    assert worth.difference < 1e-4
    for network in worth.networks:
        assert list(network.us) == [str(rows) for rows in payoff.BATCHES]
        assert all(time > 0 for time in network.us.values())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_it_is_in_terminal_page_and_results(tmp_path: Path) -> None:
    found = results([row("sparseout", 0, 0.9, "matched", 1.0)])
    found.more["demo"] = {"verdict": "It was trained.", "seconds": 1.0}
    looks = {str(found.frame["run"][0]): look(0, silent=200)}
    worth = payoff.measure(found, looks)
    assert worth is not None
    report.write(tmp_path, OPTIONS, found, looks, worth)
    record = json.loads((tmp_path / "results.json").read_text())["more"]["demo"]["payoff"]
    assert [network["name"] for network in record["networks"]] == ["as trained", "compacted", "and sparse"]
    html = (tmp_path / "report.html").read_text()
    assert "The sparsest network (matched scale, q = 1, seed 0), cashed in" in html
    assert f"<td>{worth.networks[1].parameters:,}</td>" in html
    console = Console(width=80, record=True, file=io.StringIO())
    report.show(console, OPTIONS, found, [], worth)
    text = console.export_text()
    assert f"{worth.networks[1].parameters:,}" in text
    assert "fewer parameters" in text


@pytest.mark.parametrize(("hoyer", "with_look"), [(0.5, False), (None, True)])
def test_without_a_network_with_numbers_there_is_no_last_act(hoyer: float | None, with_look: bool) -> None:
    found = results([row("none", 0, hoyer)])
    assert payoff.measure(found, {str(found.frame["run"][0]): look(0)} if with_look else {}) is None
