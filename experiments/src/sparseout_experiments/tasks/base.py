"""What the training loop asks of a task."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """The metrics of an evaluation, and of each module that was measured every measure of its activations."""

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

    def rate(self, progress: float, batch: Any) -> float:
        """The factor on the learning rate for a batch, once this fraction of training is done."""
        return 1.0

    def after_step(self) -> None:
        """Called after every step of the optimizer."""

    def after_epoch(self, valid: Mapping[str, float]) -> None:
        """Called with the metrics of the validation data."""

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


class Objective(nn.Module):
    """A model with its loss, and the penalty on the activations that the model had meanwhile."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], penalty: ActivityPenalty | None
    ) -> None:
        super().__init__()
        self.model, self.penalty, self._loss = model, penalty, loss

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch, computed in fp32."""
        return penalised(self._loss(self.model(x).float(), target), self.penalty)


def penalised(loss: Tensor, penalty: ActivityPenalty | None) -> Tensor:
    """The loss and, if there is one, the penalty on the activations that the model had meanwhile."""
    return loss if penalty is None else loss + penalty.loss()


@contextmanager
def measuring(modules: Mapping[str, nn.Module], unit_dims: Mapping[int, int]) -> Iterator[dict[str, dict[str, float]]]:
    """Every measure of what the modules put out while the block runs: a dict that is filled at its end.

    `unit_dims` says along which dimension units lie, by the number of dimensions of an output.
    """
    sparsity: dict[str, dict[str, float]] = {}
    accumulators: dict[str, Streaming] = {}
    hooks = Hooks()

    def update(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        activations = output[0] if isinstance(output, tuple) else output
        if name not in accumulators:
            accumulators[name] = Streaming(MEASURES, unit_dim=unit_dims.get(activations.dim(), -1))
        accumulators[name].update(activations)

    for name, module in modules.items():
        hooks.after(module, update, name)
    try:
        yield sparsity
        for name, accumulator in accumulators.items():
            sparsity[name] = {measure: value.item() for measure, value in accumulator.compute().items()}
    finally:
        hooks.remove()


def means(sparsity: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Over the modules: Hoyer, Hoyer over live units, the fraction of dead units and that of undefined rows."""

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(sparsity)

    measures = sparsity.values()
    return {
        "hoyer": mean(module["hoyer"] for module in measures),
        "hoyer_live": mean(module["hoyer_live"] for module in measures),
        "dead": mean(module["dead_units"] / module["units"] for module in measures),
        "undefined": mean(module["undefined_rows"] / module["rows"] for module in measures),
    }


def fingerprint(parts: Mapping[str, Tensor]) -> str:
    """Tells data from others, by the sizes of their parts and where each begins."""
    digest = hashlib.blake2b(digest_size=8)
    for name, part in parts.items():
        digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
        digest.update(part[:1000].cpu().numpy().tobytes())
    return digest.hexdigest()


def shuffled(count: int, batch: int, context: DistributedContext, shuffle: torch.Generator) -> list[Tensor]:
    """One epoch in random order: for each step the numbers of all processes' examples; a last part step is left out."""
    together = batch * context.processes
    if together > count:
        most = f"at most {count // context.processes}, as there are {count} training examples"
        raise ValueError(expected("batch", most, batch))
    return list(torch.randperm(count, generator=shuffle).split(together)[: count // together])


def local_shard(batch: Tensor, context: DistributedContext) -> Tensor:
    """The part of a batch of all processes that this one works on."""
    return batch.chunk(context.processes)[context.process]
