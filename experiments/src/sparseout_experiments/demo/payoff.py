"""The last act: the sparsest network of the demonstration is compacted, its decoder made sparse, and both are timed."""

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from sparseout import inference
from sparseout_experiments.demo.training import Look, digits
from sparseout_experiments.studies.engine.frame import Results
from sparseout_experiments.training.environment import one_thread

ROWS = (1, 64)  # of a call that is timed


@dataclass(frozen=True)
class Network:
    """One form of the network: its parameters, its multiplications for a digit, and microseconds a digit."""

    name: str
    parameters: int
    macs: float
    macs_effective: float
    us: dict[int, float]  # by the number of digits at a time


@dataclass(frozen=True)
class Payoff:
    """What the sparsity of one network is worth. `difference` is the largest between outputs, on the test digits."""

    run: Mapping[str, Any]  # its method, scale, q and seed
    networks: tuple[Network, ...]
    difference: float
    left: str  # why the decoder stayed dense; empty if it became sparse

    def record(self) -> dict[str, Any]:
        """The entry of results.json."""
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
            report = inference.sparse_linear_(sparse, [test[:rows] for rows in ROWS], modules=["decoder"])
        forms: dict[str, nn.Module] = {"as trained": model, "compacted": compacted, "and sparse": sparse}
        times = _times(forms, test)
        networks = []
        for name, network in forms.items():
            total = inference.cost(network, [test]).total
            parameters = sum(parameter.numel() for parameter in network.parameters())
            networks.append(Network(name, parameters, total["dense_macs"], total["effective_macs"], times[name]))
        difference = float((sparse(test) - model(test)).abs().max())
    run["seed"] = int(best["seed"])
    return Payoff(run, tuple(networks), difference, report.skipped.get("decoder", ""))


def _times(networks: dict[str, nn.Module], test: Tensor, turns: int = 200) -> dict[str, dict[int, float]]:
    """Microseconds a digit: medians of calls, the networks in turn."""
    medians: dict[str, dict[int, float]] = {name: {} for name in networks}
    for rows in ROWS:
        calls: dict[str, list[float]] = {name: [] for name in networks}
        inputs = test[: len(test) // rows * rows].split(rows)
        for turn in range(turns):
            for name, network in networks.items():
                calls[name].append(_seconds(network, inputs[turn % len(inputs)]))
        for name, times in calls.items():
            medians[name][rows] = 1e6 * sorted(times)[turns // 2] / rows
    return medians


def _seconds(network: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    network(x)
    return time.perf_counter() - start


HEADINGS = ("parameters", "MACs", "that count", *(f"µs, {rows} at a time" for rows in ROWS))


def cells(network: Network) -> tuple[str, ...]:
    """The row of a network under `HEADINGS`."""
    counts = (network.parameters, network.macs, network.macs_effective)
    return (*(f"{count:,.0f}" for count in counts), *(f"{network.us[rows]:.2f}" for rows in ROWS))


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
