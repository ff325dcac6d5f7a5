"""Reconstruction of images through one hidden layer of ReLU units, with the noise on their activations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout_experiments import options
from sparseout_experiments.data import images
from sparseout_experiments.models import Autoencoder
from sparseout_experiments.tasks import base
from sparseout_experiments.tasks.base import DistributedContext, Evaluation, Task
from sparseout_experiments.training.noise import activation, attached, noise
from sparseout_experiments.training.rng import Rng


class Reconstruct(Task):
    """Mean squared error per pixel, pixels in [0, 1]. Adam at a constant learning rate."""

    metric = "mse"
    shown = 1000.0
    unit = "e-3"

    def __init__(self, config: options.Autoencoder, rng: Rng, context: DistributedContext) -> None:
        self._config, self._context, self._shuffle = config, context, rng.shuffle
        data = images.load(config.data, **config.sizes(), labelled=False)
        self.parts: dict[str, Tensor] = {
            name: getattr(data, name).pixels.flatten(1).to(context.device).float() / 255
            for name in ("train", "valid", "test")
        }
        self.data = base.fingerprint(self.parts)
        pixels = self.parts["train"].shape[1]
        layer = noise(config, units=config.units)
        model = Autoencoder(pixels, config.units, layer, rng.init, activation(config)).to(context.device)
        self.model, self._activations = model, model.activations()
        penalty = attached(config, model, self._activations.values(), [model.decoder])
        self.objective = base.Objective(model, F.mse_loss, penalty)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(), lr=self._config.lr, weight_decay=self._config.weight_decay, fused=True
        )

    def plan(self) -> list[Tensor]:
        return base.shuffled(len(self.parts["train"]), self._config.batch, self._context, self._shuffle)

    def loss(self, objective: nn.Module, batch: Tensor) -> Tensor:
        x = self.parts["train"][base.local_shard(batch, self._context)]
        return objective(x, x)

    @torch.no_grad()
    def evaluate(self, part: str) -> Evaluation:
        self.model.eval()
        x = self.parts[part]
        total = 0.0
        with base.measuring(self._activations, {}) as sparsity:
            for batch in x.split(1000):
                total += F.mse_loss(self.model(batch).float(), batch, reduction="sum").item()
        self.model.train()
        return Evaluation({"mse": total / x.numel()}, sparsity)
