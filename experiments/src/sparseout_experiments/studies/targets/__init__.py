"""Does a controller meet its targets? First the range that fixed q's reach, then runs to targets within it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseout_experiments.message import expected
from sparseout_experiments.studies.control import collect
from sparseout_experiments.studies.engine import pages, sweep
from sparseout_experiments.studies.engine import results as files
from sparseout_experiments.studies.engine.cluster import Cluster, Job, Train
from sparseout_experiments.studies.engine.jobs import StudyStopped, train
from sparseout_experiments.studies.targets.page import START, TITLE, write
from sparseout_experiments.training import run_folder

__all__ = ["KIND", "TASKS", "StudyStopped", "Task", "load_all", "render", "reproduce"]

KIND = "sparseout targets"
POINTS = 100  # of a run's course that are kept, evenly spaced


@dataclass(frozen=True)
class Task:
    """A network to train, the q's and targets of its runs, and their seeds."""

    task: str
    options: Mapping[str, Any]
    qs: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
    parts: tuple[float, ...] = (0.25, 0.5, 0.75)  # of the range
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


TASKS = {
    "autoencoder": Task(
        "autoencoder", {"data": "digits", "units": 256, "p": 0.4, "batch": 32, "epochs": 60, "device": "cpu"}
    ),
    "language": Task(
        "language",
        {
            "data": "topics", "words": 1000, "train_size": 20_000, "valid_size": 4_000, "test_size": 4_000,
            "units": 64, "embedding": 64, "p": 0.4, "batch": 20, "bptt": 20, "lr": 5e-3, "epochs": 30, "device": "cpu",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """One training: at a fixed q, which is the bounds' only value, or to a target in a part of the range."""

    name: str
    seed: int
    q: float | None = None
    part: float | None = None
    target: float = 0.5

    def __str__(self) -> str:
        return f"{self.name}: {self.key}"

    @property
    def key(self) -> str:
        """Its name among the runs of its task."""
        return f"q={self.q:g} seed={self.seed}" if self.part is None else f"target={self.target:g} seed={self.seed}"

    def job(self, task: Task, work: Path) -> Job:
        """As options of `sparseout run`, and a folder."""
        fixed = {} if self.q is None else {"q_min": self.q, "q_max": self.q}
        start = START if self.q is None else self.q
        options = {**task.options, "seed": self.seed, "target_sparsity": self.target, "q": start, **fixed}
        return Job(task.task, options, work / self.name / self.key.replace(" ", "_"))


OnProgress = Callable[[int, int, str], None]


def reproduce(
    results: Path,
    work: Path,
    page: Path,
    workers: int = 2,
    names: Sequence[str] = tuple(TASKS),
    on_progress: OnProgress | None = None,
    *,
    tasks: Mapping[str, Task] = TASKS,
    scheduler: str | None = None,
    train: Train = train,
) -> None:
    """Run what is missing, write a file of results for each task, and make the page.

    Args:
        results: folder of the files of results.
        work: folder of the runs.
        page: the Markdown file to write; figures go to `images` beside it.
        workers: processes at a time, one thread each.
        names: which tasks.
        on_progress: is told how many runs of how many are done, and what was started last.
        tasks: what each is.
        scheduler: the address of a Dask scheduler, instead of workers of this machine.
        train: trains one run.

    Raises:
        StudyStopped: where it cannot go on, in one sentence; what is finished is kept.
    """
    total = sum(len(tasks[name].seeds) * (len(tasks[name].qs) + len(tasks[name].parts)) for name in names)
    others = (len(record["rows"]) for name, record in load_all(results).items() if name not in names)
    pages.check(page, TITLE, total + sum(others))
    found: dict[_Run, dict[str, Any]] = {}

    def report(run: _Run) -> None:
        if on_progress is not None:
            on_progress(len(found), total, str(run))

    def jobs(plan: Sequence[_Run]) -> dict[_Run, Job]:
        return {run: run.job(tasks[run.name], work) for run in plan}

    with Cluster(workers, train, scheduler) as cluster:
        plan = [_Run(name, seed, q=q) for name in names for seed in tasks[name].seeds for q in tasks[name].qs]
        sweep.run_all(cluster, jobs(plan), found, report)
        ranges = {name: _range(name, found, tasks[name]) for name in names}
        for name, (low, high) in ranges.items():
            aims = [(part, round(low + part * (high - low), 3)) for part in tasks[name].parts]
            plan += [_Run(name, seed, part=part, target=aim) for part, aim in aims for seed in tasks[name].seeds]
        sweep.run_all(cluster, jobs(plan), found, report)
    for name in names:
        mine = {
            run: found[run] | {"course": _course(job.folder)} for run, job in jobs(plan).items() if run.name == name
        }
        files.save(_path(results, name), _head(name, mine, ranges[name]) | {"rows": list(_rows(mine))})
    render(results, page)


def render(results: Path, page: Path) -> None:
    """Make the page and its figures from the files of results.

    Raises ValueError where there are none, for a file that holds something else, and for a page that shows more.
    """
    records = load_all(results)
    if not records:
        raise ValueError(
            expected("--results", "a folder with results of `sparseout reproduce targets`", repr(str(results)))
        )
    write(records, page)


def load_all(results: Path) -> dict[str, dict[str, Any]]:
    """The results of every task that a folder has. Raises ValueError for a file that is none."""
    return {name: files.load(path, KIND) for name in TASKS if (path := _path(results, name)).exists()}


def _path(results: Path, name: str) -> Path:
    return results / f"targets-{name}.json"


def _range(name: str, found: Mapping[_Run, Mapping[str, Any]], task: Task) -> tuple[float, float]:
    """Hoyer at the q's that give least and most of it, means over seeds."""
    means = [
        sum(found[_Run(name, seed, q=q)]["control"]["hoyer"] for seed in task.seeds) / len(task.seeds) for q in task.qs
    ]
    return min(means), max(means)


def _head(name: str, found: Mapping[_Run, Mapping[str, Any]], reached: tuple[float, float]) -> dict[str, Any]:
    return {
        "kind": KIND,
        "task": name,
        "config": collect.shared([result["config"] for result in found.values()]),
        "environments": collect.distinct([result["environment"] for result in found.values()]),
        "range": reached,
    }


def _rows(found: Mapping[_Run, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for run, result in found.items():
        yield {
            "q": run.q,
            "part": run.part,
            "target": None if run.part is None else run.target,
            "seed": run.seed,
            "control": result["control"],
            "steps": result["steps"],
            "seconds": result["seconds"],
            "told": [warning for warning in result["warnings"] if "out of reach" in warning],
            "course": None if run.part is None else result["course"],
        }


def _course(folder: Path) -> list[list[float | None]]:
    """Step, q and Hoyer of every so many intervals, the last one among them."""
    course = [entry for line in run_folder.metrics(folder) for entry in line["control"]]
    some = course[::-1][:: max(1, len(course) // POINTS)][::-1]
    return [
        [entry["step"], *(None if entry[name] is None else round(entry[name], 4) for name in ("q", "hoyer"))]
        for entry in some
    ]
