"""Runs that have names: those that their folders hold are read, the others are trained."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from sparseout.experiments import config, runs
from sparseout.experiments.study.pool import Job, Pool
from sparseout.experiments.study.runner import StudyStopped

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
