"""Jobs of a study: what their folders hold is read, and the rest is trained by a cluster."""

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sparseout_experiments.studies.engine.cluster import Cluster, Job, Outcome, is_cancelled
from sparseout_experiments.training import run_folder

Name = TypeVar("Name", bound=Hashable)


class StudyStopped(Exception):
    """The reason why a study cannot go on, in one sentence; whatever is finished stays."""


def train(task: str, options: dict[str, Any], folder: Path) -> None:
    """Train one run; a failed one leaves `failure.json` in its folder, and one that is taken back its checkpoint."""
    from sparseout_experiments.config import resolve
    from sparseout_experiments.training.loop import perform

    def stop(progress: object) -> None:
        if is_cancelled():
            raise _Cancelled

    with suppress(run_folder.RunFailed, _Cancelled):
        perform(resolve(task, options), folder, stop, wait=True)


class _Cancelled(Exception):
    """The run is no longer wanted."""


def outcome_of(folder: Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The result of a run, or the reason of its failure, or neither, from its folder.

    Raises StudyStopped where the folder holds a run with other options than `wanted`, but for where the data lie, or
    something else.
    """
    for name in (run_folder.RESULT, run_folder.FAILURE):
        path = folder / name
        if not path.exists():
            continue
        try:
            record = run_folder.read_json(path)
            config = dict(record["config"])
            reason = str(record["reason"]) if name == run_folder.FAILURE else None
        except (run_folder.RunError, LookupError, TypeError, ValueError):
            raise StudyStopped(f"{path} cannot be read: remove {folder} to repeat the run") from None
        for option, value in wanted.items():
            if option != "data" and config.get(option) != value:
                raise StudyStopped(
                    f"{folder} holds a run with {option} = {config.get(option)} where the study wants {value}: give "
                    "the study another work folder, or remove this one"
                )
        return (None, reason) if reason is not None else (record, None)
    return None, None


def run_all(
    cluster: Cluster,
    jobs: Mapping[Name, Job],
    started: Callable[[Name], None],
    ended: Callable[[Name, Outcome], Mapping[Name, Job]],
) -> None:
    """Run jobs in their order. `ended` gives the jobs that are known now; those that are new follow."""
    queue = deque(jobs.items())
    known = set(jobs)
    names = {job.folder: name for name, job in jobs.items()}
    while queue or cluster.busy:
        while queue and cluster.free:
            name, job = queue.popleft()
            cluster.start(job)
            started(name)
        outcome = cluster.wait()
        new = {name: job for name, job in ended(names[outcome.job.folder], outcome).items() if name not in known}
        queue.extend(new.items())
        known |= new.keys()
        names |= {job.folder: name for name, job in new.items()}
