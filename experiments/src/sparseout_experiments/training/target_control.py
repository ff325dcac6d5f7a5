"""A run with a target for its sparsity: the controller, and the record of what it did."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparseout.control._controller import SparsityController
from sparseout.monitor._noise import dropout_variance, noise_powers
from sparseout_experiments.options import Target


class TargetControl:
    """Moves q after every step towards `target_sparsity`, Hoyer in training of what the noise layers take in.

    Of every interval of the controller it keeps the step, q, Hoyer, and the power of the noise as a multiple of that
    of Dropout's; means over the layers.
    """

    def __init__(self, config: Target, model: nn.Module) -> None:
        assert config.target_sparsity is not None
        self._target = config.target_sparsity
        bounds: Any = (config.q_min, config.q_max)
        self._controller = SparsityController(model, self._target, bounds=bounds)
        self._steps = 0
        self._records: list[dict[str, float]] = []
        self._written = 0  # of the records, by `line`
        self._messages: list[str] = []
        self._power = torch.zeros(2, dtype=torch.float64)  # of the noise, and of Dropout's
        for name in self._controller.q:
            model.get_submodule(name).register_forward_hook(self._see)

    def _see(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
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
            record = {"step": self._steps, "q": _mean(self._controller.q.values())}
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
        result: dict[str, Any] = {name: _mean(record[name] for record in last) for name in ("hoyer", "q")}
        noises = [record["noise"] for record in self._records]
        result |= {"noise_least": min(noises, default=math.nan), "noise_most": max(noises, default=math.nan)}
        return {"target": self._target, **result, "intervals": len(self._records), "told": list(self._messages)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; the same on every process but for what was seen since the last interval."""
        return {key: getattr(self, name) for key, name in _KEPT.items()} | {"controller": self._controller.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for key, name in _KEPT.items():
            setattr(self, name, state[key])
        self._controller.load_state_dict(state["controller"])


# The keys of a checkpoint, which older ones have too, and the attributes.
_KEPT = {"_told": "_messages", **{name: name for name in ("_steps", "_records", "_written", "_power")}}


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
