"""Sweeps: every combination of options, with several seeds."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparseout_experiments import config
from sparseout_experiments.message import expected
from sparseout_experiments.studies.engine import jobs as engine
from sparseout_experiments.studies.engine.cluster import Cluster, Job, Train
from sparseout_experiments.studies.engine.jobs import Ledger, OnProgress, StudyStopped, train
from sparseout_experiments.training import atomic_files, run_folder

PLAN = "sweep.json"  # of a sweep's folder: the command, and the runs that it wants
MOST = 100_000  # runs


def grid(
    task: str, options: Mapping[str, Sequence[Any]], seeds: int, folder: Path, named: config.Named = lambda name: name
) -> dict[str, Job]:
    """Every combination of the options' values with every seed, by the name from which its folder is named.

    An option that a method has no use for does not multiply the runs of that method.

    Raises:
        ValueError: for an option or a value that the task does not take, or more than `MOST` runs.
    """
    if (count := seeds * math.prod(len(values) for values in options.values())) > MOST:
        raise ValueError(expected("the sweep", f"at most {MOST} runs", count))
    swept = [name for name, values in options.items() if len(values) > 1]
    jobs: dict[str, Job] = {}
    for values in itertools.product(*options.values()):
        given = dict(zip(options, values, strict=True))
        method = str(given.get("method", "sparseout"))
        for name in options:
            if len(options.get("method", ())) < 2 and not config.uses(method, name):
                config.resolve(task, given, named)  # raises: no method of the sweep has a use for it
        used = config.without_unused(given, method)
        config.resolve(task, used, named)
        for seed in range(seeds):
            parts = [*(f"{option}={used[option]}" for option in swept if option in used), f"seed={seed}"]
            jobs.setdefault(" ".join(parts), Job(task, {**used, "seed": seed}, folder / _folder("_".join(parts))))
    return jobs


def _folder(name: str) -> str:
    """A name that every file system takes, different for different names."""
    plain = re.sub(r"[^\w.=+-]", "_", name, flags=re.ASCII)
    if plain == name and len(name) <= 100:
        return name
    return f"{plain[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def plan_of(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], str]:
    """The options of the runs that sweeps in these folders want, each with ``run``, and the command of the last.

    Raises RunError for a plan that is something else.
    """
    planned: list[dict[str, Any]] = []
    command = ""
    for folder in folders:
        if (folder / PLAN).exists():
            plan = run_folder.read_json(folder / PLAN)
            try:
                command = str(plan["command"])
                planned += [{**entry, "run": str(folder / entry["run"])} for entry in plan["runs"]]
            except (LookupError, TypeError) as error:
                name = type(error).__name__
                raise run_folder.RunError(f"{folder / PLAN} is not that of a sweep ({name}): remove it") from None
    return planned, command


def perform(
    jobs: Mapping[str, Job],
    folder: Path,
    workers: int,
    scheduler: str | None,
    command: str,
    on_progress: OnProgress = lambda progress: None,
    train: Train = train,
) -> Ledger[str]:
    """Train the runs of a sweep that have not ended, and return how each has.

    Raises:
        StudyStopped, ClusterError: where it cannot go on; runs that have ended are kept.
    """
    ledger: Ledger[str] = Ledger()
    engine.look(ledger, lambda: jobs)

    def plan() -> None:
        atomic_files.prepare(folder)
        runs = [{**ledger.wanted(job), "run": job.folder.name} for job in jobs.values()]
        atomic_files.write(folder / PLAN, json.dumps({"command": command, "runs": runs}, indent=1) + "\n")

    missing = [name for name in jobs if name not in ledger]
    if not missing:
        plan()
        return ledger
    with Cluster(min(workers, len(missing)), train, scheduler) as cluster:
        plan()  # now that there is a cluster: a command that is refused leaves nothing
        engine.run_all(cluster, ledger, lambda: jobs, lambda: len(jobs), on_progress)
    for name, reason in ledger.lost.items():
        raise StudyStopped(f"{name}: {reason}")
    return ledger
