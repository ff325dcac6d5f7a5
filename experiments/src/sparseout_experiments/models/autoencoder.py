"""An autoencoder with one hidden layer."""

import torch
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Linear, `activation` (ReLU), `noise`, linear. Weights by He et al. (2015) from `generator`, biases 0.

    With `nn.Linear`'s own initialisation many units start out dead, and how many differs from seed to seed.
    """

    def __init__(
        self, pixels: int, units: int, noise: nn.Module, generator: torch.Generator, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.encoder = _linear(pixels, units, generator, gain=2**0.5)
        self.activation = nn.ReLU() if activation is None else activation
        self.noise = noise
        self.decoder = _linear(units, pixels, generator)

    def code(self, x: Tensor) -> Tensor:
        """The hidden activations, before the noise."""
        return self.activation(self.encoder(x))

    def activations(self) -> dict[str, nn.Module]:
        """The module whose output is the code: what the decoder reads, in evaluation without noise."""
        return {"code": self.noise}

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.noise(self.code(x)))


def _linear(inputs: int, outputs: int, generator: torch.Generator, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
