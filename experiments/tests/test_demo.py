import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sparseout_experiments import demo
from sparseout_experiments.data import Split, digits
from sparseout_experiments.demo import Options, Run, Setting, plan, settings, training
from sparseout_experiments.demo.summary import dial, summarise, trend, verdict
from sparseout_experiments.demo.training import run_all, train
from sparseout_experiments.models import Autoencoder
from sparseout_experiments.training.environment import one_thread
from torch import Tensor, nn

from sparseout import Sparseout

SHORT = Options(epochs=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data() -> Split:
    return digits()


def quiet(setting: Setting, seed: int) -> None:
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


def test_weights_and_batches_are_the_same_at_every_setting(data: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded(Autoencoder):
        def __init__(self, pixels: int, units: int, noise: nn.Module, generator: torch.Generator) -> None:
            super().__init__(pixels, units, noise, generator)
            start.append([parameter.detach().clone() for parameter in self.parameters()])

        def code(self, x: Tensor) -> Tensor:
            if self.training:
                batches.append(x)
            return super().code(x)

    monkeypatch.setattr(training, "Autoencoder", Recorded)
    seen = {}
    for seed in (0, 1):
        for setting in settings(Options(q=(1.0, 3.0))):
            start: list[list[Tensor]] = []
            batches: list[Tensor] = []
            train(setting, seed, SHORT, data, quiet)
            seen[setting, seed] = torch.cat([p.flatten() for p in start[0]]), torch.cat(batches)
    first, *others = (value for (_, seed), value in seen.items() if seed == 0)
    assert first[1].shape == (2 * 1347, 64)
    assert not torch.equal(first[1][:1347], first[1][1347:])  # another order in the second epoch
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
    elsewhere = seen[Setting("none"), 1]
    assert not torch.equal(first[0], elsewhere[0])
    assert not torch.equal(first[1], elsewhere[1])


@pytest.mark.parametrize("scale", ["paper", "matched", 0.1])
@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_q_2_is_dropout_bit_for_bit(data: Split, scale: demo.Scale, gradient: demo.Gradient) -> None:
    options = dataclasses.replace(SHORT, gradient=gradient)
    ours = train(Setting("sparseout", scale, 2.0), 0, options, data, quiet)
    dropout = train(Setting("dropout"), 0, options, data, quiet)
    assert numbers(ours) == numbers(dropout)
    assert ours.pictures is not None
    assert dropout.pictures is not None
    assert torch.equal(ours.pictures.filters, dropout.pictures.filters)
    assert torch.equal(ours.pictures.reconstructions, dropout.pictures.reconstructions)


@pytest.mark.parametrize(
    ("setting", "layer"),
    [
        (Setting("none"), "Identity()"),
        (Setting("dropout"), "Dropout(p=0.3, inplace=False)"),
        (Setting("sparseout", "paper", 1.0), repr(Sparseout(0.3, 1.0, gradient="exact"))),
        (Setting("sparseout", "matched", 3.0), repr(Sparseout(0.3, 3.0, gradient="exact", scale="matched"))),
        (Setting("sparseout", 0.25, 1.5), repr(Sparseout(0.3, 1.5, gradient="exact", scale=0.25))),
    ],
)
def test_the_options_reach_the_layer(setting: Setting, layer: str) -> None:
    assert repr(training.noise_layer(setting, Options(p=0.3, gradient="exact"))) == layer


def test_a_run_is_measured_on_the_test_digits(data: Split) -> None:
    assert train(Setting("none"), 0, Options(epochs=1), data, quiet).rows == len(data.test)


def test_a_run_repeats_and_leaves_torch_as_it_was(data: Split) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    options = Options(q=(1.0,), scales=("paper",), seeds=1, epochs=1)
    first = list(run_all(options, data, quiet))
    torch.rand(7)
    assert list(map(numbers, run_all(options, data, quiet))) == list(map(numbers, first))
    torch.set_rng_state(state)
    interrupted = run_all(options, data, quiet)
    next(interrupted)
    interrupted.close()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_noise_of_seeds_differs_where_weights_do_not_matter(data: Split) -> None:
    one, two = (train(Setting("dropout"), seed, SHORT, data, quiet) for seed in (0, 1))
    assert one.error != two.error
    assert two.pictures is None


def test_the_measures_are_of_the_code_in_evaluation(data: Split) -> None:
    model = Autoencoder(64, 256, nn.Dropout(0.5), torch.Generator().manual_seed(0))
    run = training.measure(model, Setting("dropout"), 0, data.test, 0.0)
    code = torch.relu(model.encoder(data.test))
    norms = code.norm(dim=1)
    assert run.hoyer == pytest.approx(((16 - code.sum(1) / norms) / 15).mean().item(), rel=1e-5)
    assert run.density == pytest.approx((code > 0).float().mean().item())
    assert run.dead == (code == 0).all(0).float().mean().item()
    assert run.error == pytest.approx((model.decoder(code) - data.test).square().mean().item())
    assert sum(run.histogram) == (code > 0).sum().item()
    assert run.undefined_rows == 0


def test_a_dead_network_is_undefined_and_not_an_error(data: Split) -> None:
    model = Autoencoder(64, 256, nn.Identity(), torch.Generator().manual_seed(0))
    nn.init.constant_(model.encoder.bias, -100)
    run = training.measure(model, Setting("none"), 0, data.test, 0.0)
    assert run.hoyer != run.hoyer
    assert (run.undefined_rows, run.rows, run.dead) == (450, 450, 1.0)


def test_sparsity_falls_with_q(data: Split) -> None:
    """The claim of the page, at reduced size."""
    options = Options(q=(1.0, 3.0), epochs=5)
    with one_thread():
        runs = [train(one, seed, options, data, quiet) for one, seed in demo.plan(options) if one.q is not None]
    rows = summarise(options, runs)
    for scale in options.scales:
        assert trend(dial(rows, scale), "hoyer").verdict == "apart"
        assert trend(dial(rows, scale), "hoyer_live").verdict == "apart"
    assert "falls at every step" in verdict(rows, options.scales)
    assert sum(run.undefined_rows for run in runs) == 0
