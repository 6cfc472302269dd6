"""Residual networks of bottleneck blocks, after He et al. 2016 (arXiv 1512.03385), with a stem for small images.

A block narrows its input by a 1×1 convolution, works on it by a 3×3 convolution and widens it four times by another of
1×1. The stem is one 3×3 convolution, where the network for large images has one of 7×7 and a pooling: with the stages
of ResNet-50 this is the form in which that network is used on CIFAR.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import relu

from hbfp.errors import HBFPError

EXPANSION = 4
"""How many times wider a block's output is than its middle."""


@dataclass(frozen=True, slots=True)
class BottleneckShape:
    """Sizes of the model; as it stands it is ResNet-50.

    What the HBFP emulator's scripts call resnet50 on CIFAR is another network, of a thirtieth of the parameters and 74
    layers: stem=16, widths=(16, 32, 64), blocks=(8, 8, 8).
    """

    channels: int = 3
    """Of the images."""
    classes: int = 10
    stem: int = 64
    """Channels of the first convolution."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels in the middle of each stage's blocks."""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage."""

    def __post_init__(self) -> None:
        for name, sizes in (
            ("channels", (self.channels,)),
            ("classes", (self.classes,)),
            ("stem", (self.stem,)),
            ("widths", self.widths or (0,)),
            ("blocks", self.blocks or (0,)),
        ):
            if min(sizes) < 1:
                raise HBFPError(f"{name}: expected at least 1; found {getattr(self, name)}")
        if len(self.blocks) != len(self.widths):
            raise HBFPError(f"blocks: expected a number for each of the {len(self.widths)} widths; found {self.blocks}")

    @property
    def layers(self) -> int:
        """Layers with weights on the longest way, which give the network its number."""
        return 3 * sum(self.blocks) + 2


class Bottleneck(nn.Module):
    """[batch, inputs, h, w] to [batch, 4 · width, h/stride, w/stride], rounded up.

    Where sizes change, the shortcut is a normed 1×1 convolution; elsewhere it has no parameters.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.narrow = nn.Conv2d(inputs, width, 1, bias=False)
        self.narrow_norm = nn.BatchNorm2d(width)
        self.middle = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.middle_norm = nn.BatchNorm2d(width)
        self.widen = nn.Conv2d(width, outputs, 1, bias=False)
        self.widen_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.narrow_norm(self.narrow(x)))
        y = relu(self.middle_norm(self.middle(y)))
        y = self.widen_norm(self.widen(y))
        return relu(self.shortcut(x) + y)


class BottleneckResNet(nn.Module):
    """Images [batch, channels, height, width] -> scores [batch, classes]."""

    def __init__(self, shape: BottleneckShape) -> None:
        super().__init__()
        self.shape = shape
        self.stem = nn.Conv2d(shape.channels, shape.stem, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(shape.stem)
        self.blocks = nn.ModuleList()
        inputs = shape.stem
        for stage, (width, count) in enumerate(zip(shape.widths, shape.blocks, strict=True)):
            for number in range(count):
                self.blocks.append(Bottleneck(inputs, width, 2 if stage and number == 0 else 1))
                inputs = EXPANSION * width
        self.head = nn.Linear(inputs, shape.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores
