"""Plan of a compaction, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import named_modules
from sparseout._utils.outcome_table import aligned, outcome_rows
from sparseout.inference._compact_cut import Cut, State, drop_gradient_nodes, fingerprint
from sparseout.inference._compact_trial import Trial, size


@dataclass(frozen=True)
class CompactedChain:
    """Chain of layers in a `CompactionPlan`: its hidden units, and which of them go.

    Args:
        producers: the layers that make the units; several if their outputs are multiplied, as in a gated network.
        consumer: the layer that reads them.
        units: how many there are.
        removed: the numbers of those that go.
        never_active: how many of these are 0 on all rows given, though they need not be on others.
        provably_dead: how many are 0 for every input in the range seen: the upper bound of what their ReLU is given is
            no more than 0, or their weights are 0.
        constant: how many have another value that does not change: it is added to the consumer's bias.
        bordered: how many that do not change stay, since the consumer pads with zeros and so tells border from middle.
        rows: the rows on which the units were seen, positions of maps and sequences included.
    """

    producers: tuple[str, ...]
    consumer: str
    units: int
    removed: tuple[int, ...]
    never_active: int
    provably_dead: int
    constant: int
    bordered: int
    rows: int

    def __str__(self) -> str:
        counts = {
            f"never active on {self.rows:,} rows": self.never_active,
            "provably dead": self.provably_dead,
            "constant": self.constant,
        }
        text = f"{len(self.removed)} of {self.units} units"
        why = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        text += f": {why}" if why else f": all active on {self.rows:,} rows" if not self.bordered else ""
        return text + (f"; {self.bordered} constant, kept for the padding with zeros after it" if self.bordered else "")


class CompactionPlan:
    """Plan of what `compact` would remove, why, and what it could not reach. Printed, it is a table.

    - `chains`: a `CompactedChain` for each chain of layers that was found, with what goes of it.
    - `unreached`: name of a layer -> why its outputs are no hidden units that can go.
    - `parameters`, `parameters_after`: how many the model has, and how many it would have.
    - `difference`: the largest difference of the outputs with and without the units on the rows given;
      `largest_output` is there for comparison.
    - `new_biases`: names of the parameters that would be added.

    Example:
        >>> from torch import nn
        >>> from sparseout.inference import compact
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        >>> print(compact(model, [torch.rand(8, 2)]).chains[0])
        1 of 2 units: 1 provably dead
    """

    def __init__(
        self,
        model: nn.Module,
        cuts: Mapping[Cut, CompactedChain],
        names: Mapping[nn.Module, str],
        unreached: Mapping[str, str],
        trial: Trial,
    ) -> None:
        self._model, self._names = model, dict(names)
        self._every, self._cuts = list(cuts), [cut for cut, chain in cuts.items() if chain.removed]
        self._modules = [module for cut in self._cuts for module in cut.chain.modules]
        self._fingerprint: list[Any] | None = fingerprint(self._modules)
        self.chains = tuple(cuts.values())
        self.unreached = dict(unreached)
        self.parameters, self.parameters_after = size(model), trial.parameters
        self.difference, self.largest_output = trial.difference, trial.largest
        self.new_biases = tuple(
            f"{names[cut.chain.consumer]}.bias".lstrip(".") for cut in self._cuts if cut.makes_bias()
        )

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of a layer that makes hidden units -> (units,) bool, True for those that stay."""
        return {self._names[layer]: cut.kept.clone() for cut in self._every for layer in cut.chain.producers}

    @property
    def parameter_masks(self) -> dict[str, list[tuple[int, Tensor]]]:
        """Name of a parameter or buffer -> along which dims it is cut, each with a bool mask of what stays there.

        With it the state of an optimizer, which has the shape of its parameter, can be cut likewise.
        """
        masks: dict[str, list[tuple[int, Tensor]]] = {}
        for cut in self._cuts:
            for module, name, dim, kept in cut.masks():
                masks.setdefault(f"{self._names[module]}.{name}".lstrip("."), []).append((dim, kept.clone()))
        return masks

    def apply_(self) -> None:
        """Take the units out of the model, in place.

        Modules and parameters stay the objects that they are, with smaller tensors; gradients are dropped, and sizes
        such as ``in_features`` follow. The configuration of a model, such as ``config.intermediate_size`` of
        `transformers`, does not: layers may differ in width now, so keep the model, not only its ``state_dict``. The
        state of an optimizer is not carried over: make a new one, or cut its tensors by `parameter_masks`.

        Raises:
            RuntimeError: if the plan was applied before, its layers have changed since it was made, or the model is
                wrapped in DistributedDataParallel. Nothing is changed then.
        """
        if self._fingerprint is None:
            raise RuntimeError("expected a plan that has not been applied, but this one has: make a new one")
        if any(isinstance(module, DistributedDataParallel) for module in self._model.modules()):
            raise RuntimeError(
                "expected a model that is not wrapped in DistributedDataParallel, whose buckets keep their sizes: plan "
                "for its `module`, and wrap it afterwards"
            )
        modules = dict(named_modules(self._model))
        unchanged = all(modules.get(self._names[module]) is module for module in self._modules)
        if not unchanged or fingerprint(self._modules) != self._fingerprint:
            raise RuntimeError(
                "expected a model that has not changed since the plan was made, but layers of the plan have: make a "
                "new one"
            )
        state = State(self._modules)
        try:
            with torch.inference_mode(False), torch.no_grad():  # the model may train on
                for cut in self._cuts:
                    cut.apply_()
        except BaseException:
            state.restore()
            raise
        drop_gradient_nodes(self._modules)
        torch.clear_autocast_cache()
        self._fingerprint = None
        reset_compiler()

    def __str__(self) -> str:
        removed, units = sum(len(c.removed) for c in self.chains), sum(c.units for c in self.chains)
        saved = self.parameters - self.parameters_after
        lines = [
            f"Compaction: {removed:,} of {units:,} hidden units go, and {saved:,} of {self.parameters:,} parameters "
            f"({saved / max(self.parameters, 1):.1%}).",
        ]
        texts = {_title(c): c for c in self.chains}
        rows = [
            *outcome_rows("remove", {name: str(c) for name, c in texts.items() if c.removed}),
            *outcome_rows("keep", {name: str(c) for name, c in texts.items() if not c.removed}),
            *outcome_rows("unreached", self.unreached),
        ]
        lines += [aligned(rows)] if rows else []
        if removed:
            lines.append(
                f"Largest difference of the outputs on these rows: {self.difference:.1e}; the largest output is "
                f"{self.largest_output:.3g}."
            )
            if self.new_biases:
                lines.append(f"New parameters: {', '.join(self.new_biases)}.")
            lines.append("The state of an optimizer is not carried over: make a new one after apply_().")
        return "\n".join(lines)

    __repr__ = __str__


def _title(chain: CompactedChain) -> str:
    """The layers of a chain, with the part of their names that is the same before them."""
    paths = [name.split(".") for name in (*chain.producers, chain.consumer)]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    *producers, consumer = (".".join(path[shared:]) for path in paths)
    text = f"{' * '.join(producers)} -> {consumer}"
    return f"{'.'.join(paths[0][:shared])}.({text})" if shared else text
