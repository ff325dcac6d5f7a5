"""A run with a target for its sparsity: the controller, and the record of what it did."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseout.baselines import ActivityPenalty
from sparseout.control._controller import SparsityController
from sparseout.monitor._noise import dropout_variance, noise_powers
from sparseout_experiments.methods import KNOBS, Target, TargetOfQ

UPDATES = 100  # that a short run is to have at least; a long one has one in 10 steps


class TargetControl:
    """Moves the knob after every step towards `target_sparsity`, Hoyer in evaluation where the method acts.

    Evaluation is seen on the validation data after every epoch; between, what is measured in training steers. Of every
    interval of the controller it keeps the step, the knob, Hoyer, and the power of the noise as a multiple of that of
    Dropout's; means over the layers.

    Args:
        config: with a target.
        model: that is trained.
        penalty: whose strength is moved, if that is the knob.
        steps: of the run in all.
    """

    def __init__(self, config: Target, model: nn.Module, penalty: ActivityPenalty | None, steps: int) -> None:
        assert config.target_sparsity is not None
        self._target = config.target_sparsity
        self._knob: str = config.knob or KNOBS[getattr(config, "method")][0]  # noqa: B009
        bounds: Any = (config.q_min, config.q_max) if isinstance(config, TargetOfQ) and self._knob == "q" else None
        knob: Any = penalty if self._knob == "strength" else self._knob
        every = min(10, max(1, steps // UPDATES))
        self._controller = SparsityController(model, self._target, knob=knob, bounds=bounds, every=every)
        self._steps = 0
        self._records: list[dict[str, float]] = []
        self._written = 0  # of the records, by `line`
        self._messages: list[str] = []
        self._power = torch.zeros(2, dtype=torch.float64)  # of the noise, and of Dropout's
        for name in self._controller.values:
            model.get_submodule(name).register_forward_hook(self._measure_noise)

    def _measure_noise(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if layer.training and dropout_variance(layer):
            powers = noise_powers(layer, inputs[0], output).flatten(1).sum(1)
            self._power = self._power.to(powers.device) + powers

    def step(self) -> list[str]:
        """After a step of the optimizer; returns the messages of the controller, seldom any."""
        self._steps += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._controller.step()
        messages = [str(warning.message) for warning in caught]
        self._messages += messages
        if self._steps % self._controller.every == 0:
            noise, dropout = self._power.tolist()
            record = {"step": self._steps, self._knob: _mean(self._controller.values.values())}
            record["hoyer"] = _mean(self._controller.measured.values())
            self._records.append(record | {"noise": noise / dropout if dropout else 1.0})
            self._power.zero_()
        return messages

    def line(self) -> list[dict[str, float]]:
        """The intervals that ended since the last call."""
        new, self._written = self._records[self._written :], len(self._records)
        return new

    def result(self) -> dict[str, Any]:
        """What came of it: means over the last tenth of the intervals, and how far the power of the noise went."""
        last = self._records[-max(1, len(self._records) // 10) :]
        result: dict[str, Any] = {name: _mean(record[name] for record in last) for name in ("hoyer", self._knob)}
        noises = [record["noise"] for record in self._records]
        result |= {"noise_least": min(noises, default=math.nan), "noise_most": max(noises, default=math.nan)}
        return {"target": self._target, **result, "intervals": len(self._records), "told": list(self._messages)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; the same on every process but for what was seen since the last interval."""
        return {key: getattr(self, name) for key, name in _KEPT.items()} | {"controller": self._controller.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        for key, name in _KEPT.items():
            setattr(self, name, state[key])
        self._controller.load_state_dict(state["controller"])


# The keys of a checkpoint, which older ones have too, and the attributes.
_KEPT = {"_told": "_messages", **{name: name for name in ("_steps", "_records", "_written", "_power")}}


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
