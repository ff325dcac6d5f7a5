r"""A controller that moves a knob while a network trains, until its activations are as sparse as wanted."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparseout._utils.activations import UnitDim, UnitTracker
from sparseout._utils.compiler import reset_compiler
from sparseout._utils.distributed import Group, check_group, check_replicas, data_parallel_group, is_distributed
from sparseout._utils.modules import Modules, check_model, named_modules, unwrapped
from sparseout._utils.revival import revive_units
from sparseout._utils.validation import check_bool, check_choice, check_int, check_positive, expected, type_name
from sparseout.baselines import ActivityPenalty
from sparseout.control._arguments import check_equal, state_of_groups, targets_of
from sparseout.control._knob_protocol import Knob, bounds_of
from sparseout.control._law import Law
from sparseout.control._layer_group import LayerGroup, idle_messages, listed
from sparseout.control._measure_specs import Goal, scale_of
from sparseout.control._measurement import Accumulator, Eps, load_sums, read, state_of_sums
from sparseout.control._probe import check_probe, probed, run_probe
from sparseout.control.knobs import LayerKnob, StrengthKnob, hold, knobs_of
from sparseout.measures._functions import check_eps

__all__ = ["SparsityController"]


class SparsityController:
    r"""Moves a knob during training until activations are as sparse as wanted.

    The knob is q or p of noise layers, k of k-winners layers, the strength of a penalty, or one of your own. It is
    moved on its natural scale x: q itself, the logarithm of a strength or of k, the logarithm of p / (1 - p). A knob
    that makes activations denser as it rises is moved once in `every` steps by

    .. math:: x \leftarrow x + K\,(e_t - e_{t-1} + e_t / T) + v_t

    and other knobs the other way. e is the excess of sparsity over the target, measured since the last update, as an
    exponential moving average of weight 1/4. This is a proportional-integral law in velocity form: the first term
    responds to a change at once; the second, left out inside the dead-band, removes the remaining error. v is the
    average step of some 40 updates, at most a quarter of `max_step`: it keeps up with a network that works against the
    knob. An update moves x by at most `max_step`, and by half of that towards sparser activations while far from the
    target, since dead units do not recover. In the first 8 updates the knob moves back and forth by 2% of its range:
    where the measure responds at once, as to k, K and T are lowered accordingly. K is halved where it proves too large.

    **Where it measures**: at the input of Sparseout and Dropout layers, at the output of k-winners layers, where a
    penalty penalises, and where a knob of your own says; as means over samples of the measure over units.

    **Training or evaluation.** Networks are used in evaluation mode, where activations differ from those in training if
    there is noise in earlier layers. So the target applies to evaluation wherever evaluation is seen: in passes of the
    model in evaluation mode, such as those over a validation set, or with `probe`. Between them the measure in training
    is used, corrected by the difference of the two when last seen. Without any evaluation the target applies to
    training. `report` says which it is, and what the other was. `mode` fixes it.

    Dead units make activations look sparse; ``measure="hoyer_live"`` leaves them out. Rows that
    :class:`sparseout.row_mask` masks do not count. Give Sparseout layers ``scale="matched"``, so that q changes the
    shape of the noise and not its strength.

    Warnings, repeated by `report`, say that a target is out of reach, because the knob has been at a bound for 50
    updates or because dead units rule the target out, with the closest value, until it is met after all; that
    activations are NaN or infinite, which do not move the knob; and that no training pass was seen in 5 updates, or
    none of a layer with a knob of its own.

    While a controller is attached it owns the knob: what :func:`sparseout.set_q_` writes is overwritten at the next
    update. A later controller of the same knob on the same layers takes them over, with a warning. A model can be
    copied and pickled with its controller; in a copy without it nothing is measured. Names of layers are those of the
    written model, without the wrappers of `torch.compile`, `DistributedDataParallel` and the like, so that a state fits
    with and without them. While a controller holds them, q, p, k and strengths are 0-d tensors, which change under
    `torch.compile` without recompilation. torch's own Dropout layers are recompiled whenever p changes: for
    ``knob="p"`` convert them first, by ``convert_dropout_(model, q=2)``, which computes the same.

    Args:
        model: a model with at least one layer that has the knob.
        target: the wanted value of `measure`; with `per_layer` it may be a mapping from layer names to values.
        measure: ``"hoyer"``, ``"hoyer_live"`` (over units that are not dead), ``"gini"``, ``"treves_rolls"``,
            ``"sparsity"``, ``"density"`` (the fraction of active units) or ``"kurtosis"``.
        knob: ``"q"`` of Sparseout layers; ``"p"`` of Sparseout, Dropout and GaussianDropout layers; ``"k"``, as a
            fraction, of KWinners (`k_eval` keeps its ratio to it) and StatisticalTopK layers; a
            :class:`sparseout.baselines.ActivityPenalty`, whose strength is moved; an object as
            :class:`sparseout.Knob` describes, or with `per_layer` a sequence of such objects.
        mode: ``"train"`` or ``"eval"``: the mode of the layers in which the target is to be met, whatever is seen of
            the other; with ``"eval"`` an update without an evaluation pass leaves the knob as it is. None: as above.
        probe: a batch on which the model is called in evaluation mode, without gradients, at every update: a tensor, a
            tuple of arguments, or a mapping of keyword arguments. Only it counts as evaluation then. Its rows are those
            that its own `attention_mask` keeps, if it has one, whatever block of `row_mask` is open. Modes, buffers,
            random numbers and autocast are left as they were, and monitors do not count the pass.
        modules: dotted names or types of the layers to control, or a function of name and layer; None: all.
        per_layer: each layer has its own value of the knob and its own target. Otherwise all layers have one value, at
            first their mean, and the mean over layers is measured. A tensor for q that is shared with a layer of
            another q is replaced by a new one.
        every: steps between updates. Each update waits for the device once.
        bounds: the least and the greatest value; None: 1 to 4 for q, .01 to .95 for p, .005 to .95 for k, a thousandth
            to a thousand times the strength at first, or those of your own knob.
        deadband: errors up to this size count as none for the integral term.
        gain: K, the change of x per unit of error (of q itself, and of logarithms of the others); None: at most 12
            times the range of x, less where the first updates show that the measure responds at once.
        delay: T, updates over which the integral term repeats the proportional one.
        max_step: the most by which an update moves x; None: a thirtieth of its range.
        eps: values up to this magnitude count as zero, for sparsity, density and dead units: GELU, SiLU and tanh have
            hardly any exact zeros.
        relative: `eps` is in units of a row's root mean square.
        unit_dim: dimension of the units where the module that made an activation does not tell: an int, a mapping from
            names or types of modules to ints, or a function of name, module and tensor.
        revive: units that were dead in 50 updates get fresh weights, as from :func:`sparseout.revive_`; pass the
            optimizer to clear its state of them too. Only for knobs that act through training: units that k-winners
            leave out are not dead.
        group: process group over which measurements are summed; None: that of the data-parallel wrapper around the
            model, else all processes, which must have equal parameters then.

    Raises:
        ValueError: if the model has no layer with the knob, or a value is out of range.
        TypeError: for an argument of another type.

    Example:
        >>> import torch, sparseout
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 32), torch.nn.ReLU(), sparseout.Sparseout(q=2.5, scale="matched"),
        ...     torch.nn.Linear(32, 8),
        ... )
        >>> controller = sparseout.SparsityController(model, target=0.6)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> for _ in range(100):
        ...     x = torch.rand(16, 8)
        ...     loss = (model(x) - x).square().mean()
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...     controller.step()
        >>> controller.q["2"] < 2.5
        True

    Source: Astrom & Hagglund (2006), Advanced PID Control: section 3.4 for the law, 2.7 for the gain of a process that
    responds at once; Khan & Stavness (2019) for q.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float | Mapping[str, float],
        measure: str = "hoyer",
        *,
        knob: str | ActivityPenalty | Knob | Sequence[Knob] = "q",
        mode: str | None = None,
        probe: Any = None,
        modules: Modules | None = None,
        per_layer: bool = False,
        every: int = 10,
        bounds: tuple[float, float] | None = None,
        deadband: float = 0.002,
        gain: float | None = None,
        delay: float = 20.0,
        max_step: float | None = None,
        eps: float = 0.0,
        relative: bool = False,
        unit_dim: UnitDim = None,
        revive: bool | Optimizer = False,
        group: Group | None = None,
    ) -> None:
        scale_of(measure)
        if mode is not None:
            check_choice("mode", mode, ("train", "eval"))
        probe_mask = check_probe(probe)
        if probe is not None and mode == "train":
            raise ValueError(expected("mode", "None or 'eval' beside a probe, which is evaluated", repr(mode)))
        check_model(model)
        check_eps(eps, relative)
        written = unwrapped(model)
        knobs = knobs_of(written, knob, modules, check_bool("per_layer", per_layer))
        sites = {name: (tensor, moved.name) for moved in knobs for name, tensor in moved.sites.items()}
        targets = targets_of(target, measure, list(sites), per_layer)
        self.measure, self.mode, self.every = measure, mode, check_int("every", every, 1)
        layer_knob = knobs[0].name if isinstance(knobs[0], LayerKnob) else ""  # a user's may have any name
        self.bounds = None if bounds is None else bounds_of("bounds", bounds, knobs[0].scale, layer_knob)
        self.deadband = check_positive("deadband", deadband, zero=True)
        self.gain = None if gain is None else check_positive("gain", gain)
        self.delay = check_positive("delay", delay)
        self.max_step = None if max_step is None else check_positive("max_step", max_step)
        if unit_dim is None and isinstance(knob, ActivityPenalty):
            unit_dim = knob.unit_dim
        if not isinstance(revive, (bool, Optimizer)):
            raise TypeError(expected("revive", "a bool or the optimizer", type_name(revive)))
        self._revive = revive
        self._model, self._probed, self._tracker = written, probed(model), UnitTracker(written, unit_dim)
        check_group(group)
        self._process_group = data_parallel_group(model) if group is None and is_distributed() else group
        self._compared = False  # with the controllers of other processes
        self._steps, self._probe, self._probe_mask = 0, probe, probe_mask
        self._groups = [
            LayerGroup.start(moved, Goal(measure, targets[next(iter(moved.sites))]), mode, self.bounds, gain is None)
            for moved in knobs
        ]
        zero = Eps(eps, relative)
        self._accumulators = {
            name: Accumulator(name, tensor, knob_name, measure, zero, self._tracker, after_training=mode is None)
            for name, (tensor, knob_name) in sites.items()
        }
        lost = self._attach()
        hold(written, knobs)
        for group_of_layers in self._groups:
            group_of_layers.apply()
        reset_compiler()
        if lost:
            message = f"another controller has lost {listed(lost)} to this one and can no longer be stepped"
            warnings.warn(f"{message}: detach it first", stacklevel=2)
        if idle := [name for moved in knobs if isinstance(moved, LayerKnob) for name in moved.without_effect()]:
            warnings.warn(f"q has no effect where p is 0 or 1, as it is in {listed(idle)}", stacklevel=2)

    @property
    def values(self) -> dict[str, float]:
        """The current value of the knob by the dotted name of every module that is measured."""
        return {name: group.value for group in self._groups for name in group.sites}

    @property
    def q(self) -> dict[str, float]:
        """The current q of every layer, by dotted name: `values`, where the knob is q."""
        if (name := self._groups[0].knob.name) != "q":
            raise AttributeError(f"this controller moves {name}, not q: see `values`")
        return self.values

    @property
    def measured(self) -> dict[str, float | None]:
        """The measure that is to meet the target, at the last update, by module; of modules with one knob, the mean.

        In evaluation, where that counts, it is measured, or expected from training and the last difference of the two.
        """
        return {name: group.measured for group in self._groups for name in group.sites}

    def step(self) -> None:
        """Count a step of the optimizer; after every `every` of them, update the knob.

        With several processes (`torch.distributed`) measurements are summed over them, so all must call it alike.

        Raises:
            RuntimeError: after `detach`, and if a layer was reverted or taken over by another controller; on all
                processes, if their controllers differ, as after one of them alone has loaded a state.
            ValueError: on all processes, if they have different models and `group` was not given.
        """
        self._check_attached()
        first, self._compared = not self._compared, True
        if first or (self._steps + 1) % self.every == 0:
            self._check_processes(first)
        self._steps += 1
        if self._steps % self.every:
            return
        if self._probe is not None:
            for accumulator in self._accumulators.values():
                accumulator.begin_probe()
            run_probe(self._probed, self._probe, self._probe_mask)
        measurements = read(list(self._accumulators.values()), self._device(), self._process_group)
        messages = []
        for group in self._groups:
            training, evaluation = (
                {source: value for source, value in measurements[mode].items() if source[0] in group.knob.sites}
                for mode in (True, False)
            )
            law = Law.over(group.axis.ends, self.gain, self.delay, self.deadband, self.max_step)
            messages += group.update(training, evaluation, law)
        if self._revive:
            dead = {site: units for group in self._groups for site, units in group.take_dead().items()}
            revive_units(self._model, dead, None if self._revive is True else self._revive, self._process_group)
        for message in messages + idle_messages(self._groups, self.mode, self.every):
            warnings.warn(message, stacklevel=2)

    def report(self) -> list[str]:
        """A sentence for each knob: its value, the measured sparsity, and why the target is out of reach, if it is."""
        sentences = []
        for group in self._groups:
            unmasked = [name for name in group.sites if self._accumulators[name].unmasked]
            masked = f"; the row mask does not fit {listed(unmasked)}, where all rows count" if unmasked else ""
            sentences.append(group.report() + masked)
        return sentences

    def detach(self) -> None:
        """Remove the hooks. The knob keeps its value, as a float; `step` raises from then on."""
        self._tracker.detach()
        for accumulator in self._accumulators.values():
            accumulator.hooks.remove()
        for group in self._groups:
            if isinstance(group.knob, (LayerKnob, StrengthKnob)):
                group.knob.release(group.value)
        reset_compiler()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue as if training had not been interrupted."""
        return {
            "measure": self.measure,
            "mode": self.mode,
            "knob": self._groups[0].knob.name,
            "steps": self._steps,
            **state_of_sums(list(self._accumulators.values()), self.mode),
            "groups": {"+".join(group.sites): group.state() for group in self._groups},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; with another target, from the value of the knob in the state.

        Raises:
            ValueError: for a state of another measure, knob or mode or of other layers, or that is not of a controller.
            TypeError: if it is not a mapping. Nothing is changed then.
        """
        names = ["+".join(group.sites) for group in self._groups]
        groups = state_of_groups(state, self.measure, self.mode, self._groups[0].knob.name, names)
        if not (self._compared and is_distributed()):  # all processes update at the same calls, whoever loads a state
            self._steps = state["steps"]
        load_sums(list(self._accumulators.values()), state, self.mode, self._device())
        for group, saved in zip(self._groups, groups, strict=True):
            group.load(saved)
            group.apply()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process_group": None, "_compared": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_eyes" in state:
            wanted = "one of this version: build a new one, whose load_state_dict takes states of the first version"
            raise RuntimeError(expected("the pickled controller", wanted, "one of the first version"))
        self.__dict__ |= state
        self._attach()

    def _attach(self) -> list[str]:
        """Put the hooks on the model. Returns the modules that other controllers lost."""
        self._tracker.attach()
        modules = dict(named_modules(self._model))
        return [name for name, accumulator in self._accumulators.items() if accumulator.attach(modules[name])]

    def _check_attached(self) -> None:
        for group in self._groups:
            if isinstance(group.knob, LayerKnob):
                group.knob.check()
        for name, accumulator in self._accumulators.items():
            if not accumulator.hooks:
                got = f"one that was detached, or that gave `{name}` to a later one"
                raise RuntimeError(expected("controller", "on its layers", got))

    def _check_processes(self, first: bool) -> None:
        """Raise, on all processes, if their controllers differ: each would move its knob elsewhere."""
        if not is_distributed():
            return
        if first and self._process_group is None:
            check_replicas(self._model)
        names = ("measure", "mode", "every", "bounds", "deadband", "gain", "delay", "max_step")
        values = {name: getattr(self, name) for name in names} | {"steps": self._steps}
        values |= {"probe": self._probe is not None, "revive": self._revive is not False}
        for group in self._groups:
            knob = {group.knob.name: group.value, "target": group.goal.target, "error": group.error}
            values |= {f"{name} of {group.names}": value for name, value in knob.items()}
        check_equal(values, self._process_group)

    def _device(self) -> torch.device:
        return next((tensor.device for tensor in self._model.parameters()), torch.device("cpu"))
