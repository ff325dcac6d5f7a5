"""Control of sparsity: a controller that moves q until a target is met, and schedules of q."""

from sparseout.control import schedules
from sparseout.control._controller import SparsityController
from sparseout.control._knob_protocol import Knob

# By this name controllers were pickled by the first version.
from sparseout.control._layer_group import LayerGroup as _Group  # noqa: F401

__all__ = ["Knob", "SparsityController", "schedules"]
