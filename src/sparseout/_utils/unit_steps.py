"""Kinds of layers and steps: which hold hidden units, which leave each unit apart, and where units lie in a weight."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from sparseout._utils.dataflow import Step, is_conv1d, is_metadata, reads_no_units
from sparseout._utils.modules import ACTIVATIONS, is_noise

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *_CONVS, *_TRANSPOSED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_POOLS = ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "Upsample", "UpsamplingNearest")
_ACROSS_UNITS = (nn.GLU, nn.PReLU)
# Functions of one tensor, element by element; of two; and of each channel of a map.
_POINTWISE = re.compile(
    "relu|relu6|gelu|silu|sigmoid|tanh|elu|selu|celu|leaky_relu|hardtanh|hardsigmoid|hardswish|hardshrink|softshrink|"
    "tanhshrink|softplus|softsign|logsigmoid|mish|threshold|rrelu|dropout[123]?d?|alpha_dropout|feature_alpha_dropout|"
    "sparseout|gaussian_dropout|square|abs|exp|expm1|log1p|neg|sqrt|erf|sin|cos|clamp|clamp_min|clamp_max|clip|pow|to|float|double|half|"
    "bfloat16|contiguous|clone|detach"
)
_ARITHMETIC = re.compile("add|sub|mul|div|truediv|multiply|maximum|minimum")
_POOLING = re.compile("(adaptive_)?(max|avg)_pool[123]d|interpolate")


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, whose units are the last dim."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a transposed convolution, whose weight is (inputs, outputs, ...)."""
    return type(module) in _TRANSPOSED


def spatial_dims(layer: nn.Module) -> int:
    """The number of dims of the maps of a convolution; 0 for a linear layer."""
    return 0 if is_linear(layer) else weight(layer).ndim - 2


def weight(layer: nn.Module) -> nn.Parameter:
    """The weight of a layer."""
    return layer.get_parameter("weight")


def out_dim(layer: nn.Module) -> int:
    """The dim of a layer's weight that its outputs are along."""
    return 1 if is_conv1d(layer) or is_transposed(layer) else 0


def in_dim(layer: nn.Module) -> int:
    """The dim of a layer's weight that its inputs are along."""
    return 1 - out_dim(layer)


def unit_dim(layer: nn.Module) -> int:
    """The dim of the units in what a layer reads or makes, from the end: -1, or -3 for the maps of a Conv2d."""
    return -1 - spatial_dims(layer)


def padding_sizes(convolution: Any) -> list[int]:
    """The padding of a convolution as `F.pad` takes it: before and after, from the last dim to the first."""
    if convolution.padding == "same":
        totals = [d * (k - 1) for d, k in zip(convolution.dilation, convolution.kernel_size, strict=True)]
        return [part for total in reversed(totals) for part in (total // 2, total - total // 2)]
    if convolution.padding == "valid":
        return [0] * (2 * len(convolution.kernel_size))
    return [part for part in reversed(convolution.padding) for _ in range(2)]


def module_kind(module: nn.Module) -> str:
    """Kind of a module, as hidden units see it.

    "layer" makes and reads them; "norm" keeps statistics of each; "unit" and "pool" leave each apart; "flatten" puts
    the positions of a map beside each other; "other" may do anything.
    """
    if type(module) in LAYERS or is_conv1d(module):
        return "layer"
    if type(module) in _NORMS:
        return "norm"
    if type(module) is nn.Identity or is_noise(module):
        return "unit"
    if type(module) in ACTIVATIONS and not isinstance(module, _ACROSS_UNITS):
        return "unit"
    if type(module) is nn.Flatten:
        return "flatten" if (module.start_dim, module.end_dim) == (1, -1) else "other"
    is_torch = type(module).__module__.startswith("torch.nn.")
    return "pool" if is_torch and type(module).__name__.rstrip("d123").startswith(_POOLS) else "other"


def step_kind(step: Step) -> str:
    """The kind of a step, as of a module, or "metadata" for what does not depend on the units."""
    if step.module is not None:
        kind = module_kind(step.module)
        return kind if len(step.inputs) == 1 or kind == "layer" else "other"
    if reads_no_units(step):
        return "metadata"
    if not isinstance(step.function, str) and not _is_torch(step.function):
        return "other"
    if _flatten_dims(step):
        return "flatten"
    if "out" in step.kwargs or step.kwargs.get("return_indices"):
        return "other"
    name, alone = step.function_name, len(step.inputs) == 1
    if _ARITHMETIC.fullmatch(name) or (_POINTWISE.fullmatch(name) and alone):
        return "unit"
    return "pool" if _POOLING.fullmatch(name) and alone else "other"


def flattens_units(step: Step, spatial: int) -> bool:
    """Whether the units of maps of so many dims are along the last dim after this step, each in a block or alone."""
    dims = _flatten_dims(step)
    if isinstance(dims, set):
        return {dim % (spatial + 2) for dim in dims} == set(range(2, spatial + 2))
    return dims == "all"


def mixes_positions(step: Step) -> bool:
    """Whether it makes of several positions of a map one."""
    return step_kind(step) == "pool" or isinstance(_flatten_dims(step), set)


def _is_torch(function: Any) -> bool:
    home = getattr(function, "__module__", None) or "torch"
    return home.split(".")[0] in ("torch", "_operator") or home in (
        "sparseout.functional",
        "sparseout.baselines.gaussian",
    )


def _flatten_dims(step: Step) -> str | set[int] | None:
    """The positions of a map that a step takes away: "all" become columns, or these dims are reduced."""
    args = step.args[1:]
    if step.module is not None:
        return "all" if module_kind(step.module) == "flatten" else None
    if step.function_name == "flatten":
        start = args[0] if args else step.kwargs.get("start_dim", 0)
        end = args[1] if len(args) > 1 else step.kwargs.get("end_dim", -1)
        return "all" if (start, end) == (1, -1) else None
    if step.function_name in ("view", "reshape") and not step.kwargs:
        sizes = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
        return "all" if len(sizes) == 2 and sizes[1] == -1 and is_metadata(sizes[0]) else None
    if step.function_name in ("mean", "sum", "amax") and not step.kwargs.get("keepdim") and len(args) < 2:
        dims = args[0] if args else step.kwargs.get("dim")
        dims = (dims,) if isinstance(dims, int) else dims
        return set(dims) if isinstance(dims, (tuple, list)) and all(isinstance(d, int) for d in dims) else None
    return None
