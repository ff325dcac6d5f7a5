"""Checks of a controller: targets, states, and whether it is the same on all processes."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparseout._utils.distributed import Group, all_gather
from sparseout._utils.validation import expected, is_number, type_name
from sparseout.control._measure_specs import SCALES


def targets_of(target: Any, measure: str, names: Sequence[str], per_layer: bool) -> dict[str, float]:
    """The target of every module that is measured."""
    if isinstance(target, Mapping):
        if not per_layer:
            raise ValueError(expected("target", "a number, as the layers share a knob (per_layer=False)", "a mapping"))
        if target.keys() != set(names):
            raise ValueError(expected("target", f"a value for each of {', '.join(names)}", f"{sorted(target)}"))
        targets = dict(target)
    else:
        targets = dict.fromkeys(names, target)
    scale = SCALES[measure]
    for value in targets.values():
        if not is_number(value):
            raise TypeError(expected("target", "a number", type_name(value)))
        if not scale.low < value < scale.high:
            raise ValueError(expected("target", f"in ({scale.low:g}, {scale.high:g}), as {measure} is", value))
    return {name: float(value) for name, value in targets.items()}


def state_of_groups(
    state: Any, measure: str, mode: str | None, knob: str, names: Sequence[str]
) -> list[Mapping[str, Any]]:
    """The groups of a controller's state, if it is one of this measure, mode, knob and these groups."""
    wanted = "what state_dict gives"
    if not isinstance(state, Mapping):
        raise TypeError(expected("state", wanted, type_name(state)))
    if missing := {"measure", "steps", "sums", "groups"} - state.keys():
        raise ValueError(expected("state", wanted, f"one without {', '.join(sorted(missing))}"))
    if state["measure"] != measure:
        raise ValueError(expected("state", f"one of {measure}", f"one of {state['measure']}"))
    other = state.get("mode", "train")  # the first version had one mode
    if {mode, other} == {"train", "eval"}:
        raise ValueError(expected("state", f"one of mode {mode!r}", f"one of mode {other!r}"))
    if (moved := state.get("knob", "q")) != knob:  # it had one knob, too
        raise ValueError(expected("state", f"one of the knob {knob}", f"one of {moved}"))
    if list(state["groups"]) != names:
        raise ValueError(expected("state", f"one of the layers {', '.join(names)}", ", ".join(state["groups"])))
    return list(state["groups"].values())


def check_equal(values: Mapping[str, Any], group: Group | None) -> None:
    """Raise, on all processes of the group, if one of them has another value under a name."""
    ranks = all_gather(dict(values), group)
    for (rank, other), name in itertools.product(enumerate(ranks), values):
        first, value = ranks[0].get(name), other.get(name)
        if value != first and not (isinstance(value, float) and math.isclose(value, first or 0.0)):
            wanted = "the same on all processes (with the same arguments, and one state loaded on all)"
            got = f"{name} {first} on process 0 and {value} on process {rank}"
            raise RuntimeError(expected("controller", wanted, got))
