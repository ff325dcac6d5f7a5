"""The training loop: one run, from its options to its result.

Accelerate handles precision, devices and processes; this file handles order, checkpoints and the end. Every process
draws the same order and works on its part of every batch; evaluation is done whole by each of them.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch

from sparseout_experiments.config import record
from sparseout_experiments.methods import Target
from sparseout_experiments.options import Config
from sparseout_experiments.tasks import DistributedContext, Evaluation, Task, build, means
from sparseout_experiments.training import health, run_folder
from sparseout_experiments.training.accelerator import accelerator_for, release
from sparseout_experiments.training.lock import locked
from sparseout_experiments.training.rng import Rng
from sparseout_experiments.training.run_folder import RunError, RunFailed
from sparseout_experiments.training.target_control import TargetControl

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECK = 10  # steps between looks at losses, clock and budget: each waits for the device


class Progress(NamedTuple):
    """Where a run is, for whoever watches."""

    done: float  # fraction of training
    epoch: int
    epochs: int
    loss: float  # mean of the last steps
    metric: float | None  # on the validation data after the last epoch, and so on
    hoyer: float | None
    dead: float | None
    note: str = ""


OnProgress = Callable[[Progress], None]


def perform(
    config: Config,
    folder: Path,
    on_progress: OnProgress = lambda progress: None,
    *,
    resume: bool = True,
    wait: bool = False,
) -> dict[str, Any]:
    """Train one run in its folder and return its result.

    A folder that holds this run goes on from its last checkpoint, and one that holds its result just gives it; with
    `resume` false both are an error. A folder in which another process trains is an error too; with `wait` its end is
    waited for. Raises RunFailed where the run has no result, RunError where the folder cannot be
    used, DataError and ValueError where the options cannot be met.
    """
    accelerator = accelerator_for(config, folder)
    lock, withdraw = ExitStack(), ExitStack()
    try:
        if accelerator.is_main_process:
            lock.enter_context(locked(folder, wait=wait))
            if run_folder.begin(folder, config, resume):
                withdraw.callback(run_folder.withdraw, folder)
        accelerator.wait_for_everyone()
        if (folder / run_folder.RESULT).exists():
            return run_folder.result(folder, config)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            try:
                run = _Run(config, folder, accelerator, on_progress)
            except KeyboardInterrupt:
                withdraw.close()
                raise
            return run.complete()
    except RunFailed:
        raise
    except Exception:  # nothing stays of a run that was refused, though only its first step may have shown why
        withdraw.close()
        raise
    finally:
        lock.close()
        release(accelerator)


class _Run:
    """The state of a run and the steps of its life."""

    def __init__(self, config: Config, folder: Path, accelerator: "Accelerator", on_progress: OnProgress) -> None:
        self.config, self.folder, self.accelerator, self.on_progress = config, folder, accelerator, on_progress
        self.context = DistributedContext(accelerator.device, accelerator.process_index, accelerator.num_processes)
        self.rng = Rng(config.seed, self.context.process)
        self.task: Task = build(config, self.rng, self.context)
        self.shuffle_state = self.rng.shuffle.get_state()  # as the epoch began
        steps = len(self.task.plan())  # says now, and not in the first epoch, if there is no plan
        self.rng.shuffle.set_state(self.shuffle_state)
        self.target_control: TargetControl | None = None
        if isinstance(config, Target) and config.target_sparsity:  # before compilation, which sees no later hook
            self.target_control = TargetControl(config, self.task.model, self.task.penalty, config.epochs * steps)
        objective: Any = torch.compile(self.task.objective) if config.compile else self.task.objective
        self.objective, self.optimizer = accelerator.prepare(objective, self.task.optimizer())
        self.epoch = self.step = self.steps = 0  # step counts within the epoch, steps in all
        self.lines = 0  # of metrics
        self.losses: list[float] = []  # of the epoch's steps, up to the last look
        # Those since then. One tensor for all: small ones, made between large ones and kept, pin the memory of these.
        self.recent = torch.zeros(CHECK, device=accelerator.device)
        self.loss_check = health.LossCheck()
        self.best: dict[str, Any] = {}
        self.last: dict[str, float] = {}
        self.stopped_by = ""
        self.train_loss = math.nan  # mean of the last epoch
        self.seconds = 0.0  # of training, up to the last look at the clock
        if self.task.penalty is not None:
            self.task.penalty.warmup = round(getattr(config, "warmup", 0) * config.epochs * steps)
        for note in self.task.notes:
            self._report(0.0, note=note)
        self._resume()
        self.saved = self.seconds
        self.begun = time.monotonic() - self.seconds
        if config.track:
            accelerator.init_trackers("sparseout", {k: v for k, v in record(config).items() if v is not None})

    def complete(self) -> dict[str, Any]:
        """Train to the end, then measure the best weights."""
        while not self.stopped_by:
            self._train_epoch()
            self._end_epoch()
        return self._finish()

    def _train_epoch(self) -> None:
        self.shuffle_state = self.rng.shuffle.get_state()
        plan = self.task.plan()
        while self.step < len(plan):
            batch = plan[self.step]
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * self.task.rate(self._done(len(plan)), batch)
            with self.accelerator.autocast():
                loss = self.task.loss(self.objective, batch)
            self.accelerator.backward(loss)
            if self.config.clip:
                self.accelerator.clip_grad_norm_(self.task.model.parameters(), self.config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.task.after_step()
            if self.target_control is not None:
                for note in self.target_control.step():
                    self._report(self._done(len(plan)), self.losses[-1] if self.losses else math.nan, note)
            self.recent[self.step % CHECK] = loss.detach()
            self.step += 1
            self.steps += 1
            if self.step % CHECK == 0 or self.step == len(plan):
                self._check(len(plan))
                if self.stopped_by:
                    break

    def _done(self, steps: int) -> float:
        """The fraction of training that is done, by steps or by time, whichever is further."""
        by_steps = (self.epoch + self.step / steps) / self.config.epochs
        budget = self.config.budget_minutes
        return by_steps if budget is None else min(max(by_steps, self.seconds / (60 * budget)), 1.0)

    def _check(self, steps: int) -> None:
        """Hold the last steps against the health checks, look at the clock, save if it is time."""
        recent = self.recent[: (self.step - 1) % CHECK + 1]
        seconds = recent.new_tensor([time.monotonic() - self.begun])
        if self.context.processes > 1:  # all must come to the same decisions
            from accelerate.utils import broadcast

            recent, seconds = self.accelerator.reduce(recent, "mean"), broadcast(seconds)
        self.seconds = seconds.item()
        values = recent.tolist()
        self.losses += values
        if message := self.loss_check.update(values, self.steps - len(values) + 1):
            self._fail(message)
        budget = self.config.budget_minutes
        if budget is not None and self.seconds > 60 * budget:
            self.stopped_by = "budget"
        elif self.step < steps and self.seconds - self.saved >= 60 * self.config.checkpoint_minutes:
            self._save()
        self._report(self._done(steps), sum(values) / len(values))

    def _end_epoch(self) -> None:
        """Measure, keep the weights if they are the best, write it all down."""
        self.train_loss = torch.tensor(self.losses).mean().item()
        evaluation = self._evaluate("valid")
        self.epoch += 1
        value = evaluation.metrics[self.task.metric]
        if not math.isfinite(value):
            self._fail(f"the validation {self.task.metric} after epoch {self.epoch} (step {self.steps}) is {value}")
        # a target is met at the end, if at all: the weights of another epoch are as sparse as they happened to be
        if not self.best or value < self.best["value"] or self.target_control is not None:
            state = self.task.evaluated().state_dict()
            weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
            self.best = {"value": value, "epoch": self.epoch, "weights": weights}
        self.task.after_epoch(evaluation.metrics)
        overall = means(evaluation.sparsity)
        self.last = {"metric": value, "hoyer": overall["hoyer"], "dead": overall["dead"]}
        seconds = time.monotonic() - self.begun
        line: dict[str, Any] = {"epoch": self.epoch, "steps": self.steps, "train_loss": self.train_loss}
        line |= {"valid": evaluation.metrics, "mean": overall, "sparsity": evaluation.sparsity, "seconds": seconds}
        if self.target_control is not None:
            line["control"] = self.target_control.line()
        if self.accelerator.is_main_process:
            run_folder.log(self.folder, line)
        self.lines += 1
        if self.config.track:
            tracked = line | ({"control": line["control"][-1]} if line.get("control") else {})
            self.accelerator.log(_flat(tracked), step=self.steps)
        if self.epoch == self.config.epochs and not self.stopped_by:
            self.stopped_by = "epochs"
        self.step, self.losses, self.shuffle_state = 0, [], self.rng.shuffle.get_state()
        self._save()
        self._report(self.epoch / self.config.epochs, self.train_loss)

    def _stateful(self) -> dict[str, Any]:
        """What has a `state_dict` for the checkpoint, or None where the run has none."""
        task, scaler = self.task, self.accelerator.scaler
        return {"model": task.model, "optimizer": self.optimizer, "penalty": task.penalty, "scaler": scaler}

    def _evaluate(self, part: str) -> Evaluation:
        with self.accelerator.autocast():
            return self.task.evaluate(part)

    def _finish(self) -> dict[str, Any]:
        self.task.use(self.best["weights"])
        valid, test = self._evaluate("valid"), self._evaluate("test")
        config = record(self.config)
        result = {
            "status": "finished",
            "task": config["task"],
            "config": config,
            "metric": self.task.metric,
            "epochs": self.epoch,
            "steps": self.steps,
            "best_epoch": self.best["epoch"],
            "stopped_by": self.stopped_by,
            "seconds": time.monotonic() - self.begun,
            "processes": self.context.processes,
            "parameters": sum(parameter.numel() for parameter in self.task.model.parameters()),
            "train_loss": self.train_loss,
            "valid": valid.metrics,
            "test": test.metrics,
            "mean": means(test.sparsity),
            "sparsity": test.sparsity,
            "warnings": health.warnings(test.sparsity, test.metrics),
            "notes": list(self.task.notes),
        }
        if self.target_control is not None:
            result["control"] = self.target_control.result()
            result["warnings"] += result["control"].pop("told")
        if self.accelerator.is_main_process:
            result["environment"] = run_folder.read_json(self.folder / run_folder.ENVIRONMENT)
            run_folder.write_json(self.folder / run_folder.RESULT, result)
        if self.config.track:
            self.accelerator.log(_flat({"test": test.metrics}), step=self.steps)
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()
        return run_folder.plain(result)

    def _fail(self, reason: str) -> NoReturn:
        sentence = f"the run failed: {reason}"
        if self.accelerator.is_main_process:
            failure = {"status": "failed", "reason": reason, "step": self.steps, "epoch": self.epoch}
            run_folder.write_json(self.folder / run_folder.FAILURE, failure | {"config": record(self.config)})
            if (self.folder / run_folder.CHECKPOINT).exists():
                sentence += f"; {self.folder / run_folder.CHECKPOINT} is the last good checkpoint"
        raise RunFailed(sentence)

    def _save(self) -> None:
        from accelerate.utils import gather_object

        rank = {"streams": self.rng.state(), "own": self.task.rank_state()}
        rank |= {"steering": self.target_control.state()} if self.target_control is not None else {}
        processes = gather_object([rank])
        if self.accelerator.is_main_process:
            state = {key: getattr(self, name) for key, name in _KEPT.items()}
            state |= {name: None if part is None else part.state_dict() for name, part in self._stateful().items()}
            state["losses"] = torch.tensor(self.losses, dtype=torch.float32)
            state["guard"] = self.loss_check.state()
            state["task"], state["data"] = self.task.state(), self.task.data
            state["processes"], state["options"] = processes, run_folder.deciding(self.config)
            run_folder.save(self.folder, state)
        self.saved = self.seconds

    def _resume(self) -> None:
        state, message = run_folder.load(self.folder)
        self.accelerator.wait_for_everyone()  # all have read before one writes
        if self.accelerator.is_main_process and message:
            self._report(0.0, note=message)
            run_folder.discard_newest(self.folder)
        try:
            if state is not None:
                self._load(state)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            checkpoint = self.folder / run_folder.CHECKPOINT
            raise RunError(f"{checkpoint} is not of this run ({reason}): remove it, or start another folder") from error
        # only now: a checkpoint that is refused must not have cut the lines of the run that is there
        if self.accelerator.is_main_process and (damage := run_folder.cut(self.folder, self.lines)):
            self._report(0.0, note=damage)

    def _load(self, state: dict[str, Any]) -> None:
        run_folder.check_options(self.folder / run_folder.CHECKPOINT, state.get("options"), self.config)
        if len(state["processes"]) != self.context.processes:
            count = f"{len(state['processes'])} processes, not {self.context.processes}"
            raise RunError(f"the run in {self.folder} was started with {count}: resume it with as many")
        if state["data"] != self.task.data:
            raise RunError(f"the run in {self.folder} was started with other data than {self.config.data!r} holds now")
        for key, name in _KEPT.items():
            setattr(self, name, state[key])
        self.losses = state["losses"].tolist()
        self.loss_check = health.LossCheck(**state["guard"])
        for name, part in self._stateful().items():
            if part is not None and state.get(name) is not None:  # older checkpoints have no penalty
                part.load_state_dict(state[name])
        self.task.load(state["task"])
        rank = state["processes"][self.context.process]
        self.task.load_rank_state(rank["own"])
        if self.target_control is not None:
            self.target_control.load(rank["steering"])
        self.rng.load({**rank["streams"], "order": self.shuffle_state})

    def _report(self, done: float, loss: float = math.nan, note: str = "") -> None:
        if self.accelerator.is_main_process:
            last = {name: self.last.get(name) for name in ("metric", "hoyer", "dead")}
            self.on_progress(Progress(done, self.epoch, self.config.epochs, loss, **last, note=note))


# What a checkpoint keeps of a run just as it is: its keys, which older ones have too, and the attributes.
_KEPT = {
    name: name for name in ("epoch", "step", "steps", "lines", "best", "last", "stopped_by", "seconds", "train_loss")
}
_KEPT["order"] = "shuffle_state"


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under names such as valid/mse."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
