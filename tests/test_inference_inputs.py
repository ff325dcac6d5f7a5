"""What every call of `sparseout.inference` takes, refuses and leaves alone."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sparseout.inference import compact, cost, sparse_linear_, threshold_

CALLS = [compact, cost, sparse_linear_, lambda model, batches: threshold_(model, batches, density=0.5)]


def mlp(first=nn.Linear):
    return nn.Sequential(nn.LazyLinear(8) if first is nn.LazyLinear else first(4, 8), nn.GELU(), nn.Linear(8, 2))


@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_be_run_is_an_error(call):
    x = torch.ones(3, 4)
    lazy = mlp(nn.LazyLinear)
    with pytest.raises(ValueError, match="'0' that has not: call the model on a batch first"):
        call(lazy, [x])
    assert isinstance(lazy[0], nn.LazyLinear)
    with pytest.raises(ValueError, match="meta device"):
        call(mlp().to("meta"), [x])
    with pytest.raises(ValueError, match=r"to have (rows|examples), but got none"):
        call(mlp(), [x[:0]])
    with pytest.raises(TypeError, match="begins with None"):
        call(mlp(), [None])


@pytest.mark.parametrize("call", CALLS)
def test_random_generators_and_modes_are_left_alone(call):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x) + torch.rand(())

    model, loader = Noisy().train(), DataLoader(torch.randn(8, 4).tolist(), 4, shuffle=True, collate_fn=torch.tensor)
    model.net[1].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    call(model, loader)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_named():
    model = torch.jit.script(mlp())
    assert compact(model, [torch.ones(3, 4)]).unreached == dict.fromkeys("02", "is compiled by TorchScript")
    assert cost(model, [torch.ones(3, 4)]).uncounted.keys() == {"0", "2"}
