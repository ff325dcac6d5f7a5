"""Sparsity in Lightning: logged through the trainer's loggers, controlled to a target, kept in its checkpoints."""

from typing import Any

from sparseout.integrations._common import CallbackBase

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ImportError('sparseout.integrations.lightning needs Lightning: pip install "sparseout[lightning]"') from error

__all__ = ["SparsityCallback"]


class SparsityCallback(CallbackBase, Callback):
    """Logs the sparsity of activations while a Lightning trainer fits and, with a target, moves a knob until it is met.

    Every `log_every_n_steps` of the trainer, at the step at which it logs the loss, each of its loggers is given

    - ``sparsity/{module}/{measure}`` for `measures` and hoyer_live, means over the rows (samples, or positions) in
      training mode since the last log, over the units of each row;
    - ``sparsity/{module}/dead``, the fraction of units that were active in none of these rows;
    - ``sparsity/{layer}/q`` for all Sparseout layers, and ``sparsity/{module}/{knob}`` of another knob;

    and after each validation ``sparsity/eval/{module}/...``, in evaluation mode. A module that is called at several
    widths has names ``{module}/{units}``. What is undefined, such as Hoyer of rows that are all zero, is not
    logged.

    Of a batch with an `attention_mask`, a mapping or a tuple or list with one in it, only the rows that the mask keeps
    are counted, as in a block of :class:`sparseout.row_mask`.

    Modules are watched as by :class:`sparseout.SparsityMonitor`, and q is changed as by
    :class:`sparseout.SparsityController`, which is stepped after each batch in which an optimizer stepped. The
    controller's state is in the checkpoint, and ``fit(..., ckpt_path=...)`` continues from it as if training had not
    been interrupted. With several processes this holds for checkpoints written at an update of q; others contain the
    measurements of one process since the last update. After the fit only the last q is left on the model.

    Args:
        target: the sparsity to reach; None: nothing is changed.
        measures: names in `sparseout.measures`.
        modules: what to watch: a function (name, module) -> bool, or a collection of dotted names or of types; None:
            activation modules, Sparseout and Dropout.
        every: interval of the steps that are watched; the first step after a log always is.
        control: further arguments of the controller, by name, such as ``{"measure": "gini", "per_layer": True}``.
        knob: what the controller moves: ``"q"``, ``"p"``, ``"k"``, a penalty on the model, whose strength is moved, or
            a knob of your own.
        eps: magnitudes up to it count as zero, for monitor and controller.
        relative: `eps` is in units of the root mean square of the row.

    Raises:
        ValueError: for a value out of range; when fit begins, for one that does not suit the model.
        TypeError: for an argument of another type.
        ImportError: on import of the module, if Lightning is missing.

    Example:
        >>> import torch, sparseout
        >>> from torch import nn
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> class Autoencoder(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         noise = sparseout.Sparseout(q=2.5, scale="matched")
        ...         self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), noise, nn.Linear(32, 8))
        ...     def training_step(self, batch, index):
        ...         return (self.net(batch) - batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> model, batches = Autoencoder(), torch.rand(20, 16, 8)
        >>> callback = SparsityCallback(target=0.6, control={"every": 1})
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", barebones=True, callbacks=[callback])
        >>> trainer.fit(model, batches)
        >>> model.net[2].q < 2.5
        True

    Source: that of the controller, :class:`sparseout.SparsityController`.
    """

    _step = 0  # of the trainer, at the last call

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.begin(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._session.monitor is not None:
            self._session.monitor.reset()  # of the rows of Lightning's sanity check

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._session.close_mask()  # of a batch that was given up
        self._session.open_mask(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._session.close_mask()
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        self._session.step()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (_logged_at(trainer) + 1) % every == 0:
            self._log(trainer, "train", "sparsity")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._session.close_mask()
        self._session.open_mask(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._session.close_mask()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log(trainer, "eval", "sparsity/eval")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._session.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._session.close()

    def state_dict(self) -> dict[str, Any]:
        return {"controller": self._session.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._session.load(state_dict["controller"])  # before the fit starts, or after with some strategies

    def _log(self, trainer: Trainer, mode: str, head: str) -> None:
        if not trainer.loggers:
            return
        values = {f"{head}/{name}": value for name, value in self._session.values(mode).items()}
        if values and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=_logged_at(trainer))


def _logged_at(trainer: Trainer) -> int:
    """The step at which Lightning logs what a batch gave: batches with a step of an optimizer, before this one."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
