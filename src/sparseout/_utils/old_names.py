"""Module names of the first version, for its pickles and for code that imports them."""

import importlib
import sys
from types import ModuleType
from typing import Any

_MOVED = {
    "conversion": "convert._report",
    "insertion": "convert._insertion",
    "norm": "convert._batch_norm",
    "schedules": "control.schedules",
    "seen": "_utils.hooks",
    "sites": "_utils.modules",
    "sparsity_report": "monitor._report",
}
_RENAMED = {"Eye": "DeadHook", "Site": "HookPoint"}


class _Moved(ModuleType):
    """A module of the first version: looks names up in the module that replaces it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # else whoever looks for the file of a module finds two of it
            raise AttributeError(name)
        module = importlib.import_module(f"sparseout.{_MOVED[self.__name__.partition('.')[2]]}")
        return getattr(module, _RENAMED.get(name, name))


def register() -> None:
    """Make the old names importable."""
    for name in _MOVED:
        sys.modules.setdefault(f"sparseout.{name}", _Moved(f"sparseout.{name}"))
