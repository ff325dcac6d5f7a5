"""Reconstruction of images through one hidden layer of ReLU units, with the noise on their activations."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout.baselines import ActivityPenalty
from sparseout_experiments import options
from sparseout_experiments.data import images
from sparseout_experiments.models import Autoencoder
from sparseout_experiments.tasks.base import (
    DistributedContext,
    Evaluation,
    Task,
    fingerprint,
    local_shard,
    measured,
    measuring,
    penalised,
    shuffled,
)
from sparseout_experiments.training.noise import activation, attached, noise
from sparseout_experiments.training.rng import Rng


class Reconstruct(Task):
    """Mean squared error per pixel, pixels in [0, 1]. Adam at a constant learning rate."""

    metric = "mse"
    shown = 1000.0
    unit = "e-3"

    def __init__(self, config: options.Autoencoder, rng: Rng, context: DistributedContext) -> None:
        self._config, self._context, self._shuffle = config, context, rng.shuffle
        data = images.load(
            config.data,
            train_size=config.train_size,
            valid_size=config.valid_size,
            test_size=config.test_size,
            split_seed=config.split_seed,
            labelled=False,
        )
        self.parts: dict[str, Tensor] = {
            name: getattr(data, name).pixels.flatten(1).to(context.device).float() / 255
            for name in ("train", "valid", "test")
        }
        self.data = fingerprint(self.parts)
        pixels = self.parts["train"].shape[1]
        layer = noise(config, units=config.units)
        model = Autoencoder(pixels, config.units, layer, rng.init, activation(config)).to(context.device)
        self.model, self._activations = model, model.activations()
        penalty = attached(config, model, self._activations.values(), [model.decoder])
        self.objective = _Error(self.model, penalty)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(), lr=self._config.lr, weight_decay=self._config.weight_decay, fused=True
        )

    def plan(self) -> list[Tensor]:
        return shuffled(len(self.parts["train"]), self._config.batch, self._context, self._shuffle)

    def loss(self, objective: nn.Module, batch: Tensor) -> Tensor:
        return cast(Tensor, objective(self.parts["train"][local_shard(batch, self._context)]))

    @torch.no_grad()
    def evaluate(self, part: str) -> Evaluation:
        self.model.eval()
        x = self.parts[part]
        total = 0.0
        with measuring(self._activations, {}) as streams:
            for batch in x.split(1000):
                total += F.mse_loss(self.model(batch).float(), batch, reduction="sum").item()
        self.model.train()
        return Evaluation({"mse": total / x.numel()}, measured(streams))


class _Error(nn.Module):
    """Images to the error of their reconstruction, and the penalty on the code."""

    def __init__(self, model: nn.Module, penalty: ActivityPenalty | None) -> None:
        super().__init__()
        self.model, self.penalty = model, penalty

    def forward(self, x: Tensor) -> Tensor:
        return penalised(F.mse_loss(self.model(x).float(), x), self.penalty)
