"""Sparsity in the Trainer of transformers: part of its logs, controlled to a target, kept in its checkpoints."""

import base64
import io
import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

from sparseout._utils.validation import expected
from sparseout.integrations._common import CallbackBase

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler, ExportableState
except ModuleNotFoundError as error:
    sentence = 'sparseout.integrations.transformers needs transformers: pip install "sparseout[transformers]"'
    raise ImportError(sentence) from error

__all__ = ["SparsityCallback"]


class SparsityCallback(CallbackBase, TrainerCallback, ExportableState):
    """Logs the sparsity of activations while a Trainer trains and, with a target, moves a knob until it is met.

    Whenever the Trainer logs the loss, the same line contains

    - ``sparsity/{module}/{measure}`` for `measures` and hoyer_live, means over the rows (samples, or positions) in
      training mode since the last log, over the units of each row;
    - ``sparsity/{module}/dead``, the fraction of units that were active in none of these rows;
    - ``sparsity/{layer}/q`` for all Sparseout layers, and ``sparsity/{module}/{knob}`` of another knob;

    and the metrics of an evaluation during training contain ``eval_sparsity/{module}/...``, in evaluation mode. A
    module that is called at several widths has names ``{module}/{units}``. What is undefined, such as Hoyer of rows
    that are all zero, is not logged. When training begins the callback moves itself to the front of the Trainer's
    callbacks, since these receive the line in their order, trackers included.

    In a call of the model with an `attention_mask` only the rows that it keeps are counted, as in a block of
    :class:`sparseout.row_mask`; in a block of your own, those of that.

    Modules are watched as by :class:`sparseout.SparsityMonitor`, and q is changed as by
    :class:`sparseout.SparsityController`, which is stepped after each step of the optimizer. The controller's state is
    in the checkpoint, and ``train(resume_from_checkpoint=...)`` continues from it as if training had not been
    interrupted. With several processes this holds for checkpoints written at an update of q; others contain the
    measurements of one process since the last update. After training only the last q is left on the model; after an
    exception, which the Trainer does not report to callbacks, call :meth:`close`. A Trainer can have one such callback.

    Args:
        target: the sparsity to reach; None: nothing is changed.
        measures: names in `sparseout.measures`.
        modules: what to watch: a function (name, module) -> bool, or a collection of dotted names or of types; None:
            activation modules, Sparseout and Dropout.
        every: interval of the steps that are watched, which are calls of the model; the first step after a log always
            is.
        control: further arguments of the controller, by name, such as ``{"measure": "gini", "per_layer": True}``.
        knob: what the controller moves: ``"q"``, ``"p"``, ``"k"``, a penalty on the model, whose strength is moved, or
            a knob of your own.
        eps: magnitudes up to it count as zero, for monitor and controller.
        relative: `eps` is in units of the root mean square of the row.

    Raises:
        ValueError: for a value out of range; when training begins, for one that does not suit the model.
        TypeError: for an argument of another type.
        ImportError: on import of the module, if transformers is missing.

    Example:
        >>> from transformers import TrainerControl, TrainerState, TrainingArguments  # a Trainer does what follows
        >>> import torch, sparseout
        >>> noise = sparseout.Sparseout(q=2.5, scale="matched")
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), noise)
        >>> callback, logs = SparsityCallback(target=0.9, modules=["1"], control={"every": 1}), {"loss": 1.0}
        >>> events = TrainingArguments(use_cpu=True), TrainerState(log_history=[{}]), TrainerControl()
        >>> callback.on_train_begin(*events, model=model)
        >>> _ = model(torch.rand(16, 8))
        >>> callback.on_step_end(*events)
        >>> callback.on_log(*events, logs=logs)
        >>> list(logs)
        ['loss', 'sparsity/1/hoyer', 'sparsity/1/gini', 'sparsity/1/density', 'sparsity/1/hoyer_live',
         'sparsity/1/dead', 'sparsity/2/q']
        >>> callback.on_train_end(*events)

    Source: that of the controller, :class:`sparseout.SparsityController`.
    """

    saved: str | None = None  # set by a Trainer that restores callbacks; read from its state

    def close(self) -> None:
        """Take everything off the model, as the end of training does."""
        self._session.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        handler = _handler()
        if handler is not None and self in handler.callbacks:
            # The handler is iterating over the list: the callbacks that move back have had this event.
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
        # a checkpoint of a training without this callback has no entry, which the Trainer expects when it saves
        stored: Any = state.stateful_callbacks
        saved = stored.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):
            raise ValueError(expected("callbacks", f"with one {type(self).__name__}", len(saved)))
        if state.global_step and saved["attributes"]["saved"] is not None:
            self._session.load(_decoded(saved["attributes"]["saved"]))
        if model is not None:
            self._session.begin(model)
            self._session.mask_calls()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._session.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the line that the Trainer logs, and to the copy of it that it has kept."""
        logs = {} if logs is None else logs
        evaluated = [name.removesuffix("_runtime") for name in logs if name.endswith("_runtime") and name[:4] == "eval"]
        if "loss" in logs:
            mode, head = "train", "sparsity"
        elif evaluated:
            mode, head = "eval", f"{evaluated[0]}_sparsity"
        else:
            return
        values = {f"{head}/{name}": value for name, value in self._session.values(mode).items()}
        logs.update(values)
        state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """State for the Trainer's checkpoints, as JSON: the arguments, and the controller's state."""
        saved = self._session.state()
        attributes = {"saved": None if saved is None else _encoded(saved)}
        return {"args": self._session.arguments(), "attributes": attributes}


def _handler() -> CallbackHandler | None:
    """The handler that calls, found on the stack.

    The Trainer puts callbacks behind its trackers, and a tracker is given the line before callbacks behind it can add
    to it. A callback is handed neither the Trainer nor the handler, and nothing that it is handed leads to them. What
    is left without the stack is to ask users to reorder the callbacks of a Trainer once it is made.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def _encoded(state: dict[str, Any]) -> str:
    """A state with tensors as text, to the last bit and in its order."""
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _decoded(text: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)
    return state
