"""Made-up results: folders of runs as a real training would leave them, from a formula of the options."""

import json
import math
from pathlib import Path
from typing import Any

from sparseout_experiments import config
from sparseout_experiments.studies.control import grid
from sparseout_experiments.studies.control.collect import Ledger
from sparseout_experiments.studies.control.grid import GRIDS, Run, Task
from sparseout_experiments.studies.engine.cluster import Job, Outcome, Train
from sparseout_experiments.training import run_folder

ENVIRONMENT = {"torch": "2.13.0", "processor": "a processor", "gpu": None}


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """What a training leaves; and a mark for each time it was called."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "calls").open("a") as file:
        file.write("x")
    (folder / "result.json").write_text(json.dumps(result))


def wobble(seed: float, size: float) -> float:
    return size * math.sin(1 + 2.5 * seed)


def result_of(task: Task, options: dict[str, Any], effect: float = 1.0) -> dict[str, Any]:
    """A result in which Hoyer falls with q, the error falls and the perplexity rises with it, times `effect`."""
    q = options.get("q", 2.0)
    p, seed = options.get("p", 0.0), options["seed"]
    tilt = effect * (q - 2.0) * (0.5 + p) * (1.0 if options.get("scale") == "matched" else 1.3)
    tilt *= 0.6 if options.get("gradient") == "exact" else 1.0
    off = wobble(seed, 0.004) + wobble(1.7 * seed + 3 * q, 0.0005)  # of the seed, and of the run
    hoyer = min(max(0.42 + 0.3 * p - 0.16 * tilt + off, 0.02), 0.99)
    live = min(max(0.40 + 0.2 * p - 0.07 * tilt + off, 0.02), 0.99)
    dead = min(max(0.15 + 0.3 * p - 0.2 * tilt + off, 0.0), 0.98)
    metric = {
        "autoencoder": 0.012 + 0.02 * p + 0.004 * tilt**2 + off / 40,
        "image": 0.55 + 0.1 * p - 0.01 * tilt + off,
        "language": 47.0 - 6.0 * p * (1 - p) + 1.5 * tilt + 20 * off,
        "transformer": 52.0 - 5.0 * p * (1 - p) + 1.2 * tilt + 20 * off,
    }[task]
    name = GRIDS[task].metric
    measures = {"hoyer": hoyer, "hoyer_live": live, "gini": hoyer / 1.1, "dead_units": round(256 * dead), "units": 256}
    return {
        "status": "finished",
        "task": task,
        "config": dict(options),
        "metric": name,
        "epochs": options["epochs"],
        "steps": 640,
        "best_epoch": 7,
        "stopped_by": "epochs",
        "seconds": 4.2,
        "parameters": 402192,
        "train_loss": metric / 2,
        "valid": {name: metric * 1.02},
        "test": {name: metric},
        "sparsity": {"code": measures, "other": dict(measures)},
        "mean": {"hoyer": hoyer, "hoyer_live": live, "dead": dead, "undefined": 0.0},
        "last": {"hoyer": hoyer + 0.002 * q, "hoyer_live": live + 0.003 * q, "dead": dead, "undefined": 0.0},
        "warnings": [],
        "environment": {**ENVIRONMENT, "threads": 1},
    }


def fake_train(task: Task, options: dict[str, Any], folder: Path) -> None:
    """Stands in for a training."""
    result = result_of(task, options)
    epochs, last = result["epochs"], result.pop("last")
    write_result(folder, result)
    lines = [{"epoch": epoch, "mean": dict.fromkeys(last, 0.5)} for epoch in range(1, epochs)]
    lines.append({"epoch": epochs, "mean": last})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained(task: str, options: dict[str, Any], folder: Path) -> None:
    """Stands in for a training too: a made-up result in the folder of a real run."""
    found = config.resolve(task, options)
    fake_train(task, options, folder)
    record = json.loads((folder / "result.json").read_text())
    sparsity = {"code": dict.fromkeys(run_folder.MEASURES, record["mean"]["hoyer"])}
    (folder / "result.json").write_text(json.dumps({**record, "config": config.record(found), "sparsity": sparsity}))
    lines = [{"epoch": epoch, "valid": record["valid"], "mean": record["mean"]} for epoch in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text(config.write(found))


class Inline:
    """Stands in for a cluster: trains in this one, a job whenever its outcome is waited for."""

    def __init__(self, workers: int, train: Train, scheduler: str | None = None) -> None:
        self.workers, self._train = workers, train
        self._jobs: list[Job] = []

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def free(self) -> bool:
        return len(self._jobs) < self.workers

    @property
    def running(self) -> int:
        return min(len(self._jobs), self.workers)

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def start(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> Outcome:
        job = self._jobs.pop(0)
        try:
            self._train(*job)
        except Exception as error:
            return Outcome(job, str(error), None)
        return Outcome(job, None, None)


def ledger_of(task: Task, budget: str = "small", effect: float = 1.0, seeds: int = 5) -> Ledger:
    """All runs of a task, or those of its first seeds."""
    ledger = Ledger()

    def add(runs: list[Run]) -> None:
        for run in runs:
            if run.role == "tuning" or run.seed < seeds:
                ledger.results[run] = result_of(task, grid.options(run, budget, {}, {}), effect)

    add(grid.first(budget, task))
    add(grid.second(budget, task, ledger.chosen(budget, task)))
    return ledger
