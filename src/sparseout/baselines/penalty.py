"""Penalty on the activations of a model, collected while it runs, to be added to the loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparseout._utils.activations import UnitDim, UnitTracker, check_unit_dim, first_tensor
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.hooks import DeadHook, Hooks
from sparseout._utils.modules import HookPoint, Modules, check_model, choose, is_activation, unwrapped
from sparseout._utils.torch_internals import in_backward, is_recorded, is_sharded, is_transformed, transforms_active
from sparseout._utils.validation import check_int, check_positive, expected
from sparseout.baselines.penalty_terms import EPS, check_target, kl_term, lq_term


class ActivityPenalty:
    r"""Collects a penalty on the activations of a model while it runs in training, to be added to the loss.

    .. math::
        R = \sum_l \lambda_l R_l

    with :math:`R_l` the :func:`sparseout.baselines.lq_penalty` or the :func:`sparseout.baselines.kl_penalty` of one
    watched module's output. With `warmup`, R is multiplied by min(1, t / warmup) in step t = 0, 1, 2, ..., so that a
    strong penalty does not kill units of a network that is still untrained. A with-block, or :meth:`attach` and
    :meth:`detach`; in each step :meth:`loss` returns R and resets it. If a module is called several times before that,
    its terms add up. Nothing is collected from modules in evaluation mode or while gradients are
    off, nor from what activation checkpointing computes again, nor in a pass that is traced or exported. So
    ``checkpoint(use_reentrant=True)``, which runs the forward without gradients, leaves nothing to collect: a warning
    says so. Under ``torch.compile(fullgraph=True)`` a model with checkpointing needs
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``.

    Activations may be overwritten by the next module, such as ``nn.ReLU(inplace=True)``: what backward needs of them is
    copied, unless the watched module keeps its output for its own backward (ReLU, sigmoid, tanh). A copy of the model,
    or one that was pickled, is not penalised. Names are those of the model that was written, without what
    ``torch.compile``, ``DistributedDataParallel`` and the like put around it or around its parts.

    Args:
        model: the module that is run.
        modules: what to watch: a function (name, module) -> bool, or a collection of dotted names or of types, each at
            its output (its first floating-point tensor), dropout-like layers at their input. By default all activation
            modules, of torch or by the name of their class, or those that `strength` names.
        strength: :math:`\lambda`, a finite number >= 0 in units of the loss over those of the penalty, for all modules;
            or {dotted name: number}, one for each watched module.
        q: exponent of the L_q^q penalty; 1 if neither `q` nor `target` is given.
        eps: where that is smoothed, in the unit of the activations: 1e-3 if not given.
        target: in place of `q` and `eps`: the mean activation towards which the KL penalty draws every unit.
        unit_dim: where units lie: an int for all modules; a mapping from their names or types to ints; or a function
            (name, module, tensor) that gives an int or None. Where it says nothing, they lie where the module that made
            the activation puts them (last for a Linear, at dim 1 for a convolution), else as in
            :func:`sparseout.baselines.lq_penalty`.
        warmup: steps over which the strength rises linearly from 0, an int >= 0. A step is a call of :meth:`loss` that
            finds something collected. Their number is in :meth:`state_dict`.

    Raises:
        ValueError: for a value out of range, for `target` beside `q` or `eps`, if the names in `strength` are not those
            of the watched modules, or if there is nothing to watch.
        TypeError: for an argument of another type; later, for a watched output without a floating-point tensor.
        RuntimeError: from :meth:`loss`, if it was never attached, or if detaching dropped what it had collected.

    Warns:
        UserWarning: once, in backward, if what checkpoint(use_reentrant=True) ran was not collected.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> x = torch.rand(16, 4)
        >>> with ActivityPenalty(model, strength=1e-3, q=1.0) as penalty:
        ...     loss = (model(x) - x).square().mean() + penalty.loss()
        >>> loss.backward()

    Source: Glorot, Bordes & Bengio (2011), Deep sparse rectifier neural networks, section 3.3, for L1 on activations;
    for its warm-up Conerly et al. (2024), Update on how we train SAEs, Transformer Circuits, where it takes 5% of
    training; for the KL penalty see :func:`sparseout.baselines.kl_penalty`.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Modules | None = None,
        *,
        strength: float | Mapping[str, float] = 1e-3,
        q: float | None = None,
        eps: float | None = None,
        target: float | None = None,
        unit_dim: UnitDim = None,
        warmup: int = 0,
    ) -> None:
        check_model(model)
        check(strength=strength, q=q, eps=eps, target=target, unit_dim=unit_dim, warmup=warmup)
        self.strength: Any = strength  # a controller puts tensors there
        self.q, self.eps, self.target, self.unit_dim, self.warmup = q, eps, target, unit_dim, warmup
        with torch.inference_mode(False):  # a tensor, as compiled code would guard on a number
            self._steps = torch.zeros(1, dtype=torch.int64, device="cpu")
        if modules is None:
            modules = list(strength) if isinstance(strength, Mapping) else _activations
        self._sites = choose(model, modules)
        if isinstance(strength, Mapping) and {point.name for point in self._sites} != set(strength):
            wanted = f"of the watched modules, {', '.join(repr(point.name) for point in self._sites)}"
            raise ValueError(expected("strength", f"one number for each {wanted}", f"names {', '.join(strength)}"))
        self._units = UnitTracker(unwrapped(model), unit_dim)
        self._hooks = Hooks()
        self._terms: list[Tensor] = []
        self._recomputed: list[Tensor | None] = []  # of each term, whether compiled code added it in backward
        self._attached = self._warned = False
        self._without_grad: set[str] = set()  # sites that ran in training without gradients, as a checkpoint may

    @property
    def sites(self) -> dict[str, HookPoint]:
        """The watched modules, by dotted name: the module, and whether its ``"input"`` or its ``"output"``."""
        return {point.name: point for point in self._sites}

    def attach(self) -> Self:
        """Start collecting. Returns the penalty itself."""
        self._attached = True
        if not self._hooks:
            self._units.attach()
            for point in self._sites:
                # an input before the call, which may overwrite it
                hook = self._hooks.before if point.tensor == "input" else self._hooks.after
                hook(point.module, self._collect, point)
            reset_compiler()
        return self

    def detach(self) -> None:
        """Remove all hooks from the model, and what was collected: ask for :meth:`loss` before."""
        self._attached = self._attached and not self._terms
        self._terms, self._recomputed = [], []
        if self._hooks:
            self._hooks.remove()
            self._units.detach()
            reset_compiler()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.detach()

    def loss(self) -> Tensor:
        """The penalty collected since the last call, a 0-d tensor; 0 if there is none, as in evaluation."""
        if not self._attached:
            wanted, got = "attached, by attach() or a with-block", "one that never was or no longer is"
            raise RuntimeError(expected("penalty", wanted, got))
        terms, recomputed, self._terms, self._recomputed = self._terms, self._recomputed, [], []
        if not torch.compiler.is_compiling():
            # Of what compiled code collected it is known only now whether a checkpoint computed it again.
            terms = [term for term, flag in zip(terms, recomputed, strict=True) if flag is None or not flag]
            if not transforms_active() and any(map(is_transformed, terms)):
                wanted = "called in the vmap or grad that the model ran in"
                raise RuntimeError(expected("penalty.loss()", wanted, "called after it"))
        if not terms:
            return torch.zeros((), device="cpu")
        total = torch.stack(terms).sum()
        if self.warmup:
            total = total * torch.ops.sparseout.warmup_factor(self._steps, self.warmup)
            self._steps.add_(1)
        return total

    def state_dict(self) -> dict[str, int]:
        """The number of steps so far, by which the warm-up goes on in a training that is resumed."""
        return {"steps": int(self._steps)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a state of :meth:`state_dict`. Raises: KeyError, TypeError, ValueError."""
        self._steps.fill_(check_int("steps", state["steps"], 0))

    def _collect(self, point: HookPoint, module: nn.Module, args: Any, more: Any) -> None:
        """Add the term of a call: a hook's, on inputs with `more` keyword arguments, on outputs with the output."""
        if not module.training:
            return
        eager = not torch.compiler.is_compiling()
        if not torch.is_grad_enabled():
            if eager:
                self._without_grad.add(point.name)
            return
        value = (args, more) if point.tensor == "input" else more
        x = first_tensor(value)
        if x is None:
            wanted = f"a floating-point tensor of at least one dimension as {point.tensor}"
            raise TypeError(expected(point.name or "model", f"a module with {wanted}", "one without"))
        if is_recorded((x,)) if eager else torch.compiler.is_exporting():
            return  # no values are computed, or what is computed is written down
        term = self._term(point, x)
        if not eager or not in_backward():  # else computed all the same, since a checkpoint counts what is saved
            self._terms.append(term)
            self._recomputed.append(None if eager else torch.ops.sparseout.in_backward(term.detach()))
            if eager:
                self._without_grad.discard(point.name)
        elif point.name in self._without_grad and not self._warned:
            self._warned = True
            remedy = "which runs forward without gradients: use_reentrant=False collects it"
            penalty = f"the penalty of {point.name or 'the model'} was not collected"
            warnings.warn(f"{penalty} under checkpoint(use_reentrant=True), {remedy}", stacklevel=2)

    def _term(self, point: HookPoint, x: Tensor) -> Tensor:
        dim = self._units.dim(point.name, point.module, x)
        if x.is_nested:
            x, dim = torch.cat([part.movedim(dim - 1, -1).flatten(0, -2) for part in x.unbind()]), -1
        strength = self.strength[point.name] if isinstance(self.strength, Mapping) else self.strength
        if isinstance(strength, Tensor):  # that a controller moves, perhaps before backward
            strength = strength.clone()
        if self.target is not None:
            term = kl_term(x, self.target, dim)
        else:
            kept = point.tensor == "output" and type(point.module) in _KEEP_OUTPUT
            term = lq_term(x, 1.0 if self.q is None else self.q, EPS if self.eps is None else self.eps, dim, not kept)
        weighted: Any = strength * term
        return weighted.full_tensor() if is_sharded(weighted) else weighted  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """The attributes of a copy, which is attached to nothing: the hooks in a copied model are dead."""
        return vars(self) | {"_terms": [], "_recomputed": [], "_attached": False, "_without_grad": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes of a copy, or those of the first version, which had fewer."""
        new = {"_units": UnitTracker(nn.Identity(), state["unit_dim"]), "_hooks": Hooks(), "_warned": False}
        new |= {"warmup": 0, "_steps": torch.zeros(1, dtype=torch.int64, device="cpu")}
        vars(self).update(new | state | {"_terms": [], "_recomputed": [], "_attached": False, "_without_grad": set()})


class _Hook(DeadHook):
    """The remains of the hook in a model that the first version pickled."""

    after = DeadHook.__call__


# In these backward needs the output, which nobody overwrites then.
_KEEP_OUTPUT = (nn.ReLU, nn.Sigmoid, nn.Tanh)


_library = torch.library.Library("sparseout", "FRAGMENT")
_library.define("in_backward(Tensor term) -> Tensor")
_library.impl("in_backward", lambda term: torch.tensor(in_backward(), device="cpu"), "CompositeExplicitAutograd")
# An op, as the compiler would compute it again for backward, from the steps that are one more by then.
_library.define("warmup_factor(Tensor steps, int warmup) -> Tensor")
_library.impl("warmup_factor", lambda steps, warmup: (steps / warmup).clamp(max=1)[0], "CompositeExplicitAutograd")
torch.library.register_fake(
    "sparseout::warmup_factor", lambda steps, warmup: steps.new_empty((), dtype=torch.float32), lib=_library
)
torch.library.register_fake(
    "sparseout::in_backward", lambda term: torch.empty((), dtype=torch.bool, device="cpu"), lib=_library
)


def _activations(name: str, module: nn.Module) -> bool:
    return is_activation(module)


def check(
    strength: Any = 1e-3, q: Any = None, eps: Any = None, target: Any = None, unit_dim: Any = None, warmup: Any = 0
) -> dict[str, Any]:
    """The arguments of an :class:`sparseout.baselines.ActivityPenalty`, if they are right."""
    for value in strength.values() if isinstance(strength, Mapping) else (strength,):
        check_positive("strength", value, zero=True)
    for name, value in (("q", q), ("eps", eps)):
        if value is not None:
            check_positive(name, value)
            if target is not None:
                raise ValueError(expected(name, "left out, as `target` asks for the KL penalty", value))
    if target is not None:
        check_target(target)
    check_unit_dim(unit_dim)
    check_int("warmup", warmup, 0)
    checked = {"strength": strength, "q": q, "eps": eps, "target": target, "unit_dim": unit_dim, "warmup": warmup}
    return {name: value for name, value in checked.items() if name != "warmup" or value}
