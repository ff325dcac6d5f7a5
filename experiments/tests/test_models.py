"""The models have the sizes that they are named for, and start from their generator alone."""

import pytest
import torch
from sparseout_experiments.models import LanguageModel, WideResNet
from torch import nn


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def wide_resnet_parameters(depth, width, classes):
    """Counted from the architecture, with nothing shared with the model but the paper."""
    total, channels = 3 * 16 * 9, 16
    for outputs in (16 * width, 32 * width, 64 * width):
        for place in range((depth - 4) // 6):
            total += 2 * channels + 9 * channels * outputs  # norm, convolution
            total += 2 * outputs + 9 * outputs * outputs
            if place == 0 and (channels != outputs or outputs > 16 * width):
                total += channels * outputs  # projection of 1 x 1
            channels = outputs
    return total + 2 * channels + channels * classes + classes


@pytest.mark.parametrize(("depth", "width", "classes"), [(28, 10, 10), (16, 2, 10), (10, 1, 100)])
def test_wide_resnet_has_the_parameters_of_the_paper(depth, width, classes):
    model = WideResNet(depth, width, nn.Identity, generator(), classes)
    assert count(model) == wide_resnet_parameters(depth, width, classes)
    if (depth, width) == (28, 10):
        assert count(model) == 36_479_194


def test_wide_resnet_has_noise_between_the_convolutions_of_every_block():
    model = WideResNet(16, 1, lambda _: nn.Dropout(0.3), generator())
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == 6
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_a_stride_of_the_first_convolution_halves_what_follows():
    model, plain = (WideResNet(10, 1, nn.Identity, generator(), stride=stride) for stride in (2, 1))
    shapes = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(2, 16, 16, 16)]
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), plain.parameters(), strict=True))


def test_language_model_has_four_gates_a_layer_and_one_matrix_for_words():
    words, embedding, units = 100, 12, 20
    model = LanguageModel(words, embedding, units, 3, lambda _: nn.Dropout(0.5), generator())
    gates = sum(4 * outputs * (inputs + outputs + 2) for inputs, outputs in ((12, 20), (20, 20), (20, 12)))
    assert count(model) == words * embedding + words + gates
    assert len(model.noises) == 4
    logits, state = model(torch.randint(words, (7, 3)))
    assert logits.shape == (7, 3, words)
    assert [tuple(h.shape) for h, _ in state] == [(1, 3, 20), (1, 3, 20), (1, 3, 12)]


def test_language_model_goes_on_from_its_state():
    model = LanguageModel(50, 8, 10, 2, lambda _: nn.Identity(), generator())
    text = torch.randint(50, (9, 2))
    whole, _ = model(text)
    _, state = model(text[:5])
    torch.testing.assert_close(model(text[5:], state)[0], whole[5:])


@pytest.mark.parametrize(
    "build",
    [
        lambda source: WideResNet(10, 1, nn.Identity, source),
        lambda source: LanguageModel(50, 8, 10, 2, lambda _: nn.Identity(), source),
    ],
)
def test_the_weights_come_from_the_generator_alone(build):
    first = build(generator())
    torch.manual_seed(99)
    again, other = build(generator()), build(generator(1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    matrices = [(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True) if a.dim() > 1]
    assert not any(torch.equal(a, b) for a, b in matrices)
