"""The callback for the Trainer of transformers, in a Trainer: what is logged, how q goes on, what is left."""

import json
from functools import cache
from itertools import pairwise

import pytest
import torch
from tracked import failed, hooks, on_two_processes, plain, scalars, stop
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainerState, TrainingArguments

from sparseout import Sparseout, convert_dropout_, measures
from sparseout._utils.row_mask import any_mask
from sparseout.integrations.transformers import SparsityCallback

SEEN = {"hoyer", "gini", "density", "hoyer_live", "dead"}
ACT, NOISE = "transformer.h.0.mlp.act", "transformer.h.1.mlp.dropout"
CONTROL = {"every": 3, "gain": 0.5, "modules": [NOISE], "bounds": (1.0, 4.0)}


def gpt():
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2, **ends))
    convert_dropout_(model, q=2.5, scale="matched")
    return model


def texts(count=48):
    tokens = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Record(TrainerCallback):
    """q after every step and the codes of one module; stops at a step."""

    def __init__(self, watched, stop=None, how=None):
        self.watched, self.stop, self.how, self.q, self.codes, self.validated = watched, stop, how, {}, [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begun = getattr(self, "begun", 0) + 1
        self.handle = model.get_submodule(ACT).register_forward_hook(self.see)

    def see(self, module, inputs, code):
        (self.codes if module.training else self.validated).append(code.detach().reshape(-1, code.shape[-1]))

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.q[state.global_step] = float(model.get_submodule(NOISE).q)
        if state.global_step == self.stop:
            self.how()


def trainer(folder, *callbacks, model=None, **options):
    options = {"max_steps": 12, "logging_steps": 3, "save_strategy": "no", "report_to": "tensorboard"} | options
    options |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2}
    args = TrainingArguments(folder, **options)
    return Trainer(model or gpt(), args, train_dataset=texts(), eval_dataset=texts(8), callbacks=list(callbacks))


def hoyer(codes):
    return measures.hoyer(torch.cat(codes)).nanmean().item()


@pytest.mark.parametrize("way", ["an argument", "added later"])
def test_what_is_logged_is_what_was_seen_in_training(way, tmp_path, capsys):
    callback = SparsityCallback(modules=[ACT], every=1)
    record = Record(callback)
    trained = trainer(tmp_path, record, *([callback] if way == "an argument" else []))
    if way == "added later":
        trained.add_callback(callback)
    before = [type(one).__name__ for one in trained.callback_handler.callbacks]
    trained.train()
    after = [type(one).__name__ for one in trained.callback_handler.callbacks]
    assert after[0] == "SparsityCallback"
    assert after[1:] == [name for name in before if name != "SparsityCallback"]
    assert record.begun == 1  # nobody is told twice because somebody moved
    logged = scalars(tmp_path)
    ours = {tag.removeprefix("train/sparsity/") for tag in logged if "sparsity" in tag}
    assert {name for name in ours if not name.endswith("/q")} == {f"{ACT}/{name}" for name in SEEN}
    noises = [n for n, layer in trained.model.named_modules() if isinstance(layer, Sparseout)]
    assert {name for name in ours if name.endswith("/q")} == {f"{name}/q" for name in noises}
    assert len(noises) == 5
    for name in ours:
        assert list(logged[f"train/sparsity/{name}"]) == list(logged["train/loss"]) == [3, 6, 9, 12]
    history = {line["step"]: line for line in trained.state.log_history if "loss" in line}
    for place, step in enumerate((3, 6, 9, 12)):
        codes = record.codes[3 * place : 3 * place + 3]
        assert logged[f"train/sparsity/{ACT}/hoyer"][step] == pytest.approx(hoyer(codes), rel=1e-5)
        assert history[step][f"sparsity/{ACT}/hoyer"] == pytest.approx(hoyer(codes), rel=1e-5)
    assert f"sparsity/{ACT}/hoyer" in capsys.readouterr().out  # the Trainer prints its lines
    assert hooks(trained.model) == 0


def test_by_default_activations_and_noise_are_watched(tmp_path):
    trained = trainer(tmp_path, SparsityCallback(), max_steps=3)
    trained.train()
    seen = {name.split("/")[1] for name in trained.state.log_history[0] if name.startswith("sparsity/")}
    layers = {f"transformer.h.{n}.{part}" for n in (0, 1) for part in ("mlp.act", "mlp.dropout", "attn.resid_dropout")}
    assert seen == layers | {"transformer.drop"}


def test_evaluation_is_part_of_its_metrics(tmp_path):
    callback = SparsityCallback(modules=[ACT], every=1)
    record = Record(callback)
    options = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 4}
    trained = trainer(tmp_path, callback, record, metric_for_best_model=f"sparsity/{ACT}/hoyer", **options)
    trained.train()
    logged = scalars(tmp_path)
    assert {tag for tag in logged if tag.startswith("eval/sparsity")} == {f"eval/sparsity/{ACT}/{n}" for n in SEEN}
    found = logged[f"eval/sparsity/{ACT}/hoyer"]
    assert list(found) == list(logged["eval/loss"]) == [4, 8, 12]
    for place, step in enumerate(found):
        assert found[step] == pytest.approx(hoyer(record.validated[2 * place : 2 * place + 2]), rel=1e-5)
    assert trained.state.best_metric == pytest.approx(max(found.values()))
    # the evaluation after step 4 has not cut the interval from 4 to 6
    assert logged[f"train/sparsity/{ACT}/hoyer"][6] == pytest.approx(hoyer(record.codes[3:6]), rel=1e-5)


def test_accumulated_batches_are_one_step(tmp_path):
    callback = SparsityCallback(target=0.9, control={"every": 2})
    record = Record(callback)
    trainer(tmp_path, callback, record, gradient_accumulation_steps=2, max_steps=6).train()
    q = record.q
    assert len({2.5, *q.values()}) == 4
    assert [q[step] for step in range(1, 7)] == [2.5, q[2], q[2], q[4], q[4], q[6]]


def controlled():
    return SparsityCallback(target=0.6, modules=lambda name, module: name == ACT, control=CONTROL)


def rounded(state):
    """A state to 6 digits: with several threads two processes differ in the last bits of a sum."""
    if isinstance(state, dict):
        return {key: rounded(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [rounded(value) for value in state]
    return float(f"{state:.6g}") if isinstance(state, float) else state


def interrupted(folder, how):
    callback = controlled()
    record = Record(callback, stop=9, how=how)
    trainer(folder, callback, record, save_strategy="steps", save_steps=5).train()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The callback of a training that nothing stopped, and its record."""
    callback = controlled()
    record = Record(callback)
    trainer(tmp_path_factory.mktemp("whole"), callback, record).train()
    return callback, record


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The checkpoint of a training that ended after it, once for each way to end."""

    @cache
    def checkpoint_of(how):
        folder = tmp_path_factory.mktemp("stopped")
        stop(interrupted, how, folder)
        return folder / "checkpoint-5"

    return checkpoint_of


@pytest.mark.parametrize(
    ("how", "restored"),
    [("an exception", False), ("an exception", True), pytest.param("a kill", False, marks=pytest.mark.slow)],
)
def test_resumed_q_goes_on_as_if_nothing_had_happened(how, restored, tmp_path, unbroken, stopped):
    unbroken, whole = unbroken
    moves = {one - other for one, other in pairwise(whole.q.values())} - {0.0}
    assert len(moves) == 4
    assert max(map(abs, moves)) < 0.045  # not one that is cut off at 0.05, and would be the same whatever is lost
    callback = controlled()
    rest = Record(callback)
    again = trainer(tmp_path, callback, rest, restore_callback_states_from_checkpoint=restored)
    again.train(resume_from_checkpoint=str(stopped(how)))
    assert rest.q == {step: q for step, q in whole.q.items() if step > 5}
    used = [one for one in again.callback_handler.callbacks if isinstance(one, SparsityCallback)]
    assert (used == [callback]) is not restored  # the Trainer makes a new one from what the checkpoint has
    names = {tag for tag in scalars(tmp_path) if "sparsity" in tag and not tag.endswith("/q")}
    assert names == {f"train/sparsity/{ACT}/{name}" for name in SEEN}
    found, wanted = (plain(one._session.state()) for one in (used[0], unbroken))
    assert rounded(found) == rounded(wanted) if how == "a kill" else found == wanted
    assert again.model.transformer.drop.q == 2.5  # not one of those that are controlled
    assert hooks(again.model) == 0


def test_the_checkpoint_has_the_state_as_json(stopped):
    saved = json.loads((stopped("an exception") / "trainer_state.json").read_text())["stateful_callbacks"]
    arguments = saved["SparsityCallback"]["args"]
    assert arguments["modules"] == [ACT]
    assert arguments["control"] == {**CONTROL, "bounds": [1.0, 4.0]}
    assert SparsityCallback(**arguments).state()["args"] == arguments


def test_names_are_those_of_the_model_that_was_written():
    callback, model = controlled(), gpt()
    state = TrainerState(stateful_callbacks=[callback])
    callback.on_train_begin(None, state, None, model=torch.compile(model))
    assert list(callback.controller.q) == [NOISE]
    assert callback.state()["args"]["modules"] == [ACT]
    callback.close()
    assert hooks(model) == 0


def test_a_checkpoint_of_a_training_without_it(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=5, max_steps=5).train()
    callback = controlled()
    record = Record(callback)
    again = trainer(tmp_path, callback, record, save_strategy="steps", save_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert (tmp_path / "checkpoint-10").exists()
    assert record.q[6] == 2.5 != record.q[8]


def test_a_checkpoint_of_other_layers_is_refused_and_nothing_is_left(tmp_path, stopped):
    model = gpt()
    says = rf"^expected `state` to be one of the layers transformer.drop, but got {NOISE}$"
    again = trainer(tmp_path, SparsityCallback(0.6, control={"modules": ["transformer.drop"]}), model=model)
    with pytest.raises(ValueError, match=says):
        again.train(resume_from_checkpoint=str(stopped("an exception")))
    assert hooks(model) == 0


def test_a_second_training_begins_anew(tmp_path):
    callback = controlled()
    trained = trainer(tmp_path, callback, max_steps=4)
    trained.train()
    once = trained.model.get_submodule(NOISE).q
    trained.train()
    assert once != 2.5
    assert callback._session.state()["steps"] == 4  # those of the second alone


def test_after_an_exception_close_takes_everything_off(tmp_path):
    callback, model = controlled(), gpt()
    record = Record(callback, stop=5, how=failed)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, callback, record, model=model).train()
    record.handle.remove()
    assert hooks(model) > 0
    callback.close()
    assert hooks(model) == 0
    assert isinstance(model.get_submodule(NOISE).q, float)


TWO = """
import test_trainer as t
callback, folder = t.controlled(), pathlib.Path(sys.argv[1])
kept = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 6}
trainer = t.trainer(folder, callback, **kept)
trainer.train()
print("result", trainer.state.global_step, trainer.model.get_submodule(t.NOISE).q, t.hooks(trainer.model), flush=True)
"""


@pytest.mark.slow
def test_two_processes_move_q_alike_and_one_logs(tmp_path):
    one, other = on_two_processes(TWO, tmp_path)
    assert one == other
    steps, q, left = one.split()
    assert (steps, left) == ("12", "0")
    assert float(q) != 2.5
    assert len(list(tmp_path.rglob("events.out.*"))) == 1
    assert list(scalars(tmp_path)[f"train/sparsity/{ACT}/hoyer"]) == [3, 6, 9, 12]
    assert list(scalars(tmp_path)[f"eval/sparsity/{ACT}/hoyer"]) == [6, 12]


def test_two_in_a_trainer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^expected `callbacks` to be with one SparsityCallback, but got 2$"):
        trainer(tmp_path, SparsityCallback(), SparsityCallback()).train()


def test_errors_come_where_the_callback_is_made():
    with pytest.raises(ValueError, match=r"^expected `every` to be an int >= 1, but got 0$"):
        SparsityCallback(every=0)


def test_rows_that_an_attention_mask_leaves_out_are_not_counted(tmp_path):
    lengths = torch.randint(1, 4, (48,), generator=torch.Generator().manual_seed(2))
    masks = [(torch.arange(8) < length).long() for length in lengths]
    data = [text | {"attention_mask": mask} for text, mask in zip(texts(), masks, strict=True)]
    callback = SparsityCallback(modules=[ACT], every=1)
    record = Record(callback)
    trained = trainer(tmp_path, callback, record, train_sampling_strategy="sequential", max_steps=3, report_to="none")
    trained.train_dataset = data
    trained.train()
    keep = torch.cat(masks[:12]).bool()
    value = measures.hoyer(torch.cat(record.codes)[keep]).nanmean().item()
    assert trained.state.log_history[0][f"sparsity/{ACT}/hoyer"] == pytest.approx(value, rel=1e-5)
    assert hooks(trained.model) == 0
    assert not any_mask()
