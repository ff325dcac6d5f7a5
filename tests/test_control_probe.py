"""Evaluation as a controller sees it: a probe, passes over a validation set, masked rows and small values."""

import copy

import pytest
import torch
from torch import nn

from sparseout import Sparseout, SparsityController, SparsityMonitor, measures, row_mask


class Odd(nn.Module):
    """Has all that a probe might change: modes, a buffer that evaluation changes, random numbers, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.noise, self.frozen = nn.Linear(8, 16), Sparseout(q=2.5), nn.BatchNorm1d(16).eval()
        self.register_buffer("calls", torch.zeros(()))
        self.modes: list[bool] = []

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor | float = 0.0) -> torch.Tensor:
        self.modes.append(self.training)
        if not self.training:
            self.calls += 1
            torch.rand(3)
        return self.noise(self.frozen(self.linear(x)).relu() + shift)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_a_probe_leaves_everything_as_it_was(form: str) -> None:
    model, x = Odd(), torch.rand(32, 8)
    probe = {"tensor": x, "tuple": (x,), "dict": {"x": x, "shift": torch.tensor(0.5)}}[form]
    controller = SparsityController(model, 0.5, every=1, probe=probe)
    with SparsityMonitor(model, ["noise"]) as monitor, torch.autocast("cpu", torch.bfloat16):
        loss = model(x).square().mean()
        before = (
            copy.deepcopy(model.state_dict()),
            torch.get_rng_state(),
            [module.training for module in model.modules()],
        )
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        controller.step()
        assert torch.equal(torch.get_rng_state(), before[1])
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        model(x).square().mean().backward()  # what the probe cast has no gradient
        loss.backward()
        after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        assert after == hooks
    assert model.modes == [True, False, True]
    assert model.linear.weight.grad is not None
    state, _, modes = before
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert [module.training for module in model.modules()] == modes
    assert {record["mode"] for record in monitor.report()} == {"train"}  # it does not count the probe
    code = model.frozen(model.linear(x)).relu() + (0.5 if form == "dict" else 0.0)
    assert controller.measured["noise"] == pytest.approx(measures.hoyer(code).mean().item(), abs=0.01)  # bf16
    assert "in evaluation (" in controller.report()[0]


def test_of_a_probe_the_rows_count_that_its_own_mask_keeps() -> None:
    class Masked(nn.Sequential):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    x, mask = torch.rand(4, 6, 8), torch.arange(6) < torch.tensor([1, 6, 2, 3])[:, None]
    other = row_mask(torch.ones(4, 6).triu())  # of the training batch
    for probe, rows in (({"x": x, "attention_mask": mask}, x[mask]), ((x, mask), x)):
        model = Masked(nn.Identity(), Sparseout())
        controller = SparsityController(model, 0.5, every=1, probe=probe)
        with other:
            model(x, mask)
            controller.step()
        assert controller.measured["1"] == pytest.approx(measures.hoyer(rows).mean().item(), abs=1e-6)
    with pytest.warns(UserWarning, match="all rows of the probe count, for its `attention_mask` is no mask: expected"):
        SparsityController(Masked(Sparseout()), 0.5, probe={"x": x, "attention_mask": -1e9 * mask})


def test_a_probe_that_fails_leaves_everything_as_it_was() -> None:
    model = Odd()
    controller = SparsityController(model, 0.5, every=1, probe=torch.rand(4, 5))
    model(torch.rand(4, 8))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        controller.step()
    assert model.training
    assert not model.frozen.training
    assert model.calls == 0
    with pytest.raises(TypeError, match=r"^expected `probe` to be a batch: .*, but got an int$"):
        SparsityController(model, 0.5, probe=3)
    with pytest.raises(ValueError, match=r"^expected `mode` to be None or 'eval' beside a probe"):
        SparsityController(model, 0.5, probe=torch.rand(4, 8), mode="train")


def rows(hoyer: float, n: int = 100) -> torch.Tensor:
    """One unit large and all others alike, such that the row has this Hoyer."""
    wanted, m = n**0.5 - hoyer * (n**0.5 - 1), n - 1
    large = (m + (m**2 - (wanted**2 - 1) * (wanted**2 * m - m**2)) ** 0.5) / (wanted**2 - 1)
    row = torch.ones(4, n)
    row[:, 0] = large
    return row


def test_between_evaluations_training_steers_with_the_offset_last_seen() -> None:
    layer, hoyer = Sparseout(q=2.5), 0.5
    controller = SparsityController(layer, 0.6, every=1)

    def step(offset: float | None = None) -> None:
        nonlocal hoyer
        hoyer += (0.9 - 0.15 * float(layer.q) - hoyer) / 5
        layer.train()(rows(hoyer))
        if offset is not None:
            layer.eval()(rows(hoyer + offset))
        controller.step()

    layer.eval()(rows(0.1))  # before training: a check of the validation loop, which says nothing
    for _ in range(150):
        step()
    assert hoyer == pytest.approx(0.6, abs=0.005)
    assert f"hoyer {hoyer:.3f} in training, target" in controller.report()[0]
    step(-0.1)
    assert f"hoyer {hoyer - 0.1:.3f} in evaluation ({hoyer:.3f} in training), target" in controller.report()[0]
    for _ in range(150):
        step()
    assert hoyer - 0.1 == pytest.approx(0.6, abs=0.005)
    assert controller.measured[""] == pytest.approx(hoyer - 0.1, abs=1e-3)
    assert "expected in evaluation" in controller.report()[0]
    for number in range(150):
        step(0.05 if number % 20 == 0 else None)
    assert hoyer + 0.05 == pytest.approx(0.6, abs=0.005)


@pytest.mark.slow
def test_noise_in_the_measure_moves_q_neither_way() -> None:
    draw, layer, hoyer, seen = torch.Generator().manual_seed(0), Sparseout(q=2.5), 0.5, []
    controller = SparsityController(layer, 0.6, every=1)
    for _ in range(1500):
        hoyer += (0.9 - 0.15 * float(layer.q) - hoyer) / 20
        layer(rows(hoyer + 0.02 * torch.randn((), generator=draw).item()))
        controller.step()
        seen.append(hoyer)
    assert sum(seen[300:]) / 1200 == pytest.approx(0.6, abs=0.004)


def test_what_is_small_counts_as_zero_and_padding_does_not_count() -> None:
    x = torch.tensor([[1.0, 1e-3, 0.5, -1e-4], [9.0, 9.0, 9.0, 9.0]])
    layer = Sparseout(q=2.5)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for run_layer in (layer, fast):
        for options, density in (({}, 1.0), ({"eps": 0.01}, 0.5), ({"eps": 1.0, "relative": True}, 0.25)):
            controller = SparsityController(layer, 0.4, "density", every=1, **options)
            with row_mask(torch.tensor([1, 0])):
                run_layer(x)
            controller.step()
            assert controller.measured[""] == pytest.approx(density)
            assert "row mask" not in controller.report()[0]
            with row_mask(torch.ones(7)):
                run_layer(x)
            controller.step()
            assert controller.report()[0].endswith("the row mask does not fit the model, where all rows count")
            controller.detach()
    with pytest.raises(ValueError, match="`eps` to be"):
        SparsityController(layer, 0.4, eps=-1.0)
