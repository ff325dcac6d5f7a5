from pathlib import Path
from typing import Any

import pytest
import torch
from sparseout_experiments import demo
from sparseout_experiments.config import record, resolve
from sparseout_experiments.data import Split, digits
from sparseout_experiments.demo import Options, plan, report, training
from sparseout_experiments.demo.summary import trend, verdict
from sparseout_experiments.demo.training import Look, run_all, train
from sparseout_experiments.models import Autoencoder
from sparseout_experiments.studies.engine.cluster import Job
from sparseout_experiments.studies.engine.frame import Results
from sparseout_experiments.tasks import autoencoder
from torch import Tensor, nn


@pytest.fixture(scope="module")
def data() -> Split:
    return digits()


def quiet(name: str, done: float) -> None:
    pass


def trained(options: Options, folder: Path) -> tuple[dict[str, Job], dict[str, Look], Results]:
    """The jobs of a demonstration, the looks at their runs, and the results."""
    jobs = plan(options, folder)
    looks = {str(job.folder): look for job, look in zip(jobs.values(), run_all(jobs, quiet), strict=True) if look}
    return jobs, looks, report.gathered(options, jobs, looks, "")


def test_the_digits_are_split_once_and_for_all(data: Split) -> None:
    assert data.train.shape == (1347, 64)
    assert data.test.shape == (450, 64)
    assert torch.equal(data.train, digits().train)
    assert 0 == data.train.min() < data.train.max() == 1
    assert torch.cat(data).unique(dim=0).shape[0] == 1797  # no digit twice: none is trained and tested on


def test_every_setting_is_run_on_every_seed_and_whole_seeds_come_first(tmp_path: Path) -> None:
    jobs = plan(Options(), tmp_path)
    assert len(jobs) == len({job.folder for job in jobs.values()}) == (5 * 2 + 2) * 3
    seeds = [job.options["seed"] for job in jobs.values()]
    assert seeds == sorted(seeds)


@pytest.mark.slow
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
    for name, job in plan(Options(q=(1.0, 3.0), seeds=2, epochs=2), tmp_path).items():
        start: list[list[Tensor]] = []
        batches: list[Tensor] = []
        train(name, job, quiet)
        seen[name, job.options["seed"]] = torch.cat([p.flatten() for p in start[0]]), torch.cat(batches)
    first, *others = (value for (_, seed), value in seen.items() if seed == 0)
    count = len(first[1]) // 2
    assert first[1].shape == (2 * count, 64)
    assert count == 18 * 64
    assert not torch.equal(first[1][:count], first[1][count:])  # another order in the second epoch
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
    elsewhere = seen["method=none seed=1", 1]
    assert not torch.equal(first[0], elsewhere[0])
    assert not torch.equal(first[1], elsewhere[1])


@pytest.mark.parametrize("gradient", ["detached", "exact"])
def test_q_2_is_dropout_bit_for_bit(tmp_path: Path, gradient: demo.Gradient) -> None:
    options = Options(q=(2.0,), seeds=1, scales=("paper", "matched", 0.1), gradient=gradient, epochs=2)
    _, looks, results = trained(options, tmp_path)
    *ours, dropout, _ = looks.values()
    for one in ours:
        assert one.histogram == dropout.histogram
        assert torch.equal(one.filters, dropout.filters)
        assert torch.equal(one.reconstructions, dropout.reconstructions)
    numbers = results.frame[results.frame["method"] != "none"][["hoyer", "gini", "dead", "metric"]]
    assert len(numbers.drop_duplicates()) == 1
    assert len(numbers) == 4


@pytest.mark.parametrize("scale", ["paper", "matched", 0.25])
def test_the_options_reach_the_run(scale: demo.Scale, tmp_path: Path) -> None:
    options = Options(q=(1.5,), scales=(scale,), p=0.3, gradient="exact", epochs=7, seeds=4)
    for job in list(plan(options, tmp_path).values())[-3:]:
        found, method = record(resolve(job.task, job.options)), job.options["method"]
        wanted = {"seed": 3, "epochs": 7, "data": "digits", "units": 256}
        wanted |= {} if method == "none" else {"p": 0.3}
        wanted |= {"q": 1.5, "scale": scale, "gradient": "exact"} if method == "sparseout" else {}
        assert {name: found[name] for name in wanted} == wanted


def test_a_run_repeats_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    options = Options(q=(1.0,), scales=("paper",), seeds=1, epochs=1)

    def once(name: str) -> list[Any]:
        _, looks, _ = trained(options, tmp_path / name)
        return [look.reconstructions.tolist() for look in looks.values()]

    first = once("first")
    torch.rand(7)
    assert once("second") == first
    torch.set_rng_state(state)
    interrupted = run_all(plan(options, tmp_path / "third"), quiet)
    next(interrupted)
    interrupted.close()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_looked_at_is_what_was_measured(tmp_path: Path) -> None:
    jobs = dict(list(plan(Options(q=(2.0,), seeds=1, epochs=2), tmp_path).items())[-1:])
    heard: list[float] = []
    ((name, job),) = jobs.items()
    look = train(name, job, lambda name, done: heard.append(done))
    assert look
    found = report.gathered(Options(q=(2.0,)), jobs, {str(job.folder): look}, "").frame.iloc[0]
    test = training.digits().test
    with torch.no_grad():
        code = torch.relu(look.model.encoder(test))
        error = (look.model.decoder(code) - test).square().mean().item()
    norms = code.norm(dim=1)
    assert found["hoyer"] == pytest.approx(((16 - code.sum(1) / norms) / 15).mean().item(), rel=1e-5)
    assert found["density"] == pytest.approx((code > 0).float().mean().item())
    assert found["dead"] == (code == 0).all(0).float().mean().item()
    assert found["metric"] == pytest.approx(1000 * error, rel=1e-5)
    assert found["undefined"] == 0
    assert sum(look.histogram) == (code > 0).sum().item()
    assert look.reconstructions.shape == look.filters.shape == (10, 64)
    assert heard == sorted(heard)
    assert heard[-1] == 1


def test_a_dead_network_has_an_empty_histogram(data: Split) -> None:
    model = Autoencoder(64, 256, nn.Identity(), torch.Generator().manual_seed(0))
    nn.init.constant_(model.encoder.bias, -100)
    assert sum(training.look(model, data.test).histogram) == 0


def test_a_run_that_fails_has_no_numbers(tmp_path: Path) -> None:
    options = Options(q=(300.0,), scales=("paper",), seeds=1, epochs=2)
    _, looks, results = trained(options, tmp_path)
    failed = results.frame[results.frame["method"] == "sparseout"].iloc[0]
    assert failed["status"] == "failed"
    assert failed["run"] not in looks
    assert failed[["hoyer", "metric", "dead"]].isna().all()


def test_sparsity_falls_with_q(tmp_path: Path) -> None:
    """The claim of the page, at reduced size."""
    options = Options(q=(1.0, 3.0), epochs=5)
    _, _, results = trained(options, tmp_path)
    for scale in options.scales:
        for measure in ("hoyer", "hoyer_live"):
            found = trend(results, scale, measure)
            assert found
            assert found.verdict == "apart"
    assert "falls at every step" in verdict(results, options.scales)
    assert (results.frame["undefined"] == 0).all()
