"""Control of sparsity: a controller that moves q until a target is met, and schedules of q."""

from sparseout.control import schedules
from sparseout.control._controller import SparsityController

__all__ = ["SparsityController", "schedules"]
