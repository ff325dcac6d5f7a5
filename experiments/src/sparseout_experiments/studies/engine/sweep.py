"""Named runs: what their folders hold is read, the rest is trained; and the file of what came of them."""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sparseout_experiments import config
from sparseout_experiments.studies.control.runner import StudyStopped
from sparseout_experiments.studies.engine.pool import Job, Pool
from sparseout_experiments.training import files, runs

Name = TypeVar("Name", bound=Hashable)


def run_all(
    pool: Pool, jobs: Mapping[Name, Job], found: dict[Name, dict[str, Any]], tell: Callable[[Name], None]
) -> None:
    """Bring into `found` the results that it lacks; `tell` hears of each run that begins and of each that ends.

    Raises StudyStopped where a run has failed or a folder holds another one; what is finished stays.
    """
    for name, job in jobs.items():
        if name not in found and (there := result_of(name, job)) is not None:
            found[name] = there
    queue = [(name, job) for name, job in jobs.items() if name not in found]
    names = {job.folder: name for name, job in queue}
    while queue or pool.busy:
        while queue and pool.free:
            name, job = queue.pop(0)
            pool.start(job)
            tell(name)
        outcome = pool.wait()
        name = names[outcome.job.folder]
        if problem := outcome.problem or outcome.lost:
            raise StudyStopped(f"{name}: {problem}")
        result = result_of(name, outcome.job)
        if result is None:
            raise StudyStopped(f"{name}: the run ended without a result in {outcome.job.folder}")
        found[name] = result
        tell(name)


def result_of(name: object, job: Job) -> dict[str, Any] | None:
    """What a run found; None where it has not finished. Raises StudyStopped."""
    try:
        if (job.folder / runs.FAILURE).exists():
            raise StudyStopped(f"{name}: {runs.read_json(job.folder / runs.FAILURE)['reason']}")
        if not (job.folder / runs.RESULT).exists():
            return None
        result = runs.read_json(job.folder / runs.RESULT)
    except runs.RunError as error:
        raise StudyStopped(str(error)) from None
    wanted = config.record(config.resolve(job.task, job.options))
    for option, value in wanted.items():
        if option != "data" and result["config"].get(option) != value:
            raise StudyStopped(
                f"{job.folder} holds a run with {option} = {result['config'].get(option)} where {value} is wanted: "
                "give another work folder, or remove this one"
            )
    return result


def save(path: Path, head: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write results: a line a run, so that a diff shows which one changed."""
    lines = ",\n".join(f"  {json.dumps(runs.plain(row))}" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(runs.plain(head), indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')


def load(path: Path, kind: str) -> dict[str, Any]:
    """Read results. Raises ValueError for a file that holds none of this kind."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["kind"] != kind:
            raise KeyError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold results of the {kind}") from error
    return found
