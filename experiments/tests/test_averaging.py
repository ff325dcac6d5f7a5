import pytest
import torch
from sparseout_experiments.models import LanguageModel
from sparseout_experiments.tasks.language import averaged, triggered
from torch import nn


@pytest.mark.parametrize(
    ("losses", "begun"),
    [
        ([], False),
        ([1, 2, 3], False),  # too few checks: only from the one after `patience` + 1
        ([1, 2, 3, 4], True),
        ([9, 8, 7, 6, 5, 4, 3], False),
        ([9, 1, 8, 8, 8], True),  # above the 1, which is three checks back
        ([9, 9, 1, 8, 8], False),  # the 1 is two checks back and not looked at
        ([5, 9, 9, 5], False),  # as good is not worse
        ([1, 2, 3, 4, 0, 0], True),  # what has begun stays
        ([1, 1, 1, float("nan")], False),
    ],
)
def test_trigger_by_hand(losses, begun):
    assert triggered(losses, patience=2) is begun


def test_trigger_is_that_of_the_algorithm():
    """Line by line with the state that it keeps: t, logs, T."""
    ends = []
    for seed in range(50):
        losses = torch.rand(12, generator=torch.Generator().manual_seed(seed)).cumsum(0).neg().tolist()
        losses = [loss + 4 * (place > 6) * torch.rand(()).item() for place, loss in enumerate(losses)]
        logs, begun = [], False
        for t, v in enumerate(losses):
            begun = begun or (t > 5 and v > min(logs[: t - 5]))
            logs.append(v)
            assert triggered(losses[: t + 1]) is begun
        ends.append(begun)
    assert any(ends)
    assert not all(ends)


def small(seed=0):
    model = LanguageModel(13, 5, 6, 2, lambda _: nn.Identity(), torch.Generator().manual_seed(seed))
    return model.double()


def steps(model, optimizer, text, n):
    for _ in range(n):
        optimizer.zero_grad()
        logits, _ = model(text[:-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten()).backward()
        optimizer.step()
        yield


def test_sgd_with_the_average_is_asgd():
    text = torch.randint(13, (8, 3))
    model, twin = small(), small()
    asgd = torch.optim.ASGD(twin.parameters(), lr=2.0, t0=0, lambd=0, weight_decay=1e-3)
    for _ in steps(twin, asgd, text, 12):
        pass
    average = averaged(model)
    sgd = torch.optim.SGD(model.parameters(), lr=2.0, weight_decay=1e-3)
    for step, _ in enumerate(steps(model, sgd, text, 12)):
        if step > 0:  # ASGD's own average leaves out its first step
            average.update_parameters(model)
    for weight, other, mean in zip(model.parameters(), twin.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(weight, other)
        torch.testing.assert_close(mean, asgd.state[other]["ax"])
        assert not torch.allclose(mean, weight, rtol=1e-3)


def test_the_average_stays_tied_and_computes_with_its_weights():
    model, text = small(), torch.randint(13, (8, 3))
    average = averaged(model)
    seen = []
    for _ in steps(model, torch.optim.SGD(model.parameters(), lr=2.0), text, 4):
        average.update_parameters(model)
        seen.append([weight.detach().clone() for weight in model.parameters()])
    inner = average.module
    assert inner.decoder.weight is inner.embedding.weight
    assert inner.decoder.weight is not model.decoder.weight
    other = small(seed=1)
    with torch.no_grad():
        for weight, values in zip(other.parameters(), zip(*seen, strict=True), strict=True):
            weight.copy_(torch.stack(values).mean(0))
    torch.testing.assert_close(average(text)[0], other(text)[0])


def test_the_average_goes_on_from_its_state():
    model, text = small(), torch.randint(13, (8, 3))
    average, again = averaged(model), averaged(small(seed=1))
    for step, _ in enumerate(steps(model, torch.optim.SGD(model.parameters(), lr=2.0), text, 6)):
        average.update_parameters(model)
        if step == 2:
            again.load_state_dict(average.state_dict())
        elif step > 2:
            again.update_parameters(model)
    for one, other in zip(average.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
