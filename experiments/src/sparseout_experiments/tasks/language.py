"""Prediction of the next word by LSTM layers or a transformer, with the noise between layers or in the blocks."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparseout.baselines import ActivityPenalty
from sparseout_experiments import options
from sparseout_experiments.data import text
from sparseout_experiments.data.hub import DataError
from sparseout_experiments.methods import METHODS
from sparseout_experiments.models import LanguageModel, Transformer
from sparseout_experiments.models.language import State
from sparseout_experiments.tasks import base
from sparseout_experiments.tasks.base import DistributedContext, Evaluation, Task
from sparseout_experiments.training.noise import attached, noise
from sparseout_experiments.training.rng import Rng
from sparseout_experiments.training.schedules import cosine

EVALUATED = 10  # columns of text side by side
MEASURED = 20_000  # words whose hidden states are measured, the first of a part


class Predict(Task):
    """Perplexity. AWD-LSTM learns by NT-ASGD, the other models by Adam, its rate falling on a cosine.

    The state of an LSTM is carried from window to window. A transformer reads every window for itself, in evaluation
    too, so that its perplexity depends on `bptt`.
    """

    metric = "perplexity"
    model: LanguageModel | Transformer

    def __init__(self, config: options.Language, rng: Rng, context: DistributedContext) -> None:
        self._config, self._rng = config, rng
        corpus = text.load(config.data, **config.model_dump(include={*text.SIZES, "words"}))
        if short := [name for name in ("train", "valid", "test") if len(getattr(corpus, name)) < 2]:
            raise DataError(f"The {short[0]} part of {config.data!r} has one word and nothing to predict: take more")
        batches = {name: min(EVALUATED, len(getattr(corpus, name)) // 2) for name in ("valid", "test")}
        batches = {"train": config.batch * context.processes, **batches}
        columns = {name: text.columns(getattr(corpus, name), batch) for name, batch in batches.items()}
        self.data = base.fingerprint(columns)
        columns["train"] = base.local_shard(columns["train"].t(), context).t()
        self.parts: dict[str, Tensor] = {name: part.contiguous().to(context.device) for name, part in columns.items()}
        self.model = _model(config, len(corpus.vocabulary), rng.init).to(context.device)
        penalty = attached(config, self.model, self.model.activations().values(), self.model.following())
        self.objective = _Loss(self.model, config, penalty)
        self._varied = config.model == "awd"
        self._bptt = config.bptt
        self._carried: State | None = None
        self._history: list[float] = []
        self._average: AveragedModel | None = None

    def optimizer(self) -> torch.optim.Optimizer:
        kind: Any = torch.optim.SGD if self._varied else torch.optim.AdamW
        return kind(self.model.parameters(), lr=self._config.lr, weight_decay=self._config.weight_decay)

    def rate(self, progress: float, batch: tuple[int, int]) -> float:
        return batch[1] / self._bptt if self._varied else cosine(progress)

    def plan(self) -> list[tuple[int, int]]:
        return text.windows(len(self.parts["train"]), self._bptt, self._rng.shuffle if self._varied else None)

    def loss(self, objective: nn.Module, batch: tuple[int, int]) -> Tensor:
        start, size = batch
        stretch = self.parts["train"][start : start + size + 1]
        carried = None if start == 0 else self._carried
        loss, after = objective(stretch[:-1], stretch[1:], carried)
        self._carried = [(h.detach(), c.detach()) for h, c in after]
        return loss

    def after_step(self) -> None:
        if self._average is not None:
            self._average.update_parameters(self.model)

    def after_epoch(self, valid: Mapping[str, float]) -> None:
        self._history.append(valid["loss"])
        if self._varied and self._average is None and triggered(self._history):
            self._average = averaged(self.model)

    def evaluated(self) -> nn.Module:
        return self.model if self._average is None or not self._average.n_averaged else self._average.module

    @torch.no_grad()
    def evaluate(self, part: str) -> Evaluation:
        model = cast(LanguageModel | Transformer, self.evaluated())
        model.eval()
        words = self.parts[part]
        sparsity: dict[str, dict[str, float]] = {}
        carried: State | None = None
        total, count = 0.0, 0
        windows = text.windows(len(words), self._bptt, None)
        first = sum(start * words.shape[1] < MEASURED for start, _ in windows)
        for chunk, modules in ((windows[:first], model.activations()), (windows[first:], {})):
            with base.measuring(modules, {}) as measures:
                for start, size in chunk:
                    logits, carried = model(words[start : start + size], carried)
                    target = words[start + 1 : start + 1 + size]
                    total += F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum").item()
                    count += target.numel()
            sparsity |= measures
        model.train()
        loss = total / count
        return Evaluation({"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, sparsity)

    def use(self, weights: dict[str, Tensor]) -> None:
        self._average = None
        self.model.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        average = None if self._average is None else self._average.state_dict()
        return {"history": self._history, "average": average}

    def load(self, state: dict[str, Any]) -> None:
        self._history = list(state["history"])
        if state["average"] is not None:
            self._average = averaged(self.model)
            self._average.load_state_dict(state["average"])

    def rank_state(self) -> dict[str, Any]:
        return {"carried": self._carried}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        if state["carried"] is not None:
            device = self.parts["train"].device
            self._carried = [(h.to(device), c.to(device)) for h, c in state["carried"]]


class _Loss(nn.Module):
    """Words and the words after them to cross-entropy, the penalties of AWD-LSTM and that asked for; and the state."""

    def __init__(
        self, model: LanguageModel | Transformer, config: options.Language, penalty: ActivityPenalty | None
    ) -> None:
        super().__init__()
        self.model, self.penalty = model, penalty
        self._of_squares, self._of_changes = config.activation_penalty, config.temporal_penalty

    def forward(self, words: Tensor, target: Tensor, carried: State | None) -> tuple[Tensor, State]:
        dropped, raw, after = self.model.features(words, carried)
        loss = F.cross_entropy(self.model.decoder(dropped).flatten(0, 1).float(), target.flatten())
        if self._of_squares:
            loss = loss + self._of_squares * dropped.float().square().mean()
        if self._of_changes and len(raw) > 1:
            loss = loss + self._of_changes * raw.float().diff(dim=0).square().mean()
        return base.penalised(loss, self.penalty), after


def _model(config: options.Language, words: int, generator: torch.Generator) -> LanguageModel | Transformer:
    sizes, shared = (words, config.embedding, config.units, config.layers), (0,) if config.locked else ()
    if config.model == "transformer":
        in_ffn = partial(noise, config, shared_dims=shared, units=config.units)
        activation: Any = "none" if METHODS[config.method].is_activation else config.activation
        return Transformer(*sizes, config.heads, in_ffn, generator, activation=activation, place=config.place)

    def noise_at(position: str) -> nn.Module:
        own = {name: getattr(config, f"{name}_{position}") for name in "pq" if hasattr(config, f"{name}_{position}")}
        return noise(config, shared_dims=shared, **own)

    dropped = config.model_dump(include={"weight_drop", "embedding_drop"})
    return LanguageModel(*sizes, noise_at, generator, **dropped)


def triggered(losses: Sequence[float], patience: int = 5) -> bool:
    """Whether averaging has begun: once begun, no later loss ends it.

    It begins with the first of the validation losses so far that is above the least of those `patience` and more
    checks before it, the `patience` losses just before it not looked at. So does the authors' code, and the reading
    that compares with those last losses instead, as the algorithm was first printed, is by their word a misprint.
    A loss that is not a number begins nothing.

    Source: Merity, Keskar & Socher (2017), Regularizing and Optimizing LSTM Language Models, section 3 and algorithm 1
    (NT-ASGD).
    """
    checks = range(patience + 1, len(losses))
    return any(losses[check] > min(losses[: check - patience]) for check in checks)


def averaged(model: nn.Module) -> AveragedModel:
    """The equal average of the weights that `model` has at each call of `update_parameters(model)`; starts with none.

    SGD and this are averaged SGD: `torch.optim.ASGD(t0=0, lambd=0)` is the same average over every step but its
    first. Weights that are tied in `model` are tied in the average.
    """
    average = AveragedModel(model)
    for module in average.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # a copy's weights no longer lie in the one block that cuDNN reads
    return average
