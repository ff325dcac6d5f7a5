"""Noise factory: a method's layers and attachments, by its name on the command line."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from sparseout.baselines import ActivityPenalty, Attachment, make
from sparseout_experiments.methods import METHODS
from sparseout_experiments.options import Config


def noise(config: Config, *, shared_dims: Sequence[int] = (), **own: float) -> nn.Module:
    """The layer that a configuration asks for, or one that does nothing for a method that is no layer.

    `own` are the p and q of this layer, where it has its own, and the number of its units.
    """
    name, arguments = config.method, _arguments(config)
    usable = {*arguments, *(["units"] if name == "kwinners" else [])}
    arguments |= {key: value for key, value in own.items() if key in usable}
    if shared_dims and name == "dropout":
        # torch has no Dropout with a mask shared over time; Sparseout at q = 2 is one.
        name, arguments = "sparseout", arguments | {"q": 2.0}
    if shared_dims and name in ("sparseout", "gaussian"):
        arguments["shared_dims"] = shared_dims
    layer = make(name, **arguments)
    return nn.Identity() if isinstance(layer, Attachment) else layer


def activation(config: Config) -> nn.Module:
    """The activation before the noise: ReLU, or nothing where the method is an activation itself."""
    return nn.Identity() if METHODS[config.method].is_activation else nn.ReLU()


def attached(
    config: Config, model: nn.Module, activations: Collection[nn.Module], following: Collection[nn.Module] = ()
) -> ActivityPenalty | None:
    """`attach` the method that a configuration asks for, if it is no layer."""
    attachment = make(config.method, **_arguments(config))
    return attach(attachment if isinstance(attachment, Attachment) else None, model, activations, following)


def attach(
    attachment: Attachment | None,
    model: nn.Module,
    activations: Collection[nn.Module],
    following: Collection[nn.Module] = (),
) -> ActivityPenalty | None:
    """Attach noise on weights to the layers `following` the place of the noise, or a penalty on the `activations`.

    Returns the penalty, whose `loss` is to be added to the loss.
    """
    if attachment is None:
        return None
    if attachment.acts_on == "weights":
        for layer in following:
            attachment.attach(layer)
        return None
    return attachment.attach(model, modules=lambda name, module: module in activations)


def _arguments(config: Config) -> dict[str, Any]:
    arguments = config.arguments()
    arguments.pop("warmup", None)  # a fraction of training, whose steps only the loop knows
    return arguments | {"scale": None} if arguments.get("scale") == "paper" else arguments
