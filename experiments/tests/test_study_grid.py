import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from sparseout_experiments import config
from sparseout_experiments.studies import control
from sparseout_experiments.studies.control import grid
from sparseout_experiments.studies.control.collect import Ledger
from sparseout_experiments.studies.control.grid import BUDGETS, GRIDS, SEEDS, TUNING_SEED, Run, Setting, Task, Value
from sparseout_experiments.studies.engine import pages
from sparseout_experiments.studies.engine.study import Request
from study_rows import ledger_of

from sparseout import Sparseout

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"
TUNED: tuple[Task, ...] = ("image", "language")


def tuned(task: Task, **low: float) -> dict[Setting, Value]:
    """A choice of p: the first, but the second for the settings named."""
    return {
        setting: grid.trials("small", task, setting)[int(setting.name in low)]  # type: ignore[misc]
        for setting in grid.settings("small", task)
    }


def test_the_protocol_has_the_tables_of_the_grid() -> None:
    text = PROTOCOL.read_text()
    plan = {"grid_of": grid.grid_of, "budgets": BUDGETS, "always": grid.ALWAYS, "count": grid.count}
    plan |= {"seeds": SEEDS, "tuning_seed": TUNING_SEED}
    for line in pages.rendered(control.__name__, "protocol.md.j2", **plan).splitlines():
        assert line in text
    assert "about two hours" in text
    assert len([line for line in text.splitlines() if re.match(r"\| (small|medium|gpu|full) \|", line)]) == 12


def test_the_protocol_has_the_margins_of_the_grid() -> None:
    text = " ".join(PROTOCOL.read_text().split())
    error, perplexity = GRIDS["image"].margin, GRIDS["language"].margin
    assert error is not None
    assert perplexity is not None
    assert f"{error:g} of classification error ({100 * error:g} points), {100 * perplexity:g}% of perplexity" in text
    assert f"{grid.HOYER_MARGIN:g} of Hoyer" in text
    assert f"fewer than {len(SEEDS)} seeds" in text
    images = grid.BUDGETS["small"]["image"]["test_size"]
    assert f"{100 * error:g} points of error are {error * images:g} images" in text


def test_the_autoencoder_has_every_combination_once() -> None:
    runs = grid.first("small", "autoencoder")
    # 6 q's other than 2, 2 p's, 2 gradients, 2 scales; q = 2 and Dropout at 2 p's; none
    assert len(runs) == 5 * (6 * 2 * 2 * 2 + 2 + 2 + 1) == 265
    assert len({run.key for run in runs}) == len(runs)
    assert {run.seed for run in runs} == set(SEEDS)
    assert not grid.second("small", "autoencoder", {})


@pytest.mark.parametrize("task", TUNED)
def test_every_setting_gets_two_trials_none_included(task: Task) -> None:
    runs = grid.first("small", task)
    assert len(runs) == 16
    assert set(Counter(run.setting for run in runs).values()) == {2}
    assert Setting("none") in {run.setting for run in runs}
    assert {run.seed for run in runs} == {TUNING_SEED}
    assert TUNING_SEED not in SEEDS


@pytest.mark.parametrize("task", TUNED)
def test_where_all_choose_the_same_p_nothing_is_run_at_a_common_one(task: Task) -> None:
    runs = grid.second("small", task, tuned(task))
    assert Counter(run.role for run in runs) == {"tuned": 40, "identity": 1}
    assert len({run.key for run in runs}) == 41
    assert grid.count("small", task) == (57, 72)


@pytest.mark.parametrize("task", BUDGETS["medium"])
def test_medium_has_three_q_at_matched_noise(task: Task) -> None:
    trials = grid.first("medium", task)
    settings = {run.setting for run in trials}
    assert {(one.q, one.scale) for one in settings} == {(1.5, "matched"), (2.0, None), (3.0, "matched"), (None, None)}
    assert len(trials) == 8
    assert grid.count("medium", task) == (8 + 5 * 4 + 1, 8 + 5 * 6 + 1)


def test_a_transformer_of_medium_is_a_language_run() -> None:
    run = Run("transformer", Setting("sparseout", 1.5, "matched", "detached"), Value("p", 0.2), 3, "tuned")
    found = config.resolve("language", grid.options(run, "medium", {}, {}))
    assert found.model_dump(include={"model", "place", "activation", "scale", "q", "p"}) == {
        "model": "transformer", "place": "ffn", "activation": "relu", "scale": "matched", "q": 1.5, "p": 0.2,
    }  # fmt: skip


def test_medium_goes_seed_by_seed_through_all_networks(tmp_path: Path) -> None:
    ledger = Ledger()
    for task in BUDGETS["medium"]:
        ledger.results |= ledger_of(task, "medium").results
    request = Request(("autoencoder", "image", "language", "transformer"), tmp_path, "medium")
    plan = list(control.STUDY.plan(request, ledger))
    assert len(plan) == 3 * 29  # there is no autoencoder; all chose one p
    assert [run.seed for run in plan] == sorted(
        (run.seed for run in plan), key=lambda seed: (seed != TUNING_SEED, seed)
    )
    for seed in SEEDS:
        assert {run.task for run in plan if run.seed == seed} == {"image", "language", "transformer"}
    with pytest.raises(ValueError, match="expected `--only` to be of image, language, transformer at this budget"):
        control.STUDY.plan(Request(("autoencoder",), tmp_path, "medium"), ledger)


def test_another_p_than_that_of_dropout_is_run_at_that_of_dropout_too() -> None:
    chosen = tuned("image", **{"q=1.5 matched detached": 1, "q=1.5 paper detached": 1})
    runs = [run for run in grid.second("small", "image", chosen) if run.role == "common"]
    assert {run.setting.name for run in runs} == {"q=1.5 matched detached"}  # at the paper's scale noise differs anyhow
    assert [run.seed for run in runs] == list(SEEDS)
    assert {run.value for run in runs} == {chosen[Setting("sparseout", 2.0)]}


def test_the_identity_run_is_dropout_at_the_p_of_q_2() -> None:
    chosen = tuned("language", **{"q=2": 1})
    (run,) = [run for run in grid.second("small", "language", chosen) if run.role == "identity"]
    assert run.setting.method == "dropout"
    assert run.value == Value("p", 0.5)


def test_the_value_with_the_lowest_score_is_chosen() -> None:
    setting = Setting("sparseout", 1.5, "matched", "detached")

    def at(p: float) -> Run:
        return Run("image", setting, Value("p", p), TUNING_SEED, "tuning")

    assert grid.choose("small", "image", [(at(0.1), 0.5), (at(0.3), 0.4)]) == {setting: Value("p", 0.3)}
    assert grid.choose("small", "image", [(at(0.1), 0.5), (at(0.3), 0.5)]) == {setting: Value("p", 0.1)}
    assert grid.choose("small", "image", [(at(0.1), 0.5), (at(0.3), float("inf"))]) == {setting: Value("p", 0.1)}
    assert grid.choose("small", "image", [(at(0.1), 0.5)]) == {}  # the other trial is not there yet
    assert grid.choose("small", "image", [(at(0.1), float("inf")), (at(0.3), float("inf"))]) == {}
    analysed = [(Run("image", setting, Value("p", p), 0, "tuned"), 0.1) for p in (0.1, 0.3)]
    assert grid.choose("small", "image", analysed) == {}  # only trials choose


def test_options_name_what_is_compared_and_the_source() -> None:
    run = Run("autoencoder", Setting("sparseout", 1.5, "matched", "exact"), Value("p", 0.2), 3, "grid")
    found = grid.options(run, "small", {"mnist": "/data/mnist"}, {"device": "cpu"})
    assert found["data"] == "/data/mnist"
    assert (found["q"], found["scale"], found["gradient"], found["p"]) == (1.5, "matched", "exact", 0.2)
    assert (found["seed"], found["device"], found["train_size"]) == (3, "cpu", 10_000)
    none = grid.options(Run("image", Setting("none"), Value("weight_decay", 5e-3), 0, "tuned"), "full", {}, {})
    assert none["weight_decay"] == 5e-3
    assert none["depth"] == 28
    assert not {"p", "q", "scale", "gradient", "train_size"} & none.keys()
    dropout = grid.options(Run("image", Setting("dropout"), Value("p", 0.1), 0, "identity"), "small", {}, {})
    assert dropout["p"] == 0.1
    assert not {"q", "scale", "gradient"} & dropout.keys()


@pytest.mark.parametrize("scale", [None, "matched"])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_q_2_is_one_setting_whatever_gradient_and_scale(scale: str | None, gradient: str) -> None:
    def both(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(5)
        x = torch.randn(40, 30).relu().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        assert x.grad is not None
        return y, x.grad

    plain = both(torch.nn.Dropout(0.3))
    found = both(Sparseout(0.3, 2.0, gradient=gradient, scale=scale))  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
