"""Methods by name: layers in place of Dropout, and attachments to layers and models."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sparseout._utils.activations import UnitDim
from sparseout._utils.validation import expected, type_name
from sparseout.baselines import bridgeout, penalty, shakeout
from sparseout.baselines.activations import ReLUSquared, StatisticalTopK
from sparseout.baselines.gaussian import GaussianDropout
from sparseout.baselines.kwinners import KWinners
from sparseout.layers import Sparseout


@dataclass(frozen=True)
class Attachment:
    """A method that is not a layer: it acts on the weights of an existing layer, or on the loss of a model.

    :func:`sparseout.baselines.make` builds it. Printed, it says what it acts on and how it is attached.

    Args:
        name: of the method.
        acts_on: ``"weights"`` or ``"loss"``.
        function: is called with the module and the parameters.
        parameters: by name.

    Example:
        >>> attachment = make("penalty", strength=0.1)
        >>> attachment.acts_on
        'loss'
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        >>> penalty = attachment.attach(model)
        >>> penalty.detach()

    Source: those of :func:`sparseout.baselines.bridgeout_`, :func:`sparseout.baselines.shakeout_` and
    :class:`sparseout.baselines.ActivityPenalty`.
    """

    name: str
    acts_on: Literal["weights", "loss"]
    function: Callable[..., Any]
    parameters: dict[str, Any]

    def attach(self, module: nn.Module, **more: Any) -> Any:
        """Attach it, and return what was attached.

        Args:
            module: for "weights" the Linear or Conv2d that follows the place of the noise, which is changed and
                returned, until `revert_`; for "loss" the model, for which an attached `ActivityPenalty` is returned.
            more: further arguments of the function or class, such as `modules`.
        """
        attached = self.function(module, **self.parameters, **more)
        return attached.attach() if isinstance(attached, penalty.ActivityPenalty) else attached

    def __str__(self) -> str:
        parameters = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items() if value is not None)
        targets = {
            "weights": "the weights of the Linear or Conv2d that follows the place of the noise: attach(layer)",
            "loss": "the loss, by a penalty on activations: attach(model), and add its loss() in every step",
        }
        return f"{self.name} ({parameters}) acts on {targets[self.acts_on]}"


def make(name: str, **parameters: Any) -> nn.Module | Attachment:
    """Builds a method by name: a layer to use in place of Dropout, or an :class:`sparseout.baselines.Attachment`.

    | name | parameters | acts on | made |
    |---|---|---|---|
    | none | | activations | `nn.Identity` |
    | dropout | p, inplace | activations | `nn.Dropout` |
    | sparseout | p, q, inplace, gradient, scale, shared_dims, seed | activations | `Sparseout` |
    | gaussian | p, shared_dims | activations | `GaussianDropout` |
    | kwinners | k, k_eval, boost, momentum, units, unit_dim | activations | `KWinners` |
    | bridgeout | p, q, per_example | weights | `Attachment` |
    | shakeout | p, c | weights | `Attachment` |
    | penalty | strength, q, eps, target, unit_dim, warmup | loss | `Attachment` |
    | l1_warmup | strength, warmup, eps, unit_dim | loss | `Attachment` |
    | relu2 | | activations | `ReLUSquared` |
    | statistical_topk | k, unit_dim | activations | `StatisticalTopK` |

    The last two are activation functions themselves: `statistical_topk` takes the place of ReLU, too, and `relu2` can.

    Args:
        name: of the method.
        parameters: its parameters, each with a default.

    Raises:
        ValueError: for another name, or a value out of range.
        TypeError: for a parameter that the method does not have, or of another type.

    Example:
        >>> make("sparseout", p=0.5, q=1.5)
        Sparseout(p=0.5, q=1.5)
        >>> print(make("shakeout", p=0.5, c=0.1))
        shakeout (p=0.5, c=0.1) acts on the weights of the Linear or Conv2d that follows the place of the noise:
            attach(layer)
        >>> make("shakeout", p=0.5, c=0.1).attach(nn.Linear(3, 2))
        ShakeoutLinear(in_features=3, out_features=2, bias=True, p=0.5, c=0.1)

    Source: each method has its own, in the class or function that it is made from.
    """
    if not isinstance(name, str):
        raise TypeError(expected("name", f"one of {', '.join(METHODS)}", type_name(name)))
    if name not in METHODS:
        raise ValueError(expected("name", f"one of {', '.join(METHODS)}", repr(name)))
    builder = METHODS[name]
    names = [] if builder is nn.Identity else list(inspect.signature(builder).parameters)
    for parameter in parameters:
        if parameter not in names:
            raise TypeError(expected("parameters", f"among {', '.join(names) or 'none'} for {name}", repr(parameter)))
    method: nn.Module | Attachment = builder(**parameters)
    return method


def _bridgeout(p: float = 0.5, q: float = 1.5, per_example: bool = True) -> Attachment:
    return Attachment("bridgeout", "weights", bridgeout.bridgeout_, bridgeout.check(p, q, per_example))


def _shakeout(p: float = 0.5, c: float = 0.01) -> Attachment:
    return Attachment("shakeout", "weights", shakeout.shakeout_, shakeout.check(p, c))


def _penalty(
    strength: Any = 1e-3,
    q: float | None = None,
    eps: float | None = None,
    target: float | None = None,
    unit_dim: UnitDim = None,
    warmup: int = 0,
) -> Attachment:
    checked = penalty.check(strength, q, eps, target, unit_dim, warmup)
    return Attachment("penalty", "loss", penalty.ActivityPenalty, checked)


def _l1_warmup(
    strength: Any = 1e-3, warmup: int = 1000, eps: float | None = None, unit_dim: UnitDim = None
) -> Attachment:
    checked = penalty.check(strength, 1.0, eps, None, unit_dim, warmup)
    return Attachment("l1_warmup", "loss", penalty.ActivityPenalty, checked)


METHODS: dict[str, Callable[..., Any]] = {
    "none": nn.Identity,
    "dropout": nn.Dropout,
    "sparseout": Sparseout,
    "bridgeout": _bridgeout,
    "shakeout": _shakeout,
    "gaussian": GaussianDropout,
    "penalty": _penalty,
    "kwinners": KWinners,
    "l1_warmup": _l1_warmup,
    "relu2": ReLUSquared,
    "statistical_topk": StatisticalTopK,
}
