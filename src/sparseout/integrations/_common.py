"""Training session: a monitor and a controller on a model while it trains, and the base class of the callbacks."""

import inspect
import math
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from sparseout._utils.distributed import check_replicas, data_parallel_group, is_distributed
from sparseout._utils.hooks import EagerHook, Hooks
from sparseout._utils.modules import Modules, choose, named_modules, unwrapped
from sparseout._utils.row_mask import any_mask, attention_mask, row_mask
from sparseout._utils.validation import expected, type_name
from sparseout.baselines import ActivityPenalty
from sparseout.control import Knob
from sparseout.control._controller import SparsityController
from sparseout.layers import Sparseout
from sparseout.monitor._monitor import SparsityMonitor

Target = float | Mapping[str, float] | None


class TrainingSession:
    """A monitor on the model that is trained and, with a target, a controller. Raises: TypeError, ValueError."""

    def __init__(
        self,
        target: Target,
        measures: Iterable[str],
        modules: Modules | None,
        every: int,
        control: Mapping[str, Any] | None,
        knob: Any = "q",
        eps: float = 0.0,
        relative: bool = False,
    ) -> None:
        self.measures = measures if isinstance(measures, str) else tuple(measures)
        zero: dict[str, Any] = {"eps": eps, "relative": relative}
        self.knob, self.zero = knob, zero
        SparsityMonitor(nn.ReLU(), measures=self.measures, every=every, **self.zero)  # raises if they are wrong
        options = tuple(inspect.signature(SparsityController).parameters)[2:]
        if control is not None and not isinstance(control, Mapping):
            raise TypeError(expected("control", "a mapping or None", type_name(control)))
        for name in control or ():
            if name not in options:
                raise ValueError(expected("control", f"options of SparsityController: {', '.join(options)}", name))
        for name in ("knob", "eps", "relative"):
            if name in (control or ()):
                raise ValueError(expected("control", f"without {name}, which is an argument of its own", "one with it"))
        for name, is_given in (("control", bool(control)), ("knob", knob != "q")):
            if is_given and target is None:
                raise ValueError(expected("target", f"a number, as `{name}` is given", None))
        self.target, self.modules, self.every, self.control = target, modules, every, dict(control or {})
        self.monitor: SparsityMonitor | None = None
        self.controller: SparsityController | None = None
        self._model: nn.Module | None = None
        self._masks = BatchMasks()
        self._layers: dict[str, Sparseout] = {}
        self._sync: bool | None = None  # whether reports are of all processes, once they have been compared
        self._names: dict[str, Any] = {}  # in place of arguments that choose modules
        self._pending: Mapping[str, Any] | None = None  # loaded before there was a controller
        self._last: dict[str, Any] | None = None  # of the controller that was

    def begin(self, model: nn.Module) -> None:
        """Put monitor and controller on the model."""
        self.close()
        self._model, self._sync = model, None
        monitor = SparsityMonitor(model, self.modules, measures=self.measures, every=self.every, **self.zero)
        pending, self._pending = self._pending, None
        if self.target is not None:
            self.controller = SparsityController(model, self.target, knob=self.knob, **self.zero, **self.control)
            if pending is not None:
                try:
                    self.controller.load_state_dict(pending)
                except ValueError:
                    self.close()
                    raise
        self._layers = {name: layer for name, layer in named_modules(model) if isinstance(layer, Sparseout)}
        if self.modules is not None:
            self._names["modules"] = [point.name for point in choose(model, self.modules)]
        if self.controller is not None and "modules" in self.control:
            self._names["control"] = self.control | {"modules": list(self.controller.values)}
        self.monitor = monitor.attach()

    def open_mask(self, batch: Any) -> None:
        """Count the rows that the `attention_mask` of a batch keeps, if it has one, until `close_mask`."""
        self._masks.open(batch)

    def close_mask(self) -> None:
        """Count all rows again."""
        self._masks.close()

    def mask_calls(self) -> None:
        """Count the rows that the `attention_mask` keeps which the model is called with, if it is, in each call."""
        assert self._model is not None
        self._masks.attach(unwrapped(self._model))

    def arguments(self) -> dict[str, Any]:
        """Those of the constructor, as JSON can hold them: for modules, once there is a model, the names they have."""
        target = dict(self.target) if isinstance(self.target, Mapping) else self.target
        arguments = {"target": target, "measures": list(self.measures), "modules": self.modules, "every": self.every}
        # A knob that is an object cannot be made again from JSON: the name of its type is an error that says which.
        knob = self.knob if isinstance(self.knob, str) else type(self.knob).__name__
        return arguments | {"control": self.control, "knob": knob} | self.zero | self._names

    def step(self) -> None:
        """Count a step of the optimizer."""
        if self.controller is not None:
            self.controller.step()

    def values(self, mode: str) -> dict[str, float]:
        """Measures of one mode since the last call, by "module/measure", and in training every layer's q and the knob.

        All processes must call this. What is undefined, such as a measure of rows that are all zero, is left out.
        """
        if self.monitor is None:
            return {}
        if self._sync is None:
            self._sync = self._can_be_summed()
        report = self.monitor.report(self._sync, self.control.get("group") if self._sync else None)
        records = [r for r in report if r["mode"] == mode and r["axis"] == "population"]
        self.monitor.reset(mode)
        values: dict[str, float] = {}
        for record in records:
            name = record["module"] or "model"
            several = sum(other["module"] == record["module"] for other in records) > 1  # called at several widths
            head = f"{name}/{record['units']}" if several else name
            values |= {f"{head}/{measure}": record[measure] for measure in (*self.measures, "hoyer_live")}
            values[f"{head}/dead"] = record["dead_units"] / record["units"]
        if mode == "train":
            values |= {f"{name or 'model'}/q": float(layer.q) for name, layer in self._layers.items()}
            for group in self.controller._groups if self.controller is not None else ():
                values |= {f"{name or 'model'}/{group.knob.name}": group.value for name in group.sites}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _can_be_summed(self) -> bool:
        """Whether sums over processes mean something. All processes must call this."""
        assert self._model is not None
        if not is_distributed() or self.control.get("group") is not None or data_parallel_group(self._model):
            return True
        try:
            check_replicas(self._model)
        except ValueError:
            warnings.warn(
                "processes have different parameters, as under tensor parallelism: what is logged was measured on "
                "process 0 alone",
                stacklevel=2,
            )
            return False
        return True

    def state(self) -> dict[str, Any] | None:
        """The controller's, also after its end; None where there was none."""
        return self._last if self.controller is None else self.controller.state_dict()

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Continue from a state, now or when training begins."""
        if self.controller is None:
            self._pending = state
        elif state is not None:
            self.controller.load_state_dict(state)

    def close(self) -> None:
        """Remove everything from the model. q keeps its value."""
        self._last = self.state()
        self._masks.detach()
        if self.monitor is not None:
            self.monitor.detach()
        if self.controller is not None:
            self.controller.detach()
        self.monitor, self.controller, self._model, self._layers = None, None, None, {}


class BatchMasks:
    """Blocks of :class:`row_mask` for the time of a batch, each in the thread that opened it."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[row_mask | None]] = {}  # by thread: the replicas of nn.DataParallel have their own
        self._hooks = Hooks(EagerHook)
        self._warned = False

    def open(self, batch: Any) -> None:
        """Open a block for the batch; none if it has no mask, or in a block of the user's own."""
        mask = attention_mask(batch)
        block = None
        if mask is not None and not any_mask():
            try:
                block = row_mask(mask).__enter__()
            except (TypeError, ValueError) as error:
                if not self._warned:
                    warnings.warn(f"all rows are counted, for `attention_mask` is no mask: {error}", stacklevel=3)
                self._warned = True
        self._blocks.setdefault(threading.get_ident(), []).append(block)

    def close(self) -> None:
        """Close the block that this thread opened last, if one is open."""
        blocks = self._blocks.get(threading.get_ident())
        if blocks and (block := blocks.pop()) is not None:
            block.__exit__()

    def attach(self, model: nn.Module) -> None:
        """Open and close with each call of the model, by the arguments that it has."""
        self._hooks.before(model, lambda module, args, kwargs: self.open(kwargs))
        self._hooks.after(model, lambda module, args, output: self.close(), always=True)

    def detach(self) -> None:
        """Close what is open in this thread, and open no more."""
        self._hooks.remove()
        while self._blocks.get(threading.get_ident()):
            self.close()
        self._blocks.clear()


class CallbackBase:
    """The constructor and the controller of a callback, whatever its framework."""

    def __init__(
        self,
        target: Target = None,
        *,
        measures: Iterable[str] = ("hoyer", "gini", "density"),
        modules: Modules | None = None,
        every: int = 10,
        control: Mapping[str, Any] | None = None,
        knob: str | ActivityPenalty | Knob | Sequence[Knob] = "q",
        eps: float = 0.0,
        relative: bool = False,
    ) -> None:
        self._session = TrainingSession(target, measures, modules, every, control, knob, eps, relative)

    @property
    def controller(self) -> SparsityController | None:
        """The controller, while a model is trained to a target."""
        return self._session.controller
