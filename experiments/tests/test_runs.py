"""What a run's folder goes through."""

import json
import math
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small import arguments, differences, half_done, options, outcome, run
from sparseout_experiments import cli
from sparseout_experiments.data import images
from sparseout_experiments.training import loop as train
from sparseout_experiments.training import run_folder
from sparseout_experiments.training.run_folder import RunError


def resumed(folder: Path) -> list[str]:
    """Finish a run; what was told on the way."""
    told: list[str] = []
    train.perform(options("autoencoder"), folder, lambda progress: told.append(progress.note))
    return [note for note in told if note]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, "autoencoder")
    return outcome(folder)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -22, -1])
def test_a_checkpoint_cut_short_is_passed_over(kept: float, tmp_path: Path, whole: dict[str, Any]) -> None:
    half_done(tmp_path)
    path = tmp_path / run_folder.CHECKPOINT
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept == 0.5 else int(kept)])
    state, told = run_folder.load(tmp_path)
    assert state is not None
    assert (state["epoch"], state["lines"]) == (1, 1)
    assert told.startswith(f"{path} cannot be read (")
    assert told.endswith("), so the run goes on from the one before it")
    assert resumed(tmp_path) == [told]
    assert differences(whole, outcome(tmp_path)) == []


def test_flipped_bytes_are_noticed_wherever_they_are(tmp_path: Path, whole: dict[str, Any]) -> None:
    half_done(tmp_path)
    path = tmp_path / run_folder.CHECKPOINT
    data = path.read_bytes()
    good, _ = run_folder.load(tmp_path)
    damaged = 0
    for start in range(0, len(data), len(data) // 40):
        flipped = bytes(byte ^ 0xFF for byte in data[start : start + 64])
        path.write_bytes(data[:start] + flipped + data[start + 64 :])
        state, told = run_folder.load(tmp_path)
        assert state is not None
        if told:
            damaged += 1
            assert state["epoch"] == 1
        else:  # in what aligns the entries of the archive
            assert differences(good, state) == []
    assert damaged > 25
    middle = data.index(good["model"]["decoder.weight"].numpy().tobytes()) + 100  # type: ignore[index]
    path.write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])
    assert resumed(tmp_path) == [
        f"{path} cannot be read (its checksum does not hold), so the run goes on from the one before it"
    ]
    assert differences(whole, outcome(tmp_path)) == []


@pytest.mark.parametrize("foreign", [{"epoch": 7, "model": {}, "optimizer": {}}, {}, [1], torch.zeros(3)])
def test_the_checkpoint_of_another_program_is_passed_over(foreign: Any, tmp_path: Path, whole: dict[str, Any]) -> None:
    half_done(tmp_path)
    torch.save(foreign, tmp_path / run_folder.CHECKPOINT)
    (told,) = resumed(tmp_path)
    assert told.endswith("cannot be read (it is another program's), so the run goes on from the one before it")
    assert differences(whole, outcome(tmp_path)) == []


def test_a_folder_in_the_place_of_a_checkpoint_is_set_aside(tmp_path: Path, whole: dict[str, Any]) -> None:
    half_done(tmp_path)
    path = tmp_path / run_folder.CHECKPOINT
    path.unlink()
    path.mkdir()
    (path / "notes").write_text("mine")
    (told,) = resumed(tmp_path)
    assert told == (
        f"{path} cannot be read (it is a folder, and is set aside), so the run goes on from the one before it"
    )
    assert (tmp_path / f"{run_folder.CHECKPOINT}-folder" / "notes").read_text() == "mine"
    assert differences(whole, outcome(tmp_path)) == []


def test_the_checkpoint_of_another_run_is_named(tmp_path: Path) -> None:
    half_done(tmp_path)
    state = torch.load(tmp_path / run_folder.CHECKPOINT, weights_only=True)
    state["model"]["decoder.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / run_folder.CHECKPOINT)
    with pytest.raises(RunError) as raised:
        run(tmp_path, "autoencoder")
    assert str(raised.value).startswith(f"{tmp_path / run_folder.CHECKPOINT} is not of this run (")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("result", ["{}", "[]", "3", '{"status": "finished"}', '{"kind": "sparseout control"}', ""])
def test_a_result_that_is_something_else_is_one_sentence(
    result: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half_done(tmp_path)
    (tmp_path / run_folder.RESULT).write_text(result)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder"), "--resume", "--out", str(tmp_path)])
    err = capfd.readouterr().err
    assert (stopped.value.code, err.count("\n")) == (1, 1)
    assert err.startswith(f"sparseout: {tmp_path / run_folder.RESULT} cannot be read (")


@pytest.mark.parametrize("damage", [b"\xff\xfe{", b"3\n", b""])
def test_damaged_metrics_are_said_and_the_run_goes_on(damage: bytes, tmp_path: Path, whole: dict[str, Any]) -> None:
    half_done(tmp_path)
    (tmp_path / run_folder.METRICS).write_bytes(damage)
    assert resumed(tmp_path) == [
        f"{tmp_path / run_folder.METRICS} is damaged: of 2 epochs 0 could be kept, and the run goes on"
    ]
    assert [line["epoch"] for line in run_folder.metrics(tmp_path)] == [3]
    assert differences(whole["state"], outcome(tmp_path)["state"]) == []


@pytest.mark.parametrize("damage", [None, b"[]", b"\xff"])
def test_an_environment_that_cannot_be_read_is_written_anew(damage: bytes | None, tmp_path: Path) -> None:
    half_done(tmp_path)
    (tmp_path / run_folder.ENVIRONMENT).unlink() if damage is None else (tmp_path / run_folder.ENVIRONMENT).write_bytes(
        damage
    )
    resumed(tmp_path)
    assert run_folder.result(tmp_path)["environment"]["torch"] == torch.__version__


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_done(tmp_path)
    (tmp_path / run_folder.CHECKPOINT).write_bytes(b"damaged")
    replace = run_folder.os.replace

    def stopped(one: Path, other: Path) -> None:
        replace(one, other)
        if Path(other).name == run_folder.PREVIOUS or Path(one).name.startswith(f".{run_folder.CHECKPOINT}"):
            raise KeyboardInterrupt  # in the middle of saving, or right after

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            resumed(tmp_path)
    state, _ = run_folder.load(tmp_path)
    assert state is not None
    assert state["epoch"] >= 1
    assert torch.load(tmp_path / run_folder.PREVIOUS, weights_only=True)["epoch"] == 1


def test_a_stop_between_the_two_moves_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]
) -> None:
    half_done(tmp_path)
    replace = run_folder.os.replace

    def stopped(one: Path, other: Path) -> None:
        replace(one, other)
        if Path(other).name == run_folder.PREVIOUS:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            resumed(tmp_path)
    assert not (tmp_path / run_folder.CHECKPOINT).exists()
    assert resumed(tmp_path) == []
    assert differences(whole, outcome(tmp_path)) == []


def test_without_a_whole_checkpoint_it_starts_over(
    tmp_path: Path, whole: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    half_done(tmp_path)
    for name in (run_folder.CHECKPOINT, run_folder.PREVIOUS):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder"), "--resume", "--out", str(tmp_path)])
    assert stopped.value.code == 0
    (told,) = capfd.readouterr().err.splitlines()
    first, second = (re.escape(str(tmp_path / name)) for name in (run_folder.CHECKPOINT, run_folder.PREVIOUS))
    assert re.fullmatch(
        rf"{first} cannot be read \(.*\) and {second} cannot be read \(.*\), so the run starts over", told
    )
    assert differences(whole, outcome(tmp_path)) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The disk takes no file of more bytes than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (0, "cannot be written (File too large)"),  # not even the lines of metrics that stay
        (1300, "cannot be written (File too large)"),  # no further line
        (10_000, "cannot be written (File too large); the checkpoint before it is still there"),
    ],
)
def test_a_full_disk(size: int, says: str, tmp_path: Path, whole: dict[str, Any]) -> None:
    half_done(tmp_path)
    assert 1000 < (tmp_path / run_folder.METRICS).stat().st_size < 1300
    assert (tmp_path / run_folder.CHECKPOINT).stat().st_size > 10_000
    with largest_file(size), pytest.raises(RunError) as raised:
        run(tmp_path, "autoencoder")
    assert str(raised.value) == f"{tmp_path} {says}"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    for name, epoch in ((run_folder.CHECKPOINT, 2), (run_folder.PREVIOUS, 1)):
        assert torch.load(tmp_path / name, weights_only=True)["epoch"] == epoch
    run(tmp_path, "autoencoder")
    assert differences(whole, outcome(tmp_path)) == []


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with largest_file(10_000), pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder"), "--out", str(tmp_path / "run")])
    assert stopped.value.code == 1
    assert capfd.readouterr().err == f"sparseout: {tmp_path / 'run'} cannot be written (File too large)\n"
    assert not (tmp_path / "run" / run_folder.RESULT).exists()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_written(
    where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "build", None)  # it is found before the work
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder"), "--out", str(tmp_path / where)])
    err = capfd.readouterr().err
    assert stopped.value.code == 1
    assert err.startswith(f"sparseout: {tmp_path / where} cannot be written (")
    assert err.count("\n") == 1


def test_what_a_killed_process_was_writing_goes_away_and_nothing_else(tmp_path: Path, whole: dict[str, Any]) -> None:
    half_done(tmp_path)
    ours = [f".{name}-4711" for name in (run_folder.CHECKPOINT, run_folder.METRICS, run_folder.RESULT)]
    others = [".python-3.11", ".notes-1", "checkpoint.pt-4711"]
    for name in ours + others:
        (tmp_path / name).write_text("half")
    resumed(tmp_path)
    assert not [name for name in ours if (tmp_path / name).exists()]
    assert [(tmp_path / name).read_text() for name in others] == ["half"] * 3
    assert differences(whole, outcome(tmp_path)) == []


@pytest.mark.parametrize("left", [[], [".environment.json-12"], [run_folder.ENVIRONMENT, ".config.toml-12"]])
def test_a_folder_that_was_killed_as_it_began_is_resumed(
    left: list[str], tmp_path: Path, whole: dict[str, Any]
) -> None:
    for name in left:
        (tmp_path / name).write_text("{}")
    resumed(tmp_path)
    assert differences(whole, outcome(tmp_path)) == []
    assert json.loads((tmp_path / run_folder.ENVIRONMENT).read_text())["torch"] == torch.__version__


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize("name", ["thesis.tex", run_folder.METRICS, run_folder.CHECKPOINT])
def test_the_folder_of_something_else_is_left_alone(
    name: str, resume: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("all of it")
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder"), *resume, "--out", str(tmp_path)])
    got = f"'{tmp_path}', which holds other things and no config.toml"
    sentence = f"expected `--out` to be a new or empty folder, or that of a run, but got {got}"
    assert stopped.value.code == 1
    assert capfd.readouterr().err.endswith(f"sparseout: {sentence}\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "all of it")]


def test_other_data_of_the_same_shape_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_done(tmp_path)
    load = images.load

    def inverted(*args: Any, **options: Any) -> images.Images:
        found = load(*args, **options)
        return found._replace(train=found.train._replace(pixels=255 - found.train.pixels))

    monkeypatch.setattr(images, "load", inverted)
    with pytest.raises(RunError, match="was started with other data than 'digits' holds now"):
        train.perform(options("autoencoder"), tmp_path)
    assert (tmp_path / run_folder.CHECKPOINT).exists()


@pytest.mark.parametrize("name", [run_folder.CONFIG, run_folder.RESULT])
def test_a_damaged_record_is_named(name: str, tmp_path: Path) -> None:
    run(tmp_path, "autoencoder", epochs=1)
    (tmp_path / name).write_bytes(b"\xff = {")
    with pytest.raises(RunError, match=f"^{tmp_path / name} cannot be read \\(.*\\): "):
        run(tmp_path, "autoencoder", epochs=1)
    assert (tmp_path / name).read_bytes() == b"\xff = {"


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    run_folder.log(
        tmp_path, {"a": math.nan, "b": [1.5, (math.inf, -math.inf)], "c": {"d": True, "e": None, "f": "nan"}}
    )
    run_folder.log(tmp_path, {"a": 0.1})
    assert run_folder.metrics(tmp_path) == [
        {"a": None, "b": [1.5, [None, None]], "c": {"d": True, "e": None, "f": "nan"}},
        {"a": 0.1},
    ]
    with open(tmp_path / run_folder.METRICS, "a") as file:
        file.write('{"a": 0.')
    assert len(run_folder.metrics(tmp_path)) == 2
    run_folder.cut(tmp_path, 1)
    run_folder.log(tmp_path, {"a": 0.3})
    assert [line["a"] for line in run_folder.metrics(tmp_path)] == [None, 0.3]
