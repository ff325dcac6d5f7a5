"""Cuts: the units of a chain that go, and the tensors of its modules without them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseout._utils.chains import Chain
from sparseout._utils.modules import own_parameters, own_tensors
from sparseout._utils.unit_steps import in_dim, out_dim, spatial_dims, weight

# What modules say of their sizes: those that are outputs, inputs, and features of a norm.
_OUTPUTS, _INPUTS = ("out_features", "out_channels", "nf"), ("in_features", "in_channels", "nx")
_PER_UNIT = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class Cut:
    """Units that go.

    Args:
        chain: the units' chain.
        kept: (units,), True: stays.
        constants: (units,), the value that a unit has where the consumer reads it; 0 for those that stay.
    """

    chain: Chain
    kept: Tensor
    constants: Tensor

    def masks(self) -> Iterable[tuple[nn.Module, str, int, Tensor]]:
        """Every tensor that is cut: its module, its name, along which dim, and what stays there."""
        for layer in self.chain.producers:
            yield layer, "weight", out_dim(layer), self.kept
            if "bias" in own_parameters(layer):
                yield layer, "bias", 0, self.kept
        for norm in self.chain.norms:
            for name in _PER_UNIT:
                if getattr(norm, name) is not None:
                    yield norm, name, 0, self.kept
        columns = self.kept.repeat_interleave(self.chain.block)
        yield self.chain.consumer, "weight", in_dim(self.chain.consumer), columns

    def apply_(self) -> None:
        """Take the units out. Parameters stay the objects that they are; gradients are dropped."""
        self._fold()
        for module, name, dim, kept in list(self.masks()):
            _replace(getattr(module, name), dim, kept)
        units = int(self.kept.sum())
        for layer in self.chain.producers:
            _resize(layer, _OUTPUTS, units)
        for norm in self.chain.norms:
            _resize(norm, ("num_features",), units)
        _resize(self.chain.consumer, _INPUTS, units * self.chain.block)

    def makes_bias(self) -> bool:
        """Whether the consumer gets a bias that it has not had."""
        return "bias" not in own_parameters(self.chain.consumer) and bool((self.constants != 0).any())

    def _fold(self) -> None:
        """Add to the consumer's bias what the constants contribute."""
        if not bool((self.constants != 0).any()):
            return
        layer = self.chain.consumer
        w = weight(layer)
        columns = w.detach().movedim(in_dim(layer), 1).double().flatten(2).sum(2) if spatial_dims(layer) else None
        if columns is None:
            columns = w.detach().movedim(in_dim(layer), 1).double()
        added = columns @ self.constants.to(w.device).double().repeat_interleave(self.chain.block)
        bias = own_parameters(layer).get("bias")
        if bias is None:
            layer.bias = nn.Parameter(added.to(w.dtype), requires_grad=w.requires_grad)
        else:
            bias.data = (bias.detach().double() + added).to(bias.dtype)


def foldable(chain: Chain) -> bool:
    """Whether a constant that is not 0 adds the same at every position of the consumer's output.

    Not so behind padding with zeros, nor in a transposed convolution, at whose border fewer taps overlap.
    """
    layer: Any = chain.consumer
    if not spatial_dims(layer):
        return True
    if out_dim(layer) == 1:
        return False
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return True
    if layer.padding == "same":
        return all(size == 1 for size in layer.kernel_size)
    return not any(layer.padding)


def _replace(tensor: Tensor, dim: int, kept: Tensor) -> None:
    x = tensor.detach()
    new = x.index_select(dim, kept.nonzero().flatten().to(x.device))
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        new = new.contiguous(memory_format=torch.channels_last)
    tensor.data = new
    tensor.grad = None


def _resize(module: nn.Module, names: Sequence[str], size: int) -> None:
    for name in names:
        if name in vars(module):
            setattr(module, name, size)


def drop_gradient_nodes(modules: Iterable[nn.Module]) -> None:
    """Let parameters have gradients of their new shape though a graph of before is alive, such as that of a kept loss.

    That graph keeps the node which takes the old gradients; a parameter makes another one if its dtype changes.
    """
    for parameter in {p for module in modules for p in own_parameters(module).values()}:
        data = parameter.data
        parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
        parameter.data = data


class State:
    """The tensors and sizes of modules at a moment, to which they can be set back. Nothing is copied."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [
            (module, own_parameters(module), [(x, x.data, x.grad) for x in _tensors(module)], _sizes(module))
            for module in dict.fromkeys(modules)
        ]

    def restore(self) -> None:
        """Set them back."""
        for module, parameters, tensors, sizes in self._modules:
            for name in own_parameters(module).keys() - parameters.keys():  # a bias that a cut made
                module.register_parameter(name, None)
            vars(module).update(sizes)
            for tensor, data, grad in tensors:
                tensor.data = data
                tensor.grad = grad


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(own_tensors(module).values())


def _sizes(module: nn.Module) -> dict[str, int]:
    names = (*_OUTPUTS, *_INPUTS, "num_features")
    return {name: vars(module)[name] for name in names if name in vars(module)}


def fingerprint(modules: Iterable[nn.Module]) -> list[Any]:
    """Name, shape and a sum of the bits of every tensor of modules: it changes when one does, and not in a copy."""
    return [
        (name, tuple(x.shape), _sum_of_bits(x))
        for module in dict.fromkeys(modules)
        for name, x in own_tensors(module).items()
    ]


def _sum_of_bits(x: Tensor) -> int:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.detach().contiguous().view(integers).flatten().long()
    bits = bits * (torch.arange(1, 2 * len(bits), 2, device=x.device) * 0x5851F42D4C957F2D)  # each its own odd factor
    return int((bits ^ (bits >> 32)).sum())  # mixed, as doubling many numbers adds a multiple of 2^64 to their bits
