"""Wide residual networks for images of 32 x 32 pixels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseout.errors import expected


class WideResNet(nn.Module):
    """WRN-depth-width: three groups of pre-activation blocks, with noise between the two convolutions of each block.

    Source: Zagoruyko & Komodakis (2016), Wide Residual Networks, table 1 and section 2.4. Convolutions are
    initialised by He et al. (2015) from `generator`, batch norm as torch does, biases 0.

    Args:
        depth: number of convolutions and the classifier, 6 n + 4.
        width: factor on the channels 16, 32, 64 of the groups.
        noise: makes the layer for one place; called once for every block.
        generator: the source of the initial weights.
        classes: number of outputs.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        noise: Callable[[], nn.Module],
        generator: torch.Generator,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(expected("depth", "6 n + 4 with n >= 1", depth))
        self.stem = _conv3x3(3, 16)
        blocks: list[nn.Module] = []
        channels = 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for place in range((depth - 4) // 6):
                stride = 2 if group > 0 and place == 0 else 1
                blocks.append(Block(channels, outputs, stride, noise()))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                fan_out = module.weight.numel() // module.weight.shape[1]
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5, generator=generator)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        features = F.relu(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


class Block(nn.Module):
    """Norm, ReLU, convolution, norm, ReLU, noise, convolution; added to the input or to a projection of it."""

    def __init__(self, inputs: int, outputs: int, stride: int, noise: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.noise = noise
        self.conv2 = _conv3x3(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        active = F.relu(self.norm1(x))
        residual = self.conv2(self.noise(F.relu(self.norm2(self.conv1(active)))))
        out: Tensor = residual + (x if self.shortcut is None else self.shortcut(active))
        return out


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
