"""Classification of images by a Wide-ResNet, with the noise between the two convolutions of every block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout.convert._batch_norm import batch_norms, recalibrate_norm_
from sparseout_experiments import options
from sparseout_experiments.data import images
from sparseout_experiments.models import WideResNet
from sparseout_experiments.tasks import base
from sparseout_experiments.tasks.base import DistributedContext, Evaluation, Task
from sparseout_experiments.training.noise import activation, attached, noise
from sparseout_experiments.training.rng import Rng
from sparseout_experiments.training.schedules import SCHEDULES

EVALUATED = 250  # images at once
MEASURED = {"valid": 100, "test": 500}  # images whose activations are measured, the first of a part
# Training images, not augmented, from which the statistics of batch norm are re-estimated: after every epoch few, to
# choose by; for the result so many that which of them they are does not show.
REESTIMATED = {"valid": 500, "test": 5000}


class Classify(Task):
    """The fraction of images that are misclassified. SGD with Nesterov momentum.

    "error" is measured with the statistics of batch norm re-estimated without noise, "error_as_trained" with those of
    training; units are channels, samples the positions of images.
    """

    metric = "error"
    shown = 100.0
    unit = "%"

    def __init__(self, config: options.Image, rng: Rng, context: DistributedContext) -> None:
        self._config, self._context, self._rng = config, context, rng
        data = images.load(config.data, **config.sizes())
        self._mean, self._std = (value.to(context.device) for value in images.statistics(data.train))
        self._format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.parts = {
            name: images.Part(*(tensor.to(context.device) for tensor in getattr(data, name)))
            for name in ("train", "valid", "test")
        }
        self.data = base.fingerprint({name: part.pixels for name, part in self.parts.items()})
        channels, *size = data.train.pixels.shape[1:]
        self._pad = min(max(1, size[0] // 8), min(size) - 1)
        self._flip = images.coloured(data.train) if config.flip is None else config.flip
        self.notes = data.notes
        if config.augment and config.flip is None:  # digits and signs are another thing in a mirror, or nothing
            how = "coloured, and mirrored half of the time" if self._flip else "grey, and not mirrored"
            option = "--no-flip" if self._flip else "--flip"
            self.notes = (*self.notes, f"training pictures are {how}: {option} changes that")
        model = WideResNet(
            config.depth,
            config.width,
            lambda channels: noise(config, units=channels),
            rng.init,
            data.classes,
            channels=channels,
            norm=config.norm,
            place=config.place,
            activation=lambda: activation(config),
            stride=config.stride,
        )
        self.model = model.to(context.device).to(memory_format=self._format)  # type: ignore[call-overload]
        self._activations = model.activations()
        penalty = attached(config, model, self._activations.values(), model.following())
        self.objective = base.Objective(self.model, F.cross_entropy, penalty)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.model.parameters(),
            lr=self._config.lr,
            momentum=self._config.momentum,
            nesterov=self._config.momentum > 0,
            weight_decay=self._config.weight_decay,
        )

    def rate(self, progress: float, batch: Tensor) -> float:
        return SCHEDULES[self._config.schedule](progress)

    def plan(self) -> list[Tensor]:
        return base.shuffled(len(self.parts["train"].labels), self._config.batch, self._context, self._rng.shuffle)

    def loss(self, objective: nn.Module, batch: Tensor) -> Tensor:
        pixels, labels = (tensor[batch] for tensor in self.parts["train"])
        if self._config.augment:  # of all processes' images, so that one process would draw the same
            pixels = images.augment(pixels, self._rng.augment, pad=self._pad, flip=self._flip)
        pixels, labels = (base.local_shard(tensor, self._context) for tensor in (pixels, labels))
        return objective(self._ready(pixels), labels)

    @torch.no_grad()
    def evaluate(self, part: str) -> Evaluation:
        self.model.eval()
        if not batch_norms(self.model):
            evaluation = self._errors(part, MEASURED[part])
        else:
            as_trained = self._errors(part, 0).metrics["error"] if part == "test" else None
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            batches = self.parts["train"].pixels[: REESTIMATED[part]].split(EVALUATED)
            whole = [pixels for pixels in batches if len(pixels) == len(batches[0])]  # every batch counts the same
            recalibrate_norm_(self.model, map(self._ready, whole))
            evaluation = self._errors(part, MEASURED[part])
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
            if as_trained is not None:
                evaluation.metrics["error_as_trained"] = as_trained
        self.model.train()
        return evaluation

    def _errors(self, part: str, measured: int) -> Evaluation:
        """Metrics over a part, and measures of its first images."""
        wrong = total = 0.0
        pixels, labels = self.parts[part]
        sparsity: dict[str, dict[str, float]] = {}
        for rows, modules in ((slice(0, measured), self._activations), (slice(measured, None), {})):
            with base.measuring(modules, {4: 1}) as measures:
                for x, target in zip(pixels[rows].split(EVALUATED), labels[rows].split(EVALUATED), strict=True):
                    if len(target):
                        logits = self.model(self._ready(x)).float()
                        wrong += (logits.argmax(1) != target).sum().item()
                        total += F.cross_entropy(logits, target, reduction="sum").item()
            sparsity |= measures
        return Evaluation({"error": wrong / len(labels), "loss": total / len(labels)}, sparsity)

    def _ready(self, pixels: Tensor) -> Tensor:
        return images.normalise(pixels, self._mean, self._std).contiguous(memory_format=self._format)
