"""The Lightning callback, in Lightning's trainer: what is logged, how q goes on, what is left."""

from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader
from tracked import failed, hooks, on_two_processes, plain, scalars, stop

from sparseout import Sparseout, measures, row_mask
from sparseout._utils.row_mask import any_mask, kept_rows
from sparseout.integrations._common import BatchMasks
from sparseout.integrations.lightning import SparsityCallback

SEEN = {"hoyer", "gini", "density", "hoyer_live", "dead"}


class Autoencoder(LightningModule):
    """Its noise is a function of the step, since Lightning keeps no random state in checkpoints."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        noise = Sparseout(q=2.5, scale="matched")
        self.net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), noise, nn.Linear(24, 6))

    def training_step(self, batch, index):
        torch.manual_seed(self.trainer.global_step)
        loss = (self.net(batch) - batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Validated(Autoencoder):
    def validation_step(self, batch, index):
        self.log("val_loss", (self.net(batch) - batch).square().mean())


class Record(Callback):
    """q after every batch, and the codes of training and of validation; stops at a batch with an exception."""

    def __init__(self, watched, stop=None, how=None):
        self.watched, self.stop, self.how, self.q, self.codes, self.validated = watched, stop, how, {}, [], []

    def on_fit_start(self, trainer, module):
        self.handle = module.net[1].register_forward_hook(lambda layer, inputs, code: self.see(trainer, code.detach()))

    def see(self, trainer, code):
        if not trainer.sanity_checking:
            (self.codes if trainer.training else self.validated).append(code)

    def on_fit_end(self, trainer, module):
        self.handle.remove()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if self.watched.controller is not None:
            self.q[trainer.global_step] = self.watched.controller.q["net.2"]
        if trainer.global_step == self.stop:
            self.how()


def batches(count=10):
    return torch.rand(count, 16, 6, generator=torch.Generator().manual_seed(1))  # whatever can be gone through


def fit(folder, callback, *others, ckpt_path=None, model=None, held_out=None, epochs=3, **options):
    model = model or Autoencoder()
    options = {"logger": TensorBoardLogger(folder), "enable_checkpointing": False, "log_every_n_steps": 3} | options
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, callbacks=[callback, *others], default_root_dir=folder, **options)
    trainer.fit(model, batches(), held_out, ckpt_path=ckpt_path)
    return trainer, model


def test_what_is_logged_is_what_was_seen_in_training(tmp_path):
    callback = SparsityCallback(every=1)
    record = Record(callback)
    trainer, model = fit(tmp_path, callback, record)
    logged = scalars(tmp_path)
    ours = {tag for tag in logged if tag.startswith("sparsity/")}
    assert ours == {f"sparsity/net.{n}/{name}" for n in (1, 2) for name in SEEN} | {"sparsity/net.2/q"}
    assert trainer.global_step == len(record.codes) == 30
    for tag in ours:  # where the loss is
        assert list(logged[tag]) == list(logged["loss"]) == list(range(2, 30, 3))
    for place, step in enumerate(range(2, 30, 3)):
        code = torch.cat(record.codes[3 * place : 3 * place + 3])
        for name in ("hoyer", "gini", "density"):
            value = getattr(measures, name)(code).nanmean().item()
            assert logged[f"sparsity/net.1/{name}"][step] == pytest.approx(value, rel=1e-5), (name, step)
        dead = (code == 0).all(0).float().mean().item()
        assert logged["sparsity/net.1/dead"][step] == pytest.approx(dead)
        assert logged["sparsity/net.2/q"][step] == 2.5
    assert hooks(model) == 0


def test_every_so_many_and_every_logger(tmp_path):
    callback = SparsityCallback(measures=["kurtosis"], modules=[nn.ReLU], every=2)
    record = Record(callback)
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv")]
    fit(tmp_path, callback, record, logger=loggers, epochs=1)
    logged = scalars(tmp_path / "board")
    assert {tag for tag in logged if "net.1" in tag} == {
        f"sparsity/net.1/{n}" for n in ("kurtosis", "hoyer_live", "dead")
    }
    seen = torch.cat([record.codes[3], record.codes[5]])  # the first after a log, and the second after that
    value = measures.kurtosis(seen).nanmean().item()
    assert logged["sparsity/net.1/kurtosis"][5] == pytest.approx(value, rel=1e-5)
    header = next((tmp_path / "csv").rglob("metrics.csv")).read_text().split("\n")[0]
    assert "sparsity/net.1/kurtosis" in header.split(",")


def test_validation_is_logged_apart(tmp_path):
    callback = SparsityCallback(every=1)
    record = Record(callback)
    held_out = torch.rand(4, 8, 6)
    fit(
        tmp_path,
        callback,
        record,
        held_out=held_out,
        model=Validated(),
        epochs=2,
        val_check_interval=5,
        num_sanity_val_steps=2,
    )
    logged = scalars(tmp_path)
    assert {tag for tag in logged if "/eval/" in tag} == {
        f"sparsity/eval/net.{n}/{name}" for n in (1, 2) for name in SEEN
    }
    steps = [4, 9, 14, 19]
    assert list(logged["sparsity/eval/net.1/hoyer"]) == list(logged["val_loss"]) == steps
    for place, step in enumerate(steps):
        code = torch.cat(record.validated[4 * place : 4 * place + 4])
        value = measures.hoyer(code).nanmean().item()
        assert logged["sparsity/eval/net.1/hoyer"][step] == pytest.approx(value, rel=1e-5)
    # the validation after step 4 has not cut the interval from 3 to 5
    value = measures.hoyer(torch.cat(record.codes[3:6])).nanmean().item()
    assert logged["sparsity/net.1/hoyer"][5] == pytest.approx(value, rel=1e-5)


def test_accumulated_batches_are_one_step(tmp_path):
    callback = SparsityCallback(target=0.9, control={"every": 2})
    record = Record(callback)
    trainer, _ = fit(tmp_path, callback, record, accumulate_grad_batches=3, epochs=2, log_every_n_steps=2)
    assert trainer.global_step == 8
    # an epoch of 10 batches ends with a step; q moves with each second step
    assert [record.q[step] for step in range(1, 9)] == pytest.approx(
        [2.5, *[record.q[s] for s in (2, 2, 4, 4, 6, 6, 8)]]
    )
    assert len(set(record.q.values())) == 5
    assert list(scalars(tmp_path)["sparsity/net.2/q"]) == list(scalars(tmp_path)["loss"]) == [1, 3, 5, 7]


CONTROL = {"every": 4, "gain": 2.0}


def controlled():
    return SparsityCallback(target=0.6, control=CONTROL)


def keeper(folder):
    return ModelCheckpoint(folder / "kept", filename="{step}", every_n_train_steps=10, save_top_k=-1)


def interrupted(folder, how, **options):
    callback = controlled()
    fit(folder, callback, keeper(folder), Record(callback, stop=17, how=how), enable_checkpointing=True, **options)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize(
    ("how", "accumulated"),
    [("an exception", 1), ("an exception", 2), pytest.param("a kill", 1, marks=pytest.mark.slow)],
)
def test_resumed_q_goes_on_as_if_nothing_had_happened(how, accumulated, tmp_path, request):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as `run` has it: with more, products of matrices have other last bits on some processors
    request.addfinalizer(lambda: torch.set_num_threads(before))
    options = {"accumulate_grad_batches": accumulated, "epochs": 3 * accumulated}
    unbroken = controlled()
    whole = Record(unbroken)
    fit(tmp_path / "whole", unbroken, whole, **options)
    moves = {one - other for one, other in pairwise(whole.q.values())} - {0.0}
    assert len(moves) == 7
    assert max(map(abs, moves)) < 0.045  # not one that is cut off at 0.05, and would be the same whatever is lost
    stop(interrupted, how, tmp_path, **options)
    callback = controlled()
    rest = Record(callback)
    options |= {"ckpt_path": tmp_path / "kept/step=10.ckpt", "enable_checkpointing": True}
    trainer, model = fit(tmp_path / "rest", callback, keeper(tmp_path), rest, **options)
    assert trainer.global_step == 30
    assert {step: rest.q[step] for step in range(11, 31)} == {step: whole.q[step] for step in range(11, 31)}
    assert plain(callback.state_dict()) == plain(unbroken.state_dict())
    assert hooks(model) == 0


def test_after_an_exception_nothing_is_left(tmp_path):
    callback, model = controlled(), Autoencoder()
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path, callback, Record(callback, stop=5, how=failed), model=model)
    model.net[1]._forward_hooks.clear()  # the recorder's own
    assert hooks(model) == 0
    assert isinstance(model.net[2].q, float)
    assert callback.controller is None


def test_a_checkpoint_after_the_fit_has_the_last_state(tmp_path):
    callback = controlled()
    trainer, model = fit(tmp_path, callback)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["SparsityCallback"]["controller"]
    assert saved["steps"] == 30
    assert saved["groups"]["net.2"]["q"] == model.net[2].q
    # of other layers: said, and nothing is left
    other = Autoencoder()
    other.net.append(Sparseout(q=2.5))
    with pytest.raises(ValueError, match=r"^expected `state` to be one of the layers net.2[+]net.4, but got net.2$"):
        fit(tmp_path, controlled(), model=other, ckpt_path=tmp_path / "last.ckpt", epochs=4)
    assert hooks(other) == 0


def test_without_a_logger_q_moves_too(tmp_path):
    _, model = fit(tmp_path, controlled(), logger=False, epochs=1)
    assert model.net[2].q != 2.5


TWO = """
import torch, test_lightning as t
from torch.utils.data import DataLoader
callback, folder, model = t.controlled(), pathlib.Path(sys.argv[1]), t.Autoencoder()
options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
options |= {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "log_every_n_steps": 3, "max_epochs": 2}
trainer = t.Trainer(callbacks=[callback], logger=t.TensorBoardLogger(folder), **options)
trainer.fit(model, DataLoader(t.batches(20).flatten(0, 1), batch_size=16))
print("result", trainer.global_step, model.net[2].q, t.hooks(model), flush=True)
"""


@pytest.mark.slow
def test_two_processes_move_q_alike_and_one_logs(tmp_path):
    one, other = on_two_processes(TWO, tmp_path)
    assert one == other
    steps, q, left = one.split()
    assert (steps, left) == ("20", "0")
    assert float(q) != 2.5
    assert len(list(tmp_path.rglob("events.out.*"))) == 1
    assert list(scalars(tmp_path)["sparsity/net.1/hoyer"]) == [2, 5, 8, 11, 14, 17]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"measures": ["hoyr"]}, ValueError, "`measures` to be"),
        ({"every": 0}, ValueError, "`every` to be an int >= 1, but got 0"),
        (
            {"target": 0.5, "control": {"evry": 1}},
            ValueError,
            "`control` to be options of SparsityController: measure, .*evry",
        ),
        ({"target": 0.5, "control": 3}, TypeError, "`control` to be a mapping or None, but got an int"),
        ({"control": {"every": 1}}, ValueError, "`target` to be a number, as `control` is given, but got None"),
    ],
)
def test_errors_come_where_the_callback_is_made(options, error, says):
    with pytest.raises(error, match=f"^expected {says}"):
        SparsityCallback(**options)


class Padded(Autoencoder):
    """Of batches of vectors beside which a mask stands."""

    def training_step(self, batch, index):
        return super().training_step(batch[1]["x"], index)

    def validation_step(self, batch, index):
        self.net(batch[1]["x"])


def test_rows_that_an_attention_mask_leaves_out_are_not_counted(tmp_path):
    generator = torch.Generator().manual_seed(1)
    x, mask = torch.rand(10, 16, 6, generator=generator), torch.rand(10, 16, generator=generator) < 0.3
    padded = [("id", {"x": rows, "attention_mask": keep.long()}) for rows, keep in zip(x, mask, strict=True)]
    callback = SparsityCallback(every=1)
    record = Record(callback)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options |= {"logger": TensorBoardLogger(tmp_path), "enable_checkpointing": False, "log_every_n_steps": 5}
    trainer = Trainer(max_epochs=1, callbacks=[callback, record], default_root_dir=tmp_path, **options)
    trainer.fit(Padded(), *(DataLoader(data, batch_size=None) for data in (padded, padded[:3])))
    logged = scalars(tmp_path)
    for tag, seen, keep in (
        ("sparsity/net.1/hoyer", record.codes[5:10], mask[5:]),
        ("sparsity/eval/net.1/hoyer", record.validated, mask[:3]),
    ):
        value = measures.hoyer(torch.cat(seen)[keep.flatten()]).nanmean().item()
        assert logged[tag][9] == pytest.approx(value, rel=1e-5)
        assert logged[tag][9] != pytest.approx(measures.hoyer(torch.cat(seen)).nanmean().item(), rel=1e-5)
    assert not any_mask()


def test_an_attention_mask_that_is_none_is_said_once_and_all_rows_count():
    masks = BatchMasks()
    with pytest.warns(UserWarning, match="all rows are counted, for `attention_mask` is no mask: expected `mask`"):
        masks.open({"attention_mask": torch.tensor([0.0, -1e9])})
    masks.open([{"attention_mask": torch.tensor([[1.0, -1e9]])}, {}])
    masks.close()
    with row_mask(torch.ones(2)):  # one's own comes first
        masks.open({"attention_mask": torch.zeros(2)})
        assert kept_rows((2,))[0].numbers.tolist() == [0, 1]
        masks.detach()
        assert any_mask()
    masks.close()
    assert not any_mask()
