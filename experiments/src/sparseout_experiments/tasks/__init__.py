"""The tasks of the paper. Each is a model, its data, its loss and what is measured on it."""

from importlib import import_module

from sparseout_experiments.config import task_of
from sparseout_experiments.options import Config
from sparseout_experiments.tasks.base import DistributedContext, Evaluation, Task, means
from sparseout_experiments.training.rng import Rng


def build(config: Config, rng: Rng, context: DistributedContext) -> Task:
    """The task that a configuration describes, its weights drawn from `rng.init`. Raises DataError, ValueError."""
    return _class_of(task_of(config))(config, rng, context)


def shown_as(name: str) -> tuple[str, float, str]:
    """The metric of a task, and the factor and unit in which people read it."""
    task = _class_of(name)
    return task.metric, task.shown, task.unit


def _class_of(name: str) -> type[Task]:
    # one task does not import what another needs
    return getattr(import_module(f"{__name__}.{name}"), _CLASSES[name])


_CLASSES = {"autoencoder": "Reconstruct", "image": "Classify", "language": "Predict"}


__all__ = ["DistributedContext", "Evaluation", "Task", "build", "means", "shown_as"]
