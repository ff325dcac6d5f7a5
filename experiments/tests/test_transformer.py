"""The transformer as a language model: causal, rotary, with noise where it is asked for."""

import pytest
import torch
import torch.nn.functional as F
from sparseout_experiments.models import Transformer
from sparseout_experiments.models.transformer import Attention, rotated
from torch import nn

WORDS = 17


def small(noise=nn.Identity, seed=0, **changed):
    given = {"width": 8, "hidden": 20, "layers": 3, "heads": 2} | changed
    return Transformer(WORDS, noise=noise, generator=torch.Generator().manual_seed(seed), **given)


def test_no_word_sees_a_later_one():
    model, text = small().double(), torch.randint(WORDS, (9, 2))
    later = text.clone()
    later[5:] = (later[5:] + 1) % WORDS
    (before, state), (after, _) = model(text), model(later)
    assert before.shape == (9, 2, WORDS)
    assert state == []
    assert torch.equal(before[:5], after[:5])
    assert not torch.allclose(before[5], after[5])


def test_columns_do_not_meet():
    model, text = small().double(), torch.randint(WORDS, (9, 3))
    torch.testing.assert_close(model(text)[0][:, 1:2], model(text[:, 1:2])[0])


def test_attention_depends_on_positions_only_through_their_difference():
    queries, keys = torch.randn(8, dtype=torch.double).repeat(6, 1), torch.randn(8, dtype=torch.double).repeat(6, 1)
    scores = rotated(queries) @ rotated(keys).t()
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert scores[0].unique().numel() == 6
    torch.testing.assert_close(rotated(queries).norm(dim=-1), queries.norm(dim=-1))


def test_rotation_by_hand():
    # of pairs (x_0, x_2) and (x_1, x_3), by 1 and by 10000^(-1/2) = 0.01 a step
    found = rotated(torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4))[3]
    torch.testing.assert_close(
        found,
        torch.tensor([3.0, 0.03, 3.0, 0.03]).cos_() * torch.tensor([1.0, 1.0, 0, 0])
        + torch.tensor([3.0, 0.03, 3.0, 0.03]).sin_() * torch.tensor([0, 0, 1.0, 1.0]),
    )


def test_attention_head_by_head():
    attention, x = Attention(8, 2).double(), torch.randn(5, 3, 8, dtype=torch.double)
    queries, keys, values = attention.into(x).chunk(3, dim=-1)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wanted = torch.empty_like(x)
    for column in range(3):
        for head in (slice(0, 4), slice(4, 8)):
            scores = rotated(queries[:, column, head]) @ rotated(keys[:, column, head]).t() / 2  # sqrt of 4
            weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
            wanted[:, column, head] = weights @ values[:, column, head]
    torch.testing.assert_close(attention(x), attention.out(wanted))


def test_the_parameters_are_those_of_the_architecture():
    block = 2 * 2 * 8 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 20 + 20) + (20 * 8 + 8)
    assert sum(weight.numel() for weight in small().parameters()) == WORDS * 8 + 3 * block + 2 * 8
    assert (
        small().decoder.weight is (model := small()).embedding.weight or model.decoder.weight is model.embedding.weight
    )


def test_weights_start_as_said_and_from_the_generator_alone():
    model = small(width=64, hidden=256, layers=8)
    ffn = model.blocks[3].ffn
    assert ffn.into.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert ffn.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert model.blocks[0].attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert ffn.into.bias.abs().max().item() == 0
    same, other = small(seed=3), small(seed=4)
    assert torch.equal(small(seed=3).embedding.weight, same.embedding.weight)
    assert not torch.equal(other.embedding.weight, same.embedding.weight)


@pytest.mark.parametrize(
    ("place", "activation", "names"),
    [
        ("ffn", "relu", [f"blocks.{number}.ffn.noise" for number in range(3)]),
        (
            "residual",
            "gelu",
            ["noise", *(f"blocks.{n}.{part}_noise" for n in range(3) for part in ("attention", "ffn"))],
        ),
    ],
)
def test_noise_is_where_it_is_asked_for_and_the_hidden_activations_are_measured(place, activation, names):
    model = small(lambda: nn.Dropout(0.5), place=place, activation=activation)
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)] == names
    hidden, read = [], []
    for module in model.activations().values():
        module.register_forward_hook(lambda module, args, out: hidden.append(out))
    for layer in model.following():
        layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    into = model.blocks[0].ffn.into
    into.register_forward_hook(lambda module, args, out: hidden.insert(0, out))
    model.eval()(torch.randint(WORDS, (6, 2)))
    raw, *hidden = hidden
    assert [x.shape for x in hidden] == [(6, 2, 20)] * 3
    assert all(torch.equal(x, y) for x, y in zip(hidden, read, strict=True))
    assert torch.equal(hidden[0], getattr(F, activation)(raw))


def test_a_width_that_heads_do_not_divide_evenly_is_an_error():
    with pytest.raises(
        ValueError, match=r"^expected `embedding` to be a multiple of 6, as there are 3 heads, but got 8$"
    ):
        small(heads=3)
