"""A language model of transformer blocks."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout_experiments.message import expected
from sparseout_experiments.models.language import Features, State

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "none": nn.Identity}


class Transformer(nn.Module):
    """Embedding, pre-norm decoder blocks, a last norm, decoder, with noise in every block.

    A block is `x + attention(norm(x))`, then `x + ffn(norm(x))` (Vaswani et al. 2017, Attention Is All You Need,
    section 3; the norm before each part as in Xiong et al. 2020, On Layer Normalization in the Transformer
    Architecture, section 3.2). Attention is causal, and positions are rotary (Su et al. 2021, RoFormer, section 3.2),
    so that no weight belongs to a position. The decoder shares the weights of the embedding and has no bias. Weights
    are normal with standard deviation 0.02, those that add to the residual stream over sqrt(2 `layers`) besides
    (Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3), from `generator`.

    Args:
        words: size of the vocabulary.
        width: width of the embedding and of the residual stream.
        hidden: number of hidden units of a feed-forward network (FFN).
        layers: number of blocks.
        heads: attention heads of a block; each has an even width.
        noise: makes one layer of noise.
        generator: the source of the initial weights.
        activation: non-linearity of the FFN; "none" where `noise` is one itself.
        place: "ffn" puts the noise on the hidden activations of every FFN; "residual" on the embedding and on what
            attention and FFN add to the residual stream, as in Vaswani et al. (2017), section 5.4.

    Shape:
        - Input: (time, batch) of word numbers.
        - Output: (time, batch, words), and an empty state: every window of text is read for itself.
    """

    def __init__(
        self,
        words: int,
        width: int,
        hidden: int,
        layers: int,
        heads: int,
        noise: Callable[[], nn.Module],
        generator: torch.Generator,
        *,
        activation: Literal["relu", "gelu", "none"] = "relu",
        place: Literal["ffn", "residual"] = "ffn",
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(expected("embedding", f"a multiple of {2 * heads}, as there are {heads} heads", width))
        in_residual = noise if place == "residual" else nn.Identity
        self.embedding = nn.Embedding(words, width)
        self.noise = in_residual()
        in_ffn = noise if place == "ffn" else nn.Identity
        self.blocks = nn.ModuleList(
            Block(width, hidden, heads, ACTIVATIONS[activation](), in_ffn, in_residual) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, words, bias=False)
        self.decoder.weight = self.embedding.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = (2 * layers) ** -0.5 if name.endswith("out.weight") else 1.0
                nn.init.normal_(weight, std=0.02 * scale, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, text: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits of the next word at every position, and an empty state."""
        features = self.features(text, state)
        return self.decoder(features.dropped), features.state

    def features(self, text: Tensor, state: State | None = None) -> Features:
        """What the decoder reads, and an empty state: no logits yet. `state` is there for the interface, and unused."""
        x = self.noise(self.embedding(text))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Features(x, x, [])

    def activations(self) -> dict[str, nn.Module]:
        """The modules whose outputs, in evaluation, are what the second layer of each FFN reads: the noise layers."""
        return {f"ffn{number}": ffn.noise for number, ffn in enumerate(self._ffns(), 1)}

    def following(self) -> list[nn.Module]:
        """The layers that read the hidden activations of the FFNs."""
        return [ffn.out for ffn in self._ffns()]

    def _ffns(self) -> "list[FFN]":
        return [block.ffn for block in self.blocks]  # type: ignore[misc]


class Block(nn.Module):
    """Causal attention and a feed-forward network, each after a norm and around a residual connection."""

    def __init__(
        self,
        width: int,
        hidden: int,
        heads: int,
        activation: nn.Module,
        in_ffn: Callable[[], nn.Module],
        in_residual: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.attention_noise = in_residual()
        self.ffn_norm, self.ffn = nn.LayerNorm(width), FFN(width, hidden, activation, in_ffn())
        self.ffn_noise = in_residual()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention_noise(self.attention(self.attention_norm(x)))
        return x + self.ffn_noise(self.ffn(self.ffn_norm(x)))


class FFN(nn.Module):
    """Two linear layers, the non-linearity and the noise between them."""

    def __init__(self, width: int, hidden: int, activation: nn.Module, noise: nn.Module) -> None:
        super().__init__()
        self.into = nn.Linear(width, hidden)
        self.activation, self.noise = activation, noise
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.noise(self.activation(self.into(x))))


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        time, batch, width = x.shape
        heads = self.into(x).view(time, batch, 3, self.heads, width // self.heads)
        queries, keys, values = heads.permute(2, 1, 3, 0, 4)  # each (batch, heads, time, width of a head)
        mixed = F.scaled_dot_product_attention(rotated(queries), rotated(keys), values, is_causal=True)
        return self.out(mixed.permute(2, 0, 1, 3).reshape(time, batch, width))


def rotated(x: Tensor) -> Tensor:
    """Pairs (x_i, x_{i + d/2}) of (..., time, d), turned by the angle time * 10000^(-2i/d).

    A product of two such vectors depends on their positions only through the difference. Source: Su et al. (2021),
    section 3.2.2, with the halves of a vector for the elements of a pair.
    """
    time, half = x.shape[-2], x.shape[-1] // 2
    positions = torch.arange(time, device=x.device, dtype=torch.float32)
    rates = torch.exp(torch.arange(half, device=x.device, dtype=torch.float32) * (-math.log(10_000) / half))
    angles = positions[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
