"""Every method by one word in the same harness: where it acts, what is measured, and that runs go on."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import STEPS, arguments, differences, options, outcome, run
from sparseout_experiments import tasks
from sparseout_experiments.commands import app
from sparseout_experiments.commands.run import _name
from sparseout_experiments.training import loop as train
from sparseout_experiments.training import run_folder
from torch import Tensor, nn
from typer.testing import CliRunner

from conftest import needs_compiler
from sparseout import baselines
from sparseout.baselines.bridgeout import BridgeoutConv2d, BridgeoutLinear
from sparseout.baselines.shakeout import ShakeoutConv2d, ShakeoutLinear

METHODS = tuple(baselines.METHODS)
ON_WEIGHTS = {"bridgeout": (BridgeoutLinear, BridgeoutConv2d), "shakeout": (ShakeoutLinear, ShakeoutConv2d)}
ELSEWHERE = [
    *(("image", method) for method in METHODS if method not in ("none", "dropout", "sparseout", "l1_warmup")),
    *((kind, method) for kind in ("language", "awd") for method in ("gaussian", "penalty")),
    *(
        ("transformer", method)
        for method in ("bridgeout", "shakeout", "gaussian", "penalty", "kwinners", "statistical_topk")
    ),
    ("language", "l1_warmup"),
]


def task_for(kind: str, **changed: Any) -> Any:
    with torch.random.fork_rng():
        return tasks.build(options(kind, **changed), train.Rng(0), tasks.DistributedContext(torch.device("cpu")))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_autoencoder_from_the_command_line(method: str, tmp_path: Path) -> None:
    given = {"k_eval": 5, "k": 3} if method == "kwinners" else {}
    args = arguments("autoencoder", method=method, epochs=6, **given)
    shown = CliRunner().invoke(app, [*args, "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / run_folder.RESULT).read_text())
    losses = [line["train_loss"] for line in run_folder.metrics(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]
    assert found["config"]["method"] == method
    assert found["sparsity"]["code"]["units"] == 16
    assert found["sparsity"]["code"]["rows"] == 450
    # what is measured is what the decoder reads
    task = task_for("autoencoder", method=method)
    task.use(torch.load(tmp_path / run_folder.CHECKPOINT, weights_only=True)["best"]["weights"])
    read: list[Tensor] = []
    task.model.decoder.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    if method == "kwinners":
        task.model.noise.k_eval = 5
    task.evaluate("test")
    code = torch.cat(read)
    density = (code != 0).double().mean().item()
    assert found["sparsity"]["code"]["density"] == pytest.approx(density, abs=1e-12)
    if method == "kwinners":
        assert (code != 0).sum(1).max() == 5


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of a run without a method, once for each task."""
    return cache(lambda kind: run(tmp_path_factory.mktemp("plain"), kind, method="none", epochs=1))


@pytest.mark.parametrize(("kind", "method"), ELSEWHERE)
def test_the_other_tasks(kind: str, method: str, tmp_path: Path, plain_run: Callable[[str], dict[str, Any]]) -> None:
    found, plain = run(tmp_path, kind, method=method, epochs=1), plain_run(kind)
    assert found["status"] == "finished"
    assert found["train_loss"] != plain["train_loss"]
    assert found["sparsity"].keys() == plain["sparsity"].keys()
    if method == "kwinners":  # a tenth of an image's channels and positions, 26 of 256 at most, or of an FFN's units
        most = 26 / 256 if kind == "image" else 2 / 24
        assert all(place["density"] < most + 1e-6 for place in found["sparsity"].values())


@pytest.mark.parametrize("method", ON_WEIGHTS)
def test_noise_on_weights_is_on_the_layer_after_the_place_of_the_noise(method: str) -> None:
    found = {
        kind: [
            name
            for name, module in task_for(kind, method=method).model.named_modules()
            if type(module) in ON_WEIGHTS[method]
        ]
        for kind in ("autoencoder", "image", "transformer")
    }
    assert found == {
        "autoencoder": ["decoder"],
        "image": [f"blocks.{number}.conv2" for number in range(3)],
        "transformer": [f"blocks.{number}.ffn.out" for number in range(2)],
    }


def test_options_arrive() -> None:
    layer = task_for("autoencoder", method="bridgeout", p=0.25, q=3, per_example=False).model.decoder
    assert (layer.p, layer.q, layer.per_example) == (0.25, 3, False)
    layer = task_for("autoencoder", method="shakeout", p=0.25, c=2).model.decoder
    assert (layer.p, layer.c) == (0.25, 2)
    layer = task_for("autoencoder", method="kwinners", k=3, k_eval=0.5, boost=2).model.noise
    assert (layer.k, layer.k_eval, layer.boost, len(layer.duty_cycle)) == (3, 0.5, 2, 16)
    noises = task_for("awd", method="gaussian", p_input=0.1, p=0.4).model.noises
    assert [(noise.p, noise.shared_dims) for noise in noises] == [(0.1, (0,)), (0.4, (0,)), (0.4, (0,))]


def test_an_activation_takes_the_place_of_relu() -> None:
    for method, function in (("relu2", baselines.relu_squared), ("statistical_topk", baselines.statistical_topk)):
        model = task_for("autoencoder", method=method).model
        x = torch.rand(5, 64)
        assert torch.equal(model(x), model.decoder(function(model.encoder(x))))
        ffn = task_for("transformer", method=method).model.blocks[0].ffn
        assert type(ffn.activation) is nn.Identity
        block = task_for("image", method=method).model.blocks[0]
        assert torch.equal(block.noise(block.relu(x - 0.5)), function(x - 0.5))


def test_the_strength_of_l1_rises_over_a_fraction_of_the_steps(tmp_path: Path) -> None:
    weak, late, whole = (
        run(tmp_path / name, "autoencoder", method="l1_warmup", strength=0.003, warmup=warmup)
        for name, warmup in (("weak", 1.0), ("late", 0.4), ("whole", 0.0))
    )
    assert weak["mean"]["hoyer"] < late["mean"]["hoyer"] < whole["mean"]["hoyer"]
    plain = run(tmp_path / "plain", "autoencoder", method="penalty", strength=0.003)
    assert whole["train_loss"] == plain["train_loss"]
    state = torch.load(tmp_path / "late" / run_folder.CHECKPOINT, weights_only=True)
    assert state["penalty"] == {"steps": 3 * STEPS}


def test_the_penalty_is_added_in_training_alone() -> None:
    task = task_for("autoencoder", method="penalty", strength=0.5, q=1.5)
    batch = task.parts["train"][:20]
    code = task.model.code(batch)
    wanted = F.mse_loss(task.model.decoder(code), batch) + 0.5 * baselines.lq_penalty(code, 1.5)
    for _ in range(2):
        torch.testing.assert_close(task.objective(batch, batch), wanted)
        task.evaluate("valid")
        assert task.objective.penalty.loss().item() == 0


@pytest.mark.parametrize("kind", ["image", "language", "transformer"])
def test_the_penalty_is_on_every_place_that_is_measured(kind: str) -> None:
    task = task_for(kind, method="penalty", strength=0.5)
    plain = task_for(kind, method="none")
    batch = task.plan()[0]
    seen: list[Tensor] = []
    for module in plain.model.activations().values():
        module.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    plain.plan()
    plain.model.load_state_dict(task.model.state_dict())
    with_, without = (some.loss(some.objective, batch) for some in (task, plain))
    assert len(seen) == (3 if kind == "image" else 2)
    torch.testing.assert_close(with_ - without, 0.5 * sum(baselines.lq_penalty(x) for x in seen), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_shakeout_without_its_constant_is_dropout_bit_for_bit(tmp_path: Path) -> None:
    for kind, fewer in (("autoencoder", {}), ("image", {"train_size": 88})):
        run(tmp_path / kind / "dropout", kind, method="dropout", **fewer)
        run(tmp_path / kind / "shakeout", kind, method="shakeout", c=0, **fewer)
        assert differences(outcome(tmp_path / kind / "dropout"), outcome(tmp_path / kind / "shakeout")) == []


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        # one for each thing that can be lost: torch's generator, Sparseout's on weights, buffers, steps of a warm-up
        *(("autoencoder", method) for method in ("gaussian", "bridgeout", "kwinners", "l1_warmup")),
        pytest.param("image", "kwinners", marks=pytest.mark.slow),
        pytest.param("awd", "penalty", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_goes_on(kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", kind, method=method)
    look = train._Run._check

    def interrupted(self: Any, steps: int) -> None:
        look(self, steps)
        if self.steps >= 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", kind, method=method, checkpoint_minutes=0.0)
    state = torch.load(tmp_path / "stopped" / run_folder.CHECKPOINT, weights_only=True)
    assert state["step"] > 0  # within an epoch
    duty = [tensor for name, tensor in state["model"].items() if name.endswith("duty_cycle")]
    assert all(cycle.max() > 0 for cycle in duty)
    assert len(duty) == (0 if method != "kwinners" else 3 if kind == "image" else 1)
    run(tmp_path / "stopped", kind, method=method, checkpoint_minutes=0.0)
    assert differences(outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")) == []


@pytest.mark.parametrize("method", METHODS)
def test_bf16(method: str, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", "autoencoder", method=method, epochs=1)
    found = run(tmp_path / "half", "autoencoder", method=method, epochs=1, precision="bf16")
    assert found["train_loss"] != plain["train_loss"]
    # where activations of two units round to the same number another one wins
    assert found["train_loss"] == pytest.approx(plain["train_loss"], rel=0.05 if method == "kwinners" else 0.02)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("autoencoder", "l1_warmup"),
        ("autoencoder", "statistical_topk"),
        ("autoencoder", "kwinners"),
        ("autoencoder", "shakeout"),
        ("autoencoder", "bridgeout"),
        ("image", "penalty"),
        ("image", "kwinners"),
    ],
)
def test_compiled(kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "image":  # traced whole, for which a compiler that takes a minute is not needed
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    changed: dict[str, Any] = {"p": 0} if method in ON_WEIGHTS else {}
    changed |= {"train_size": 40} if kind == "image" else {}
    plain = run(tmp_path / "plain", kind, method=method, epochs=1, **changed)
    found = run(tmp_path / "compiled", kind, method=method, epochs=1, compile=True, **changed)
    assert found["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "given", "begins", "has"),
    [
        ("none", {}, "autoencoder-none-seed0", ""),
        ("bridgeout", {"per_example": False}, "autoencoder-bridgeout-q1.5-p0.5-seed0-", "-per_example-False"),
        ("penalty", {"q": 0.5, "strength": 0.1}, "autoencoder-penalty-q0.5-seed0-", "-strength-0.1"),
        ("kwinners", {"k": 3}, "autoencoder-kwinners-seed0-", "-k-3"),
    ],
)
def test_the_name_of_the_folder_says_the_method_and_its_options(
    method: str, given: dict[str, Any], begins: str, has: str
) -> None:
    name = _name(options("autoencoder", method=method, **given))
    assert name.startswith(begins)
    assert has in name


def test_the_model_is_the_same_but_for_the_method() -> None:
    states = [task_for("autoencoder", method=method).model.state_dict() for method in METHODS]
    for state in states:
        state.pop("noise.duty_cycle", None)
        assert differences(states[0], state) == []
    assert isinstance(task_for("autoencoder", method="penalty").model.noise, nn.Identity)
