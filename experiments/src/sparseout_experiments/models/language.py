"""A language model of LSTM layers."""

import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = list[tuple[Tensor, Tensor]]


class Features(NamedTuple):
    """The last layer's output after and before the noise, and the state after the last word."""

    dropped: Tensor
    raw: Tensor
    state: State


class LanguageModel(nn.Module):
    """Embedding, LSTM layers, decoder, with noise on the embedding and on the output of every layer.

    The noise is on the connections between layers and never on those through time, as in Zaremba, Sutskever &
    Vinyals (2014), Recurrent Neural Network Regularization. The last layer is as wide as the embedding, and the
    decoder shares its weights (Press & Wolf 2017) and never drops any. Weights are uniform, within 0.1 for the
    embedding and within units^(-1/2) for a layer of so many units, from `generator`.

    With 3 layers of 1150 units, an embedding of 400, `weight_drop` 0.5 and `embedding_drop` 0.1 it is the AWD-LSTM
    of Merity, Keskar & Socher (2017), Regularizing and Optimizing LSTM Language Models, sections 2 and 4.

    Args:
        words: size of the vocabulary.
        embedding: width of the embedding and of the last layer.
        units: width of the other layers.
        layers: number of LSTM layers.
        noise: makes the layer for one place; called with "input", with "between" `layers` - 1 times, with "output".
        generator: the source of the initial weights.
        weight_drop: probability that a weight from hidden state to hidden state is dropped.
        embedding_drop: probability that a word of the vocabulary is dropped: its embedding is zero wherever it stands.

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
        noise: Callable[[str], nn.Module],
        generator: torch.Generator,
        *,
        weight_drop: float = 0.0,
        embedding_drop: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [embedding] + [units] * (layers - 1) + [embedding]
        positions = ["input"] + ["between"] * (layers - 1) + ["output"]
        self.embedding_drop = embedding_drop
        self.embedding = nn.Embedding(words, embedding)
        self.layers = nn.ModuleList(WeightDropLSTM(*sizes, weight_drop) for sizes in pairwise(widths))
        self.noises = nn.ModuleList(noise(position) for position in positions)
        self.decoder = nn.Linear(embedding, words)
        self.decoder.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1, generator=generator)
        nn.init.zeros_(self.decoder.bias)
        for layer, outputs in zip(self.layers, widths[1:], strict=True):
            for weight in layer.parameters():
                nn.init.uniform_(weight, -(outputs**-0.5), outputs**-0.5, generator=generator)

    def forward(self, text: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the next word at every place, and the state after the last."""
        features = self.features(text, state)
        return self.decoder(features.dropped), features.state

    def features(self, text: Tensor, state: State | None = None) -> Features:
        """The decoder's input (`dropped`), the same before the noise (`raw`), and the state: no logits yet.

        Merity, Keskar & Socher (2017), section 4.6, penalise the squares of `dropped` and those of the differences
        of `raw` in time.
        """
        x = self.noises[0](self._embed(text))
        raw, after = x, []
        for index, layer in enumerate(self.layers):
            raw, carried = layer(x, None if state is None else state[index])
            after.append(carried)
            x = self.noises[index + 1](raw)
        return Features(x, raw, after)

    def activations(self) -> dict[str, nn.Module]:
        """The modules whose first output is a layer's hidden states, before the noise."""
        return {f"layer{number}": layer for number, layer in enumerate(self.layers, 1)}

    def following(self) -> list[nn.Module]:
        """No layer: the weights that read the hidden states are inside the LSTMs."""
        return []

    def _embed(self, text: Tensor) -> Tensor:
        vectors: Tensor = self.embedding(text)
        if not self.training or self.embedding_drop == 0:
            return vectors
        kept = F.dropout(vectors.new_ones(self.embedding.num_embeddings, 1), self.embedding_drop)
        return vectors * F.embedding(text, kept)


class WeightDropLSTM(nn.LSTM):
    """One layer that, in training, drops weights from hidden state to hidden state: one mask for a whole call.

    Kept weights are scaled by 1 / (1 - p). Source: Merity, Keskar & Socher (2017), section 2. The call of the fused
    LSTM is the one that `nn.LSTM` makes, with the dropped weights as an argument: they are no attribute, so that
    nothing of them stays in the module, its copies or its `state_dict`.
    """

    weight_hh_l0: Tensor

    def __init__(self, inputs: int, outputs: int, weight_drop: float = 0.0) -> None:
        super().__init__(inputs, outputs)
        self.weight_drop = weight_drop
        if weight_drop > 0:  # the weights are new at every call: cuDNN copies them into one block, and says so
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The hidden states (time, batch, outputs), and the state after the last."""
        if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or _cpu_has_half_lstm():
            return self._run(input, hx)
        with torch.autocast("cpu", enabled=False):
            return self._run(input.float(), None if hx is None else (hx[0].float(), hx[1].float()))

    def _run(self, input: Tensor, hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not self.training or self.weight_drop == 0:
            return super().forward(input, hx)
        hidden = F.dropout(self.weight_hh_l0, self.weight_drop)
        weights = [self.weight_ih_l0, hidden, self.bias_ih_l0, self.bias_hh_l0]
        if hx is None:
            zeros = input.new_zeros(1, input.shape[1], self.hidden_size)
            hx = (zeros, zeros)
        return _fused(input, hx, weights)


@cache
def _cpu_has_half_lstm() -> bool:
    """Whether torch's LSTM takes bf16 on this CPU: without AVX-512 it raises an error, so there it stays in fp32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.compiler.disable  # type: ignore[untyped-decorator]  # nor does the compiler enter `nn.LSTM`
def _fused(input: Tensor, state: tuple[Tensor, Tensor], weights: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    out, hidden, cell = torch.lstm(input, state, weights, True, 1, 0.0, True, False, False)
    return out, (hidden, cell)
