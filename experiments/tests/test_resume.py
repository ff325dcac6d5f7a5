"""A run that is stopped and goes on is the run that was never stopped."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small import arguments, differences, half_done, options, outcome, run
from sparseout_experiments import cli, tasks
from sparseout_experiments.training import loop as train
from sparseout_experiments.training import run_folder
from sparseout_experiments.training.run_folder import RunError
from torch import Tensor

KINDS = ("autoencoder", "image", "language", "awd", "transformer")
# Steps, of 25 an epoch, before which the run is stopped, one after the other: before anything was saved, in the first
# epoch after a save at step 10, at the end of an epoch, in the second and in the last.
STOPS = (7, 14, 25, 38, 71)


WholeRun = Callable[[str], dict[str, Any]]
TRIGGERED = "sparseout_experiments.tasks.language.triggered"


@pytest.fixture(autouse=True)
def _early_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRIGGERED, lambda losses: True)  # after the first epoch


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """The outcome of a run that nothing stopped, once for each task."""

    @cache
    def outcome_of(kind: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TRIGGERED, lambda losses: True)
            run(folder, kind)
        return outcome(folder)

    return outcome_of


def stopping(monkeypatch: pytest.MonkeyPatch, kind: str, stop: int) -> Iterator[int]:
    """Lets KeyboardInterrupt come before the step after `stop`; counts the steps that were taken."""
    task = type(tasks.build(options(kind), train.Rng(0), tasks.DistributedContext(torch.device("cpu"))))
    loss = task.loss
    taken = 0

    def interrupted(self: Any, objective: Any, batch: Any) -> Tensor:
        nonlocal taken
        if the_run[0].steps == stop:
            raise KeyboardInterrupt
        taken += 1
        return loss(self, objective, batch)

    the_run: list[Any] = []
    begin = train._Run.__init__

    def remember(self: Any, *args: Any) -> None:
        the_run.append(self)
        begin(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(task, "loss", interrupted)
        patch.setattr(train._Run, "__init__", remember)
        yield 0
    yield taken


@pytest.mark.parametrize(
    ("kind", "minutes"),
    [
        *(
            pytest.param(
                kind,
                0.0,
                id=f"{kind}, saved at every look",
                marks=[pytest.mark.slow] if kind in ("image", "awd", "transformer") else [],
            )
            for kind in KINDS
        ),
        *(pytest.param(kind, 5.0, id=f"{kind}, saved after epochs") for kind in ("autoencoder", "awd")),
    ],
)
def test_stopped_again_and_again(
    kind: str, minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: WholeRun
) -> None:
    whole = whole_run(kind)
    folder = tmp_path / "stopped"
    taken = 0
    for stop in STOPS if kind != "awd" else STOPS[:-1]:
        steps = stopping(monkeypatch, kind, stop)
        next(steps)
        with pytest.raises(KeyboardInterrupt):
            run(folder, kind, checkpoint_minutes=minutes)
        taken += next(steps)
        list(steps)
        assert not (folder / run_folder.RESULT).exists()
    if minutes == 0.0:  # it went on from within an epoch: what was done again is less than a look each time
        assert taken < STOPS[-1] + 10 * len(STOPS)
    run(folder, kind, checkpoint_minutes=minutes)
    assert differences(whole, outcome(folder)) == []
    if kind == "awd":
        assert whole["state"]["task"]["average"]["n_averaged"] > 0


def test_a_stop_between_the_last_checkpoint_and_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: WholeRun
) -> None:
    def stop(self: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", "awd")
    run(tmp_path / "stopped", "awd")
    assert differences(whole_run("awd"), outcome(tmp_path / "stopped")) == []


def test_a_stop_between_metrics_and_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: WholeRun
) -> None:
    calls = iter(range(100))
    save = train._Run._save

    def stop(self: Any) -> None:
        if next(calls) == 1:  # the end of the second epoch, whose line is written
            raise KeyboardInterrupt
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", "autoencoder")
    assert len(run_folder.metrics(tmp_path / "stopped")) == 2
    with open(tmp_path / "stopped" / run_folder.METRICS, "a") as file:
        file.write('{"epoch": 3, "ste')  # and the next one half
    run(tmp_path / "stopped", "autoencoder")
    assert differences(whole_run("autoencoder"), outcome(tmp_path / "stopped")) == []
    assert (tmp_path / "stopped" / run_folder.METRICS).read_text().count("\n") == 3


def test_an_interrupt_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = [*arguments("autoencoder"), "--out", str(tmp_path / "run")]
    told = []
    for stop in (3, 30):
        steps = stopping(monkeypatch, "autoencoder", stop)
        next(steps)
        with pytest.raises(SystemExit) as stopped:
            cli.main(args if stop == 3 else [*args, "--resume"])
        assert stopped.value.code == 130
        list(steps)
        told.append(capfd.readouterr())
    assert [out for out, _ in told] == ["", ""]
    assert [err for _, err in told] == 2 * ["sparseout: interrupted: --resume goes on with the run\n"]


def test_an_interrupt_while_data_are_read_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "build", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder"), "--out", str(tmp_path / "run")])
    assert (stopped.value.code, capfd.readouterr().err) == (130, "sparseout: interrupted: nothing was written\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"q": 2.5}, "has q = 1.5, not 2.5: resume it with the options it was started with, or start another folder"),
        ({"seed": 1}, "has seed = 0, not 1: resume it"),
        ({"budget_minutes": 9}, "has budget_minutes = None, not 9.0: resume it"),
        ({"method": "dropout"}, "has method = 'sparseout', not 'dropout': resume it"),
    ],
)
def test_another_run_is_not_resumed(
    changed: dict[str, Any], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half_done(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder", **changed), "--resume", "--out", str(tmp_path)])
    err = capfd.readouterr().err
    assert stopped.value.code == 1
    assert err.startswith(f"sparseout: the run in {tmp_path} {sentence}")
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("task", [["autoencoder"], []])
def test_resuming_needs_nothing_but_the_folder(task: list[str], tmp_path: Path, whole_run: WholeRun) -> None:
    half_done(tmp_path / "half")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", *task, "--resume", "--out", str(tmp_path / "half")])
    assert stopped.value.code == 0
    assert differences(whole_run("autoencoder"), outcome(tmp_path / "half")) == []


@pytest.mark.parametrize(
    ("content", "args", "says"),
    [
        (None, ["image"], "the run in {} has task = 'autoencoder', not 'image': start another folder"),
        ('title = "a blog"', [], "{}/config.toml is not that of a run ("),
        (
            'task = "image"\nunits = 3',
            ["image"],
            "{}/config.toml is not that of a run (expected `units` to be an option",
        ),
        ("task = ", ["autoencoder"], "{}/config.toml is not that of a run ("),
        ("task = 3", ["autoencoder"], "{}/config.toml is not that of a run ("),
    ],
)
def test_what_cannot_be_resumed_is_one_sentence(
    content: str | None, args: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half_done(tmp_path)
    if content is not None:
        (tmp_path / run_folder.CONFIG).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", *args, "--resume", "--out", str(tmp_path)])
    err = capfd.readouterr().err
    assert (stopped.value.code, err.count("\n")) == (2, 1)
    assert err.startswith(f"sparseout: {says.format(tmp_path)}")
    assert (tmp_path / run_folder.CHECKPOINT).exists()


@pytest.mark.parametrize("args", [["--resume"], ["--out", "x"], ["--resume", "--out", "x"]])
def test_without_a_run_there_is_nothing_to_resume(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", *args])
    err = capfd.readouterr().err
    assert (stopped.value.code, err.count("\n"), list(tmp_path.iterdir())) == (2, 1, [])
    assert "needs a command" in err or "the folder of " in err or "a task before" in err


def test_another_task_is_not_resumed(tmp_path: Path) -> None:
    half_done(tmp_path)
    with pytest.raises(RunError, match="has task = 'autoencoder', not 'image': resume it"):
        run(tmp_path, "image")


def test_another_number_of_processes_is_not_resumed(tmp_path: Path) -> None:
    half_done(tmp_path)
    state = torch.load(tmp_path / run_folder.CHECKPOINT, weights_only=True)
    state["processes"] *= 2
    torch.save(state, tmp_path / run_folder.CHECKPOINT)
    with pytest.raises(RunError, match=r"was started with 2 processes, not 1: resume it with as many$"):
        run(tmp_path, "autoencoder")


def test_where_and_how_long_may_change(tmp_path: Path, whole_run: WholeRun) -> None:
    half_done(tmp_path / "stopped")
    run(tmp_path / "stopped", "autoencoder", device="auto", checkpoint_minutes=0.5)
    assert differences(whole_run("autoencoder"), outcome(tmp_path / "stopped")) == []


def test_without_resume_a_run_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    half_done(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder"), "--out", str(tmp_path)])
    sentence = f"expected `--out` to be a new folder, or with --resume that of a run, but got '{tmp_path}'"
    assert (stopped.value.code, capfd.readouterr().err) == (1, f"sparseout: {sentence}\n")
    assert len(run_folder.metrics(tmp_path)) == 2


def test_a_checkpoint_of_another_run_is_refused_and_cuts_nothing(tmp_path: Path) -> None:
    half_done(tmp_path / "mine")
    half_done(tmp_path / "other", q=0.5)
    lines = (tmp_path / "mine" / run_folder.METRICS).read_text()
    (tmp_path / "mine" / run_folder.CHECKPOINT).write_bytes((tmp_path / "other" / run_folder.CHECKPOINT).read_bytes())
    with pytest.raises(RunError, match=r"checkpoint.pt is of a run with q = 0.5, not 1.5: put this run's own"):
        run(tmp_path / "mine", "autoencoder")
    assert (tmp_path / "mine" / run_folder.METRICS).read_text() == lines


def test_a_method_of_a_file_contradicts_as_one_of_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half_done(tmp_path / "run")
    (tmp_path / "other.toml").write_text('method = "dropout"\n', encoding="utf-8-sig")
    with pytest.raises(SystemExit):
        cli.main(
            ["run", "autoencoder", "--resume", "--out", str(tmp_path / "run"), "--config", f"{tmp_path}/other.toml"]
        )
    assert "has method = 'sparseout', not 'dropout'" in capfd.readouterr().err
