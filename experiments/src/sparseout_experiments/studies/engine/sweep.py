"""Sweeps: every combination of options, with several seeds; and named runs of a study, which must all finish."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparseout_experiments import config
from sparseout_experiments.message import expected
from sparseout_experiments.studies.engine import jobs as engine
from sparseout_experiments.studies.engine.cluster import Cluster, Job, Outcome, Train
from sparseout_experiments.studies.engine.jobs import Name, StudyStopped, train
from sparseout_experiments.training import atomic_files, run_folder

PLAN = "sweep.json"  # of a sweep's folder: the command, and the runs that it wants
MOST = 100_000  # runs


class Progress(NamedTuple):
    """How far a sweep is."""

    done: int
    failed: int
    running: int
    total: int
    left: float  # seconds until all are done, from the mean of those that ended; nan before the first
    now: str  # what has ended last


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
    found: dict[str, Job] = {}
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
            found.setdefault(" ".join(parts), Job(task, {**used, "seed": seed}, folder / _folder("_".join(parts))))
    return found


def _folder(name: str) -> str:
    """A name that every file system takes, different for different names."""
    plain = re.sub(r"[^\w.=+-]", "_", name, flags=re.ASCII)
    if plain == name and len(name) <= 100:
        return name
    return f"{plain[:90]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def has_ended(folder: Path) -> bool:
    """Whether a run's folder holds a result or a failure."""
    return any((folder / name).exists() for name in (run_folder.RESULT, run_folder.FAILURE))


def plan_of(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], str]:
    """The options of the runs that sweeps in these folders want, each with ``run``, and the command of the last."""
    planned: list[dict[str, Any]] = []
    command = ""
    for folder in folders:
        if (folder / PLAN).exists():
            plan = run_folder.read_json(folder / PLAN)
            command = str(plan["command"])
            planned += [{**entry, "run": str(folder / entry["run"])} for entry in plan["runs"]]
    return planned, command


def perform(
    jobs: Mapping[str, Job],
    folder: Path,
    workers: int,
    scheduler: str | None,
    command: str,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    train: Train = train,
) -> dict[str, str]:
    """Train the runs of a sweep that have not ended, and return how each ended: "finished" or "failed".

    Raises:
        StudyStopped, ClusterError: where it cannot go on; runs that have ended are kept.
    """
    wanted = {name: config.record(config.resolve(job.task, job.options)) for name, job in jobs.items()}
    ended: dict[str, str] = {}
    seconds: list[float] = []

    def look(name: str) -> bool:
        result, reason = engine.outcome_of(jobs[name].folder, wanted[name])
        if result is not None or reason is not None:
            ended[name] = "finished" if reason is None else "failed"
        return name in ended

    def plan() -> None:
        atomic_files.prepare(folder)
        entries = [{**record, "run": jobs[name].folder.name} for name, record in wanted.items()]
        atomic_files.write(folder / PLAN, json.dumps({"command": command, "runs": entries}, indent=1) + "\n")

    missing = {name: job for name, job in jobs.items() if not look(name)}
    if not missing:
        plan()
        return ended
    with Cluster(min(workers, len(missing)), train, scheduler) as cluster:

        def tell(now: str) -> None:
            left = len(jobs) - len(ended)
            mean = sum(seconds) / len(seconds) if seconds else math.nan
            failed = list(ended.values()).count("failed")
            running = min(cluster.workers, left)
            on_progress(Progress(len(ended), failed, running, len(jobs), mean * left / cluster.workers, now))

        def on_end(name: str, outcome: Outcome) -> dict[str, Job]:
            if problem := outcome.problem or outcome.lost:
                raise StudyStopped(f"{name}: {problem}")
            if not look(name):
                raise StudyStopped(f"{name}: the run ended without a result in {outcome.job.folder}")
            seconds.append(outcome.seconds)
            tell(f"{name} {ended[name]}")
            return {}

        plan()  # now that there is a cluster: a command that is refused leaves nothing
        tell("")
        engine.run_all(cluster, missing, lambda name: None, on_end)
    return ended


def run_all(
    cluster: Cluster, jobs: Mapping[Name, Job], found: dict[Name, dict[str, Any]], on_progress: Callable[[Name], None]
) -> None:
    """Bring into `found` the results that it lacks; `on_progress` is called as each run starts and ends.

    Raises StudyStopped where a run has failed or a folder holds another one; what is finished stays.
    """
    for name, job in jobs.items():
        if name not in found and (there := result_of(name, job)) is not None:
            found[name] = there

    def ended(name: Name, outcome: Outcome) -> dict[Name, Job]:
        if problem := outcome.problem or outcome.lost:
            raise StudyStopped(f"{name}: {problem}")
        result = result_of(name, outcome.job)
        if result is None:
            raise StudyStopped(f"{name}: the run ended without a result in {outcome.job.folder}")
        found[name] = result
        on_progress(name)
        return {}

    engine.run_all(cluster, {name: job for name, job in jobs.items() if name not in found}, on_progress, ended)


OnProgress = Callable[[int, int, str], None]


def run_phases(
    cluster: Cluster,
    phases: Iterable[dict[Name, Job]],
    found: dict[Name, dict[str, Any]],
    total: int,
    on_progress: OnProgress | None = None,
) -> dict[Name, Job]:
    """Run the jobs of one phase after another, each known once the one before it has its results in `found`.

    `on_progress` is told how many runs of how many are done, and what was started last. Returns all jobs.

    Raises:
        StudyStopped: as `run_all` does.
    """
    jobs: dict[Name, Job] = {}

    def tell(name: Name) -> None:
        if on_progress is not None:
            on_progress(len(found), total, str(name))

    for phase in phases:
        jobs |= phase
        run_all(cluster, phase, found, tell)
    return jobs


def result_of(name: object, job: Job) -> dict[str, Any] | None:
    """The result of a run; None where it has not finished. Raises StudyStopped."""
    result, reason = engine.outcome_of(job.folder, config.record(config.resolve(job.task, job.options)))
    if reason is not None:
        raise StudyStopped(f"{name}: {reason}")
    return result
