"""Wide residual networks for small images."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# From a number of channels, always a multiple of 16, to a layer. 16 channels a group: Wu & He (2018), Group
# Normalization, table 3.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(channels // 16, channels),
    "none": lambda channels: nn.Identity(),
}


class WideResNet(nn.Module):
    """WRN-depth-width: three groups of pre-activation blocks, with noise between the two convolutions of each block.

    Source: Zagoruyko & Komodakis (2016), Wide Residual Networks, table 1 and section 2.4. Convolutions are
    initialised by He et al. (2015) from `generator`, batch norm as torch does, biases 0.

    Without norm it is trained by SkipInit (De & Smith 2020, Batch normalization biases residual blocks towards the
    identity function in deep networks): each residual branch ends in a learned factor that starts at 0, so
    that at first every block is its shortcut, and convolutions have biases. Weights are then scaled by the number of
    inputs, not of outputs, since no norm makes up for the scale of activations.

    Args:
        depth: number of convolutions and the classifier, 6 n + 4.
        width: factor on the channels 16, 32, 64 of the groups.
        noise: makes the layer for one place, of so many channels; called once for every block.
        generator: the source of the initial weights.
        classes: number of outputs.
        channels: of the images.
        norm: `batch`, `group` (of 16 channels) or `none`.
        place: of the noise. `post-relu`: after the ReLU that follows the second norm, as in the source. `pre-norm`:
            between the first convolution and that norm, as in the code of Khan & Stavness (2019).
        activation: makes the activation between the second norm and the noise of each block.
        stride: of the first convolution, 1 in the source; with 2 all that follows sees a quarter of the positions.

    Shape:
        - Input: (batch, channels, height, width).
        - Output: (batch, classes).
    """

    def __init__(
        self,
        depth: int,
        width: int,
        noise: Callable[[int], nn.Module],
        generator: torch.Generator,
        classes: int = 10,
        *,
        channels: int = 3,
        norm: str = "batch",
        place: str = "post-relu",
        activation: Callable[[], nn.Module] = nn.ReLU,
        stride: int = 1,
    ) -> None:
        super().__init__()
        bare = norm == "none"
        self.stem = _convolution(channels, 16, stride, bias=bare)
        blocks: list[nn.Module] = []
        inputs = 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for number in range((depth - 4) // 6):
                stride = 2 if group > 0 and number == 0 else 1
                blocks.append(Block(inputs, outputs, stride, noise(outputs), norm, place, activation()))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = NORMS[norm](inputs)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                fan = module.weight[0].numel() if bare else module.weight[:, 0].numel()  # inputs, or outputs
                nn.init.normal_(module.weight, std=(2 / fan) ** 0.5, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def activations(self) -> dict[str, nn.Module]:
        """The modules whose outputs, in evaluation, are what the second convolution of each block reads.

        They are named `block1`, `block2`, ... With the place `post-relu` they are the noise layers, which in
        evaluation put out what they take in, or of it what their method selects.
        """
        return {
            f"block{number}": block.relu if block.early else block.noise  # type: ignore[misc]
            for number, block in enumerate(self.blocks, 1)
        }

    def following(self) -> list[nn.Module]:
        """The convolutions after the noise, with the place `post-relu`."""
        return [block.conv2 for block in self.blocks]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        features = self.relu(self.norm(self.blocks(self.stem(x))))
        return self.classifier(features.mean((2, 3)))


class Block(nn.Module):
    """Norm, ReLU, convolution, norm, ReLU, noise, convolution; added to the input or to a projection of it.

    With the place `pre-norm` the noise comes right after the first convolution.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, noise: nn.Module, norm: str, place: str, activation: nn.Module
    ) -> None:
        super().__init__()
        bare = norm == "none"
        self.norm1 = NORMS[norm](inputs)
        self.conv1 = _convolution(inputs, outputs, stride, bias=bare)
        self.norm2 = NORMS[norm](outputs)
        self.relu = activation
        self.noise = noise
        self.conv2 = _convolution(outputs, outputs, bias=bare)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else _convolution(inputs, outputs, stride, size=1, bias=bare)
        self.factor = nn.Parameter(torch.zeros(())) if bare else None
        self.early = place == "pre-norm"

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        inner = self.conv1(active)
        inner = self.relu(self.norm2(self.noise(inner) if self.early else inner))
        inner = inner if self.early else self.noise(inner)
        residual = self.conv2(inner)
        if self.factor is not None:
            residual = self.factor * residual
        return residual + (x if self.shortcut is None else self.shortcut(active))


def _convolution(inputs: int, outputs: int, stride: int = 1, *, size: int = 3, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=bias)
