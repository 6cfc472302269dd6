"""Densely connected networks for small images, after Huang et al. 2017 (arXiv 1608.06993), without bottlenecks.

In a dense block each layer reads the outputs of all layers before it, and adds `growth` channels. Between two blocks a
1×1 convolution, as wide as its input, and a mean over 2 × 2 pixels halve the sides of the images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from hbfp.errors import HBFPError


@dataclass(frozen=True, slots=True)
class DenseNetShape:
    """Sizes of the model; as it stands it is DenseNet-40 of growth 12."""

    channels: int = 3
    """Of the images."""
    classes: int = 10
    stem: int = 16
    """Channels of the first convolution."""
    growth: int = 12
    """Channels that each layer adds."""
    blocks: int = 3
    layers_per_block: int = 12

    def __post_init__(self) -> None:
        for name in ("channels", "classes", "stem", "growth", "blocks", "layers_per_block"):
            if getattr(self, name) < 1:
                raise HBFPError(f"{name}: expected at least 1; found {getattr(self, name)}")

    @property
    def layers(self) -> int:
        """Layers with weights, which give the network its number."""
        return self.blocks * (self.layers_per_block + 1) + 1


class DenseLayer(nn.Module):
    """[batch, inputs, h, w] to [batch, inputs + growth, h, w]: the input, and after it what is new."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv(relu(self.norm(x)))), 1)


class Transition(nn.Module):
    """[batch, channels, h, w] to [batch, channels, h/2, w/2], rounded down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(self.conv(relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """Images [batch, channels, height, width] -> scores [batch, classes]; sides of 2^(blocks − 1) pixels or more."""

    def __init__(self, shape: DenseNetShape) -> None:
        super().__init__()
        self.shape = shape
        self.stem = nn.Conv2d(shape.channels, shape.stem, 3, padding=1, bias=False)
        self.layers = nn.ModuleList()
        channels = shape.stem
        for block in range(shape.blocks):
            if block:
                self.layers.append(Transition(channels))
            for _ in range(shape.layers_per_block):
                self.layers.append(DenseLayer(channels, shape.growth))
                channels += shape.growth
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, shape.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(relu(self.norm(x)).mean((2, 3)))
        return scores
