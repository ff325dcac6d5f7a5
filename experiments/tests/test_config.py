"""The options of runs: from texts, files and Python, which method and task uses which, and back to TOML."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from small import arguments
from sparseout_experiments import config, option_types
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


WINNERS = "a number > 0 and < 1 (the fraction of units) or a whole number >= 1 (of units)"


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
