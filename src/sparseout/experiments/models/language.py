"""A language model of LSTM layers."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

State = list[tuple[Tensor, Tensor]]


class LanguageModel(nn.Module):
    """Embedding, LSTM layers, decoder, with noise on the embedding and on the output of every layer.

    The noise is on the connections between layers and never on those through time, as in Zaremba, Sutskever &
    Vinyals (2014), Recurrent Neural Network Regularization. The last layer is as wide as the embedding, and the
    decoder shares its weights (Press & Wolf 2017). Weights are uniform, within 0.1 for the embedding and within
    units^(-1/2) for a layer of so many units, from `generator`.

    Args:
        words: size of the vocabulary.
        embedding: width of the embedding and of the last layer.
        units: width of the other layers.
        layers: number of LSTM layers.
        noise: makes the layer for one place; called `layers` + 1 times.
        generator: the source of the initial weights.

    Shape:
        - Input: (time, batch) of word numbers.
        - Output: (time, batch, words), and the state with which the next stretch of text goes on.
    """

    def __init__(
        self,
        words: int,
        embedding: int,
        units: int,
        layers: int,
        noise: Callable[[], nn.Module],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        widths = [embedding] + [units] * (layers - 1) + [embedding]
        self.embedding = nn.Embedding(words, embedding)
        self.layers = nn.ModuleList(nn.LSTM(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.noises = nn.ModuleList(noise() for _ in widths)
        self.decoder = nn.Linear(embedding, words)
        self.decoder.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1, generator=generator)
        nn.init.zeros_(self.decoder.bias)
        for layer, outputs in zip(self.layers, widths[1:], strict=True):
            for weight in layer.parameters():
                nn.init.uniform_(weight, -(outputs**-0.5), outputs**-0.5, generator=generator)

    def forward(self, text: Tensor, state: Sequence[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, State]:
        """Logits of the next word at every place, and the state after the last."""
        x = self.noises[0](self.embedding(text))
        after: State = []
        for place, layer in enumerate(self.layers):
            x, carried = layer(x, None if state is None else state[place])
            after.append(carried)
            x = self.noises[place + 1](x)
        return self.decoder(x), after
