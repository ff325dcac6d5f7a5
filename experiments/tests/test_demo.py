import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sparseout_experiments import demo
from sparseout_experiments.config import record, resolve
from sparseout_experiments.data import Split, digits
from sparseout_experiments.demo import Options, Run, Setting, plan, settings, training
from sparseout_experiments.demo.summary import dial, summarise, trend, verdict
from sparseout_experiments.demo.training import run_all, train
from sparseout_experiments.models import Autoencoder
from sparseout_experiments.tasks import autoencoder
from sparseout_experiments.training.environment import one_thread
from sparseout_experiments.training.run_folder import RunFailed
from torch import Tensor, nn

SHORT = Options(epochs=2)


@pytest.fixture(scope="module")
def data() -> Split:
    return digits()


def quiet(setting: Setting, seed: int, done: float) -> None:
    pass


def numbers(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.record().items() if name not in ("seconds", "method", "scale", "q")}


def test_the_digits_are_split_once_and_for_all(data: Split) -> None:
    assert data.train.shape == (1347, 64)
    assert data.test.shape == (450, 64)
    assert torch.equal(data.train, digits().train)
    assert 0 == data.train.min() < data.train.max() == 1
    assert torch.cat(data).unique(dim=0).shape[0] == 1797  # no digit twice: none is trained and tested on


def test_every_setting_is_run_on_every_seed_and_whole_seeds_come_first() -> None:
    found = plan(Options())
    assert len(found) == len(set(found)) == (5 * 2 + 2) * 3
    assert [seed for _, seed in found] == sorted(seed for _, seed in found)


def test_weights_and_batches_are_the_same_at_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded(Autoencoder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            start.append([parameter.detach().clone() for parameter in self.parameters()])

        def code(self, x: Tensor) -> Tensor:
            if self.training:
                batches.append(x)
            return super().code(x)

    monkeypatch.setattr(autoencoder, "Autoencoder", Recorded)
    seen = {}
    for seed in (0, 1):
        for setting in settings(Options(q=(1.0, 3.0))):
            start: list[list[Tensor]] = []
            batches: list[Tensor] = []
            train(setting, seed, SHORT, tmp_path / f"{setting} {seed}", quiet)
            seen[setting, seed] = torch.cat([p.flatten() for p in start[0]]), torch.cat(batches)
    first, *others = (value for (_, seed), value in seen.items() if seed == 0)
    count = len(first[1]) // 2
    assert first[1].shape == (2 * count, 64)
    assert count == 18 * 64
    assert not torch.equal(first[1][:count], first[1][count:])  # another order in the second epoch
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
    elsewhere = seen[Setting("none"), 1]
    assert not torch.equal(first[0], elsewhere[0])
    assert not torch.equal(first[1], elsewhere[1])


@pytest.mark.parametrize("scale", ["paper", "matched", 0.1])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_q_2_is_dropout_bit_for_bit(tmp_path: Path, scale: demo.Scale, gradient: demo.Gradient) -> None:
    options = dataclasses.replace(SHORT, gradient=gradient)
    ours = train(Setting("sparseout", scale, 2.0), 0, options, tmp_path / "ours", quiet)
    dropout = train(Setting("dropout"), 0, options, tmp_path / "dropout", quiet)
    assert numbers(ours) == numbers(dropout)
    assert ours.pictures is not None
    assert dropout.pictures is not None
    assert torch.equal(ours.pictures.filters, dropout.pictures.filters)
    assert torch.equal(ours.pictures.reconstructions, dropout.pictures.reconstructions)


@pytest.mark.parametrize("scale", ["paper", "matched", 0.25])
def test_the_options_reach_the_run(scale: demo.Scale) -> None:
    options = Options(p=0.3, gradient="exact", epochs=7)
    for setting in (Setting("none"), Setting("dropout"), Setting("sparseout", scale, 1.5)):
        found = record(resolve("autoencoder", training.chosen(setting, 3, options)))
        wanted = {"method": setting.method, "seed": 3, "epochs": 7, "data": "digits", "units": 256}
        wanted |= {} if setting.method == "none" else {"p": 0.3}
        wanted |= {"q": 1.5, "scale": scale, "gradient": "exact"} if setting.q else {}
        assert {name: found[name] for name in wanted} == wanted


def test_a_run_repeats_and_leaves_torch_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    options = Options(q=(1.0,), scales=("paper",), seeds=1, epochs=1)
    first = list(run_all(options, quiet))
    torch.rand(7)
    assert list(map(numbers, run_all(options, quiet))) == list(map(numbers, first))
    torch.set_rng_state(state)
    interrupted = run_all(options, quiet)
    next(interrupted)
    interrupted.close()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_are_of_the_first_seed(tmp_path: Path) -> None:
    one, two = (train(Setting("dropout"), seed, SHORT, tmp_path / str(seed), quiet) for seed in (0, 1))
    assert one.error != two.error
    assert one.pictures is not None
    assert two.pictures is None


def test_what_is_looked_at_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Autoencoder] = []
    test, whole = training.digits().test, training.look
    monkeypatch.setattr(training, "look", lambda model, test: (seen.append(model), whole(model, test))[1])
    heard: list[float] = []
    run = train(Setting("none"), 0, SHORT, tmp_path / "run", lambda setting, seed, done: heard.append(done))
    with torch.no_grad():
        code = torch.relu(seen[0].encoder(test))
        error = (seen[0].decoder(code) - test).square().mean().item()
    norms = code.norm(dim=1)
    assert run.hoyer == pytest.approx(((16 - code.sum(1) / norms) / 15).mean().item(), rel=1e-5)
    assert run.density == pytest.approx((code > 0).float().mean().item())
    assert run.dead == (code == 0).all(0).float().mean().item()
    assert run.error == pytest.approx(error, rel=1e-5)
    assert (run.rows, run.undefined_rows) == (450, 0)
    assert sum(run.histogram) == (code > 0).sum().item()
    assert run.pictures is not None
    assert run.pictures.reconstructions.shape == run.pictures.filters.shape == (10, 64)
    assert heard == sorted(heard)
    assert heard[-1] == 1


def test_a_dead_network_has_an_empty_histogram(data: Split) -> None:
    model = Autoencoder(64, 256, nn.Identity(), torch.Generator().manual_seed(0))
    nn.init.constant_(model.encoder.bias, -100)
    assert sum(training.look(model, data.test)[0]) == 0


def test_a_run_that_fails_has_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RunFailed("the loss of step 7 is nan")

    monkeypatch.setattr(training, "perform", fail)
    run = train(Setting("sparseout", "paper", 300.0), 0, SHORT, tmp_path / "run", quiet)
    assert all(map(math.isnan, (run.hoyer, run.error, run.dead)))
    assert run.rows == 450


def test_sparsity_falls_with_q(tmp_path: Path) -> None:
    """The claim of the page, at reduced size."""
    options = Options(q=(1.0, 3.0), epochs=5)
    with one_thread():
        runs = [
            train(setting, seed, options, tmp_path / f"{setting} {seed}", quiet)
            for setting, seed in plan(options)
            if setting.q is not None
        ]
    rows = summarise(options, runs)
    for scale in options.scales:
        assert trend(dial(rows, scale), "hoyer").verdict == "apart"
        assert trend(dial(rows, scale), "hoyer_live").verdict == "apart"
    assert "falls at every step" in verdict(rows, options.scales)
    assert sum(run.undefined_rows for run in runs) == 0
