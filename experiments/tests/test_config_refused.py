"""Options that are refused: each in a sentence that names it, and nothing is left behind."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small import arguments
from sparseout_experiments import cli, config

SCALE = "paper (beta = 1), matched (the power of Dropout's noise) or a number > 0 (the unit of x)"
METHODS = (
    "none, dropout, sparseout, bridgeout, shakeout, gaussian, penalty, kwinners, l1_warmup, relu2 or statistical_topk"
)
FUSED = "the weights after the noise are inside LSTM layers, out of its reach"
SIGNED = "the states of an LSTM have both signs, and the largest are not the most active"
BAD: list[tuple[str, str, Any, str]] = [
    ("autoencoder", "method", "dropconnect", METHODS),
    ("language", "method", "bridgeout", f"another for lstm, as {FUSED}"),
    ("language", "method", "shakeout", f"another for lstm, as {FUSED}"),
    ("language", "method", "kwinners", f"another for lstm, as {SIGNED}"),
    ("autoencoder", "p", 1, "a number >= 0 and < 1"),
    ("autoencoder", "p", "-0.1", "a number >= 0 and < 1"),
    ("autoencoder", "p", True, "a number >= 0 and < 1"),
    ("autoencoder", "q", math.nan, "a finite number >= 0"),
    ("autoencoder", "q", "inf", "a finite number >= 0"),
    ("autoencoder", "q", [1.5], "a finite number >= 0"),
    ("autoencoder", "gradient", "slow", "detached or exact"),
    ("autoencoder", "scale", 0, SCALE),
    ("autoencoder", "scale", True, SCALE),
    ("autoencoder", "seed", -1, "a whole number >= 0"),
    ("autoencoder", "split_seed", 2**64, "a whole number >= 0 and < 2^64"),
    ("autoencoder", "epochs", 0, "a whole number >= 1"),
    ("autoencoder", "epochs", "1.5", "a whole number >= 1"),
    ("autoencoder", "epochs", "inf", "a whole number >= 1"),
    ("autoencoder", "budget_minutes", 0, "a finite number > 0"),
    ("autoencoder", "data", "", "a text"),
    ("autoencoder", "data", 3, "a text"),
    ("autoencoder", "device", "tpu", "auto, cpu or cuda"),
    ("autoencoder", "precision", "fp8", "fp32, bf16 or fp16"),
    ("autoencoder", "compile", "yes", "true or false"),
    ("autoencoder", "track", "", "the name of a tracker"),
    ("image", "depth", 12, "6 n + 4 with n >= 1"),
    ("image", "depth", "4", "6 n + 4 with n >= 1"),
    ("image", "norm", "layer", "batch, group or none"),
    ("image", "momentum", 1, "a number >= 0 and < 1"),
    ("language", "words", 2, "a whole number >= 3"),
    ("language", "weight_drop", 1.0, "a number >= 0 and < 1"),
    ("language", "q_between", -1, "a finite number >= 0"),
    ("language", "model", "gru", "lstm, awd or transformer"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "name", "value", "wanted"), BAD)
def test_a_bad_value_is_named(task: str, name: str, value: Any, wanted: str) -> None:
    for shown in (lambda name: name, lambda name: f"--{name}"):
        sentence = f"expected `{shown(name)}` to be {wanted}, but got {value!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            config.resolve(task, {name: value}, shown)


def test_what_is_not_an_option_is_named() -> None:
    with pytest.raises(ValueError, match=r"^expected `units` to be an option of image: method, p, q, .*, but got 3$"):
        config.resolve("image", {"units": 3})
    with pytest.raises(
        ValueError, match=r"^expected `task` to be one of autoencoder, image, language, but got 'cost'$"
    ):
        config.resolve("cost", {})


OF_ONE_MODEL = [
    ("lstm", "heads", 8),
    ("awd", "activation", "gelu"),
    ("lstm", "place", "residual"),
    ("transformer", "weight_drop", 0.5),
    ("transformer", "embedding_drop", 0.1),
    ("transformer", "p_output", 0.3),
    ("transformer", "q_input", 2.0),
]


@pytest.mark.parametrize(("model", "name", "value"), OF_ONE_MODEL)
def test_what_a_model_has_no_use_for_is_refused(model: str, name: str, value: Any) -> None:
    sentence = f"expected `{name}` to be left out, as the model is {model}, but got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        config.resolve("language", {"model": model, name: value})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("q = = 2", "expected `--config` to be a file in TOML, but got "),
        (b"q = 2 # \xff", "expected `--config` to be a file in TOML, but got "),
        (None, "expected `--config` to be a file that can be read, but got "),
        ('task = "image"', "expected `--config` to be a file for the task autoencoder, but got "),
        ("speed = 3", "expected `--speed` to be an option of autoencoder: method, "),
        ("depth = 16", "expected `--depth` to be an option of autoencoder: method, "),
        ('p = "half"', "expected `--p` to be a number >= 0 and < 1, but got 'half'"),
        ("train-size = 9", "expected `--train-size` to be an option of autoencoder: method, "),
        ("[p]\nx = 1", "expected `--p` to be a number >= 0 and < 1, but got {'x': 1}"),
    ],
)
def test_a_bad_file_of_options_is_one_sentence(
    content: str | bytes | None, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(["run", "autoencoder", "--config", str(path)], sentence, tmp_path, capfd)


def refused(args: list[str], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], status: int = 2) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*args, "--out", str(tmp_path / "new")])
    out, err = capfd.readouterr()
    assert (stopped.value.code, out) == (status, "")
    assert err.startswith(f"sparseout: {sentence}")
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["autoencoder", "--q", "-1"], "expected `--q` to be a finite number >= 0, but got '-1'"),
        (["image", "--depth", "17"], "expected `--depth` to be 6 n + 4 with n >= 1, but got '17'"),
        (["image", "--units", "17"], "No such option: --units"),
        (["autoencoder", "--config", ""], "expected `--config` to be the name of a file, but got ''"),
        (["speech"], "No such command 'speech'. The commands are autoencoder, image, language; `spa"),
        (["autoencoder", "--method", "none", "--q", "2"], "expected `--q` to be left out, as the method is none, but"),
        (["language", "--method", "dropout", "--q-output", "2"], "expected `--q-output` to be left out, as the method"),
        (["language", "--budget-minutes", "0"], "expected `--budget-minutes` to be a finite number > 0, but got '0'"),
        # what only the data or the machine can tell
        (["autoencoder", "--batch", "1214"], "expected `--batch` to be at most 1213, as there are 1213 training exa"),
        (["image", "--valid-size", "2000"], "expected `--valid-size` to be from 1 to 1346, which the data allow, but"),
        (["language", "--train-size", "99999999"], "expected `--train-size` to be between 1 and the "),
        (["language", "--batch", "600000"], "expected `--batch` to be between 1 and half of the "),
        (["image", "--data", "./nowhere"], "'./nowhere' does not exist: name a folder that holds the data as train-"),
        (["language", "--data", "ptb"], "The Penn Treebank has no public download"),
        (["autoencoder", "--precision", "fp16", "--device", "cpu"], "expected `--precision` to be fp32 or bf16 on a"),
        (["autoencoder", "--track", "nothing"], "expected `--track` to be a tracker that is installed ("),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence_and_no_folder(
    args: list[str], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(["run", *args], sentence, tmp_path, capfd)


@pytest.mark.parametrize("exists", [False, True])
def test_what_the_first_step_refuses_leaves_nothing(
    exists: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "mine"
    if exists:
        out.mkdir(parents=True)
    args = [*arguments("autoencoder", method="kwinners", epochs=1, track="tensorboard"), "--out", str(out), "--k"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*args, "300"])
    assert stopped.value.code == 2
    assert capfd.readouterr().err.startswith("sparseout: expected `--k` to be ")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == (["runs", "runs/mine"] * exists)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*args, "3"])
    assert stopped.value.code == 0


def test_too_large_a_network_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: Any, objective: Any, batch: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("sparseout_experiments.tasks.autoencoder.Reconstruct.loss", exhausted)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments("autoencoder"), "--out", str(tmp_path / "run")])
    assert stopped.value.code == 1
    assert not (tmp_path / "run").exists()
