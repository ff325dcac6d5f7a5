"""Wide residual networks: where the noise is, what each norm means, and that the one without norm trains."""

import pytest
import torch
import torch.nn.functional as F
from sparseout_experiments.models import WideResNet
from torch import nn


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Ramp(nn.Module):
    """Stands for noise: adds what grows from left to right, which no norm takes off again."""

    def forward(self, x):
        return x + torch.arange(x.shape[-1])


def by_hand(model, x, place):
    """The network from its layers, written out once more."""
    x = model.stem(x)
    for block in model.blocks:
        active = F.relu(block.norm1(x))
        shortcut = x if block.shortcut is None else block.shortcut(active)
        inner = block.conv1(active)
        inner = F.relu(block.norm2(Ramp()(inner))) if place == "pre-norm" else Ramp()(F.relu(block.norm2(inner)))
        residual = block.conv2(inner)
        x = shortcut + (residual if block.factor is None else block.factor * residual)
    return model.classifier(F.relu(model.norm(x)).mean((2, 3)))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("place", ["post-relu", "pre-norm"])
def test_the_noise_is_where_place_says(norm, place):
    model = WideResNet(10, 1, lambda _: Ramp(), generator(), norm=norm, place=place).eval()
    for block in model.blocks:
        if block.factor is not None:
            nn.init.constant_(block.factor, 0.5)  # at 0 the noise would not show
        if norm == "batch":
            block.norm2.running_mean.fill_(0.3)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(x), by_hand(model, x, place))
    other = "pre-norm" if place == "post-relu" else "post-relu"
    assert not torch.allclose(model(x), by_hand(model, x, other), atol=1e-3)


def test_the_default_is_the_network_of_the_paper():
    named = WideResNet(10, 1, nn.Identity, generator(), norm="batch", place="post-relu", channels=3)
    plain = WideResNet(10, 1, nn.Identity, generator())
    assert named.state_dict().keys() == plain.state_dict().keys()
    assert not any("bias" in name for name, _ in plain.named_parameters() if "norm" not in name and "class" not in name)


@pytest.mark.parametrize("place", ["post-relu", "pre-norm"])
def test_activations_are_the_outputs_of_the_relu_where_the_noise_acts(place):
    inputs, outputs = {}, {}
    model = WideResNet(16, 1, lambda _: nn.Dropout(0.5), generator(), channels=1, place=place).eval()
    names = model.activations()
    assert list(names) == [f"block{i}" for i in range(1, 7)]
    for name, module in names.items():
        module.register_forward_hook(lambda module, args, out, name=name: outputs.__setitem__(name, out))
    for number, block in enumerate(model.blocks, 1):
        block.noise.register_forward_hook(
            lambda module, args, out, name=f"block{number}": inputs.__setitem__(name, args[0])
        )
    model(torch.rand(3, 1, 8, 8))
    assert all((outputs[name] >= 0).all() for name in names)
    for name, x in inputs.items():
        assert torch.equal(outputs[name], x) == (place == "post-relu")


def test_group_norm_has_sixteen_channels_a_group():
    model = WideResNet(10, 2, nn.Identity, generator(), norm="group")
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 7
    assert all(module.num_channels == 16 * module.num_groups for module in norms)
    assert {module.num_channels for module in norms} == {16, 32, 64, 128}


def test_without_norm_every_block_starts_as_its_shortcut_and_keeps_the_scale():
    model = WideResNet(28, 2, nn.Identity, generator(), norm="none")
    kinds = {type(module).__name__ for module in model.modules()}
    assert not any("Norm" in kind for kind in kinds)
    assert all(module.bias is not None for module in model.modules() if isinstance(module, nn.Conv2d))
    x = torch.randn(8, 32, 16, 16)
    assert torch.equal(model.blocks[1](x), x)
    stem = model.stem(torch.randn(16, 3, 32, 32))
    assert 0.5 < model.blocks(stem).square().mean() / stem.square().mean() < 2


@pytest.mark.parametrize("depth", [16, 28])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_it_learns_at_depth(depth, norm):
    model = WideResNet(depth, 1, nn.Identity, generator(), classes=4, channels=1, norm=norm)
    x = torch.randn(32, 1, 8, 8, generator=generator(1))
    target = torch.arange(32) % 4
    x = x + torch.randn(4, 1, 8, 8, generator=generator(2))[target]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    if norm == "none":
        assert all(block.factor != 0 and block.conv1.weight.grad.any() for block in model.blocks)
