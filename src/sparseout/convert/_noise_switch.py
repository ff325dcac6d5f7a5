"""The noise of a model on or off, in training and in evaluation."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from threading import RLock
from typing import Any

import torch
from torch import nn

from sparseout._utils.compiler import reset_compiler
from sparseout._utils.modules import check_model, is_noise, named_modules, select
from sparseout._utils.tracing import runs_own_code, trace, untouched_random_state
from sparseout._utils.validation import expected, type_name
from sparseout.convert._functional_dropout import unreached

_RECORD = "_noise_switch"  # the attribute of a module whose noise is switched
_NAMES = re.compile("drop|noise|bridgeout|shakeout|stochasticdepth|zoneout", re.IGNORECASE)
_INSIDE = (nn.RNNBase, nn.MultiheadAttention)  # with dropout among other things, whose p is an attribute
# In evaluation these pass over the layers in them to one function without noise, or make nested tensors for it.
_FAST_PATHS = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


def noise_(model: nn.Module, enabled: bool | None) -> None:
    r"""Switches all noise of a model on or off, whether it trains or is evaluated.

    With :math:`f(x)` what a layer computes in evaluation and :math:`f(x) + n` what it computes in training, such as
    :math:`n = \beta \operatorname{sign}(x) |x|^{q/2} \xi` of :class:`Sparseout`, it now computes

    .. math:: y = f(x) + s \, n

    with s = 1 if `enabled` is True, s = 0 if it is False, and s as the layer's flag ``training`` has it if it is None.
    ``noise_(model.eval(), True)`` is for Monte-Carlo passes, in which batch norm and all else stays in evaluation;
    ``noise_(model.train(), False)`` for training without noise. ``train()`` and ``eval()`` do not change it, nor do
    copying and pickling; flags, parameters and the keys of ``state_dict()`` stay as they are. Monitor and controller
    go by the flags: a Monte-Carlo pass in evaluation counts as evaluation. Threads that share a model take turns in
    what is switched.

    Switched are Sparseout layers, whether built, converted or inserted; ``nn.Dropout`` of every kind and classes
    derived from it; layers without children whose class name contains drop or noise, such as ``DropPath``;
    ``nn.RReLU``; :class:`sparseout.baselines.GaussianDropout`, Bridgeout and Shakeout; the dropout inside ``nn.LSTM``,
    ``nn.GRU``, ``nn.RNN``, ``nn.MultiheadAttention`` and transformer layers; and modules whose own forward calls a
    dropout function, which then runs as if their flag were other than it is. Not switched is noise that does not go by
    the flag ``training``, such as ``F.dropout(x)``, what a forward draws by ``torch.rand`` or the like, and what
    TorchScript has compiled. k-winners are not noise. Not for ``nn.DataParallel`` on several devices, whose copies of a
    module would all use the first one.

    Args:
        model: any module.
        enabled: True: noise in evaluation too. False: none in training either. None: as usual.

    Raises:
        TypeError: for an argument of another type.

    Warns:
        UserWarning: if the model has no noise, or some of it is compiled by TorchScript.

    Example:
        >>> import torch, sparseout
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), sparseout.Sparseout(q=1.5)).eval()
        >>> x = torch.rand(1, 8)
        >>> sparseout.noise_(model, True)
        >>> torch.stack([model(x) for _ in range(20)]).std(dim=0).min() > 0
        tensor(True)
        >>> sparseout.noise_(model, None)
        >>> bool((model(x) == model(x)).all())
        True

    Source: Gal & Ghahramani (2016), Dropout as a Bayesian approximation: representing model uncertainty in deep
    learning, for the use of Monte-Carlo passes.
    """
    check_model(model)
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(expected("enabled", "True, False or None", type_name(enabled)))
    modules = _noisy(model)
    changed = [_set(module, enabled) for module in modules]
    if any(changed):
        reset_compiler()
    if not modules and enabled is not None:
        warnings.warn(f"no noise was switched: the {type(model).__name__} has none that was found", stacklevel=2)


class NoiseSwitch:
    """The forward of a module whose noise is switched: that of its class, with other attributes while it runs.

    It is an attribute of the module, called inside its hooks, which therefore see the flag `training` unchanged.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Any = vars(module).get("forward")  # another's, such as that of accelerate's hooks
        self.enabled: bool | None = None
        self._lock = RLock()  # a thread would take what another has set for the module's own

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=RLock())

    @property
    def follows_class(self) -> bool:
        """Whether the class of the module still decides what is computed."""
        return self.inner is None

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the forward that it stands for, since some read the names of a model's inputs from it."""
        return inspect.signature(self._forward())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.enabled is None:
            return self._run(args, kwargs)
        with self._lock:
            return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Any:
        module = self.module
        before = {name: getattr(module, name) for name in self._attributes()}
        for name, value in self._attributes().items():
            setattr(module, name, value)
        try:
            return self._forward()(*args, **kwargs)
        finally:
            for name, value in before.items():
                setattr(module, name, value)

    def _forward(self) -> Any:
        return functools.partial(type(self.module).forward, self.module) if self.inner is None else self.inner

    def _attributes(self) -> dict[str, Any]:
        if self.enabled is None:
            return {}
        if isinstance(self.module, nn.TransformerEncoder):
            return {"use_nested_tensor": False} if self.enabled else {}
        if isinstance(self.module, nn.TransformerEncoderLayer):
            return {"training": True} if self.enabled else {}
        if isinstance(self.module, _INSIDE) and not self.enabled:
            return {"dropout": 0.0}  # and not the flag, without which cuDNN cannot go backward
        return {"training": self.enabled}


def _noisy(model: nn.Module) -> list[nn.Module]:
    """The modules that have noise of their own."""
    modules = select(dict(named_modules(model)), None)
    by_class = {name for name, module in modules.items() if _is_noisy(module)}
    with untouched_random_state():
        graphs = {module: trace(module) for module in modules.values() if runs_own_code(module)}
    calls = unreached(model, graphs, ())
    scripted = [name for name in calls if isinstance(modules[name], torch.jit.ScriptModule)]
    if scripted:
        warnings.warn(f"noise compiled by TorchScript stays as it is: {', '.join(scripted)}", stacklevel=3)
    return [module for name, module in modules.items() if name in by_class | calls.keys() and name not in scripted]


def _is_noisy(module: nn.Module) -> bool:
    named = _NAMES.search(type(module).__name__) and next(module.children(), None) is None
    types = (*_INSIDE, *_FAST_PATHS, nn.RReLU)
    return is_noise(module) or isinstance(module, types) or bool(named)


def _set(module: nn.Module, enabled: bool | None) -> bool:
    """Switch a module. Returns whether a forward was put on it or removed."""
    switch: NoiseSwitch | None = vars(module).get(_RECORD)
    forward = vars(module).get("forward")
    if switch is not None and enabled is not None and _is_in(switch, forward):
        switch.enabled = enabled
        return False
    if switch is not None:
        inner, switch.enabled = switch.inner, None  # wherever it may still be
        del vars(module)[_RECORD]
        if forward is switch:
            del vars(module)["forward"]
            if inner is not None:
                vars(module)["forward"] = inner
    if enabled is not None:
        new = NoiseSwitch(module)
        new.enabled = enabled
        vars(module).update({_RECORD: new, "forward": new})
    return switch is not None or enabled is not None


def _is_in(switch: NoiseSwitch, forward: Any) -> bool:
    """Whether it is this forward or one that this forward wraps; other code may have removed it."""
    while forward is not None and forward is not switch:
        forward = getattr(forward, "__wrapped__", None)
    return forward is switch
