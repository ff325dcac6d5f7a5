"""What the training loop asks of a task."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparseout._utils.hooks import Hooks
from sparseout.baselines import ActivityPenalty
from sparseout.measures import MEASURES, Streaming
from sparseout_experiments.message import expected
from sparseout_experiments.training.rng import Rng


class DistributedContext(NamedTuple):
    """Where a process trains, and which of how many it is."""

    device: torch.device
    process: int = 0
    processes: int = 1


class Evaluation(NamedTuple):
    """What an evaluation found: metrics, and of each place in the network every measure of its activations."""

    metrics: dict[str, float]
    sparsity: dict[str, dict[str, float]]


class Task(ABC):
    """A model with its data. All of it is on the device of its process."""

    metric: ClassVar[str]  # what is lower when the model is better
    shown: ClassVar[float] = 1.0  # by which the metric is multiplied where people read it
    unit: ClassVar[str] = ""

    data: str  # tells these data from others
    notes: tuple[str, ...] = ()  # what a user should know of the data before training
    model: nn.Module
    objective: nn.Module  # what a step runs forward: inputs to loss. This is what is compiled and distributed.

    @abstractmethod
    def __init__(self, config: Any, rng: Rng, context: DistributedContext) -> None:
        """Read the data and draw the weights. Raises DataError, ValueError."""

    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimizer for the model."""

    @abstractmethod
    def plan(self) -> Sequence[Any]:
        """The batches of one epoch, drawn from the generator `shuffle`."""

    @abstractmethod
    def loss(self, objective: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch of the plan, 0-d; `objective` is the task's own, made ready."""

    @abstractmethod
    def evaluate(self, part: str) -> Evaluation:
        """Measure the model in evaluation mode on "valid" or "test"."""

    @property
    def penalty(self) -> ActivityPenalty | None:
        """The penalty on activations, where the method is one."""
        return cast(ActivityPenalty | None, self.objective.penalty)

    def rate(self, progress: float) -> float:
        """The factor on the learning rate once this fraction of training is done."""
        return 1.0

    def batch_rate(self, batch: Any) -> float:
        """The factor on the learning rate that one batch asks for."""
        return 1.0

    def after_step(self) -> None:
        """Called after every step of the optimizer."""

    def after_epoch(self, valid: Mapping[str, float]) -> None:
        """Called with what was found on the validation data."""

    def evaluated(self) -> nn.Module:
        """The model that `evaluate` measures, whose weights are kept as the best."""
        return self.model

    def use(self, weights: dict[str, Tensor]) -> None:
        """Measure these weights from now on."""
        self.model.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beyond model, optimizer and generators; the same on every process."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""

    def rank_state(self) -> dict[str, Any]:
        """What differs between processes."""
        return {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of this process."""


@contextmanager
def measuring(places: Mapping[str, nn.Module], unit_dims: Mapping[int, int]) -> Iterator[dict[str, Streaming]]:
    """Every measure of what the modules put out, taken while the block runs.

    `unit_dims` says along which dimension units lie, by the number of dimensions of an output.
    """
    streams: dict[str, Streaming] = {}
    hooks = Hooks()

    def update(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        activations = output[0] if isinstance(output, tuple) else output
        if name not in streams:
            streams[name] = Streaming(MEASURES, unit_dim=unit_dims.get(activations.dim(), -1))
        streams[name].update(activations)

    for name, module in places.items():
        hooks.after(module, update, name)
    try:
        yield streams
    finally:
        hooks.remove()


def penalised(loss: Tensor, penalty: ActivityPenalty | None) -> Tensor:
    """The loss and, if there is one, the penalty on the activations that the model had meanwhile."""
    return loss if penalty is None else loss + penalty.loss()


def measured(streams: Mapping[str, Streaming]) -> dict[str, dict[str, float]]:
    """The values of every place, as numbers."""
    return {
        place: {name: value.item() for name, value in stream.compute().items()} for place, stream in streams.items()
    }


def means(sparsity: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Over the places: Hoyer, Hoyer over live units, the fraction of dead units and that of undefined rows."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    places = list(sparsity.values())
    return {
        "hoyer": mean([place["hoyer"] for place in places]),
        "hoyer_live": mean([place["hoyer_live"] for place in places]),
        "dead": mean([place["dead_units"] / place["units"] for place in places]),
        "undefined": mean([place["undefined_rows"] / place["rows"] for place in places]),
    }


def fingerprint(parts: Mapping[str, Tensor]) -> str:
    """Tells data from others, by the sizes of their parts and where each begins."""
    digest = hashlib.blake2b(digest_size=8)
    for name, part in parts.items():
        digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
        digest.update(part[:1000].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shuffled(count: int, batch: int, context: DistributedContext, shuffle: torch.Generator) -> list[Tensor]:
    """One epoch in random order: for each step the numbers of all processes' examples; a last part step is left out."""
    together = batch * context.processes
    if together > count:
        wanted = f"at most {count // context.processes}, as there are {count} training examples"
        raise ValueError(expected("batch", wanted, batch))
    return list(torch.randperm(count, generator=shuffle).split(together)[: count // together])


def local_shard(of_all: Tensor, context: DistributedContext) -> Tensor:
    """The part of a batch that this process works on."""
    return of_all.chunk(context.processes)[context.process]
