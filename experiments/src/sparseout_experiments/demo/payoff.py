"""The last act: the sparsest network of the demonstration is compacted, its decoder made sparse, and both are timed."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from sparseout import inference
from sparseout_experiments.demo.training import Look, digits
from sparseout_experiments.studies.engine.frame import Results
from sparseout_experiments.studies.payoff.training import BATCHES, count, timed
from sparseout_experiments.training.environment import one_thread


@dataclass(frozen=True)
class Network:
    """One form of the network: its parameters, its multiplications for a digit, and microseconds a digit."""

    name: str
    parameters: int
    macs: float
    macs_effective: float
    us: dict[str, float]  # by the number of digits at a time


@dataclass(frozen=True)
class Payoff:
    """What the sparsity of one network is worth. `difference` is the largest between outputs, on the test digits."""

    run: Mapping[str, Any]  # its method, scale, q and seed
    networks: tuple[Network, ...]
    difference: float
    left: str  # why the decoder stayed dense; empty if it became sparse

    def record(self) -> dict[str, Any]:
        networks = [asdict(network) for network in self.networks]
        return {**self.run, "difference": self.difference, "decoder_left": self.left, "networks": networks}


def measure(results: Results, looks: Mapping[str, Look]) -> Payoff | None:
    """The payoff of the sparsest network, by Hoyer; None where no run has numbers."""
    runs = results.frame[results.frame["run"].isin(list(looks))].dropna(subset="hoyer")
    if runs.empty:
        return None
    best = runs.loc[runs["hoyer"].astype(float).idxmax()]
    run = {name: None if best[name] != best[name] else best[name] for name in ("method", "scale", "q")}
    with one_thread(), torch.no_grad():
        train, test = digits()
        model = copy.deepcopy(looks[best["run"]].model).eval()
        compacted = copy.deepcopy(model)
        inference.compact(compacted, [train]).apply_()
        sparse = copy.deepcopy(compacted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = inference.sparse_linear_(sparse, [test[:rows] for rows in BATCHES], modules=["decoder"])
        forms: dict[str, nn.Module] = {"as trained": model, "compacted": compacted, "and sparse": sparse}
        times = timed(forms, test, seconds=0.05)
        networks = []
        for name, network in forms.items():
            total = inference.cost(network, [test]).total
            macs, effective = total["dense_macs"], total["effective_macs"]
            networks.append(Network(name, count(network), macs, effective, times[name]))
        difference = float((sparse(test) - model(test)).abs().max())
    run["seed"] = int(best["seed"])
    return Payoff(run, tuple(networks), difference, report.skipped.get("decoder", ""))


HEADINGS = ("parameters", "MACs", "that count", *(f"µs, {rows} at a time" for rows in BATCHES))


def cells(network: Network) -> tuple[str, ...]:
    """The row of a network under `HEADINGS`."""
    counts = (network.parameters, network.macs, network.macs_effective)
    return (*(f"{number:,.0f}" for number in counts), *(f"{us:.2f}" for us in network.us.values()))


def terminal(payoff: Payoff) -> Table:
    """The table for a terminal of 80 columns."""
    table = Table(title=title(payoff), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("", *HEADINGS):
        table.add_column(heading, justify="right" if heading else "left")
    for network in payoff.networks:
        table.add_row(network.name, *cells(network))
    return table


def sentence(payoff: Payoff) -> str:
    """What was done, in words."""
    before, after = payoff.networks[0], payoff.networks[1]
    gone = 1 - after.parameters / before.parameters
    decoder = f"Its decoder stayed dense: {payoff.left}" if payoff.left else "Its decoder reads active units alone"
    return (
        f"Without the units that never fire on the training digits the network has {gone:.0%} fewer parameters. "
        f"{decoder}. Outputs for test digits changed by {payoff.difference:.0e} at most. Times are this "
        "machine's, on one thread."
    )


def title(payoff: Payoff) -> str:
    """Which network it is."""
    method, scale, q, seed = (payoff.run[name] for name in ("method", "scale", "q", "seed"))
    name = method if q is None else f"{scale} scale, q = {q:g}"
    return f"The sparsest network ({name}, seed {seed}), cashed in"
