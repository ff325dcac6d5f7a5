"""Methods that make activations sparser or denser: a class of options for each, and those of a target."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from sparseout_experiments import option_types as types
from sparseout_experiments.option_types import option


class Refused(ValueError):
    """An option whose value does not go with the others: its name, what it should be, what it is."""


class Method(BaseModel):
    """A method that makes activations sparser or denser."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    is_activation: ClassVar[bool] = False  # takes the place of the ReLU before
    method: str


def _if_moving(moving: Any, fixed: Any) -> Callable[[Mapping[str, Any]], Any]:
    """A default that depends on whether there is a target."""
    return lambda given: fixed if given.get("target_sparsity") is None else moving


class NoNoise(Method):
    """No noise and nothing else."""

    method: Literal["none"]


class _Noise(Method):
    p: types.Probability = option(0.5, "Drop probability.")


class _Penalty(Method):
    strength: types.NonNegative = option(1e-3, "Penalty: factor on the L_q^q of the activations.")


class _TopK(Method):
    k: types.Winners = option(0.1, "k-winners and statistical top-k: how many units win, or what fraction.")


class Dropout(_Noise):
    """Dropout."""

    method: Literal["dropout"]


class Sparseout(_Noise):
    """Sparseout, at a q that stays or one that moves to a target."""

    method: Literal["sparseout"]
    q: types.NonNegative = option(
        _if_moving(2.5, 1.5),
        "Exponent: below 2 sparser, above 2 denser, 2 is Dropout; where it starts if there is a target.",
        shown="1.5; with a target 2.5; of a penalty 1",
    )
    gradient: Literal["detached", "exact"] = option("detached", "Slope of the noise.")
    scale: types.Scale = option(
        _if_moving("matched", "paper"), "Strength of the noise.", shown="paper; with a target matched"
    )


class Bridgeout(_Noise):
    """Noise on the weights: Bridgeout."""

    method: Literal["bridgeout"]
    q: types.NonNegative = option(1.5, "Exponent.")
    per_example: types.Flag = option(True, "Bridgeout: noise of its own for every example of a batch.")


class Shakeout(_Noise):
    """Noise on the weights: Shakeout."""

    method: Literal["shakeout"]
    c: types.NonNegative = option(0.01, "Shakeout: the constant, in units of the weights.")


class Gaussian(_Noise):
    """Gaussian multiplicative noise."""

    method: Literal["gaussian"]


class Penalty(_Penalty):
    """A penalty on activations, added to the loss."""

    method: Literal["penalty"]
    q: types.NonNegative = option(1.0, "Exponent.")


class KWinners(_TopK):
    """Only the k largest activations stay."""

    method: Literal["kwinners"]
    k_eval: types.Winners | None = option(None, "k-winners: the same in evaluation.", shown="as k")
    boost: types.NonNegative = option(1.0, "k-winners: how strongly units that seldom won are preferred.")


class L1Warmup(_Penalty):
    """An L1 penalty on activations whose strength rises from 0."""

    method: Literal["l1_warmup"]
    warmup: types.Fraction = option(
        0.05, "L1 with warm-up: the fraction of the epochs' steps in which the strength rises."
    )


class ReLUSquared(Method):
    """ReLU squared as activation."""

    is_activation = True
    method: Literal["relu2"]


class StatisticalTopK(_TopK):
    """Activations above a Gaussian quantile of their row, in place of ReLU."""

    is_activation = True
    method: Literal["statistical_topk"]


_METHODS: tuple[type[Method], ...] = (
    *(NoNoise, Dropout, Sparseout, Bridgeout, Shakeout, Gaussian),
    *(Penalty, KWinners, L1Warmup, ReLUSquared, StatisticalTopK),
)
METHODS = {get_args(method.model_fields["method"].annotation)[0]: method for method in _METHODS}


KNOBS = {  # of the methods that have any: what moves to a target, the default first
    "dropout": ("p",),
    "sparseout": ("q", "p"),
    "gaussian": ("p",),
    "penalty": ("strength",),
    "l1_warmup": ("strength",),
    "kwinners": ("k",),
    "statistical_topk": ("k",),
}


class Target(BaseModel):
    """Instead of a setting that stays, one that moves until a target is met."""

    target_sparsity: types.Sparsity | None = option(
        None, "Mean Hoyer sparsity in evaluation, where the method acts: the knob moves until it is met."
    )
    knob: Literal["q", "p", "strength", "k"] | None = option(
        None, "What moves to the target, from its value on.", shown="the first of these that the method has"
    )

    @model_validator(mode="after")
    def _can_move(self) -> Self:
        values: dict[str, Any] = {
            name: getattr(self, name, None) for name in ("knob", "q_min", "q_max", "q", "strength", "k")
        }
        knob, low, high, q, strength, k = values.values()
        if self.target_sparsity is None:
            for name in ("knob", "q_min", "q_max"):
                if values[name] is not None:
                    raise Refused(name, "left out, as there is no target sparsity", values[name])
        elif knob is not None and knob not in (knobs := KNOBS[method := getattr(self, "method")]):  # noqa: B009
            raise Refused("knob", f"{' or '.join(knobs)} for the method {method}", knob)
        elif strength == 0:
            raise Refused("strength", "> 0, to be moved by factors", strength)
        elif k is not None and k >= 1:
            raise Refused("k", "a fraction of the units, to be moved", k)
        elif low is not None and low > high:
            raise Refused("q_max", f"at least q_min {low:g}", high)
        elif low is not None and not low <= q <= high:
            raise Refused("q", f"between q_min {low:g} and q_max {high:g}", q)
        return self


class TargetOfQ(Target):
    """A target for Sparseout, whose q has bounds."""

    q_min: types.NonNegative | None = option(_if_moving(1.0, None), "Lower bound of q if there is a target.", shown=1.0)
    q_max: types.NonNegative | None = option(_if_moving(4.0, None), "Upper bound of q if there is a target.", shown=4.0)
