"""The command line: its commands and their errors, help, completion, interrupts."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import arguments, status_of
from sparseout_experiments import cli
from sparseout_experiments.commands import app
from sparseout_experiments.demo import Options
from sparseout_experiments.studies.engine import jobs
from sparseout_experiments.training import atomic_files
from typer.testing import CliRunner

from sparseout import __version__


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--p", "1"], "expected `--p` to be a number >= 0 and < 1, but got '1'"),
        (["--p", "half"], "expected `--p` to be a number >= 0 and < 1, but got 'half'"),
        (["--q", "inf"], "expected `--q` to be a finite number >= 0, but got 'inf'"),
        (["--q", "1,nan"], "expected `--q` to be a finite number >= 0, but got 'nan'"),
        (["--q", "1", "--q", "-2"], "expected `--q` to be a finite number >= 0, but got '-2'"),
        (["--q", ""], "expected `--q` to be a finite number >= 0, but got ''"),
        (["--seeds", "0"], "expected `--seeds` to be a whole number >= 1, but got '0'"),
        (["--epochs", "1.5"], "expected `--epochs` to be a whole number >= 1, but got '1.5'"),
        (["--gradient", "slow"], "expected `--gradient` to be detached or exact, but got 'slow'"),
        (["--scale", "0"], "expected `--scale` to be paper, matched, both or a finite number > 0, but got '0'"),
        (["--speed", "9"], "No such option: --speed"),
    ],
)
def test_a_bad_option_is_answered_with_one_sentence(
    args: list[str], sentence: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert status_of("demo", "--out", str(tmp_path / "new"), *args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"sparseout: {sentence}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    where: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "train", None)
    (tmp_path / "file").touch()
    assert status_of("demo", "--out", str(tmp_path / where)) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "expected `--out` to be a folder that can be written, but got" in err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", "task = "),
        ("config.toml", "task = 3"),
        ("result.json", "{}"),
        ("result.json", "[]"),
        ("result.json", '{"task": "autoencoder"}'),
        ("failure.json", "{}"),
        ("metrics.jsonl", '{"epoch": 1}'),
        ("sweep.json", "{}"),
        ("sweep.json", "3"),
    ],
)
def test_a_report_of_what_is_no_run_is_one_sentence(
    name: str, content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text('task = "autoencoder"')
    (tmp_path / name).write_text(content)
    assert status_of("report", str(tmp_path)) == 1
    err = capfd.readouterr().err
    assert err.startswith("sparseout: ")
    assert (err.count("\n"), str(tmp_path) in err) == (1, True)
    assert "remove it" in err or err.endswith(": give another folder, or move it away\n"), err


def test_a_kept_report_that_is_cut_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text('{"kind": "sparseout report", "runs": []}')
    assert status_of("report", str(tmp_path / "report.json")) == 2
    assert (
        capfd.readouterr().err == f"sparseout: {tmp_path / 'report.json'} is not a complete file of sparseout report\n"
    )


def test_files_are_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_files.write(tmp_path / "a", "first")

    def fail(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):  # noqa: PT011
        atomic_files.write(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_what_cannot_be_written_is_named_and_not_the_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        atomic_files.write(tmp_path / "a", "")
    assert refused.value.filename == str(tmp_path / "a")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as refused:
        atomic_files.write(tmp_path / "b", "")
    assert refused.value.filename == str(tmp_path)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "`sparseout run` needs a command. The commands are autoencoder, image, language; `sparseout run --help`"),
        (["audio"], "No such command 'audio'. The commands are autoencoder, image, language; `sparseout run --help`"),
        (["imag"], "No such command 'imag' (did you mean 'image'?). The commands are autoencoder, image, language"),
        (["image", "--foo"], "No such option: --foo; `sparseout run image --help` tells more."),
        (["image", "--epoch", "1"], "No such option: --epoch (did you mean --epochs?); `sparseout run image --help`"),
        (["--resume"], "expected `--out` to be the folder of the run to go on with, but got none"),
        (["--out", "x"], "expected a task before `--out`, or `--resume` beside it, but got neither"),
        (["image", "--q"], "Option '--q' requires an argument."),
        (["image", "extra"], "Got unexpected extra argument(s) (extra); `sparseout run image --help` tells more."),
    ],
)
def test_a_command_line_that_is_no_command_says_what_there_is(
    args: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status_of("run", *args) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"sparseout: {sentence}")


@pytest.mark.parametrize(
    "args",
    [
        ["theory", "--page", "page.md", "--results", "made/here"],
        ["theory", "--render", "--results", "made/here", "--page", "made/there/page.md"],
        ["bench", "--render", "--out", "made/here"],
        ["bench", "--out", "made/here"],
        ["reproduce", "targets", "--workers", "0", "--results", "made/here"],
        ["reproduce", "alternatives", "--page", "page.md", "--results", "made/here", "--work", "made/there"],
    ],
)
def test_a_refused_command_leaves_nothing(args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEOUT_BACKEND", "none of them")
    monkeypatch.setattr("sparseout_experiments.studies.engine.study.reproduce", refuse)
    (tmp_path / "page.md").write_text("a page without blocks")
    assert status_of(*args) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def refuse(*args: Any, **options: Any) -> None:
    raise ValueError("refused")


def test_without_a_terminal_progress_is_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparseout_experiments.commands.common._EVERY", 0.0)
    assert status_of(*arguments("language", epochs=2), "--out", str(tmp_path / "run")) == 0
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"sparseout: 0:\d\d:\d\d  epoch 1/2  loss [\d.]+  0:\d\d:\d\d left", lines[1]), lines
    last = r"sparseout: 0:\d\d:\d\d  epoch 2/2  loss [\d.]+  perplexity [\d.]+  Hoyer 0.\d\d  dead \d+%  0:00:00 left"
    assert re.fullmatch(last, lines[-1]), lines


def test_an_output_that_is_full_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert status_of("--help") == 1
    assert capfd.readouterr().err == "sparseout: the output cannot be written (No space left on device)\n"


def test_what_a_terminal_in_ascii_cannot_show_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    monkeypatch.setattr(sys, "argv", ["sparseout", *arguments("autoencoder", epochs=1), "--out", f"{tmp_path}/dätä"])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    signal.signal(signal.SIGINT, handler)  # which a command that ends its process leaves ignored
    sys.stdout.flush()
    assert stopped.value.code == 0
    assert f"Wrote {tmp_path}/d\\xe4t\\xe4/result.json" in shown.getvalue().decode()


def command_line(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sparseout_experiments", *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(happened: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if happened():
            return
        time.sleep(0.001)
    raise TimeoutError


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_torch_is_imported_is_one_sentence(number: signal.Signals, status: int) -> None:
    process = command_line("demo")
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", "sparseout: interrupted\n")


@pytest.mark.slow
def test_a_demo_that_is_terminated_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    process = command_line("demo", "--out", str(tmp_path / "demo"))
    wait_for(lambda: any((tmp_path / "temporary").rglob("result.json")))
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert err.endswith("sparseout: interrupted, and nothing was written\n")
    assert not any((tmp_path / "temporary").iterdir())
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.parametrize("apart", [0.0, 0.001, 0.1])
def test_ctrl_c_twice_is_one_sentence(apart: float, tmp_path: Path) -> None:
    process = command_line(*arguments("language", epochs=1000), "--out", str(tmp_path / "run"))
    wait_for((tmp_path / "run" / "checkpoint.pt").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(apart)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch("sparseout: interrupted.*\n", err)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("sparseout run ", {"autoencoder", "image", "language"}),
        ("sparseout run image --norm ", {"batch", "group", "none"}),
        ("sparseout demo --gradient ", {"detached", "exact"}),
        ("sparseout run language --weight-d", {"--weight-drop", "--weight-decay"}),
    ],
)
def test_the_shell_completes(
    words: str, offered: set[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_SPARSEOUT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    assert status_of() == 0
    assert set(capfd.readouterr().out.split()) == offered


def test_version_and_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert status_of("--version") == 0
    assert capfd.readouterr().out == f"sparseout {__version__}\n"
    for args in ([], ["--help"], ["demo", "--help"]):
        assert status_of(*args) == 0
        assert "Usage" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "completing"),
    [
        (["--help"], {}),
        (["run", "image", "--help"], {}),
        (["sweep", "language", "--p", "2"], {}),  # refused
        ([], {"_SPARSEOUT_COMPLETE": "complete_bash", "COMP_WORDS": "sparseout run image --norm ", "COMP_CWORD": "4"}),
    ],
)
def test_help_and_completion_import_nothing_slow(args: list[str], completing: dict[str, str]) -> None:
    code = (
        "import atexit, sys; from sparseout_experiments import cli\n"
        "slow = {'torch', 'numpy', 'pandas', 'matplotlib', 'scipy', 'distributed'}\n"
        f"atexit.register(lambda: print(*sys.modules.keys() & slow)); cli.main({args})"
    )
    process = subprocess.run([sys.executable, "-c", code], env=os.environ | completing, capture_output=True, text=True)
    assert process.stdout + process.stderr
    assert process.stdout.splitlines()[-1] == "", process.stderr


def test_the_command_line_defaults_are_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Options] = []

    def stop(options: Options, folder: Path) -> dict[str, Any]:
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("sparseout_experiments.commands.demo.plan", stop)
    CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--q", "3,1.0", "--q", "1", "--scale", "0.25"])
    assert seen[0] == Options()
    assert (seen[1].q, seen[1].scales) == ((1.0, 3.0), (0.25,))
