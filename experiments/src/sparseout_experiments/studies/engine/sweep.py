"""Named runs that must all finish: the first that fails stops the study."""

from collections.abc import Callable, Mapping
from typing import Any

from sparseout_experiments import config
from sparseout_experiments.studies.engine import jobs as engine
from sparseout_experiments.studies.engine.jobs import Name, StudyStopped
from sparseout_experiments.studies.engine.pool import Job, Outcome, Pool


def run_all(
    pool: Pool, jobs: Mapping[Name, Job], found: dict[Name, dict[str, Any]], on_progress: Callable[[Name], None]
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

    engine.run_all(pool, {name: job for name, job in jobs.items() if name not in found}, on_progress, ended)


def result_of(name: object, job: Job) -> dict[str, Any] | None:
    """The result of a run; None where it has not finished. Raises StudyStopped."""
    result, reason = engine.outcome_of(job.folder, config.record(config.resolve(job.task, job.options)))
    if reason is not None:
        raise StudyStopped(f"{name}: {reason}")
    return result
