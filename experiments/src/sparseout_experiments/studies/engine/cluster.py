"""A Dask cluster that trains runs: of this machine's own workers, or of any number of machines behind a scheduler.

The folder of a run is the truth: it has ended when it holds a result or a failure. A job whose worker dies is run again
and goes on from its checkpoint; a job that is run twice waits for the folder's lock and finds the result.
"""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, Self

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, as_completed, get_worker

# Dask's defaults are for tasks of milliseconds; these are for trainings of minutes.
_SETTINGS = {
    # Dask has its workers hand freed memory back at once, and a training then spends up to half of its time on page
    # faults.
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    # Dask looks at its processes up to 100 times a second, which takes a twentieth of a core from the trainings.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.worker.memory.monitor-interval": "2s",
    # How often the worker of one run may die; a run goes on from its checkpoint.
    "distributed.scheduler.allowed-failures": 15,
}
Train = Callable[[str, dict[str, Any], Path], None]
AHEAD = 2  # jobs for each worker that are given ahead, so that a worker that joins finds one


class ClusterError(Exception):
    """Why a cluster cannot be used, in one sentence; runs that have ended are kept."""


class Job(NamedTuple):
    """A run to train: its task, its options, and its folder, which every worker sees under the same path."""

    task: str
    options: dict[str, Any]
    folder: Path


class Outcome(NamedTuple):
    """How a job has ended."""

    job: Job
    problem: str | None  # an error that is not the failure of one run: the rest would meet it too
    lost: str | None  # that its workers died, where they did again and again


class Cluster:
    """A cluster as a with-block. Leaving it takes back the jobs that have not ended; they resume from checkpoints.

    Args:
        workers: how many processes of this machine, one thread each; not used if there is a `scheduler`.
        train: trains one run in its folder; a function that workers can import.
        scheduler: the address of a scheduler, such as ``tcp://host:8786``; None: workers of this machine.

    Raises:
        ClusterError: if there is no scheduler at the address, or it goes away.
    """

    def __init__(self, workers: int, train: Train, scheduler: str | None = None) -> None:
        self._workers, self._train, self._address = workers, train, scheduler
        self._jobs: dict[Future[Any], Job] = {}

    def __enter__(self) -> Self:
        for name in ("distributed", *logging.root.manager.loggerDict):
            if name.startswith("distributed"):  # a worker that dies is no news; a scheduler is told below
                logging.getLogger(name).setLevel(logging.CRITICAL)
        self._local = None
        try:
            if self._address is None:
                with _interrupts_blocked(), dask.config.set(_SETTINGS):
                    self._local = LocalCluster(
                        n_workers=self._workers,
                        threads_per_worker=1,
                        resources={"GPU": 1},  # where there is none, a run that asks for one says so
                        dashboard_address="127.0.0.1:0",  # a free port: by default one that may be taken
                        silence_logs=logging.CRITICAL,
                    )
            self._client = Client(self._local or self._address, timeout=10)
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(
                f"expected `--scheduler` to be the address of a Dask scheduler, but got {self._address!r} ({error})"
            ) from error
        self._ended = as_completed(raise_errors=False)
        return self

    def __exit__(self, *error: object) -> None:
        if self._jobs and self._client.status == "running":
            self._client.cancel(list(self._jobs), force=True)
        # Each may time out on a busy machine; what is left ends with this process.
        with suppress(TimeoutError):
            self._client.close(timeout=5)
        with suppress(TimeoutError):
            if self._local is not None:
                self._local.close(timeout=5)

    @property
    def workers(self) -> int:
        """How many jobs can run at a time now; a scheduler may have no workers yet."""
        if self._address is None:
            return self._workers
        return len(self._client.scheduler_info(n_workers=-1).get("workers", ()))

    @property
    def free(self) -> bool:
        """Whether more jobs are to be given."""
        return len(self._jobs) < (self._workers if self._address is None else AHEAD * max(1, self.workers))

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    @property
    def running(self) -> int:
        return min(len(self._jobs), self.workers)

    def start(self, job: Job) -> None:
        """Give a job to the cluster. One for a GPU goes to a worker that has the resource ``GPU``.

        Raises ClusterError where there are workers and none has it: the job would wait for ever.
        """
        resources = {"GPU": 1} if job.options.get("device") == "cuda" else None
        workers = self._client.scheduler_info(n_workers=-1).get("workers", {}).values() if resources else ()
        if workers and not any(worker["resources"].get("GPU") for worker in workers):
            raise ClusterError(
                "expected a worker of the scheduler to have the resource GPU, as `--device` is cuda, but got "
                f'{len(workers)} without: start one for each device with --resources "GPU=1"'
            )
        future = self._client.submit(_perform, self._train, job, pure=False, resources=resources)
        self._jobs[future] = job
        self._ended.add(future)

    def wait(self) -> Outcome:
        future = next(self._ended)
        job = self._jobs.pop(future)
        if future.status in ("cancelled", "lost"):
            raise ClusterError("the scheduler is gone: runs that have ended are kept, and the same command goes on")
        error = future.exception() if future.status == "error" else None
        if isinstance(error, KilledWorker):
            return Outcome(job, None, "its worker died again and again")
        return Outcome(job, None if error is None else str(error) or type(error).__name__, None)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Threads and processes started meanwhile, and those that they start, are not interrupted by Ctrl-C.

    It reaches every process of a terminal, and the first one decides.
    """
    resource_tracker.ensure_running()  # which would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_cancelled() -> bool:
    """Whether the job that asks, if it is one, has been taken back."""
    try:
        worker = get_worker()
    except ValueError:
        return False
    task = worker.state.tasks.get(worker.get_current_task())
    return task is None or task.state in ("cancelled", "released", "forgotten")


def _perform(train: Train, job: Job) -> None:
    """What a worker does with a job."""
    import torch

    torch.set_num_threads(1)
    train(*job)
