import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from small import arguments
from sparseout_experiments import cli, config, option_types
from sparseout_experiments.commands import app
from sparseout_experiments.methods import KNOBS
from sparseout_experiments.training import run_folder
from typer.testing import CliRunner

# A value other than the default for every option.
OTHER: dict[str, dict[str, Any]] = {
    "common": {
        "target_sparsity": 0.7, "knob": "p", "q_min": 0.5, "q_max": 5.0,
        "p": 0.25, "q": 3.5, "gradient": "exact", "scale": 0.75, "seed": 7, "epochs": 3, "budget_minutes": 0.5,
        "per_example": False, "c": 0.5, "strength": 0.125, "warmup": 0.5, "k": 0.25, "k_eval": 0.5, "boost": 0.0,
        "data": 'a folder/of "dätä" \\ \U0001f600', "train_size": 100, "valid_size": 11, "test_size": 12,
        "split_seed": 2, "batch": 9, "lr": 1e-05, "weight_decay": 0.01, "clip": 1.5, "device": "cpu",
        "precision": "bf16", "compile": True, "checkpoint_minutes": 0.0, "track": "tensorboard",
    },
    "autoencoder": {"units": 33},
    "image": {
        "depth": 28, "width": 10, "norm": "group", "place": "pre-norm", "schedule": "steps", "augment": False,
        "flip": True, "channels_last": True, "momentum": 0.0, "stride": 2,
    },
    "language": {
        "model": "awd", "embedding": 30, "units": 40, "layers": 4, "bptt": 17, "words": 99, "p_input": 0.1,
        "q_input": 1.0, "p_between": 0.2, "q_between": 2.0, "p_output": 0.3, "q_output": 3.0, "locked": False,
        "weight_drop": 0.4, "embedding_drop": 0.05, "activation_penalty": 0.0, "temporal_penalty": 0.125,
    },
    "transformer": {"model": "transformer", "heads": 8, "activation": "gelu", "place": "residual"},
}  # fmt: skip


# The options that each method uses, of those that not all do.
SITES = ("input", "between", "output")
TARGET = ("target_sparsity", "knob")
USES: dict[str, set[str]] = {
    "none": set(),
    "dropout": {"p", *TARGET, *(f"p_{site}" for site in SITES)},
    "sparseout": {
        "p", "q", "gradient", "scale", *TARGET, "q_min", "q_max",
        *(f"{name}_{site}" for name in "pq" for site in SITES),
    },
    "bridgeout": {"p", "q", "per_example"},
    "shakeout": {"p", "c"},
    "gaussian": {"p", *TARGET, *(f"p_{site}" for site in SITES)},
    "penalty": {"q", "strength", *TARGET},
    "kwinners": {"k", "k_eval", "boost", *TARGET},
    "l1_warmup": {"strength", "warmup", *TARGET},
    "relu2": set(),
    "statistical_topk": {"k", *TARGET},
}  # fmt: skip
OF_SOME = set.union(*USES.values())
AFTER_RELU = ("bridgeout", "shakeout", "kwinners", "relu2", "statistical_topk")
CANNOT = {("language", method) for method in AFTER_RELU}
BOTH = [(task, method) for task in config.TASKS for method in USES if (task, method) not in CANNOT]


def other(task: str, method: str = "sparseout") -> dict[str, Any]:
    given = {"method": method} | OTHER["common"] | OTHER[task] | {"knob": KNOBS.get(method, ("p",))[-1]}
    if method in AFTER_RELU:
        given.pop("place", None)
    return {name: value for name, value in given.items() if name not in OF_SOME - USES[method]}


@pytest.mark.parametrize("task", config.TASKS)
def test_every_option_is_tried(task: str) -> None:
    given = OTHER["common"] | OTHER[task] | (OTHER["transformer"] if task == "language" else {})
    assert given.keys() | {"method"} == config.options_of(task).keys()


@pytest.mark.parametrize(("task", "method"), BOTH)
def test_every_option_comes_back_from_toml(task: str, method: str, tmp_path: Path) -> None:
    given = other(task, method)
    plain = config.resolve(task, {name: value for name, value in given.items() if name in ("model", "method")})
    made = config.resolve(task, given)
    assert {name: getattr(made, name) for name in given} == given
    # a value that were the default would show nothing by its return
    assert not [name for name in given if name not in ("model", "method") and getattr(plain, name) == given[name]]
    for one in (plain, made):
        path = tmp_path / "config.toml"
        path.write_text(config.write(one), encoding="utf-8")
        assert tomllib.loads(path.read_text(encoding="utf-8"))["task"] == task
        again = config.resolve(task, config.read(path, task))
        assert again == one
        assert {name: type(value) for name, value in vars(again).items()} == {
            name: type(value) for name, value in vars(one).items()
        }
        assert config.record(again) == config.record(one)
    assert config.task_of(made) == task


@pytest.mark.parametrize("task", config.TASKS)
def test_texts_are_read_as_values(task: str) -> None:
    texts = {name: value if isinstance(value, bool) else str(value) for name, value in other(task).items()}
    assert config.resolve(task, texts) == config.resolve(task, other(task))


@pytest.mark.parametrize(("task", "method"), [both for both in BOTH if both[1] != "sparseout"])
def test_what_a_method_does_not_use_is_neither_written_nor_taken(task: str, method: str, tmp_path: Path) -> None:
    everything = OTHER["common"] | OTHER[task]
    unused = [name for name in everything if name in OF_SOME - USES[method]]
    made = config.resolve(task, {"method": method})
    assert sorted(name for name, value in config.record(made).items() if value is None and name in unused) == sorted(
        unused
    )
    (tmp_path / "config.toml").write_text(config.write(made))
    assert config.resolve(task, config.read(tmp_path / "config.toml", task)) == made
    for name in unused:
        with pytest.raises(ValueError, match=f"^expected `{name}` to be left out, as the method is {method}, but got"):
            config.resolve(task, {"method": method, name: everything[name]})
    assert config.without_unused(everything, method).keys() == everything.keys() - set(unused)


SCALE = "paper (beta = 1), matched (the power of Dropout's noise) or a number > 0 (the unit of x)"
METHODS = (
    "none, dropout, sparseout, bridgeout, shakeout, gaussian, penalty, kwinners, l1_warmup, relu2 or statistical_topk"
)
FUSED = "the weights after the noise are inside LSTM layers, out of its reach"
SIGNED = "the states of an LSTM have both signs, and the largest are not the most active"
WINNERS = "a number > 0 and < 1 (the fraction of units) or a whole number >= 1 (of units)"
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


def test_a_large_seed_is_not_rounded() -> None:
    assert config.resolve("image", {"seed": "9007199254740993"}).seed == 2**53 + 1
    assert config.resolve("image", {"seed": 2**53 + 1}).seed == 2**53 + 1
    assert config.resolve("image", {"seed": "1e3"}).seed == 1000


def test_the_language_model_brings_its_defaults() -> None:
    plain, awd = (config.resolve("language", {"model": model}) for model in ("lstm", "awd"))
    names = ("embedding", "units", "layers", "bptt", "lr", "weight_decay", "locked", "weight_drop", "embedding_drop")
    names += ("activation_penalty", "temporal_penalty")
    assert [getattr(plain, name) for name in names] == [200, 200, 2, 35, 2e-3, 0.0, False, 0.0, 0.0, 0.0, 0.0]
    # Merity, Keskar & Socher (2017), section 5
    assert [getattr(awd, name) for name in names] == [400, 1150, 3, 70, 30.0, 1.2e-6, True, 0.5, 0.1, 2.0, 1.0]
    given = config.resolve("language", {"model": "awd", "units": 9, "locked": False, "q": 2.5, "q_output": 1, "p": 0.1})
    assert (given.units, given.locked) == (9, False)  # type: ignore[attr-defined]
    assert [getattr(given, f"q_{site}") for site in ("input", "between", "output")] == [2.5, 2.5, 1.0]
    assert [getattr(given, f"p_{site}") for site in ("input", "between", "output")] == [0.1, 0.1, 0.1]


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


def test_a_transformer_takes_every_method_where_its_place_allows(tmp_path: Path) -> None:
    transformer = {"model": "transformer"} | OTHER["transformer"]
    for method in USES:
        made = config.resolve("language", {"model": "transformer", "method": method})
        (tmp_path / "config.toml").write_text(config.write(made))
        assert config.resolve("language", config.read(tmp_path / "config.toml", "language")) == made
    made = config.resolve("language", transformer | {"method": "gaussian"})
    assert [getattr(made, name) for name in transformer] == list(transformer.values())
    with pytest.raises(ValueError, match=r"^expected `place` to be ffn, as shakeout acts on the hidden activations"):
        config.resolve("language", transformer | {"method": "shakeout"})
    with pytest.raises(ValueError, match=r"^expected `activation` to be relu, as kwinners takes the largest of acti"):
        config.resolve("language", transformer | {"method": "kwinners", "place": "ffn"})
    with pytest.raises(
        ValueError, match=r"^expected `activation` to be left out, as relu2 takes its place, but got 'g"
    ):
        config.resolve("language", transformer | {"method": "relu2", "place": "ffn"})


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


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text('task = "autoencoder"\nq = 3.0\np = 0.25\nscale = "matched"\nepochs = 2\n')
    args = [*arguments("autoencoder", epochs=1), "--config", str(path), "--q", "2.5", "--out", str(tmp_path / "run")]
    found = CliRunner().invoke(app, args)
    assert found.exit_code == 0, found.output
    written = tomllib.loads((tmp_path / "run" / run_folder.CONFIG).read_text())
    assert [written[name] for name in ("q", "p", "scale", "epochs", "units")] == [2.5, 0.25, "matched", 1, 16]
    # and what was written does the same run again
    args = [
        "run",
        "autoencoder",
        "--config",
        str(tmp_path / "run" / run_folder.CONFIG),
        "--out",
        str(tmp_path / "again"),
    ]
    assert CliRunner().invoke(app, args).exit_code == 0
    assert (tmp_path / "again" / run_folder.CONFIG).read_text() == (tmp_path / "run" / run_folder.CONFIG).read_text()


@pytest.mark.parametrize("task", config.TASKS)
def test_help_names_every_option_and_its_default(task: str) -> None:
    shown = CliRunner().invoke(app, ["run", task, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(shown.output.split())
    for name, option in config.options_of(task).items():
        (line,) = (line for line in lines if line.startswith(f"  --{name.replace('_', '-')} "))
        assert not re.search(r"\.\.\.|\u2026", line)
        if option.default is not None:
            shown_as = (
                {True: "yes", False: "no"}[option.default] if isinstance(option.default, bool) else option.default
            )
            assert f"[default: {shown_as}]" in words, name
    for name in ("--out", "--config", "--resume", "Method:", "Training:", "Data:", "Machine and records:", "Task:"):
        assert name in shown.output


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "penalty", "target_sparsity": 0.5, "knob": "q"}, "`knob` to be strength for the method penalty"),
        ({"target_sparsity": 0.5, "knob": "k"}, "`knob` to be q or p for the method sparseout, but got k"),
        ({"method": "dropout", "knob": "p"}, "`knob` to be left out, as there is no target sparsity, but got p"),
        ({"method": "kwinners", "target_sparsity": 0.5, "k": 7}, "`k` to be a fraction of the units, to be moved, but"),
        ({"method": "penalty", "target_sparsity": 0.5, "strength": 0}, "`strength` to be > 0, to be moved by factors"),
        ({"method": "shakeout", "target_sparsity": 0.5}, "`target_sparsity` to be left out, as the method is shakeout"),
    ],
)
def test_a_knob_is_one_of_the_method(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^expected {says}"):
        config.resolve("autoencoder", given)


def test_a_target_moves_q_from_where_it_says() -> None:
    plain, moving = config.resolve("image", {}), config.resolve("image", {"target_sparsity": 0.6})
    assert (plain.q, plain.scale, plain.q_min) == (1.5, "paper", None)
    assert (moving.q, moving.scale, moving.q_min, moving.q_max) == (2.5, "matched", 1.0, 4.0)
    given = config.resolve("image", {"target_sparsity": 0.6, "q": 2, "scale": "paper", "q_max": 2})
    assert (given.q, given.scale, given.q_min, given.q_max) == (2.0, "paper", 1.0, 2.0)
    with pytest.raises(ValueError, match=r"^expected `q` to be between q_min 1 and q_max 4, but got 4.5$"):
        config.resolve("image", {"target_sparsity": 0.6, "q": 4.5})
    with pytest.raises(
        ValueError, match=r"^expected `q_max` to be left out, as there is no target sparsity, but got 3"
    ):
        config.resolve("image", {"q_max": 3})


@pytest.mark.parametrize("value", [0, 1.5, "-3", True, "many"])
@pytest.mark.parametrize("name", ["k", "k_eval"])
def test_winners_are_a_fraction_or_a_number(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'expected `{name}` to be {WINNERS}, but got {value!r}')}$"):
        config.resolve("autoencoder", {"method": "kwinners", name: value})
    read = [config.resolve("autoencoder", {"method": "kwinners", name: given}) for given in ("25", 1, "0.25")]
    assert [repr(getattr(one, name)) for one in read] == ["25", "1", "0.25"]


@pytest.mark.parametrize("method", AFTER_RELU)
def test_what_needs_the_noise_before_a_convolution_has_it_there(method: str) -> None:
    assert config.resolve("image", {"method": method}).method == method
    with pytest.raises(ValueError, match=f"^expected `place` to be post-relu, as {method} .*, but got 'pre-norm'$"):
        config.resolve("image", {"method": method, "place": "pre-norm"})


def test_a_penalty_is_l1_unless_said() -> None:
    assert config.resolve("image", {"method": "penalty"}) == config.resolve("image", {"method": "penalty", "q": 1})


def test_a_folder_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert option_types.reader(option_types.Folder)("~/runs") == Path("/somewhere/runs")


def test_bounds_of_q_in_the_wrong_order_name_the_bounds() -> None:
    with pytest.raises(ValueError, match="expected `q_max` to be at least q_min 3, but got 2"):
        config.resolve("autoencoder", {"target_sparsity": 0.4, "q_min": 3, "q_max": 2})
